//! The model against golden values of transformers and PEFT, and against itself: packed as unpacked, cached
//! as whole, gradients as finite differences, any thread count as one.
//!
//! Golden values: `tests/golden/tiny_models.py` and `lora_golden.py` (torch 2.15.0, transformers 5.23.0,
//! peft 0.21.2, bitsandbytes 0.50.2), float32 on the CPU.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{Mixing, Model, ModelConfig, ModelError, Pack, TensorSource, Workspace, tensors};
use crate::adapter::{Adapter, Gradients, LoraConfig, Targets};
use crate::backend::{BackendKind, Compute};
use crate::format::Checkpoint;
use crate::matrix::{Bytes, Matrix, Values};
use crate::quant::Nf4;
use crate::quant::nested::{DoubleQuantized, dynamic_map};

mod configs;
mod device;
mod golden;
mod properties;
mod speed;
mod state_space;
mod variants;

use configs::{odd_config, odd_configs};

const REFERENCE: Compute = Compute { kind: BackendKind::Reference, ..Compute::cpu(1) };
/// In f32 even where the CPU has faster products of rounded factors: golden values are f32.
const CPU: Compute = Compute { kind: BackendKind::CpuExact, ..Compute::cpu(2) };
/// As a user's run.
const FASTEST: Compute = Compute::cpu(2);
/// Plain loops that round factors.
const NAIVE: Compute = Compute { kind: BackendKind::Naive, ..Compute::cpu(1) };

/// The golden models, one a family.
const GOLDEN: [&str; 9] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "granitemoehybrid"];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(family)
}

fn model(family: &str, device: &Compute) -> Model {
    Model::open(&folder(family), device).unwrap()
}

/// Values in ±1 that repeat for the same seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// How the weights of a random model are stored.
#[derive(Clone, Copy, PartialEq)]
enum Stored {
    F32,
    Nf4,
}

/// Random tensors of any shape.
struct RandomTensors {
    stored: Stored,
    norm_mean: f32,
}

fn seed_of(name: &str) -> u64 {
    name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()))
}

fn random_weight(name: &str, rows: usize, cols: usize) -> Vec<f32> {
    let bound = 1.5 / (cols as f32).sqrt();
    noise(seed_of(name), rows * cols).iter().map(|value| value * bound).collect()
}

impl TensorSource for RandomTensors {
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let values = random_weight(name, rows, cols);
        Ok(match self.stored {
            Stored::F32 => Matrix::from_f32(rows, cols, &values),
            Stored::Nf4 => Matrix { rows, cols, values: Values::Nf4(Nf4::encode(&values)) },
        })
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let values = random_weight(name, rows, cols);
        let bytes = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
        Ok(match self.stored {
            Stored::F32 => Matrix::from_f32(rows, cols, &values),
            Stored::Nf4 => Matrix { rows, cols, values: Values::Bf16(Bytes::owned(bytes)) },
        })
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let mean = if name.contains("norm") { self.norm_mean } else { 0.0 };
        let values = noise(seed_of(name), shape.iter().product());
        Ok(values.iter().map(|value| mean + 0.2 * value).collect())
    }
}

/// A model of the given shape with random weights, the head and norms aside in `stored`.
fn random_model(config: &ModelConfig, stored: Stored, device: &Compute) -> Model {
    let norm_mean = if config.norms.offset { 0.0 } else { 1.0 };
    Model::assemble(config.clone(), &RandomTensors { stored, norm_mean }, device).unwrap()
}

/// An adapter over all linears whose B is not zero.
fn busy_adapter(model: &Model, rank: usize) -> Adapter {
    let config = LoraConfig {
        rank,
        alpha: 8.0,
        targets: Targets::AllLinear,
        rslora: false,
        seed: 3,
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::new(model, &config).unwrap();
    for (index, (name, values)) in adapter.parameters_mut().enumerate() {
        if name.contains("lora_B") {
            let random = noise(100 + index as u64, values.len());
            values.iter_mut().zip(random).for_each(|(value, random)| *value = 0.2 * random);
        }
    }
    adapter
}

fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}
