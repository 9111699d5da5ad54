//! gemma3_text: gemma2 without soft-caps, with norms over each head of q and k, and with a second rope: sliding
//! layers (five of six) rotate by `rope_local_base_freq`, full ones by a rope that may be scaled.

use serde_json::{Value, json};

use super::{Family, GgufFamily, gemma2};
use crate::model::config::fields::{Fields, number, unsupported};
use crate::model::config::{ConfigError, ModelConfig, Positions, Rope, RopeScaling};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily {
        required: &[("sliding_window", "attention.sliding_window")],
        optional: &[
            ("final_logit_softcapping", "final_logit_softcapping"),
            ("rope_local_base_freq", "rope.freq_base_swa"),
            ("sliding_window_pattern", "attention.sliding_window_pattern"),
        ],
        complete: |fields| gemma2::complete_scale(fields, 62),
        ..GgufFamily::plain("gemma3")
    }),
};

/// The multimodal files, 4B and larger: their language model is a gemma3_text, read and written as such. Their
/// vision tower is left alone.
pub(super) const MULTIMODAL: Family = Family {
    model_type: "gemma3",
    architecture: "Gemma3ForConditionalGeneration",
    read: read_multimodal,
    write,
    gguf: None,
};

/// What released files leave out of `text_config`: the defaults of transformers' Gemma3TextConfig.
const DEFAULTS: [(&str, usize); 4] = [
    ("max_position_embeddings", 131_072),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("vocab_size", 262_208),
];

fn read_multimodal(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let missing = || ConfigError::Missing { field: "text_config".to_owned() };
    let mut text = fields.object("text_config")?.ok_or_else(missing)?.clone();
    for (field, value) in DEFAULTS {
        text.entry(field).or_insert(json!(value));
    }
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(value) = fields.0.get(field) {
            text.insert(field.to_owned(), value.clone());
        }
    }
    read(&Fields(&text))
}

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = gemma2::plain(FAMILY.model_type, fields)?;
    config.attention.head_norm = true;
    config.attention.softcap = fields.optional_positive("attn_logit_softcapping")?;
    config.logits.softcap = fields.optional_positive("final_logit_softcapping")?;
    let (global, local) = ropes(fields)?;
    (config.rope, config.local_rope) = (global, Some(local));
    let period = fields.dimension_or("sliding_window_pattern", 6)?;
    let default = |layer: usize| {
        if (layer + 1).is_multiple_of(period) { "full_attention" } else { "sliding_attention" }
    };
    config.layers = gemma2::layers(fields, config.layers.len(), default, Positions::Local)?;
    Ok(config)
}

/// The rope of full layers and that of sliding ones; transformers 5 keeps both in `rope_parameters`.
fn ropes(fields: &Fields<'_>) -> Result<(Rope, Rope), ConfigError> {
    let parameters = fields.object("rope_parameters")?.map(Fields);
    let of = |kind| parameters.as_ref().map_or(Ok(None), |parameters| parameters.object(kind));
    let global = of("full_attention")?.or(fields.object("rope_scaling")?);
    let global = fields.rope_of(global, "rope_theta", 1_000_000.0)?;
    let local = fields.rope_of(of("sliding_attention")?, "rope_local_base_freq", 10_000.0)?;
    if local.scaling != RopeScaling::None {
        return Err(unsupported("rope_parameters.sliding_attention", &"a scaled rope", "default"));
    }
    Ok((global, local))
}

fn write(config: &ModelConfig) -> Value {
    let mut own = gemma2::own(config);
    let theta = config.local_rope.as_ref().map_or(Value::Null, |rope| number(rope.theta));
    own.insert("rope_local_base_freq".to_owned(), theta);
    own.insert("use_bidirectional_attention".to_owned(), json!(false));
    Value::Object(own)
}
