//! Rotary angles: a frequency per pair of channels, computed once in f32 as Hugging Face does, and a table of
//! cosines and sines that grows with the longest sequence seen.

use std::f32::consts::PI;

use crate::backend::{Backend, Precision, RopeTable};
use crate::model::{Rope, RopeScaling};

/// The frequencies (D/2) of a model.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model) struct Frequencies(pub(in crate::model) Vec<f32>);

impl Frequencies {
    /// theta^(-2i/D), scaled as the model says.
    pub(in crate::model) fn new(rope: &Rope, head_dim: usize) -> Self {
        let plain = (0..head_dim / 2).map(|i| 1.0 / rope.theta.powf((2 * i) as f32 / head_dim as f32));
        Self(plain.map(|frequency| scaled(frequency, &rope.scaling)).collect())
    }
}

fn scaled(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f32;
            let wavelength = 2.0 * PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// The table of a pass, kept while the frequencies stay the same.
#[derive(Debug, Default)]
pub(in crate::model) struct RopeBuffer {
    frequencies: Vec<f32>,
    positions: usize,
    pub(in crate::model) table: RopeTable,
}

impl RopeBuffer {
    /// Makes sure the table covers all `positions`, where `backend` computes.
    pub(in crate::model) fn prepare(
        &mut self,
        backend: &dyn Backend,
        frequencies: &Frequencies,
        positions: &[usize],
    ) {
        if self.frequencies != frequencies.0 {
            *self = Self { frequencies: frequencies.0.clone(), ..Self::default() };
        }
        let needed = positions.iter().max().map_or(0, |last| last + 1);
        if needed <= self.positions {
            return;
        }
        let (mut cos, mut sin) = (self.table.cos.to_host(), self.table.sin.to_host());
        for position in self.positions..needed {
            for frequency in &self.frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
        self.table = RopeTable { cos: cos.into(), sin: sin.into() };
        backend.place(&mut self.table.cos, Precision::Exact);
        backend.place(&mut self.table.sin, Precision::Exact);
        self.positions = needed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;

    #[test]
    fn llama3_bands_keep_high_and_divide_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32,
        };
        assert_eq!(scaled(1.0, &scaling), 1.0);
        assert_eq!(scaled(1e-3, &scaling), 1e-3 / 8.0);
        let middle = scaled(0.5, &scaling);
        assert!(middle < 0.5 && middle > 0.5 / 8.0);
        assert_eq!(scaled(0.5, &RopeScaling::Linear { factor: 4.0 }), 0.125);
    }

    #[test]
    fn table_grows_and_keeps_what_it_has() {
        let frequencies = Frequencies(vec![1.0, 0.1]);
        let mut buffer = RopeBuffer::default();
        buffer.prepare(&Reference::EXACT, &frequencies, &[0, 1]);
        let first = buffer.table.cos.clone();
        buffer.prepare(&Reference::EXACT, &frequencies, &[4]);
        assert_eq!(buffer.table.cos.len(), 10);
        assert_eq!(buffer.table.cos[..4], first[..]);
        assert_eq!(buffer.table.sin[9], 0.4f32.sin());
    }
}
