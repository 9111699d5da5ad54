//! gemma3_text: gemma2 without soft-caps, with norms over each head of q and k, and with a second rope: sliding
//! layers (five of six) rotate by `rope_local_base_freq`, full ones by a rope that may be scaled.

use serde_json::{Value, json};

use super::{Family, gemma2};
use crate::model::config::fields::{Fields, number, unsupported};
use crate::model::config::{ConfigError, ModelConfig, Positions, Rope, RopeScaling};

pub(super) const FAMILY: Family =
    Family { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", read, write };

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
