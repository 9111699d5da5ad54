//! GGUF's block formats with 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Decodes exactly as llama.cpp's
//! `dequantize_row_*`; knows nothing of files.
//!
//! ```text
//! Q4_0 (18 bytes)  d f16 │ 16 × (low nibble: value i, high nibble: value i + 16)          d · (q - 8)
//! Q4_1 (20 bytes)  d f16 │ m f16 │ 16 nibble pairs                                        d · q + m
//! Q5_0 (22 bytes)  d f16 │ fifth bits u32 │ 16 nibble pairs                               d · (q - 16)
//! Q5_1 (24 bytes)  d f16 │ m f16 │ fifth bits u32 │ 16 nibble pairs                       d · q + m
//! Q8_0 (34 bytes)  d f16 │ 32 × i8                                                        d · q
//! ```
//! A product of an f16 and at most 8 bits is exact in f32, so a fused multiply-add gives the same bits.

use half::f16;

/// Values in a block of each of these formats.
pub const BLOCK: usize = 32;

/// Which block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

impl BlockFormat {
    /// Bytes of a block of 32 values.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
        }
    }

    /// Decodes `out.len()` values from flat index `start` of `bytes`; both multiples of 32.
    pub fn decode(self, bytes: &[u8], start: usize, out: &mut [f32]) {
        assert!(
            start.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK),
            "BUG: a run of blocks starts or ends within a block"
        );
        let blocks = bytes[start / BLOCK * self.block_bytes()..].chunks_exact(self.block_bytes());
        for (out, block) in out.chunks_exact_mut(BLOCK).zip(blocks) {
            match self {
                Self::Q4_0 => decode_nibbles(half(block, 0), 0.0, -8.0, 0, &block[2..], out),
                Self::Q4_1 => decode_nibbles(half(block, 0), half(block, 2), 0.0, 0, &block[4..], out),
                Self::Q5_0 => decode_nibbles(half(block, 0), 0.0, -16.0, word(block, 2), &block[6..], out),
                Self::Q5_1 => {
                    decode_nibbles(half(block, 0), half(block, 2), 0.0, word(block, 4), &block[8..], out);
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

/// out (32) = (nibble + 16 · fifth bit + shift) * scale + min.
fn decode_nibbles(scale: f32, min: f32, shift: f32, fifth_bits: u32, nibbles: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for (i, &byte) in nibbles.iter().enumerate() {
        let low_code = u32::from(byte & 15) | (fifth_bits >> i & 1) << 4;
        let high_code = u32::from(byte >> 4) | (fifth_bits >> (i + 16) & 1) << 4;
        low[i] = (low_code as f32 + shift) * scale + min;
        high[i] = (high_code as f32 + shift) * scale + min;
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block's bytes and its values as little-endian f32, both in hex. From the `gguf` Python package 0.19.0,
    /// `gguf.quants.dequantize`, on bytes ((91 k² + 57 k + 31 i + 13) >> 1) & 255 (i: the format's place in this
    /// list) with d = 0.0371 (i + 1) and, where there is one, m = -0.2913 (i + 1).
    const GOLDEN: [(BlockFormat, &str, &str); 5] = [
        (
            BlockFormat::Q4_0,
            "c028f5f5500617834a6ce9c1f4826baf4e48",
            "0000e4bd0000e4bd000098be000098bd000018bd00003ebe0000983d0000183e0000183d000085be000018be000064be0000e43d0000853e0000643e000000000000853e0000853e0000e4bd000098be000085be00000000000018be000098bd0000643e0000183e0000853e00000000000098bd0000983d000018be000018be",
        ),
        (
            BlockFormat::Q4_1,
            "c02ca9b8601627935a7cf9d104927bbf5e58ad5d",
            "002015bf00800cbe000081bd0040b8be0080233e00c09d3e0000af3d002002bf004092be0040debe00806f3e00e0073f00c0e93e0000383c00c0c33e00c0c33e00800cbe002002bf0040debe0000af3d008058be000081bd00e0073f00c0c33e002015bf0000af3d000081bd00806f3e008058be008058be0080233e008058be",
        ),
        (
            BlockFormat::Q5_0,
            "202f14146f2536a2698b08e013a18ace6d67bc6c77dd",
            "00808ebf0080c7bf0040803f00800ebf0000643f0000e4bf0040b9bf00c0d5bf00002bbf000064be0040b93f004080bf0000ab3f0000e4be004080bf0000abbe0000ab3e00808e3f00002b3f0000643f0000e4bf0080c73f0000e43d00002bbf0000643f0000e4be00002b3f00808ebf00800ebf00002b3f004080bf0000abbe",
        ),
        (
            BlockFormat::Q5_1,
            "c030a9bc7f3546b2799b18f023b19ade7d77cc7c87edaeca",
            "00f0224000f035400070194000e09a3f00e0d33f00e0ad3f00702c4000c0693f00f04840000001be00703f4000c01d3f00f00f4000f0484000c0693f0080a33e000001be00f0224000e0ad3f00e0873f00405ebf0080ef3e00f0224000c0433f000001be00f00f4000c01d3f000001be00701940007052400080a33e00703f40",
        ),
        (
            BlockFormat::Q8_0,
            "f03133338e4455c188aa27ff32c0a9ed8c86db8b96fcbdd950224fd7baf89185d47e",
            "00681741006817410038a9c100e0494100587c4100083bc10020b2c100507fc10090e74000003ebe0070144100003ec1002481c100a061c00030acc10018b5c100b0dbc000acadc100589dc100003ebf00e846c10090e7c000806d4100e0c94000886a410070f3c000d04fc10000bebf00c4a4c10094b6c100a002c10008bb41",
        ),
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn blocks_decode_as_llama_cpp_decodes_them() {
        for (format, block, expected) in GOLDEN {
            let block = bytes(block);
            assert_eq!(block.len(), format.block_bytes());
            let mut out = [0.0; BLOCK];
            format.decode(&block, 0, &mut out);
            let out: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(out, bytes(expected), "{format:?}");
        }
    }

    #[test]
    fn a_run_of_blocks_starts_anywhere() {
        let (format, block, expected) = GOLDEN[3];
        let two = [vec![0; format.block_bytes()], bytes(block)].concat();
        let mut out = [0.0; BLOCK];
        format.decode(&two, BLOCK, &mut out);
        assert_eq!(out[0].to_le_bytes(), bytes(expected)[..4]);
    }
}
