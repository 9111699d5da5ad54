//! How GGUF metadata describes a model: it is turned into the fields of a `config.json`, which the family then
//! reads as it reads any other. Knows the keys that all architectures share; what an architecture has of its own
//! stands in its family's file, as pairs of field and key.
//!
//! Files of llama.cpp say less than `config.json`: no window for mistral (its architecture is `llama`), no
//! pattern of gemma's sliding layers. What llama.cpp itself assumes there is assumed here.

use serde_json::{Map, Value as Json, json};

use crate::format::gguf::{Gguf, GgufError, Value};
use crate::model::ModelConfig;
use crate::model::config::ConfigError;
use crate::model::families::{self, Family, GgufFamily};

/// A tensor with the factors llama.cpp divides each rotary frequency by.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The fields of `config.json` that every architecture has, and their keys behind the architecture's name.
const FIELDS: [(&str, &str); 4] = [
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("max_position_embeddings", "context_length"),
];

/// The model's description from the file's metadata and tensor shapes.
pub fn config(file: &Gguf) -> Result<ModelConfig, GgufError> {
    let (family, gguf) = family(file)?;
    refuse_other_models(file, gguf.architecture)?;
    let keys = Keys { file, architecture: gguf.architecture };
    let mut fields = common(&keys)?;
    fields.insert("model_type".to_owned(), json!(family.model_type));
    fields.insert("rms_norm_eps".to_owned(), json!(keys.float("attention.layer_norm_rms_epsilon")?));
    for (field, key) in FIELDS.iter().chain(gguf.required) {
        let value = keys.scalar(key)?.ok_or_else(|| keys.missing(key))?;
        fields.insert((*field).to_owned(), value);
    }
    for (field, key) in gguf.optional {
        if let Some(value) = keys.scalar(key)? {
            fields.insert((*field).to_owned(), value);
        }
    }
    (gguf.complete)(&mut fields);
    let config = ModelConfig::from_fields(&fields)?;
    let head_dim = config.head_dim;
    match keys.count("rope.dimension_count")? {
        Some(count) if count != head_dim => Err(GgufError::Unsupported {
            what: format!("rotating {count} of {head_dim} dimensions of a head"),
            hint: "only models that rotate whole heads are read",
        }),
        _ => Ok(config),
    }
}

/// The family of the file's architecture.
pub(super) fn family(file: &Gguf) -> Result<(&'static Family, &'static GgufFamily), GgufError> {
    let architecture = file.text("general.architecture")?.unwrap_or_default();
    families::find_gguf(architecture)
        .ok_or_else(|| ConfigError::UnsupportedModel { model_type: architecture.to_owned() }.into())
}

/// Fields that are not simply another name of a key.
fn common(keys: &Keys<'_>) -> Result<Map<String, Json>, GgufError> {
    let file = keys.file;
    let mut fields = Map::new();
    let mut put = |field: &str, value: Json| fields.insert(field.to_owned(), value);
    put("vocab_size", json!(vocab_size(file)?));
    put("intermediate_size", json!(keys.count("feed_forward_length")?));
    put("tie_word_embeddings", json!(file.shape("output.weight").is_none()));
    // Not every layer has every part: some attend, some do not.
    let biases = [
        ("attention_bias", ".attn_q.bias"),
        ("mlp_bias", ".ffn_gate.bias"),
        ("mamba_conv_bias", ".ssm_conv1d.bias"),
        ("mamba_proj_bias", ".ssm_in.bias"),
    ];
    for (field, tensor) in biases {
        put(field, json!(file.tensor_names().any(|name| name.ends_with(tensor))));
    }
    let head_dim = keys.count("attention.key_length")?;
    put("head_dim", json!(head_dim));
    put("rope_theta", json!(keys.float("rope.freq_base")?));
    put("rope_scaling", rope_scaling(keys, head_dim)?);
    let (heads, types) = key_heads(keys)?;
    put("num_key_value_heads", json!(heads));
    put("layer_types", json!(types));
    let token = |key| -> Result<Option<u32>, GgufError> {
        Ok(file.unsigned(key)?.and_then(|id| u32::try_from(id).ok()))
    };
    let mut ends: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ends.extend(token(key)?.filter(|id| !ends.contains(id)));
    }
    put("bos_token_id", json!(token("tokenizer.ggml.bos_token_id")?));
    put("eos_token_id", json!(ends));
    put("pad_token_id", json!(token("tokenizer.ggml.padding_token_id")?));
    Ok(fields)
}

/// Heads of keys and values. Where there is one number a layer, 0 means a layer without attention, and the layers'
/// types follow from it.
fn key_heads(keys: &Keys<'_>) -> Result<(Option<usize>, Option<Vec<&'static str>>), GgufError> {
    let key = "attention.head_count_kv";
    let Some(Value::List(values)) = keys.file.get(&keys.name(key)) else {
        return Ok((keys.count(key)?, None));
    };
    let count = |value: &Value| match value {
        Value::Unsigned(count) => Some(*count),
        Value::Signed(count) => u64::try_from(*count).ok(),
        _ => None,
    };
    let counts: Option<Vec<u64>> = values.iter().map(count).collect();
    let counts = counts.filter(|counts| !counts.contains(&0) || counts.iter().any(|&count| count > 0));
    let heads = counts.as_ref().and_then(|counts| counts.iter().copied().max());
    let (Some(counts), Some(heads)) = (counts, heads) else { return Ok((keys.count(key)?, None)) };
    if counts.iter().any(|&count| count != 0 && count != heads) {
        return Err(keys.uneven(key));
    }
    let kind = |&count: &u64| if count == 0 { "linear_attention" } else { "full_attention" };
    let types = counts.contains(&0).then(|| counts.iter().map(kind).collect());
    Ok((Some(heads as usize), types))
}

fn refuse_other_models(file: &Gguf, architecture: &'static str) -> Result<(), GgufError> {
    if (Keys { file, architecture }).count("expert_count")?.is_some_and(|count| count > 0) {
        return Err(GgufError::Unsupported {
            what: "a mixture of experts".to_owned(),
            hint: "take a dense model",
        });
    }
    Ok(())
}

/// Metadata by keys behind the architecture's name.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn missing(&self, key: &str) -> GgufError {
        GgufError::MissingMetadata { key: self.name(key) }
    }

    fn uneven(&self, key: &str) -> GgufError {
        GgufError::Unsupported {
            what: format!("`{}` that differs from layer to layer", self.name(key)),
            hint: "take a model whose layers are alike",
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.file.float(&self.name(key))
    }

    fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.file.text(&self.name(key))
    }

    /// A whole number. Some converters write one value a layer; equal values mean the same as one.
    fn count(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let name = self.name(key);
        if let Some(Value::List(values)) = self.file.get(&name) {
            return match values.as_slice() {
                [first @ Value::Unsigned(number), rest @ ..] if rest.iter().all(|value| value == first) => {
                    Ok(Some(*number as usize))
                }
                [first @ Value::Signed(number), rest @ ..]
                    if *number >= 0 && rest.iter().all(|value| value == first) =>
                {
                    Ok(Some(*number as usize))
                }
                _ => Err(self.uneven(key)),
            };
        }
        Ok(self.file.unsigned(&name)?.map(|number| number as usize))
    }

    /// A number or a flag, as JSON has it.
    fn scalar(&self, key: &str) -> Result<Option<Json>, GgufError> {
        Ok(match self.file.get(&self.name(key)) {
            Some(Value::Float(number)) => Some(json!(number)),
            Some(Value::Bool(flag)) => Some(json!(flag)),
            _ => self.count(key)?.map(|count| json!(count)),
        })
    }
}

/// The rows of the embedding are what counts; `vocab_size` may be absent.
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

fn rope_scaling(keys: &Keys<'_>, head_dim: Option<usize>) -> Result<Json, GgufError> {
    if keys.file.shape(ROPE_FACTORS).is_some() {
        return llama3_scaling(keys, head_dim);
    }
    let linear = keys.float("rope.scaling.factor")?.or(keys.float("rope.scale_linear")?);
    match (keys.text("rope.scaling.type")?, linear) {
        (Some("none"), _) | (None, None) | (None | Some("linear"), Some(1.0)) => Ok(Json::Null),
        (None | Some("linear"), Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
        (Some(other), _) => Err(GgufError::Unsupported {
            what: format!("rope scaling `{other}`"),
            hint: "supported: none, linear, and llama 3's factors",
        }),
    }
}

/// Files keep llama 3's scaling only as its result, a factor per frequency. Every released model has the bands
/// 1 and 4; with them the factors are computed anew and compared, so a wrong guess is an error.
fn llama3_scaling(keys: &Keys<'_>, head_dim: Option<usize>) -> Result<Json, GgufError> {
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    let heads = keys.count("attention.head_count")?.filter(|&heads| heads > 0);
    let hidden = keys.count("embedding_length")?;
    let head_dim = head_dim.or(hidden.zip(heads).map(|(hidden, heads)| hidden / heads)).unwrap_or(0);
    let tensor = keys.file.tensor(ROPE_FACTORS).filter(|tensor| tensor.shape == [head_dim / 2]);
    let mut factors = vec![0.0; head_dim / 2];
    if let Some(tensor) = &tensor {
        tensor.decode_rows(0, &mut factors);
    }
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let original =
        keys.count("rope.scaling.original_context_length")?.filter(|&length| length > 0).unwrap_or(8192);
    let (low, high) = (1.0f64, 4.0f64);
    let expected = |i: usize| {
        let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
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
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }))
}

#[cfg(test)]
mod tests;
