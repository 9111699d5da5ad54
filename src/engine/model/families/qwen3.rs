//! qwen3 (dense): a llama with an RMS norm over each head of q and k before rotation; heads are 128 wide unless
//! the file says otherwise, whatever the hidden size. Sliding layers as in qwen2.

use serde_json::{Value, json};

use super::{Family, GgufFamily, qwen2};
use crate::model::config::fields::Fields;
use crate::model::config::{AttentionOptions, ConfigError, Gate, ModelConfig, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily::plain("qwen3")),
};

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "intermediate_size")?;
    config.rope = fields.rope()?;
    config.head_dim = fields.dimension_or("head_dim", 128)?;
    let bias = fields.flag("attention_bias")?;
    config.attention = AttentionOptions {
        input_bias: bias,
        output_bias: bias,
        head_norm: true,
        ..AttentionOptions::plain(config.head_dim)
    };
    config.layers = qwen2::layers(fields, config.layers.len())?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    let mut own = qwen2::sliding(config);
    own.insert("attention_bias".to_owned(), json!(config.attention.input_bias));
    own.insert("hidden_act".to_owned(), json!(gate_name(config.mlp.activation)));
    Value::Object(own)
}
