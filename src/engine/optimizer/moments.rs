//! AdamW's two moments of one tensor, in f32 or in 8-bit codes: bitsandbytes' block-wise state, 256 values to a
//! scale, the signed dynamic map for the first moment and the unsigned one for the second. Codes are the nearest, as
//! in its PyTorch form (its CUDA kernel also keeps the sign of values next to zero). Knows how a block is updated;
//! which tensors get codes, and the step's scalars, are the optimizer's.

use crate::quant::nested::dynamic_map;

use super::Update;

/// Values that share a scale.
const BLOCK: usize = 256;

/// The state of one tensor of n values.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Moments {
    /// (n) each.
    F32 { first: Vec<f32>, second: Vec<f32> },
    /// Two coded lists of n values.
    Blockwise8 { first: Coded, second: Coded },
}

/// A list of values in 8-bit codes: `map[code] * absmax` of its block.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Coded {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

/// A part of an optimizer's state as it goes into a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StatePart<'a> {
    /// 4 bytes a value, little-endian.
    Floats(&'a [f32]),
    /// A byte a value.
    Codes(&'a [u8]),
}

impl Moments {
    pub(super) fn zeros_f32(len: usize) -> Self {
        Self::F32 { first: vec![0.0; len], second: vec![0.0; len] }
    }

    pub(super) fn zeros_blockwise8(len: usize) -> Self {
        let coded = Coded { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] };
        Self::Blockwise8 { first: coded.clone(), second: coded }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32 { first, .. } => first.len(),
            Self::Blockwise8 { first, .. } => first.codes.len(),
        }
    }

    pub(super) fn parts(&self) -> Vec<StatePart<'_>> {
        match self {
            Self::F32 { first, second } => vec![StatePart::Floats(first), StatePart::Floats(second)],
            Self::Blockwise8 { first, second } => [first, second]
                .into_iter()
                .flat_map(|coded| [StatePart::Codes(&coded.codes), StatePart::Floats(&coded.absmax)])
                .collect(),
        }
    }

    /// Fills the state from the bytes of [`Moments::parts`]; gives what is left of them, or none if they end early.
    pub(super) fn read<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        match self {
            Self::F32 { first, second } => read_floats(second, read_floats(first, bytes)?),
            Self::Blockwise8 { first, second } => second.read(first.read(bytes)?),
        }
    }

    /// One step of the tensor.
    pub(super) fn update(&mut self, update: &Update, maps: &Maps, parameters: &mut [f32], gradients: &[f32]) {
        match self {
            Self::F32 { first, second } => update.apply(parameters, gradients, first, second),
            Self::Blockwise8 { first, second } => {
                let blocks = parameters.chunks_mut(BLOCK).zip(gradients.chunks(BLOCK));
                let (mut firsts, mut seconds) = ([0.0; BLOCK], [0.0; BLOCK]);
                for (block, (parameters, gradients)) in blocks.enumerate() {
                    let (m, v) = (&mut firsts[..parameters.len()], &mut seconds[..parameters.len()]);
                    first.decode(block, &maps.signed, m);
                    second.decode(block, &maps.unsigned, v);
                    update.apply(parameters, gradients, m, v);
                    first.encode(block, &maps.signed, m);
                    second.encode(block, &maps.unsigned, v);
                }
            }
        }
    }
}

impl Coded {
    fn decode(&self, block: usize, map: &Map, out: &mut [f32]) {
        let codes = &self.codes[block * BLOCK..][..out.len()];
        let scale = self.absmax[block];
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = map.values[usize::from(code)] * scale);
    }

    /// Each value takes the nearest code; the lower of two as near.
    fn encode(&mut self, block: usize, map: &Map, values: &[f32]) {
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = if largest == 0.0 { 1.0 } else { largest };
        self.absmax[block] = scale;
        for (code, value) in self.codes[block * BLOCK..].iter_mut().zip(values) {
            let scaled = value / scale;
            *code = map.midpoints.partition_point(|&midpoint| midpoint < scaled) as u8;
        }
    }

    fn read<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (codes, rest) = bytes.split_at_checked(self.codes.len())?;
        self.codes.copy_from_slice(codes);
        read_floats(&mut self.absmax, rest)
    }
}

fn read_floats<'a>(values: &mut [f32], bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (own, rest) = bytes.split_at_checked(4 * values.len())?;
    for (value, bytes) in values.iter_mut().zip(own.chunks_exact(4)) {
        *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    Some(rest)
}

/// Both 8-bit maps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Maps {
    signed: Map,
    unsigned: Map,
}

#[derive(Debug, Clone, PartialEq)]
struct Map {
    values: [f32; 256],
    midpoints: Vec<f32>,
}

impl Maps {
    pub(super) fn new() -> Self {
        let map = |signed| {
            let values = dynamic_map(signed);
            Map { midpoints: values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect(), values }
        };
        Self { signed: map(true), unsigned: map(false) }
    }
}
