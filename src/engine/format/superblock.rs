//! GGUF's block formats with 256 values: Q2_K to Q6_K and IQ4_XS. Decodes exactly as llama.cpp's
//! `dequantize_row_*`, operation for operation; knows nothing of files.
//!
//! ```text
//! Q2_K (84 bytes)    16 × (scale, min) nibbles │ 64 × 4 × 2 bits │ d f16 │ dmin f16      d·s · q - dmin·m
//! Q3_K (110 bytes)   32 third-bit bytes │ 64 × 4 × 2 bits │ 16 × 6-bit scales │ d f16    d·(s-32) · (q-4·!bit)
//! Q4_K (144 bytes)   d f16 │ dmin f16 │ 8 × (6-bit scale, min) │ 128 nibble pairs         d·s · q - dmin·m
//! Q5_K (176 bytes)   d f16 │ dmin f16 │ 8 × (6-bit scale, min) │ 32 fifth-bit bytes │ 128 nibble pairs
//! Q6_K (210 bytes)   128 nibble pairs │ 64 × 4 × 2 high bits │ 16 × i8 scale │ d f16      d·s · (q-32)
//! IQ4_XS (136 bytes) d f16 │ 8 × 2 high bits │ 8 low nibbles │ 8 × 16 nibble pairs        d·(s-32) · CODE[q]
//! ```
//! Bits of a value are spread in planes: 2-bit codes of values i, i + 32, i + 64 and i + 96 share a byte, nibbles
//! of i and i + 32 (i + 64 in Q6_K), and bit k of a bit-plane byte belongs to the k-th run of 32 values.

use crate::format::block::{IQ4_CODE, half};

/// Values in a block of each of these formats.
pub(crate) const SUPERBLOCK: usize = 256;

/// Bytes of the packed 6-bit scales and mins of Q4_K and Q5_K.
const SCALE_BYTES: usize = 12;

/// Two-bit code of value `at`, as Q2_K, Q3_K and the high bits of Q6_K lie.
fn two_bits(codes: &[u8], at: usize) -> u8 {
    codes[at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3
}

/// Nibble of value `at` where bytes hold values i and i + `stride`.
fn nibble(codes: &[u8], at: usize, stride: usize) -> u8 {
    codes[at / (2 * stride) * stride + at % stride] >> (at % (2 * stride) / stride * 4) & 15
}

/// Bit of value `at` in a plane of 32 bytes.
fn plane_bit(plane: &[u8], at: usize) -> u8 {
    plane[at % 32] >> (at / 32) & 1
}

pub(crate) fn decode_q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (at, value) in out.iter_mut().enumerate() {
        let scale = scales[at / 16];
        let (scale, min) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        *value = scale * f32::from(two_bits(codes, at)) - min;
    }
}

pub(crate) fn decode_q3_k(block: &[u8], out: &mut [f32]) {
    let (plane, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    for (run, out) in out.chunks_exact_mut(16).enumerate() {
        // Low nibbles of runs 0..8 and high nibbles of runs 8..16 in 8 bytes; then two bits each in 4 bytes.
        let low = packed[run % 8] >> (run / 8 * 4) & 15;
        let high = packed[8 + run % 4] >> (run / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        for (i, value) in out.iter_mut().enumerate() {
            let at = run * 16 + i;
            let code = f32::from(two_bits(codes, at)) - f32::from(4 * (plane_bit(plane, at) ^ 1));
            *value = scale * code;
        }
    }
}

/// The 6-bit scale and min of run `run` of 32 values.
fn scale_and_min(packed: &[u8], run: usize) -> (f32, f32) {
    let (scale, min) = if run < 4 {
        (packed[run] & 63, packed[run + 4] & 63)
    } else {
        let both = packed[run + 4];
        (both & 15 | packed[run - 4] >> 6 << 4, both >> 4 | packed[run] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

pub(crate) fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    let codes = &block[4 + SCALE_BYTES..];
    decode_scaled_and_shifted(block, out, |at| nibble(codes, at, 32));
}

pub(crate) fn decode_q5_k(block: &[u8], out: &mut [f32]) {
    let (plane, codes) = block[4 + SCALE_BYTES..].split_at(32);
    decode_scaled_and_shifted(block, out, |at| nibble(codes, at, 32) | plane_bit(plane, at) << 4);
}

fn decode_scaled_and_shifted(block: &[u8], out: &mut [f32], code: impl Fn(usize) -> u8) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&block[4..4 + SCALE_BYTES], run);
        let (scale, min) = (d * scale, dmin * min);
        for (i, value) in out.iter_mut().enumerate() {
            *value = scale * f32::from(code(run * 32 + i)) - min;
        }
    }
}

pub(crate) fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (at, value) in out.iter_mut().enumerate() {
        let code = nibble(low, at, 64) | two_bits(high, at) << 4;
        let scale = d * f32::from(scales[at / 16] as i8);
        *value = scale * (f32::from(code) - 32.0);
    }
}

pub(crate) fn decode_iq4_xs(block: &[u8], out: &mut [f32]) {
    let high = u16::from_le_bytes([block[2], block[3]]);
    let d = half(block, 0);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + run / 2] >> (run % 2 * 4) & 15;
        let high = (high >> (run * 2) & 3) as u8;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let codes = &block[8 + run * 16..8 + (run + 1) * 16];
        for (i, value) in out.iter_mut().enumerate() {
            *value = scale * IQ4_CODE[usize::from(nibble(codes, i, 16))];
        }
    }
}
