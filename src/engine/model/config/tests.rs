//! Reading and writing the description of a llama, and what every family has in common.

use super::*;

const SMOLLM2: &str = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
    "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}"#;

fn with(field: &str, value: Value) -> Result<ModelConfig, ConfigError> {
    let mut config: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
    config.insert(field.to_owned(), value);
    ModelConfig::from_json(&serde_json::to_string(&config).unwrap())
}

#[test]
fn head_dim_defaults_to_hidden_size_over_heads() {
    let config = ModelConfig::from_json(SMOLLM2).unwrap();
    assert_eq!(config.head_dim, 64);
    assert_eq!(config.rope, Rope { theta: 100_000.0, scaling: RopeScaling::None });
    assert_eq!(config.eos_token_ids, [2]);
}

#[test]
fn old_and_new_rope_fields_mean_the_same() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let mut new = scaling.clone();
    new["rope_theta"] = json!(100_000.0);
    assert_eq!(with("rope_scaling", scaling).unwrap(), with("rope_parameters", new).unwrap());
    let linear = with("rope_scaling", json!({"type": "linear", "factor": 2.0})).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn golden_config_of_transformers_5_is_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/llama/config.json");
    let config = ModelConfig::from_json(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(
        (config.head_dim, config.num_key_value_heads, config.rope.theta, config.pad_token_id),
        (16, 2, 500_000.0, Some(0))
    );
}

#[test]
fn written_config_reads_back_equal() {
    let mut config = with("eos_token_id", json!([2, 7])).unwrap();
    config.rope.scaling = RopeScaling::Linear { factor: 1.7 };
    let text = serde_json::to_string(&config.to_json()).unwrap();
    assert!(text.contains("\"rms_norm_eps\":0.00001,") || text.contains("\"rms_norm_eps\":1e-5,"), "{text}");
    assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
}

#[test]
fn other_families_are_refused_by_name() {
    let error = with("model_type", json!("bert")).unwrap_err().to_string();
    assert!(error.starts_with("model_type `bert` is not supported yet; supported: llama, "), "{error}");
}

#[test]
fn senseless_values_are_refused_by_field() {
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-4)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(2)),
        ("vocab_size", json!(1u64 << 40)),
        ("num_hidden_layers", json!(100_000)),
        ("head_dim", json!(63)),
        ("rms_norm_eps", json!("small")),
        ("eos_token_id", json!("</s>")),
        ("rope_theta", json!(0)),
        ("hidden_act", json!("relu")),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
    ] {
        let error = with(field, value.clone()).unwrap_err().to_string();
        assert!(error.contains(field), "{field} = {value}: {error}");
    }
}
