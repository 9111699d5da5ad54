//! A llama of 100,000 random weights with a byte-level tokenizer and ChatML, as a Hugging Face folder: small
//! enough to train in a second, real enough to go through every stage.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::harness::Project;

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 128;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// 256 bytes and the special tokens, padded to a multiple of 64.
const VOCABULARY: usize = 320;

/// Writes the folder `model/` into the project.
pub(crate) fn write(project: &Project) {
    project.write("model/config.json", config().to_string());
    project.write("model/tokenizer.json", tokenizer().to_string());
    project.write("model/tokenizer_config.json", tokenizer_config().to_string());
    project.write("model/model.safetensors", weights());
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256,
        "torch_dtype": "float32"
    })
}

/// The printable stand-in GPT-2 gives each byte.
fn byte_to_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        char::from(byte)
    } else {
        let before = (0..byte).filter(|&b| !printable(b)).count();
        char::from_u32(256 + u32::try_from(before).unwrap()).unwrap()
    }
}

fn tokenizer() -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        (0..=255_u8).map(|byte| (byte_to_character(byte).to_string(), json!(byte))).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(index, token)| {
            json!({"id": 256 + index, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": []}
    })
}

fn tokenizer_config() -> Value {
    let mut template = String::new();
    write!(template, "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}}}{{% endfor %}}").unwrap();
    write!(template, "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}")
        .unwrap();
    json!({
        "tokenizer_class": "GPT2TokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "add_bos_token": false, "model_max_length": 512, "chat_template": template
    })
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let key_value = HIDDEN / HEADS * KV_HEADS;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.k_proj", vec![key_value, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![key_value, HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    shapes
}

/// A safetensors file: length of the header, header, values.
fn weights() -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut values = Vec::new();
    let mut state = 42_u64;
    for (name, shape) in shapes() {
        let start = values.len();
        let scale = if shape.len() == 1 { 0.0 } else { 1.0 / (shape[1] as f32).sqrt() };
        let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = (state >> 40) as f32 / (1_u64 << 24) as f32 * 2.0 - 1.0;
            values.extend((offset + scale * uniform).to_le_bytes());
        }
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, values.len()]}));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(values);
    file
}
