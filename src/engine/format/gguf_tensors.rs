//! How GGUF files name and store the tensors of a model: which of theirs is which of Hugging Face's, and what
//! llama.cpp's converter did to the values. Undone here, so that the rest of the engine knows Hugging Face's
//! alone:
//!
//! * rows of q and k are reordered within each head, from (half, i) to (i, half), where the architecture rotates
//!   neighbouring pairs instead of halves (llama and granite);
//! * gemma's norms have the 1 added that Hugging Face adds while computing;
//! * Mamba's A is -exp(A_log), and its small tensors have other shapes;
//! * gate and up of a shared MLP are apart.

use std::collections::BTreeMap;

use crate::format::gguf::{Gguf, GgufError};
use crate::format::gguf_model::{ROPE_FACTORS, family};
use crate::format::tensor::{Tensor, TensorData};
use crate::matrix::Bytes;
use crate::model::{MlpLayout, ModelConfig, tensors};

/// Where a tensor lies in the file and how its values are to be changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Names in the file; several are stacked, row upon row.
    parts: Vec<String>,
    change: Change,
    /// Hugging Face's shape, where theirs is another with as many values.
    shape: Option<Vec<usize>>,
}

/// What undoes the converter's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    /// Rows of each head of so many dimensions back into halves.
    Heads(usize),
    /// Values less 1.
    LessOne,
    /// The logarithm of the negative values.
    LogOfNegative,
}

/// Hugging Face's name of every tensor -> where it is in the file. A tensor that the model has no use for is an
/// error.
pub fn names(file: &Gguf, config: &ModelConfig) -> Result<BTreeMap<String, Stored>, GgufError> {
    let (_, gguf) = family(file)?;
    let specs = tensors(config).expect("the description was validated as it was read");
    let shapes: BTreeMap<String, Vec<usize>> =
        specs.into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let mut names: BTreeMap<String, Stored> = BTreeMap::new();
    for stored in file.tensor_names().filter(|&name| name != ROPE_FACTORS) {
        let known = hugging_face_name(stored, config).and_then(|name| shapes.get_key_value(&name));
        let (name, shape) = known.ok_or_else(|| GgufError::BadTensor {
            tensor: stored.to_owned(),
            what: format!("this `{}` model has no such tensor", config.model_type),
        })?;
        let rotated = name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
        let change = match () {
            () if rotated && gguf.interleaved => Change::Heads(config.head_dim),
            () if name.ends_with("norm.weight") && config.norms.offset => Change::LessOne,
            () if name.ends_with(".A_log") => Change::LogOfNegative,
            () => Change::Nothing,
        };
        let shape = name.contains(".mamba.").then(|| shape.clone());
        let fresh = Stored { parts: Vec::new(), change, shape };
        // Sorted names bring `ffn_gate` before `ffn_up`, the order in which they are stacked.
        names.entry(name.clone()).or_insert(fresh).parts.push(stored.to_owned());
    }
    Ok(names)
}

/// Reads a tensor; `None` where the file lacks it.
pub fn read(file: &Gguf, stored: &Stored) -> Result<Option<Tensor>, GgufError> {
    let parts: Option<Vec<Tensor>> = stored.parts.iter().map(|name| file.tensor(name)).collect();
    let Some(mut parts) = parts else { return Ok(None) };
    let mut tensor = match parts.len() {
        1 => parts.remove(0),
        _ => stacked(&parts, &stored.parts)?,
    };
    match stored.change {
        Change::Nothing => {}
        Change::Heads(head_dim) => {
            let whole_heads = tensor.shape[0].is_multiple_of(head_dim);
            tensor.interleaved = whole_heads.then_some(head_dim);
        }
        Change::LessOne => tensor = mapped(&tensor, |value| value - 1.0),
        Change::LogOfNegative => tensor = mapped(&tensor, |value| (-value).ln()),
    }
    if let Some(shape) = stored.shape.as_ref().filter(|shape| shape.iter().product::<usize>() == tensor.len())
    {
        tensor.shape.clone_from(shape);
    }
    Ok(Some(tensor))
}

/// A tensor of changed values; for small ones.
fn mapped(tensor: &Tensor, change: impl Fn(f32) -> f32) -> Tensor {
    let mut values = vec![0.0; tensor.len()];
    tensor.decode_rows(0, &mut values);
    floats(tensor.shape.clone(), values.into_iter().map(change))
}

fn floats(shape: Vec<usize>, values: impl Iterator<Item = f32>) -> Tensor {
    let bytes = values.flat_map(f32::to_le_bytes).collect();
    Tensor { shape, data: TensorData::F32(Bytes::owned(bytes)), interleaved: None }
}

/// Matrices of equal width, one above the other, in their own encoding where they share one.
fn stacked(parts: &[Tensor], names: &[String]) -> Result<Tensor, GgufError> {
    let (first, last) = (&parts[0], &parts[parts.len() - 1]);
    if parts.len() != 2 || first.shape.len() != 2 || first.cols() != last.cols() || last.shape.len() != 2 {
        return Err(GgufError::BadTensor {
            tensor: names[0].clone(),
            what: format!("cannot be stacked with `{}`", names[names.len() - 1]),
        });
    }
    let shape = vec![first.rows() + last.rows(), first.cols()];
    let joined = |a: &Bytes, b: &Bytes| Bytes::owned([a.as_slice(), b.as_slice()].concat());
    let data = match (&first.data, &last.data) {
        (TensorData::F32(a), TensorData::F32(b)) => TensorData::F32(joined(a, b)),
        (TensorData::Bf16(a), TensorData::Bf16(b)) => TensorData::Bf16(joined(a, b)),
        (TensorData::F16(a), TensorData::F16(b)) => TensorData::F16(joined(a, b)),
        (TensorData::Blocks(format, a), TensorData::Blocks(other, b)) if format == other => {
            TensorData::Blocks(*format, joined(a, b))
        }
        _ => {
            let mut values = vec![0.0; first.len() + last.len()];
            let (upper, lower) = values.split_at_mut(first.len());
            first.decode_rows(0, upper);
            last.decode_rows(0, lower);
            return Ok(floats(shape, values.into_iter()));
        }
    };
    Ok(Tensor { shape, data, interleaved: None })
}

fn hugging_face_name(stored: &str, config: &ModelConfig) -> Option<String> {
    match stored {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = stored.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let name = match part {
        "ssm_a" => "mamba.A_log".to_owned(),
        "ssm_d" => "mamba.D".to_owned(),
        "ssm_dt.bias" => "mamba.dt_bias".to_owned(),
        _ => {
            let (part, kind) = part.split_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
            format!("{}.{kind}", part_name(part, config)?)
        }
    };
    Some(format!("model.layers.{layer}.{name}"))
}

/// Hugging Face's name of a part of a layer. With norms on both sides of a block, the same words mean other
/// norms.
fn part_name(part: &str, config: &ModelConfig) -> Option<&'static str> {
    let stacked = config.mlp.layout == MlpLayout::Stacked;
    Some(match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "post_attention_norm" if config.norms.sandwich => "post_attention_layernorm",
        "ffn_norm" if config.norms.sandwich => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" if config.norms.sandwich => "post_feedforward_layernorm",
        "ffn_gate" | "ffn_up" if stacked => "shared_mlp.input_linear",
        "ffn_down" if stacked => "shared_mlp.output_linear",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ssm_in" => "mamba.in_proj",
        "ssm_conv1d" => "mamba.conv1d",
        "ssm_norm" => "mamba.norm",
        "ssm_out" => "mamba.out_proj",
        _ => return None,
    })
}
