//! gemma2: gemma with norms after attention and MLP too, soft-capped scores and logits, scores scaled by
//! `query_pre_attn_scalar` in place of the heads' size, and every other layer sliding, the first among them.

use serde_json::{Map, Value, json};

use super::{Family, GgufFamily, gemma};
use crate::model::config::fields::{Fields, number};
use crate::model::config::{ConfigError, Mixing, ModelConfig, Positions, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily {
        required: &[("sliding_window", "attention.sliding_window")],
        optional: &[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
        complete: |fields| complete_scale(fields, 46),
        ..GgufFamily::plain("gemma2")
    }),
};

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = plain(FAMILY.model_type, fields)?;
    config.rope = fields.rope()?;
    config.attention.softcap = fields.positive_unless_null("attn_logit_softcapping", 50.0)?;
    config.logits.softcap = fields.positive_unless_null("final_logit_softcapping", 30.0)?;
    let default = |layer: usize| if layer.is_multiple_of(2) { "sliding_attention" } else { "full_attention" };
    config.layers = layers(fields, config.layers.len(), default, Positions::Global)?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    Value::Object(own(config))
}

/// What versions 2 and 3 share.
pub(super) fn plain(model_type: &str, fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = gemma::plain(model_type, fields)?;
    config.norms.sandwich = true;
    let scalar = fields.dimension_or("query_pre_attn_scalar", 256)?;
    config.attention.scale = 1.0 / (scalar as f32).sqrt();
    Ok(config)
}

/// Layers of full attention, and sliding ones that take their positions from `positions`.
pub(super) fn layers(
    fields: &Fields<'_>,
    layers: usize,
    default: impl Fn(usize) -> &'static str,
    positions: Positions,
) -> Result<Vec<Mixing>, ConfigError> {
    let window = Some(fields.dimension_or("sliding_window", 4096)?);
    let mixing = |kind| match kind {
        "full_attention" => Ok(Mixing::FULL),
        "sliding_attention" => Ok(Mixing::Attention { window, positions }),
        other => Err(ConfigError::Unsupported {
            field: "layer_types".to_owned(),
            got: other.to_owned(),
            supported: "full_attention, sliding_attention",
        }),
    };
    fields.layer_types(layers, default)?.into_iter().map(mixing).collect()
}

/// GGUF files do not tell the scale of the scores. As llama.cpp has it: that of the head's size, but for the
/// largest model, known by its number of layers.
pub(super) fn complete_scale(fields: &mut Map<String, Value>, layers_of_the_largest: u64) {
    let number = |field: &str| fields.get(field).and_then(Value::as_u64);
    let scalar = match (number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")) {
        (Some(layers), Some(hidden), Some(heads)) if layers == layers_of_the_largest => {
            hidden.checked_div(heads)
        }
        _ => number("head_dim"),
    };
    fields.insert("query_pre_attn_scalar".to_owned(), json!(scalar));
}

/// The fields that versions 2 and 3 have of their own.
pub(super) fn own(config: &ModelConfig) -> Map<String, Value> {
    let scale = config.attention.scale;
    let fields = [
        ("attention_bias", json!(config.attention.input_bias)),
        ("attn_logit_softcapping", config.attention.softcap.map_or(Value::Null, number)),
        ("final_logit_softcapping", config.logits.softcap.map_or(Value::Null, number)),
        ("hidden_activation", json!(gate_name(config.mlp.activation))),
        ("layer_types", json!(config.layer_types())),
        ("query_pre_attn_scalar", json!((1.0 / (scale * scale)).round() as u64)),
        ("sliding_window", json!(config.sliding_window().unwrap_or(4096))),
    ];
    fields.into_iter().map(|(field, value)| (field.to_owned(), value)).collect()
}
