//! What a training pass disturbs on purpose: values dropped from the input of a LoRA pair, and NEFTune's noise
//! on embeddings. Every random number is a function of the sequence's stream, the position in the sequence, the
//! linear layer and the channel, so neither packing nor threads nor a resume changes one. Knows no seed and no
//! step: whoever makes the pack names each sequence's stream.

use std::cell::RefCell;

use crate::backend::{Backend, Buffer, Dropped};
use crate::random::Random;

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
    pub(super) scratch: RefCell<Buffer>,
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
    pub(super) fn add_to_embeddings(&self, backend: &dyn Backend, stream: &mut Buffer) {
        if self.neftune_alpha == 0.0 || self.rows.is_empty() {
            return;
        }
        backend.add_noise(stream, &self.rows, &self.lengths, self.neftune_alpha);
    }
}

impl Dropout {
    /// What linear layer `linear` drops.
    pub(super) fn of(&self, linear: usize) -> Dropped<'_> {
        Dropped { rows: &self.rows, linear, threshold: self.threshold, scale: self.scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Reference, Write};

    fn noise(dropout: f32, streams: &[u64]) -> Noise {
        Noise { dropout, neftune_alpha: 5.0, streams: streams.to_vec() }
    }

    #[test]
    fn dropped_share_and_mean_are_as_asked() {
        let rows = RowNoise::new(&noise(0.1, &[1]), &[0, 200]);
        let dropout = rows.dropout.unwrap();
        let (x, mut y) = (Buffer::from(vec![1.0; 200 * 500]), Buffer::zeros(200 * 500));
        Reference::EXACT.dropout(&mut y, &x, &dropout.of(3), Write::Overwrite);
        let dropped = y.iter().filter(|value| **value == 0.0).count() as f64 / 1e5;
        // Standard deviation of the share is 0.001.
        assert!((dropped - 0.1).abs() < 0.005, "{dropped}");
        let mean = y.iter().map(|&value| f64::from(value)).sum::<f64>() / 1e5;
        assert!((mean - 1.0).abs() < 0.006, "{mean}");
        let mut other = Buffer::zeros(y.len());
        Reference::EXACT.dropout(&mut other, &x, &dropout.of(4), Write::Overwrite);
        assert_ne!(y, other, "layers drop different values");
        let mut dx = Buffer::zeros(y.len());
        Reference::EXACT.dropout(&mut dx, &x, &dropout.of(3), Write::Add);
        assert_eq!(y, dx, "the backward drops what the forward dropped");
    }

    #[test]
    fn a_sequence_s_noise_does_not_depend_on_its_neighbours() {
        let x: Buffer = (0..9 * 6).map(|index| index as f32 + 1.0).collect();
        let both = RowNoise::new(&noise(0.5, &[7, 8]), &[0, 4, 9]);
        let alone = RowNoise::new(&noise(0.5, &[8]), &[0, 5]);
        let (mut y, mut part) = (Buffer::zeros(54), Buffer::zeros(30));
        let own = Buffer::from(x[24..].to_vec());
        Reference::EXACT.dropout(&mut y, &x, &both.dropout.as_ref().unwrap().of(0), Write::Overwrite);
        Reference::EXACT.dropout(&mut part, &own, &alone.dropout.as_ref().unwrap().of(0), Write::Overwrite);
        assert_eq!(y[24..], part[..]);
        let (mut y, mut part) = (Buffer::zeros(54), Buffer::zeros(30));
        both.add_to_embeddings(&Reference::EXACT, &mut y);
        alone.add_to_embeddings(&Reference::EXACT, &mut part);
        assert_eq!(y[24..], part[..]);
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
