//! What a training pass disturbs on purpose: values dropped from the input of a LoRA pair, and NEFTune's noise
//! on embeddings. Every random number is a function of the sequence's stream, the position in the sequence, the
//! linear layer and the channel, so neither packing nor threads nor a resume changes one. Knows no seed and no
//! step: whoever makes the pack names each sequence's stream.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::random::{GOLDEN, Random, mix};

/// Names the streams of this file, so that no other use of a seed shares them.
const NOISE: u64 = 0x004e_4f49_5345;

/// The disturbances of a training pass; a pass without is exact.
#[derive(Debug, Clone, PartialEq)]
pub struct Noise {
    /// Share of the inputs of each LoRA pair that is dropped, in [0, 1); the rest is scaled up to the same mean.
    pub dropout: f32,
    /// NEFTune's alpha: embeddings get uniform noise in ±alpha / sqrt(T·C), T the tokens of the sequence.
    pub neftune_alpha: f32,
    /// The stream of random numbers of each sequence of the pack.
    pub streams: Vec<u64>,
}

/// [`Noise`] laid out over the rows of a pass.
pub(super) struct RowNoise {
    /// A stream a row (T).
    rows: Vec<u64>,
    /// Tokens of the sequence of each row (T).
    lengths: Vec<usize>,
    neftune_alpha: f32,
    pub(super) dropout: Option<Dropout>,
}

/// Drops values, the same ones in the forward and the backward pass.
pub(super) struct Dropout {
    /// A stream a row (T).
    rows: Vec<u64>,
    /// Of 65536, how many are dropped.
    threshold: u16,
    /// What the rest is multiplied by.
    scale: f32,
    /// Holds a layer's input with values dropped.
    pub(super) scratch: RefCell<Vec<f32>>,
}

impl RowNoise {
    /// The noise of the rows of sequences that begin at `starts` (the last entry is T).
    pub(super) fn new(noise: &Noise, starts: &[usize]) -> Self {
        assert_eq!(noise.streams.len() + 1, starts.len(), "BUG: one stream a sequence");
        assert_eq!(starts[0], 0, "BUG: noise on rows that sequences share");
        let sequences = noise.streams.iter().zip(starts.windows(2));
        let (rows, lengths): (Vec<u64>, Vec<usize>) = sequences
            .flat_map(|(&stream, range)| {
                let length = range[1] - range[0];
                (0..length as u64)
                    .map(move |position| (Random::new(&[NOISE, stream, position]).next_u64(), length))
            })
            .unzip();
        let threshold = (noise.dropout * 65536.0).round() as u16;
        let dropout = (threshold > 0).then(|| Dropout {
            rows: rows.clone(),
            threshold,
            scale: 65536.0 / (65536.0 - f32::from(threshold)),
            scratch: RefCell::default(),
        });
        Self { rows, lengths, neftune_alpha: noise.neftune_alpha, dropout }
    }

    /// Adds NEFTune's noise to the embeddings (T,C).
    pub(super) fn add_to_embeddings(&self, stream: &mut [f32]) {
        if self.neftune_alpha == 0.0 || self.rows.is_empty() {
            return;
        }
        let (c, alpha) = (stream.len() / self.rows.len(), self.neftune_alpha);
        let rows = stream.par_chunks_exact_mut(c).zip(&self.rows).zip(&self.lengths);
        rows.for_each(|((values, &row), &length)| {
            let bound = alpha / ((length * c) as f32).sqrt();
            for (channel, value) in values.iter_mut().enumerate() {
                // Streams of linear layers start at `mix` of their number; this one at the row itself.
                let unit = (bits(row, channel) >> 40) as f32 / (1 << 24) as f32;
                *value += bound * (2.0 * unit - 1.0);
            }
        });
    }
}

impl Dropout {
    /// y (T,K) = x (T,K) with the values dropped that linear layer `linear` drops.
    pub(super) fn forward(&self, y: &mut [f32], x: &[f32], linear: usize) {
        self.each_row(y, x, linear, |y, factor, x| *y = factor * x);
    }

    /// dx (T,K) += the gradient dy (T,K) where [`Dropout::forward`] kept the value.
    pub(super) fn backward(&self, dx: &mut [f32], dy: &[f32], linear: usize) {
        self.each_row(dx, dy, linear, |dx, factor, dy| *dx += factor * dy);
    }

    fn each_row(&self, out: &mut [f32], x: &[f32], linear: usize, combine: fn(&mut f32, f32, f32)) {
        assert!(out.len() == x.len() && x.len().is_multiple_of(self.rows.len()), "BUG: shape of a dropout");
        let k = x.len() / self.rows.len();
        let (threshold, scale) = (self.threshold, self.scale);
        let rows = out.par_chunks_exact_mut(k).zip(x.par_chunks_exact(k)).zip(&self.rows);
        rows.for_each(|((out, x), &row)| {
            let stream = mix(row ^ mix(linear as u64 + 1));
            for (index, (out, x)) in out.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                let mut bits = bits(stream, index);
                for (out, &x) in out.iter_mut().zip(x) {
                    let factor = if (bits as u16) < threshold { 0.0 } else { scale };
                    combine(out, factor, x);
                    bits >>= 16;
                }
            }
        });
    }
}

/// Number `index` of a stream.
fn bits(stream: u64, index: usize) -> u64 {
    mix(stream.wrapping_add((index as u64 + 1).wrapping_mul(GOLDEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(dropout: f32, streams: &[u64]) -> Noise {
        Noise { dropout, neftune_alpha: 5.0, streams: streams.to_vec() }
    }

    #[test]
    fn dropped_share_and_mean_are_as_asked() {
        let rows = RowNoise::new(&noise(0.1, &[1]), &[0, 200]);
        let dropout = rows.dropout.unwrap();
        let (x, mut y) = (vec![1.0; 200 * 500], vec![0.0; 200 * 500]);
        dropout.forward(&mut y, &x, 3);
        let dropped = y.iter().filter(|value| **value == 0.0).count() as f64 / 1e5;
        // Standard deviation of the share is 0.001.
        assert!((dropped - 0.1).abs() < 0.005, "{dropped}");
        let mean = y.iter().map(|&value| f64::from(value)).sum::<f64>() / 1e5;
        assert!((mean - 1.0).abs() < 0.006, "{mean}");
        let mut other = vec![0.0; y.len()];
        dropout.forward(&mut other, &x, 4);
        assert_ne!(y, other, "layers drop different values");
        let mut dx = vec![0.0; y.len()];
        dropout.backward(&mut dx, &x, 3);
        assert_eq!(y, dx, "the backward drops what the forward dropped");
    }

    #[test]
    fn a_sequence_s_noise_does_not_depend_on_its_neighbours() {
        let x: Vec<f32> = (0..9 * 6).map(|index| index as f32 + 1.0).collect();
        let both = RowNoise::new(&noise(0.5, &[7, 8]), &[0, 4, 9]);
        let alone = RowNoise::new(&noise(0.5, &[8]), &[0, 5]);
        let (mut y, mut part) = (vec![0.0; 54], vec![0.0; 30]);
        both.dropout.as_ref().unwrap().forward(&mut y, &x, 0);
        alone.dropout.as_ref().unwrap().forward(&mut part, &x[24..], 0);
        assert_eq!(y[24..], part);
        let (mut y, mut part) = (vec![0.0; 54], vec![0.0; 30]);
        both.add_to_embeddings(&mut y);
        alone.add_to_embeddings(&mut part);
        assert_eq!(y[24..], part);
        let bound = 5.0 / 30f32.sqrt();
        assert!(
            part.iter().all(|value| value.abs() <= bound)
                && part.iter().any(|value| value.abs() > bound / 2.0)
        );
    }

    #[test]
    fn no_dropout_is_no_work() {
        assert!(RowNoise::new(&noise(0.0, &[1]), &[0, 3]).dropout.is_none());
    }
}
