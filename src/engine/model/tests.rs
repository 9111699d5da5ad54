//! The model against golden values of transformers and PEFT, and against itself: packed as unpacked, cached
//! as whole, gradients as finite differences, any thread count as one.
//!
//! Golden values: `tests/golden/tiny_models.py` and `lora_golden.py` (torch 2.15.0, transformers 5.23.0,
//! peft 0.21.2, bitsandbytes 0.50.2), float32 on the CPU.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::{Model, ModelConfig, ModelError, Pack, Rope, RopeScaling, Tensors, Workspace};
use crate::adapter::{Adapter, Gradients, LoraConfig, Targets};
use crate::backend::{BackendKind, Compute};
use crate::format::Checkpoint;
use crate::matrix::{Bytes, Matrix, Values};
use crate::quant::Nf4;
use crate::quant::nested::{DoubleQuantized, dynamic_map};

mod golden;
mod properties;
mod speed;

const REFERENCE: Compute = Compute { kind: BackendKind::Reference, threads: 1 };
const CPU: Compute = Compute { kind: BackendKind::Cpu, threads: 2 };

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama")
}

/// NF4 with double quantisation, as bitsandbytes makes it.
fn quantized(matrix: &Matrix) -> Matrix {
    let plain = Nf4::encode(&matrix.to_f32());
    let absmax = DoubleQuantized::encode(&plain.absmax).decode(&dynamic_map(true));
    Matrix { values: Values::Nf4(Nf4 { absmax: absmax.into(), ..plain }), ..*matrix }
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

/// A model of the given shape with random weights, the head and norms aside in `stored`.
fn random_model(config: &ModelConfig, stored: Stored, device: &Compute) -> Model {
    let seed_of =
        |name: &str| name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let width = config.num_attention_heads * config.head_dim;
    let kv_width = config.num_key_value_heads * config.head_dim;
    let (c, i) = (config.hidden_size, config.intermediate_size);
    let shape = |name: &str| match name.rsplit('.').nth(1).unwrap() {
        "q_proj" => (width, c),
        "k_proj" | "v_proj" => (kv_width, c),
        "o_proj" => (c, width),
        "gate_proj" | "up_proj" => (i, c),
        "down_proj" => (c, i),
        _ => (config.vocab_size, c),
    };
    let matrix = |name: &str| {
        let (rows, cols) = shape(name);
        let bound = 1.5 / (cols as f32).sqrt();
        let values: Vec<f32> = noise(seed_of(name), rows * cols).iter().map(|value| value * bound).collect();
        if name.ends_with("_proj.weight") && stored == Stored::Nf4 {
            return Ok(Matrix { rows, cols, values: Values::Nf4(Nf4::encode(&values)) });
        }
        let bytes = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
        match stored {
            Stored::F32 => Ok(Matrix::from_f32(rows, cols, &values)),
            Stored::Nf4 => Ok(Matrix { rows, cols, values: Values::Bf16(Bytes::owned(bytes)) }),
        }
    };
    let vector = |name: &str| {
        let len = match name.rsplit('.').nth(1).unwrap() {
            "q_proj" => width,
            "k_proj" | "v_proj" => kv_width,
            "gate_proj" | "up_proj" => i,
            _ => c,
        };
        Ok(noise(seed_of(name), len).iter().map(|value| 1.0 + 0.2 * value).collect())
    };
    Model::assemble(config.clone(), &Tensors { matrix: &matrix, vector: &vector }, device).unwrap()
}

/// An odd little model: nothing is a multiple of 64, biases everywhere.
fn odd_config() -> ModelConfig {
    ModelConfig {
        model_type: "llama".into(),
        hidden_size: 20,
        intermediate_size: 28,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        vocab_size: 37,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 2.0 } },
        tie_word_embeddings: true,
        attention_bias: true,
        mlp_bias: true,
        bos_token_id: None,
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
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
