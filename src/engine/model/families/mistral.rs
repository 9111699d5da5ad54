//! mistral: a llama without biases whose layers all slide, where `sliding_window` is a number (version 0.1 of
//! the 7B; later ones say null). GGUF files of it are llama's, without a window.

use serde_json::{Value, json};

use super::Family;
use crate::model::config::fields::Fields;
use crate::model::config::{ConfigError, Gate, Mixing, ModelConfig, Positions, gate_name};

pub(super) const FAMILY: Family =
    Family { model_type: "mistral", architecture: "MistralForCausalLM", read, write, gguf: None };

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "intermediate_size")?;
    config.rope = fields.rope()?;
    let window = fields.dimension_unless_null("sliding_window", 4096)?;
    config.layers.fill(Mixing::Attention { window, positions: Positions::Global });
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    json!({
        "hidden_act": gate_name(config.mlp.activation),
        "sliding_window": config.sliding_window(),
    })
}
