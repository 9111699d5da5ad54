//! A model's description as Hugging Face's `config.json` names it, with its reader and its writer. Knows
//! nothing of weights or of blocks; GGUF metadata is turned into this type by `format::gguf_llama`.
//!
//! Both generations of field names are read: `rope_theta` + `rope_scaling` + `torch_dtype` of the Hub's files
//! and `rope_parameters` + `dtype` of transformers 5. The writer uses the old names, which every reader knows.

use serde_json::{Map, Value, json};
use thiserror::Error;

/// The model families this build can run.
const MODEL_TYPES: [&str; 1] = ["llama"];

/// No dimension of a real model comes near these; beyond them a file is taken to be corrupt.
const DIMENSION_MAX: u64 = 1 << 24;
const LAYERS_MAX: u64 = 4096;

/// A decoder's description. Names follow Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`: `llama`.
    pub model_type: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: Rope,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a text.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear { factor: f32 },
    /// Llama 3.1's bands.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: usize,
    },
}

/// A description that cannot be read or run.
#[derive(Debug, Error, PartialEq)]
pub enum ConfigError {
    #[error("not JSON: {cause}")]
    NotJson { cause: String },
    #[error("field `{field}` is missing")]
    Missing { field: String },
    #[error("field `{field}` is `{got}`, expected {expected}")]
    Invalid { field: String, got: String, expected: &'static str },
    #[error("model_type `{model_type}` is not supported yet; supported: {}", MODEL_TYPES.join(", "))]
    UnsupportedModel { model_type: String },
    #[error("`{field}` of `{got}` is not supported yet; supported: {supported}")]
    Unsupported { field: String, got: String, supported: &'static str },
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| ConfigError::NotJson { cause: error.to_string() })?;
        let fields = Fields(
            value
                .as_object()
                .ok_or_else(|| ConfigError::NotJson { cause: "the top level is no object".to_owned() })?,
        );
        let model_type = fields.text("model_type")?.unwrap_or_default();
        ensure_supported_model(model_type)?;
        refuse_other_values(&fields)?;
        let hidden_size = fields.dimension("hidden_size")?;
        let num_attention_heads = fields.dimension("num_attention_heads")?;
        let config = Self {
            model_type: model_type.to_owned(),
            hidden_size,
            intermediate_size: fields.dimension("intermediate_size")?,
            num_hidden_layers: fields.dimension("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: fields.dimension_or("num_key_value_heads", num_attention_heads)?,
            head_dim: fields.dimension_or("head_dim", hidden_size / num_attention_heads)?,
            vocab_size: fields.dimension("vocab_size")?,
            max_position_embeddings: fields.dimension_or("max_position_embeddings", 2048)?,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: rope(&fields)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what every reader must hold: sane sizes, and heads that divide.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ensure_supported_model(&self.model_type)?;
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, size) in sizes {
            if size == 0 || size as u64 > DIMENSION_MAX {
                return Err(invalid(field, &size, "a positive whole number below 16777217"));
            }
        }
        if self.num_hidden_layers == 0 || self.num_hidden_layers as u64 > LAYERS_MAX {
            return Err(invalid("num_hidden_layers", &self.num_hidden_layers, "1 to 4096"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(invalid(
                "num_key_value_heads",
                &self.num_key_value_heads,
                "a divisor of num_attention_heads",
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", &self.head_dim, "an even number"));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Err(invalid("rms_norm_eps", &self.rms_norm_eps, "a number from 0 to 1"));
        }
        if !(self.rope.theta > 0.0 && self.rope.theta.is_finite()) {
            return Err(invalid("rope_theta", &self.rope.theta, "a positive number"));
        }
        Ok(())
    }

    /// The `config.json` other tools read. Keys are sorted, so equal descriptions give equal bytes.
    pub fn to_json(&self) -> Map<String, Value> {
        let scaling = match self.rope.scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"factor": number(factor), "rope_type": "linear"}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "factor": number(factor),
                "high_freq_factor": number(high_freq_factor),
                "low_freq_factor": number(low_freq_factor),
                "original_max_position_embeddings": original_max_position_embeddings,
                "rope_type": "llama3",
            }),
        };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [only] => json!(only),
            several => json!(several),
        };
        let value = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": self.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": number(self.rms_norm_eps),
            "rope_scaling": scaling,
            "rope_theta": number(self.rope.theta),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        match value {
            Value::Object(map) => map,
            _ => unreachable!("BUG: the literal above is an object"),
        }
    }
}

/// Refuses every family but the supported ones, by name.
pub(crate) fn ensure_supported_model(model_type: &str) -> Result<(), ConfigError> {
    if MODEL_TYPES.contains(&model_type) {
        return Ok(());
    }
    Err(ConfigError::UnsupportedModel { model_type: model_type.to_owned() })
}

/// Settings a llama file may carry that would change its results if they were ignored.
fn refuse_other_values(fields: &Fields<'_>) -> Result<(), ConfigError> {
    match fields.text("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(ConfigError::Unsupported {
            field: "hidden_act".to_owned(),
            got: other.to_owned(),
            supported: "silu",
        }),
    }
}

fn rope(fields: &Fields<'_>) -> Result<Rope, ConfigError> {
    let empty = Map::new();
    let parameters = fields.object("rope_parameters")?;
    let scaling = Fields(parameters.or(fields.object("rope_scaling")?).unwrap_or(&empty));
    let theta = match scaling.number("rope_theta")? {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = match scaling.text("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.text("type")?,
    };
    let scaling = match kind {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: scaling.positive("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: scaling.positive("factor")?,
            low_freq_factor: scaling.positive("low_freq_factor")?,
            high_freq_factor: scaling.positive("high_freq_factor")?,
            original_max_position_embeddings: scaling.dimension("original_max_position_embeddings")?,
        },
        Some(other) => {
            return Err(ConfigError::Unsupported {
                field: "rope_scaling".to_owned(),
                got: other.to_owned(),
                supported: "default, linear, llama3",
            });
        }
    };
    Ok(Rope { theta, scaling })
}

/// Typed access to the fields of a JSON object; `null` counts as absent.
struct Fields<'json>(&'json Map<String, Value>);

impl<'json> Fields<'json> {
    fn get(&self, field: &str) -> Option<&'json Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn text(&self, field: &str) -> Result<Option<&'json str>, ConfigError> {
        self.typed(field, "a text", Value::as_str)
    }

    fn object(&self, field: &str) -> Result<Option<&'json Map<String, Value>>, ConfigError> {
        self.typed(field, "an object", Value::as_object)
    }

    fn flag(&self, field: &str) -> Result<bool, ConfigError> {
        Ok(self.typed(field, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn number(&self, field: &str) -> Result<Option<f32>, ConfigError> {
        Ok(self.typed(field, "a number", Value::as_f64)?.map(|value| value as f32))
    }

    fn positive(&self, field: &str) -> Result<f32, ConfigError> {
        let value = self.number(field)?.ok_or_else(|| ConfigError::Missing { field: field.to_owned() })?;
        if value > 0.0 && value.is_finite() {
            return Ok(value);
        }
        Err(invalid(field, &value, "a positive number"))
    }

    fn dimension(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_dimension(field)?.ok_or_else(|| ConfigError::Missing { field: field.to_owned() })
    }

    fn dimension_or(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_dimension(field)?.unwrap_or(default))
    }

    fn optional_dimension(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let expected = "a positive whole number below 16777217";
        match self.typed(field, expected, Value::as_u64)? {
            None => Ok(None),
            Some(value) if (1..=DIMENSION_MAX).contains(&value) => Ok(Some(value as usize)),
            Some(value) => Err(invalid(field, &value, expected)),
        }
    }

    /// One id or a list of them.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let expected = "a token id or a list of token ids";
        let id = |value: &Value| {
            // transformers writes -1 for "none" in some old files.
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| invalid(field, &value, expected))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(single) => Ok(vec![id(single)?]),
        }
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &'static str,
        read: impl FnOnce(&'json Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| invalid(field, &value, expected)),
        }
    }
}

fn invalid(field: &str, got: &impl ToString, expected: &'static str) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), got: got.to_string(), expected }
}

/// The shortest decimal that reads back as the same f32 (`1e-5`, not `9.999999747378752e-6`).
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOLLM2: &str = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}"#;

    fn with(field: &str, value: Value) -> Result<ModelConfig, ConfigError> {
        let mut config: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
        config.insert(field.to_owned(), value);
        ModelConfig::from_json(&serde_json::to_string(&config).unwrap())
    }

    #[test]
    fn head_dim_defaults_to_hidden_size_over_heads() {
        let config = ModelConfig::from_json(SMOLLM2).unwrap();
        assert_eq!(config.head_dim, 64);
        assert_eq!(config.rope, Rope { theta: 100_000.0, scaling: RopeScaling::None });
        assert_eq!(config.eos_token_ids, [2]);
    }

    #[test]
    fn old_and_new_rope_fields_mean_the_same() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let mut new = scaling.clone();
        new["rope_theta"] = json!(100_000.0);
        assert_eq!(with("rope_scaling", scaling).unwrap(), with("rope_parameters", new).unwrap());
        let linear = with("rope_scaling", json!({"type": "linear", "factor": 2.0})).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn golden_config_of_transformers_5_is_read() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/llama/config.json");
        let config = ModelConfig::from_json(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(
            (config.head_dim, config.num_key_value_heads, config.rope.theta, config.pad_token_id),
            (16, 2, 500_000.0, Some(0))
        );
    }

    #[test]
    fn written_config_reads_back_equal() {
        let mut config = with("eos_token_id", json!([2, 7])).unwrap();
        config.rope.scaling = RopeScaling::Linear { factor: 1.7 };
        let text = serde_json::to_string(&config.to_json()).unwrap();
        assert!(
            text.contains("\"rms_norm_eps\":0.00001,") || text.contains("\"rms_norm_eps\":1e-5,"),
            "{text}"
        );
        assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
    }

    #[test]
    fn other_families_are_refused_by_name() {
        let error = with("model_type", json!("gemma2")).unwrap_err();
        assert_eq!(error.to_string(), "model_type `gemma2` is not supported yet; supported: llama");
    }

    #[test]
    fn senseless_values_are_refused_by_field() {
        for (field, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-4)),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(2)),
            ("vocab_size", json!(1u64 << 40)),
            ("num_hidden_layers", json!(100_000)),
            ("head_dim", json!(63)),
            ("rms_norm_eps", json!("small")),
            ("eos_token_id", json!("</s>")),
            ("rope_theta", json!(0)),
            ("hidden_act", json!("gelu")),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
        ] {
            let error = with(field, value.clone()).unwrap_err().to_string();
            assert!(error.contains(field), "{field} = {value}: {error}");
        }
    }
}
