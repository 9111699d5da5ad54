//! NF4, the 4-bit code of QLoRA, exactly as bitsandbytes computes it. Knows values and codes; nothing of files
//! (see `format`) or of shapes (see `matrix`).
//!
//! ```text
//! f32 ── blocks of 64, flat, across row ends ──► 4-bit codes, two a byte (first in the high nibble)
//!                                           └──► absmax per block ── `nested` ──► 8-bit codes + f32 per 256
//! ```

pub mod nested;

use std::sync::Arc;

use crate::matrix::Bytes;

/// Values that share one scale.
pub const BLOCK: usize = 64;

/// The 16 values of the code: quantiles of a normal distribution, scaled to [-1, 1]. From bitsandbytes
/// (`get_4bit_type`), as f32.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// f32 midpoints of neighbouring codes. A value on a boundary takes the lower code. They are f32 on purpose:
/// the same decimals as f64 would move ties.
const BOUNDARIES: [f32; 15] = {
    let mut boundaries = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        boundaries[i] = (CODE[i] + CODE[i + 1]) / 2.0;
        i += 1;
    }
    boundaries
};

/// Both values of each byte, so that decoding takes one load a byte.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODE[byte >> 4], CODE[byte & 15]];
        byte += 1;
    }
    pairs
};

/// A tensor in NF4 with blocks of 64 values, scales as bitsandbytes stores them.
#[derive(Clone)]
pub struct Nf4 {
    /// Two codes a byte, the first value in the high nibble.
    pub packed: Bytes,
    /// absmax of each block of 64, already decoded to f32 (from nested 8-bit codes where the file has them).
    pub absmax: Arc<[f32]>,
    /// Number of values.
    pub len: usize,
}

impl Nf4 {
    /// Quantises finite values. Scales are the plain f32 absmax of each block.
    pub fn encode(values: &[f32]) -> Self {
        let (packed, absmax) = encode_blocks(values);
        Self { packed: Bytes::owned(packed), absmax: absmax.into(), len: values.len() }
    }

    /// Joins codes and scales read from a file. `None` where their sizes do not fit `len`.
    pub fn from_parts(packed: Bytes, absmax: Arc<[f32]>, len: usize) -> Option<Self> {
        let fits = packed.as_slice().len() == len.div_ceil(2) && absmax.len() == len.div_ceil(BLOCK);
        fits.then_some(Self { packed, absmax, len })
    }

    /// Decodes `out.len()` values from flat index `start`: `code[nibble] * absmax`, in f32.
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        assert!(start + out.len() <= self.len, "BUG: decoding beyond the tensor");
        let packed = self.packed.as_slice();
        let mut position = start;
        let mut rest = out;
        while !rest.is_empty() {
            let (block, offset) = (position / BLOCK, position % BLOCK);
            let (now, later) = rest.split_at_mut(rest.len().min(BLOCK - offset));
            let scale = self.absmax[block];
            if let Ok(whole) = <&mut [f32; BLOCK]>::try_from(&mut *now) {
                let codes = packed[position / 2..].first_chunk().expect("a whole block has 32 bytes");
                decode_block(codes, scale, whole);
            } else {
                for (i, value) in (position..).zip(now.iter_mut()) {
                    *value = PAIRS[usize::from(packed[i / 2])][i % 2] * scale;
                }
            }
            position += now.len();
            rest = later;
        }
    }

    /// Bytes held in memory.
    pub fn size_bytes(&self) -> usize {
        self.packed.as_slice().len() + self.absmax.len() * 4
    }
}

/// Codes (two a byte; an odd end is padded with the code of zero) and absmax of each block of `values`, which
/// must be finite. Blocks are independent: a tensor may be encoded in runs of a multiple of 64 values.
pub fn encode_blocks(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut packed = Vec::with_capacity(values.len().div_ceil(2));
    let mut absmax = Vec::with_capacity(values.len().div_ceil(BLOCK));
    for block in values.chunks(BLOCK) {
        let scale = block.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let mut codes = [ZERO_CODE; BLOCK];
        if let Ok(whole) = <&[f32; BLOCK]>::try_from(block) {
            // bitsandbytes clamps the reciprocal, so that a zero or denormal scale gives the code of zero.
            let reciprocal = (1.0 / scale).min(1e38);
            nearest_of_block(whole, reciprocal, &mut codes);
        } else if scale > 0.0 {
            // The last, ragged block is divided instead; the two differ in the last bit.
            for (code, value) in codes.iter_mut().zip(block) {
                *code = nearest(value / scale);
            }
        }
        let mut bytes = [0; BLOCK / 2];
        for i in 0..BLOCK / 2 {
            bytes[i] = codes[2 * i] << 4 | codes[2 * i + 1];
        }
        packed.extend_from_slice(&bytes[..block.len().div_ceil(2)]);
        absmax.push(scale);
    }
    (packed, absmax)
}

/// Index of 0.0 in `CODE`.
const ZERO_CODE: u8 = 7;

/// The number of boundaries strictly below `scaled`. Values beyond [-1, 1] need no clamp: the outer codes
/// have no outer boundary.
fn nearest(scaled: f32) -> u8 {
    BOUNDARIES.iter().map(|&boundary| u8::from(boundary < scaled)).sum()
}

/// codes (64) = nearest(values * reciprocal), boundary by boundary, so that it vectorises.
fn nearest_of_block(values: &[f32; BLOCK], reciprocal: f32, codes: &mut [u8; BLOCK]) {
    let mut scaled = [0.0; BLOCK];
    let mut counts = [0u32; BLOCK];
    for i in 0..BLOCK {
        scaled[i] = values[i] * reciprocal;
    }
    for boundary in BOUNDARIES {
        for i in 0..BLOCK {
            counts[i] += u32::from(boundary < scaled[i]);
        }
    }
    for i in 0..BLOCK {
        codes[i] = counts[i] as u8;
    }
}

/// out (64) = `code[nibble] * scale`. Fixed sizes and plain indices: bounds are known, so the loop unrolls.
fn decode_block(codes: &[u8; BLOCK / 2], scale: f32, out: &mut [f32; BLOCK]) {
    for i in 0..BLOCK / 2 {
        let [high, low] = PAIRS[usize::from(codes[i])];
        out[2 * i] = high * scale;
        out[2 * i + 1] = low * scale;
    }
}

#[cfg(test)]
mod tests {
    //! Golden values: tests/golden/nf4_golden.py, bitsandbytes 0.50.2 (CPU) on torch 2.15.0.

    use half::{bf16, f16};
    use proptest::prelude::*;
    use safetensors::{Dtype, SafeTensors};

    use super::nested::{DoubleQuantized, dynamic_map};
    use super::*;

    const CASES: [&str; 5] =
        ["normal_128x192", "outliers_64x64", "zeros_and_tiny", "ties_1x64", "ragged_5x30"];
    const DTYPES: [&str; 3] = ["float32", "bfloat16", "float16"];

    fn golden() -> Vec<u8> {
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/nf4.safetensors")).unwrap()
    }

    fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => {
                data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
            }
            Dtype::BF16 => {
                data.chunks_exact(2).map(|bytes| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()).collect()
            }
            Dtype::F16 => {
                data.chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    fn rounded(values: &[f32], dtype: &str) -> Vec<f32> {
        let round = |value: &f32| match dtype {
            "bfloat16" => bf16::from_f32(*value).to_f32(),
            "float16" => f16::from_f32(*value).to_f32(),
            _ => *value,
        };
        values.iter().map(round).collect()
    }

    /// Equal to the bit; a failure names the first place only, the lists are long.
    fn assert_bits(ours: &[f32], theirs: &[f32], what: &str) {
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{what}[{i}]: {ours} {theirs}");
        }
    }

    /// Every golden case as (key, its input rounded to its dtype), where the file kept the case whole.
    fn for_each_case(file: &SafeTensors<'_>, mut check: impl FnMut(&str, &[f32], &str)) {
        let mut checked = 0;
        for case in CASES {
            let input = floats(file, &format!("{case}.input"));
            for dtype in DTYPES {
                let key = format!("{case}.{dtype}");
                if file.tensor(&format!("{key}.packed")).is_ok() {
                    check(&key, &rounded(&input, dtype), dtype);
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, 13);
    }

    #[test]
    fn code_and_boundaries_are_those_of_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/nf4.json");
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let list = |key: &str| -> Vec<f32> {
            golden[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
        };
        assert_bits(&CODE, &list("code"), "code");
        assert_bits(&BOUNDARIES, &list("midpoints"), "midpoints");
    }

    #[test]
    fn codes_and_scales_equal_bitsandbytes() {
        let bytes = golden();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for_each_case(&file, |key, input, _| {
            let (packed, absmax) = encode_blocks(input);
            assert!(packed == file.tensor(&format!("{key}.packed")).unwrap().data(), "{key}: codes differ");
            assert_bits(&absmax, &floats(&file, &format!("{key}.absmax")), key);
        });
    }

    #[test]
    fn decoded_values_equal_bitsandbytes_to_the_bit() {
        let bytes = golden();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for_each_case(&file, |key, input, dtype| {
            let mut out = vec![0.0; input.len()];
            Nf4::encode(input).decode(0, &mut out);
            assert_bits(&rounded(&out, dtype), &floats(&file, &format!("{key}.dequant")), key);
        });
    }

    #[test]
    fn nested_scales_equal_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/nf4.json");
        let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let bytes = golden();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let map = dynamic_map(true);
        for_each_case(&file, |key, input, dtype| {
            let offset = meta["cases"][key]["nested_offset"].as_f64().unwrap() as f32;
            let theirs = DoubleQuantized {
                codes: file.tensor(&format!("{key}.nested.absmax")).unwrap().data().to_vec(),
                absmax: floats(&file, &format!("{key}.nested.absmax2")),
                offset,
            };
            // Their codes, our decoding: exact.
            let (packed, absmax) = encode_blocks(input);
            let nf4 = Nf4::from_parts(Bytes::owned(packed), theirs.decode(&map).into(), input.len()).unwrap();
            let mut out = vec![0.0; input.len()];
            nf4.decode(0, &mut out);
            let expected = floats(&file, &format!("{key}.nested.dequant"));
            assert_bits(&rounded(&out, dtype), &expected, key);
            // Our codes: their CPU path looks them up in 65,536 bins and is off by one now and then.
            let ours = DoubleQuantized::encode(&absmax);
            assert!((ours.offset - offset).abs() <= offset.abs() * 1e-6, "{key}: {} {offset}", ours.offset);
            for (ours, theirs) in ours.codes.iter().zip(&theirs.codes) {
                assert!(ours.abs_diff(*theirs) <= 1, "{key}: {ours} {theirs}");
            }
            for (ours, theirs) in ours.absmax.iter().zip(&theirs.absmax) {
                assert!((ours - theirs).abs() <= theirs.abs() * 1e-5 + 1e-12, "{key}: {ours} {theirs}");
            }
        });
    }

    #[test]
    fn signed_dynamic_map_equals_bitsandbytes() {
        let bytes = golden();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_bits(&dynamic_map(true), &floats(&file, "dynamic_map_256"), "map");
    }

    #[test]
    fn zero_blocks_take_the_code_of_zero() {
        for len in [64, 10, 1] {
            let (packed, absmax) = encode_blocks(&vec![0.0; len]);
            assert!(packed.iter().all(|&byte| byte == 0x77), "{len}: {packed:?}");
            assert_eq!(absmax, [0.0]);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let parts = |bytes, scales| {
            Nf4::from_parts(Bytes::owned(vec![0; bytes]), vec![0.0; scales].into(), 130).is_some()
        };
        assert!(parts(65, 3));
        assert!(!parts(64, 3) && !parts(65, 2) && !parts(66, 3));
    }

    proptest! {
        #[test]
        fn any_range_decodes_as_a_part_of_the_whole(
            values in prop::collection::vec(-2.0f32..2.0, 1..400), a in 0usize..400, b in 0usize..400,
        ) {
            let nf4 = Nf4::encode(&values);
            let mut whole = vec![0.0; values.len()];
            nf4.decode(0, &mut whole);
            let (start, end) = (a.min(b).min(values.len()), a.max(b).min(values.len()));
            let mut part = vec![9.0; end - start];
            nf4.decode(start, &mut part);
            prop_assert_eq!(&part, &whole[start..end]);
        }

        #[test]
        fn no_other_code_is_nearer(values in prop::collection::vec(-2.0f32..2.0, 64)) {
            let nf4 = Nf4::encode(&values);
            let mut out = vec![0.0; 64];
            nf4.decode(0, &mut out);
            let scale = nf4.absmax[0];
            for (value, decoded) in values.iter().zip(&out) {
                let best = CODE.iter().map(|code| (code * scale - value).abs()).fold(f32::MAX, f32::min);
                prop_assert!((decoded - value).abs() <= best + scale * 1e-6);
            }
        }
    }
}
