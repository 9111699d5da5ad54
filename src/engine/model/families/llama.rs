//! llama: Llama 3.x, TinyLlama, SmolLM2. RMS norms before attention and before a silu-gated MLP, rotary
//! positions, grouped heads, optional biases, an output layer that may share the embedding's weights. The
//! others are told by what differs from this.

use serde_json::{Value, json};

use super::{Family, GgufFamily};
use crate::model::config::fields::Fields;
use crate::model::config::{ConfigError, Gate, ModelConfig, gate_name};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily { interleaved: true, ..GgufFamily::plain("llama") }),
};

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "intermediate_size")?;
    config.rope = fields.rope()?;
    config.attention.input_bias = fields.flag("attention_bias")?;
    config.attention.output_bias = config.attention.input_bias;
    config.mlp.bias = fields.flag("mlp_bias")?;
    Ok(config)
}

fn write(config: &ModelConfig) -> Value {
    json!({
        "attention_bias": config.attention.input_bias,
        "hidden_act": gate_name(config.mlp.activation),
        "mlp_bias": config.mlp.bias,
    })
}
