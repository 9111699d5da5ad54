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
