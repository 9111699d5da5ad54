//! gemma (version 1: 2B, 7B): norms whose stored weights lack 1, embeddings times the square root of the
//! hidden size, an MLP gated by gelu, heads of 256 whatever the hidden size, tied embeddings.

use serde_json::{Value, json};

use super::{Family, GgufFamily};
use crate::model::config::fields::Fields;
use crate::model::config::{AttentionOptions, ConfigError, Gate, ModelConfig, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily::plain("gemma")),
};

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = plain(FAMILY.model_type, fields)?;
    config.rope = fields.rope()?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    json!({
        "attention_bias": config.attention.input_bias,
        "hidden_act": gate_name(config.mlp.activation),
        "hidden_activation": gate_name(config.mlp.activation),
    })
}

/// What all versions of gemma share.
pub(super) fn plain(model_type: &str, fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    fields.refuse("use_bidirectional_attention")?;
    let mut config = ModelConfig::plain(model_type, fields, Gate::Gemma, "intermediate_size")?;
    config.head_dim = fields.dimension_or("head_dim", 256)?;
    let bias = fields.flag("attention_bias")?;
    config.attention =
        AttentionOptions { input_bias: bias, output_bias: bias, ..AttentionOptions::plain(config.head_dim) };
    config.norms.offset = true;
    config.embedding_multiplier = embedding_multiplier(config.hidden_size);
    Ok(config)
}

/// The models were trained with the factor in bfloat16: 55.5 for a hidden size of 3072, not 55.4256
/// (transformers #29402).
fn embedding_multiplier(hidden_size: usize) -> f32 {
    half::bf16::from_f32((hidden_size as f32).sqrt()).to_f32()
}

#[cfg(test)]
mod tests {
    #[test]
    fn factor_of_the_embeddings_is_rounded_as_in_training() {
        assert_eq!(super::embedding_multiplier(3072), 55.5);
        assert_eq!(super::embedding_multiplier(2304), 48.0);
    }
}
