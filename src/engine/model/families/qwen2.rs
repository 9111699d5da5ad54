//! qwen2 (Qwen2, Qwen2.5): a llama whose q, k and v always have biases and whose o never has one. The layers
//! from `max_window_layers` on slide, but only where `use_sliding_window` says so; released files do not.

use serde_json::{Map, Value, json};

use super::{Family, GgufFamily};
use crate::model::config::fields::Fields;
use crate::model::config::{ConfigError, Gate, Mixing, ModelConfig, Positions, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily::plain("qwen2")),
};

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "intermediate_size")?;
    config.rope = fields.rope()?;
    config.attention.input_bias = true;
    config.layers = layers(fields, config.layers.len())?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    let mut own = sliding(config);
    own.insert("hidden_act".to_owned(), json!(gate_name(config.mlp.activation)));
    Value::Object(own)
}

/// Full attention, and sliding attention from `max_window_layers` on where it is used at all.
pub(super) fn layers(fields: &Fields<'_>, layers: usize) -> Result<Vec<Mixing>, ConfigError> {
    let window = match fields.flag("use_sliding_window")? {
        true => fields.dimension_unless_null("sliding_window", 4096)?,
        false => None,
    };
    let first = fields.count_or("max_window_layers", 28)?;
    let default = |layer| match window {
        Some(_) if layer >= first => "sliding_attention",
        _ => "full_attention",
    };
    fields.layer_types(layers, default)?.into_iter().map(|kind| mixing(kind, window)).collect()
}

fn mixing(kind: &str, window: Option<usize>) -> Result<Mixing, ConfigError> {
    match (kind, window) {
        ("full_attention", _) => Ok(Mixing::FULL),
        ("sliding_attention", Some(_)) => Ok(Mixing::Attention { window, positions: Positions::Global }),
        ("sliding_attention", None) => Err(ConfigError::Missing { field: "sliding_window".to_owned() }),
        (other, _) => Err(ConfigError::Unsupported {
            field: "layer_types".to_owned(),
            got: other.to_owned(),
            supported: "full_attention, sliding_attention",
        }),
    }
}

/// The fields that `layers` reads.
pub(super) fn sliding(config: &ModelConfig) -> Map<String, Value> {
    let types = config.layer_types();
    let window = config.sliding_window();
    let full = types.iter().take_while(|kind| **kind == "full_attention").count();
    let fields = [
        ("layer_types", json!(types)),
        ("max_window_layers", json!(full)),
        ("sliding_window", json!(window)),
        ("use_sliding_window", json!(window.is_some())),
    ];
    fields.into_iter().map(|(field, value)| (field.to_owned(), value)).collect()
}
