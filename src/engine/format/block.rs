//! GGUF's block formats: those with 32 values (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL) here, those with 256 in
//! `superblock`. Decodes exactly as llama.cpp's `dequantize_row_*`; knows nothing of files.
//!
//! ```text
//! Q4_0 (18 bytes)  d f16 │ 16 × (low nibble: value i, high nibble: value i + 16)          d · (q - 8)
//! Q4_1 (20 bytes)  d f16 │ m f16 │ 16 nibble pairs                                        d · q + m
//! Q5_0 (22 bytes)  d f16 │ fifth bits u32 │ 16 nibble pairs                               d · (q - 16)
//! Q5_1 (24 bytes)  d f16 │ m f16 │ fifth bits u32 │ 16 nibble pairs                       d · q + m
//! Q8_0 (34 bytes)  d f16 │ 32 × i8                                                        d · q
//! IQ4_NL (18 bytes) d f16 │ 16 nibble pairs                                               d · CODE[q]
//! ```
//! A product of an f16 and at most 8 bits is exact in f32, so a fused multiply-add gives the same bits.

use half::f16;

use crate::format::superblock::{
    SUPERBLOCK, decode_iq4_xs, decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k,
};

/// Values in a block of the simple formats.
const BLOCK: usize = 32;

/// What a nibble of the IQ4 formats stands for.
pub(crate) const IQ4_CODE: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// Which block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
}

impl BlockFormat {
    /// As llama.cpp calls it: `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
        }
    }

    /// Values in a block; a row is a whole number of blocks.
    pub fn block_values(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl => BLOCK,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => SUPERBLOCK,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
        }
    }

    /// Decodes `out.len()` values from flat index `start` of `bytes`; both multiples of `block_values`.
    pub fn decode(self, bytes: &[u8], start: usize, out: &mut [f32]) {
        let values = self.block_values();
        assert!(
            start.is_multiple_of(values) && out.len().is_multiple_of(values),
            "BUG: a run of blocks starts or ends within a block"
        );
        let blocks = bytes[start / values * self.block_bytes()..].chunks_exact(self.block_bytes());
        for (out, block) in out.chunks_exact_mut(values).zip(blocks) {
            match self {
                Self::Q2K => decode_q2_k(block, out),
                Self::Q3K => decode_q3_k(block, out),
                Self::Q4K => decode_q4_k(block, out),
                Self::Q5K => decode_q5_k(block, out),
                Self::Q6K => decode_q6_k(block, out),
                Self::Iq4Xs => decode_iq4_xs(block, out),
                Self::Iq4Nl => {
                    let scale = half(block, 0);
                    decode_nibbles(0, &block[2..], out, |code| scale * IQ4_CODE[code as usize]);
                }
                Self::Q4_0 => {
                    let scale = half(block, 0);
                    decode_nibbles(0, &block[2..], out, |code| (code - 8.0) * scale);
                }
                Self::Q4_1 => {
                    let (scale, min) = (half(block, 0), half(block, 2));
                    decode_nibbles(0, &block[4..], out, |code| code * scale + min);
                }
                Self::Q5_0 => {
                    let scale = half(block, 0);
                    decode_nibbles(word(block, 2), &block[6..], out, |code| (code - 16.0) * scale);
                }
                Self::Q5_1 => {
                    let (scale, min) = (half(block, 0), half(block, 2));
                    decode_nibbles(word(block, 4), &block[8..], out, |code| code * scale + min);
                }
                Self::Q8_0 => {
                    let scale = half(block, 0);
                    for (value, &code) in out.iter_mut().zip(&block[2..]) {
                        *value = f32::from(code as i8) * scale;
                    }
                }
            }
        }
    }
}

/// out (32) = value(nibble + 16 · fifth bit); low nibbles are the first half.
fn decode_nibbles(fifth_bits: u32, nibbles: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for (i, &byte) in nibbles.iter().enumerate() {
        let low_code = u32::from(byte & 15) | (fifth_bits >> i & 1) << 4;
        let high_code = u32::from(byte >> 4) | (fifth_bits >> (i + 16) & 1) << 4;
        low[i] = value(low_code as f32);
        high[i] = value(high_code as f32);
    }
}

/// The f16 at byte `at`.
pub(crate) fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    const FORMATS: [(&str, BlockFormat); 12] = [
        ("Q4_0", BlockFormat::Q4_0),
        ("Q4_1", BlockFormat::Q4_1),
        ("Q5_0", BlockFormat::Q5_0),
        ("Q5_1", BlockFormat::Q5_1),
        ("Q8_0", BlockFormat::Q8_0),
        ("Q2_K", BlockFormat::Q2K),
        ("Q3_K", BlockFormat::Q3K),
        ("Q4_K", BlockFormat::Q4K),
        ("Q5_K", BlockFormat::Q5K),
        ("Q6_K", BlockFormat::Q6K),
        ("IQ4_NL", BlockFormat::Iq4Nl),
        ("IQ4_XS", BlockFormat::Iq4Xs),
    ];

    /// Blocks and their values as the `gguf` Python package decodes them (`tests/golden/gguf_golden.py`).
    fn golden(check: impl Fn(&str, BlockFormat, &[u8], &[u8])) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/gguf_blocks.safetensors");
        let file = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        for (name, format) in FORMATS {
            let [blocks, values] = ["bytes", "values"].map(|part| file.tensor(&format!("{name}.{part}")));
            check(name, format, blocks.unwrap().data(), values.unwrap().data());
        }
    }

    #[test]
    fn blocks_decode_bit_for_bit_as_llama_cpp_decodes_them() {
        golden(|name, format, blocks, expected| {
            assert!(blocks.len() >= 6 * format.block_bytes(), "{name}");
            let mut out = vec![0.0; blocks.len() / format.block_bytes() * format.block_values()];
            format.decode(blocks, 0, &mut out);
            assert_eq!(out.len() * 4, expected.len(), "{name}");
            for (at, (value, expected)) in out.iter().zip(expected.chunks_exact(4)).enumerate() {
                assert_eq!(value.to_le_bytes(), expected, "{name} value {at}: {value}");
            }
        });
    }

    #[test]
    fn a_run_of_blocks_starts_anywhere() {
        golden(|name, format, blocks, expected| {
            let values = format.block_values();
            let mut out = vec![0.0; values];
            format.decode(blocks, 2 * values, &mut out);
            let out: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert!(out == expected[2 * values * 4..3 * values * 4], "{name}");
        });
    }
}
