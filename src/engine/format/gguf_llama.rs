//! How GGUF files describe llama models: metadata keys, tensor names and the order of the q and k rows. Knows
//! the container (`gguf`) and Hugging Face's names; nothing of what is computed with the tensors.
//!
//! convert_hf_to_gguf reorders the rows of q and k within each head, from (half, i) to (i, half), because
//! llama.cpp rotates neighbouring pairs where Hugging Face rotates the two halves. `reorder` undoes it, so the
//! rest of the engine knows Hugging Face's order alone.

use std::collections::BTreeMap;

use crate::backend::{Activation, LogitMap};
use crate::format::gguf::{Gguf, GgufError, Value};
use crate::format::tensor::Tensor;
use crate::model::config::ConfigError;
use crate::model::{
    AttentionOptions, Mixing, MlpLayout, MlpOptions, ModelConfig, NormOptions, Rope, RopeScaling,
};

/// A tensor with the factors llama.cpp divides each rotary frequency by.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// GGUF's name for a part of a layer, and Hugging Face's.
const LAYER_PARTS: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The model's description from the file's metadata and tensor shapes.
pub fn config(file: &Gguf) -> Result<ModelConfig, GgufError> {
    refuse_other_models(file)?;
    let hidden_size = required(file, "llama.embedding_length")?;
    let num_attention_heads = required(file, "llama.attention.head_count")?;
    let head_dim = match optional(file, "llama.attention.key_length")? {
        Some(length) => length,
        None if num_attention_heads == 0 => 0,
        None => hidden_size / num_attention_heads,
    };
    let token = |key| -> Result<Option<u32>, GgufError> {
        Ok(optional(file, key)?.and_then(|id| u32::try_from(id).ok()))
    };
    let eos = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let mut eos_token_ids: Vec<u32> = Vec::new();
    for key in eos {
        eos_token_ids.extend(token(key)?.filter(|id| !eos_token_ids.contains(id)));
    }
    let config = ModelConfig {
        model_type: "llama".to_owned(),
        hidden_size,
        intermediate_size: required(file, "llama.feed_forward_length")?,
        num_attention_heads,
        num_key_value_heads: optional(file, "llama.attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size: vocab_size(file)?,
        max_position_embeddings: required(file, "llama.context_length")?,
        rms_norm_eps: file.float("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5) as f32,
        rope: rope(file, head_dim)?,
        tie_word_embeddings: file.shape("output.weight").is_none(),
        layers: vec![Mixing::FULL; required(file, "llama.block_count")?],
        local_rope: None,
        attention: AttentionOptions {
            input_bias: file.shape("blk.0.attn_q.bias").is_some(),
            output_bias: file.shape("blk.0.attn_output.bias").is_some(),
            ..AttentionOptions::plain(head_dim)
        },
        mamba: None,
        mlp: MlpOptions {
            activation: Activation::Silu,
            bias: file.shape("blk.0.ffn_gate.bias").is_some(),
            layout: MlpLayout::Apart,
        },
        norms: NormOptions { sandwich: false, offset: false },
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits: LogitMap::IDENTITY,
        bos_token_id: token("tokenizer.ggml.bos_token_id")?,
        eos_token_ids,
        pad_token_id: token("tokenizer.ggml.padding_token_id")?,
    };
    config.validate()?;
    match optional(file, "llama.rope.dimension_count")? {
        Some(count) if count != head_dim => Err(GgufError::Unsupported {
            what: format!("rotating {count} of {head_dim} dimensions of a head"),
            hint: "only models that rotate whole heads are read",
        }),
        _ => Ok(config),
    }
}

/// Hugging Face's name of every tensor -> its name in the file.
pub fn names(file: &Gguf) -> Result<BTreeMap<String, String>, GgufError> {
    let mut names = BTreeMap::new();
    for stored in file.tensor_names().filter(|&name| name != ROPE_FACTORS) {
        let name = hugging_face_name(stored).ok_or_else(|| GgufError::BadTensor {
            tensor: stored.to_owned(),
            what: "llama models have no such tensor".to_owned(),
        })?;
        names.insert(name, stored.to_owned());
    }
    Ok(names)
}

/// Marks q and k as interleaved, where `name` is one of them and its rows are whole heads.
pub fn reorder(name: &str, mut tensor: Tensor, config: &ModelConfig) -> Tensor {
    let rotated = name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
    let whole_heads = tensor.shape[0].is_multiple_of(config.head_dim);
    tensor.interleaved = (rotated && whole_heads).then_some(config.head_dim);
    tensor
}

fn hugging_face_name(stored: &str) -> Option<String> {
    match stored {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = stored.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.')?;
    let (_, name) = LAYER_PARTS.iter().find(|(theirs, _)| *theirs == part)?;
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{name}.{kind}"))
}

fn refuse_other_models(file: &Gguf) -> Result<(), GgufError> {
    let architecture = file.text("general.architecture")?.unwrap_or_default();
    if architecture != "llama" {
        return Err(ConfigError::UnsupportedModel { model_type: architecture.to_owned() }.into());
    }
    if optional(file, "split.count")?.is_some_and(|count| count > 1) {
        return Err(GgufError::Unsupported {
            what: "a model split over several files".to_owned(),
            hint: "join it with `llama-gguf-split --merge`",
        });
    }
    if optional(file, "llama.expert_count")?.is_some_and(|count| count > 0) {
        return Err(GgufError::Unsupported {
            what: "a mixture of experts".to_owned(),
            hint: "take a dense model",
        });
    }
    Ok(())
}

/// The rows of the embedding are what counts; `llama.vocab_size` may be absent.
fn vocab_size(file: &Gguf) -> Result<usize, GgufError> {
    let tensor = "token_embd.weight";
    match file.shape(tensor) {
        Some([rows, _]) => Ok(*rows),
        Some(shape) => Err(GgufError::BadTensor {
            tensor: tensor.to_owned(),
            what: format!("has shape {shape:?}, expected two dimensions"),
        }),
        None => Err(GgufError::BadTensor { tensor: tensor.to_owned(), what: "is missing".to_owned() }),
    }
}

fn rope(file: &Gguf, head_dim: usize) -> Result<Rope, GgufError> {
    let theta = file.float("llama.rope.freq_base")?.unwrap_or(10_000.0) as f32;
    let linear = file.float("llama.rope.scaling.factor")?.or(file.float("llama.rope.scale_linear")?);
    let kind = file.text("llama.rope.scaling.type")?;
    let scaling = match (kind, linear) {
        _ if file.shape(ROPE_FACTORS).is_some() => llama3_scaling(file, theta, head_dim)?,
        (Some("none"), _) | (None, None) => RopeScaling::None,
        (None | Some("linear"), Some(1.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor: factor as f32 },
        (Some(other), _) => {
            return Err(GgufError::Unsupported {
                what: format!("rope scaling `{other}`"),
                hint: "supported: none, linear, and llama 3's factors",
            });
        }
    };
    Ok(Rope { theta, scaling })
}

/// Files keep llama 3's scaling only as its result, a factor per frequency. Every released model has the bands
/// 1 and 4; with them the factors are computed anew and compared, so a wrong guess is an error.
fn llama3_scaling(file: &Gguf, theta: f32, head_dim: usize) -> Result<RopeScaling, GgufError> {
    let tensor = file.tensor(ROPE_FACTORS).filter(|tensor| tensor.shape == [head_dim / 2]);
    let mut factors = vec![0.0; head_dim / 2];
    if let Some(tensor) = &tensor {
        tensor.decode_rows(0, &mut factors);
    }
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let original = optional(file, "llama.rope.scaling.original_context_length")?
        .filter(|&length| length > 0)
        .unwrap_or(8192);
    let (low, high) = (1.0f64, 4.0f64);
    let expected = |i: usize| {
        let frequency = f64::from(theta).powf(-2.0 * i as f64 / head_dim as f64);
        let turns = original as f64 * frequency / std::f64::consts::TAU;
        match turns {
            turns if turns < low => f64::from(factor),
            turns if turns > high => 1.0,
            turns => {
                let smooth = (turns - low) / (high - low);
                1.0 / ((1.0 - smooth) / f64::from(factor) + smooth)
            }
        }
    };
    let agree = |(i, &factor): (usize, &f32)| (f64::from(factor) / expected(i) - 1.0).abs() < 1e-3;
    if tensor.is_none() || !factors.iter().enumerate().all(agree) {
        return Err(GgufError::Unsupported {
            what: format!("the rope scaling in tensor `{ROPE_FACTORS}`"),
            hint: "only llama 3's bands (1 and 4) are known; take the safetensors files of the model",
        });
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low as f32,
        high_freq_factor: high as f32,
        original_max_position_embeddings: original,
    })
}

fn required(file: &Gguf, key: &str) -> Result<usize, GgufError> {
    optional(file, key)?.ok_or_else(|| GgufError::MissingMetadata { key: key.to_owned() })
}

fn optional(file: &Gguf, key: &str) -> Result<Option<usize>, GgufError> {
    // Some converters write one value a layer; equal values mean the same as one.
    if let Some(Value::List(values)) = file.get(key) {
        return match values.as_slice() {
            [first @ Value::Unsigned(number), rest @ ..] if rest.iter().all(|value| value == first) => {
                Ok(Some(*number as usize))
            }
            [first @ Value::Signed(number), rest @ ..]
                if *number >= 0 && rest.iter().all(|value| value == first) =>
            {
                Ok(Some(*number as usize))
            }
            _ => Err(GgufError::Unsupported {
                what: format!("`{key}` that differs from layer to layer"),
                hint: "take a model whose layers are alike",
            }),
        };
    }
    Ok(file.unsigned(key)?.map(|number| number as usize))
}
