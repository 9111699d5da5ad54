//! Odd little models, one a family: nothing is a multiple of 64, sequences are longer than windows, and every
//! option the family has is on. Written as `config.json` has them, so that reading is part of what is tested.

use serde_json::{Value, json};

use super::ModelConfig;

/// The odd llama, with biases everywhere.
pub(super) fn odd_config() -> ModelConfig {
    odd_configs().swap_remove(0)
}

/// All odd models.
pub(super) fn odd_configs() -> Vec<ModelConfig> {
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    let sliding = ["sliding_attention", "full_attention", "sliding_attention"];
    let factors = json!({"embedding_multiplier": 3.0, "residual_multiplier": 0.4,
        "attention_multiplier": 0.3, "logits_scaling": 1.5});
    let own = [
        json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true, "rope_scaling": linear}),
        json!({"model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": false}),
        json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 1,
            "sliding_window": 9}),
        json!({"model_type": "qwen3", "attention_bias": true}),
        json!({"model_type": "gemma", "num_key_value_heads": 1}),
        json!({"model_type": "gemma2", "sliding_window": 7, "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
        json!({"model_type": "gemma3_text", "sliding_window": 6, "query_pre_attn_scalar": 5,
            "layer_types": sliding, "rope_theta": 1e6, "rope_scaling": linear}),
        merged(json!({"model_type": "granite", "attention_bias": true, "mlp_bias": true}), &factors),
        merged(hybrid("nope"), &factors),
        merged(hybrid("rope"), &factors),
    ];
    own.into_iter().map(|own| read(&merged(common(), &own))).collect()
}

fn common() -> Value {
    json!({"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 37, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": true, "eos_token_id": 2})
}

fn hybrid(positions: &str) -> Value {
    json!({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": positions, "num_local_experts": 0, "shared_intermediate_size": 28,
        "mamba_n_heads": 10, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 7, "mamba_d_conv": 3,
        "mamba_expand": 2, "mamba_conv_bias": positions == "nope", "mamba_proj_bias": positions == "rope",
        "time_step_limit": [0.0, {"__float__": "Infinity"}]})
}

fn merged(mut base: Value, own: &Value) -> Value {
    for (field, value) in own.as_object().unwrap() {
        base[field] = value.clone();
    }
    base
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_json(&config.to_string()).unwrap()
}

#[test]
fn written_descriptions_read_back_equal() {
    let golden = super::GOLDEN.map(|family| {
        let text = fs_err::read_to_string(super::folder(family).join("config.json")).unwrap();
        ModelConfig::from_json(&text).unwrap()
    });
    for config in golden.into_iter().chain(odd_configs()) {
        let text = Value::Object(config.to_json()).to_string();
        assert_eq!(ModelConfig::from_json(&text).unwrap(), config, "{text}");
    }
}

#[test]
fn every_family_has_golden_values() {
    for family in crate::model::families::FAMILIES {
        // A multimodal wrapper is read as the family of its language model.
        let wrapper = family.architecture.ends_with("ForConditionalGeneration");
        assert!(wrapper || super::GOLDEN.contains(&family.model_type), "{}", family.model_type);
    }
}

#[test]
fn what_a_family_cannot_compute_is_refused_by_field() {
    for (model_type, field, value) in [
        ("granitemoehybrid", "num_local_experts", json!(8)),
        ("granitemoehybrid", "num_local_experts", Value::Null),
        ("granitemoehybrid", "position_embedding_type", json!("alibi")),
        ("granitemoehybrid", "mamba_n_heads", json!(9)),
        ("granitemoehybrid", "mamba_n_groups", json!(3)),
        ("granitemoehybrid", "mamba_d_state", json!(1 << 24)),
        ("granitemoehybrid", "mamba_d_conv", json!(1)),
        ("granitemoehybrid", "time_step_limit", json!([1.0, 0.5])),
        ("granitemoehybrid", "layer_types", json!(["mamba", "attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "full_attention", "linear_attention"])),
        ("qwen3", "layer_types", json!(["full_attention", "full_attention", "chunked_attention"])),
        ("gemma2", "hidden_activation", json!("relu")),
        ("gemma", "use_bidirectional_attention", json!(true)),
        ("gemma3_text", "sliding_window", json!(0)),
        ("gemma3_text", "rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
        ("granite", "attention_multiplier", json!(0.0)),
    ] {
        let config = odd_configs().into_iter().find(|config| config.model_type == model_type).unwrap();
        let mut json = config.to_json();
        json.insert(field.to_owned(), value.clone());
        let error = ModelConfig::from_json(&Value::Object(json).to_string()).unwrap_err().to_string();
        let named = field == "attention_multiplier" && error.contains("attention scale");
        assert!(error.contains(field) || named, "{model_type}: {field} = {value}: {error}");
    }
}
