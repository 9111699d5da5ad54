//! granite (3.x, dense): a llama with four factors: of the embeddings, of what each block adds to the stream,
//! of the scores (in place of one over the square root of the heads' size), and a divisor of the logits.

use serde_json::{Map, Value, json};

use super::{Family, GgufFamily};
use crate::model::config::fields::{Fields, number};
use crate::model::config::{ConfigError, Gate, ModelConfig, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily { interleaved: true, required: GGUF_FACTORS, ..GgufFamily::plain("granite") }),
};

/// The factors in GGUF files.
pub(super) const GGUF_FACTORS: &[(&str, &str)] = &[
    ("attention_multiplier", "attention.scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("logits_scaling", "logit_scale"),
    ("residual_multiplier", "residual_scale"),
];

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "intermediate_size")?;
    config.rope = fields.rope()?;
    config.mlp.bias = fields.flag("mlp_bias")?;
    read_factors(&mut config, fields)?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    let mut own = factors(config);
    own.insert("mlp_bias".to_owned(), json!(config.mlp.bias));
    Value::Object(own)
}

/// The factors, and the biases of attention.
pub(super) fn read_factors(config: &mut ModelConfig, fields: &Fields<'_>) -> Result<(), ConfigError> {
    config.embedding_multiplier = fields.number_or("embedding_multiplier", 1.0)?;
    config.residual_multiplier = fields.number_or("residual_multiplier", 1.0)?;
    config.attention.scale = fields.number_or("attention_multiplier", 1.0)?;
    config.logits.scale = (1.0 / fields.wide_number("logits_scaling")?.unwrap_or(1.0)) as f32;
    config.attention.input_bias = fields.flag("attention_bias")?;
    config.attention.output_bias = config.attention.input_bias;
    Ok(())
}

/// The fields that `read_factors` reads.
pub(super) fn factors(config: &ModelConfig) -> Map<String, Value> {
    let fields = [
        ("attention_bias", json!(config.attention.input_bias)),
        ("attention_multiplier", number(config.attention.scale)),
        ("embedding_multiplier", number(config.embedding_multiplier)),
        ("hidden_act", json!(gate_name(config.mlp.activation))),
        ("logits_scaling", divisor(config.logits.scale)),
        ("residual_multiplier", number(config.residual_multiplier)),
    ];
    fields.into_iter().map(|(field, value)| (field.to_owned(), value)).collect()
}

/// The divisor that reads back as `scale`: a short number where there is one.
fn divisor(scale: f32) -> Value {
    let exact = 1.0 / f64::from(scale);
    let short = exact as f32;
    if (1.0 / f64::from(short)) as f32 == scale { number(short) } else { json!(exact) }
}
