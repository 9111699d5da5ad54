//! The golden models as llama.cpp's converter writes them (its `conversion/` modules, version of gguf 0.19):
//! every tensor and every setting comes back.

use std::path::{Path, PathBuf};

use crate::format::gguf::Value;
use crate::format::gguf_writer::GgufWriter;
use crate::format::{Checkpoint, FormatError};
use crate::model::{Mixing, ModelConfig};

fn original(family: &str) -> Checkpoint {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../tests/golden", family].iter().collect();
    Checkpoint::open(&folder).unwrap()
}

fn values(checkpoint: &Checkpoint, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.len()];
    tensor.decode_rows(0, &mut values);
    (tensor.shape, values)
}

/// The keys of a family beyond those of all.
fn own_keys(family: &str) -> (&'static str, Vec<(&'static str, Value)>) {
    let (number, float) = (Value::Unsigned, Value::Float);
    let factors = |logits| {
        vec![
            ("attention.scale", float(if logits == 5.0 { 0.125 } else { 0.0625 })),
            ("embedding_scale", float(12.0)),
            ("residual_scale", float(0.22)),
            ("logit_scale", float(logits)),
        ]
    };
    let per_layer = [0, 2, 0].map(number).to_vec();
    let ssm = vec![
        ("attention.head_count_kv", Value::List(per_layer)),
        ("ssm.conv_kernel", number(4)),
        ("ssm.state_size", number(16)),
        ("ssm.group_count", number(1)),
        ("ssm.inner_size", number(128)),
        ("ssm.time_step_rank", number(4)),
        ("rope.scaling.finetuned", Value::Bool(false)),
        ("expert_shared_feed_forward_length", number(128)),
    ];
    match family {
        "qwen2" => ("qwen2", vec![("rope.freq_base", float(1e6))]),
        "qwen3" => ("qwen3", vec![("rope.freq_base", float(1e6)), ("attention.key_length", number(24))]),
        "gemma" => ("gemma", vec![("attention.key_length", number(32))]),
        "gemma2" => (
            "gemma2",
            vec![
                ("attention.key_length", number(32)),
                ("attention.sliding_window", number(8)),
                ("attn_logit_softcapping", float(2.0)),
                ("final_logit_softcapping", float(3.0)),
            ],
        ),
        "gemma3_text" => (
            "gemma3",
            vec![
                ("attention.key_length", number(32)),
                ("attention.sliding_window", number(8)),
                ("attention.sliding_window_pattern", number(2)),
                ("rope.freq_base", float(1e6)),
                ("rope.scaling.type", Value::Text("linear".to_owned())),
                ("rope.scaling.factor", float(8.0)),
            ],
        ),
        "granite" => ("granite", factors(5.0)),
        "granitemoehybrid" => ("granitehybrid", [factors(8.0), ssm].concat()),
        other => panic!("no keys for `{other}`"),
    }
}

/// Hugging Face's name with the names of gguf's tensor map put in.
fn stored_name(family: &str, name: &str) -> String {
    let sandwich = family == "gemma2" || family == "gemma3_text";
    let after_attention = if sandwich { "post_attention_norm" } else { "ffn_norm" };
    let mut stored = name.replace("model.layers.", "blk.");
    for (theirs, ours) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", after_attention),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("shared_ffn_", "ffn_"),
        ("shared_mlp.output_linear", "ffn_down"),
        ("mamba.in_proj", "ssm_in"),
        ("mamba.out_proj", "ssm_out"),
        ("mamba.conv1d", "ssm_conv1d"),
        ("mamba.norm", "ssm_norm"),
        ("mamba.dt_bias", "ssm_dt.bias"),
        ("mamba.A_log", "ssm_a"),
        ("mamba.D", "ssm_d"),
    ] {
        stored = stored.replace(theirs, ours);
    }
    stored
}

/// Reshape (heads, 2, d/2, cols), swap axes 1 and 2.
fn permuted(values: &[f32], cols: usize, head_dim: usize) -> Vec<f32> {
    let rows = 0..values.len() / cols;
    let from = |row: usize| row / head_dim * head_dim + row % 2 * (head_dim / 2) + row % head_dim / 2;
    rows.flat_map(|row| values[from(row) * cols..(from(row) + 1) * cols].to_vec()).collect()
}

fn converted(family: &str, original: &Checkpoint) -> GgufWriter {
    let config = original.config();
    let (architecture, own) = own_keys(family);
    let mut file = GgufWriter::default();
    file.text("general.architecture", architecture);
    for (key, value) in [
        ("block_count", config.num_hidden_layers()),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
    ] {
        file.unsigned(&format!("{architecture}.{key}"), value);
    }
    let epsilon = Value::Float(f64::from(config.rms_norm_eps));
    file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), epsilon);
    for (key, value) in own {
        file.set(&format!("{architecture}.{key}"), value);
    }
    for (role, id) in [("bos", 1), ("eos", 2), ("padding", 0)] {
        file.unsigned(&format!("tokenizer.ggml.{role}_token_id"), id);
    }
    let granite = family.starts_with("granite");
    for name in original.names() {
        let (shape, mut values) = values(original, name);
        let stored = stored_name(family, name);
        if family.starts_with("gemma") && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        if granite && (name.contains("q_proj") || name.contains("k_proj")) {
            let cols = if name.ends_with("bias") { 1 } else { config.hidden_size };
            values = permuted(&values, cols, config.head_dim);
        }
        if name.ends_with("A_log") {
            values.iter_mut().for_each(|value| *value = -value.exp());
        }
        if name.contains("shared_mlp.input_linear") {
            let half = values.len() / 2;
            let shape = [shape[0] / 2, shape[1]];
            let [gate, up] =
                ["gate", "up"].map(|part| stored.replace("shared_mlp.input_linear", &format!("ffn_{part}")));
            file.floats(&gate, &shape, &values[..half]).floats(&up, &shape, &values[half..]);
            continue;
        }
        let shape = match () {
            () if name.contains("conv1d.weight") => vec![shape[0], shape[2]],
            () if name.ends_with("A_log") || name.ends_with("mamba.D") => vec![shape[0], 1],
            () if name.ends_with("mamba.norm.weight") => vec![1, shape[0]],
            () => shape,
        };
        file.floats(&stored, &shape, &values);
    }
    file
}

fn open(file: &GgufWriter) -> Result<Checkpoint, FormatError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    Checkpoint::open(Path::new(&path))
}

/// What remains of a description where files of llama.cpp say less.
fn as_told(mut config: ModelConfig) -> ModelConfig {
    match config.model_type.as_str() {
        "qwen3" => config.layers.fill(Mixing::FULL),
        "gemma2" | "gemma3_text" => config.attention.scale = 1.0 / (config.head_dim as f32).sqrt(),
        _ => {}
    }
    config
}

#[test]
fn gguf_of_every_family_gives_the_model_back() {
    for family in ["qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "granitemoehybrid"] {
        let original = original(family);
        let read = open(&converted(family, &original)).unwrap();
        assert_eq!(*read.config(), as_told(original.config().clone()), "{family}");
        assert_eq!(read.names(), original.names(), "{family}");
        for name in original.names() {
            let (ours, theirs) = (values(&read, name), values(&original, name));
            assert_eq!(ours.0, theirs.0, "{family}: {name}");
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
            assert!(ours.1.iter().zip(&theirs.1).all(close), "{family}: {name}");
        }
    }
}

#[test]
fn missing_settings_and_strange_tensors_are_refused_by_name() {
    let refused = |family: &str, change: &dyn Fn(&mut GgufWriter), part: &str| {
        let mut file = converted(family, &original(family));
        change(&mut file);
        let error = open(&file).err().expect("the file must be refused").to_string();
        assert!(error.contains(part), "{error}");
    };
    let window = "gemma2.attention.sliding_window";
    refused("gemma2", &|file| _ = file.remove(window), "`gemma2.attention.sliding_window` is missing");
    let odd = "blk.0.ssm_in.weight";
    refused("gemma2", &|file| _ = file.floats(odd, &[1], &[0.0]), "this `gemma2` model has no such tensor");
    refused("granite", &|file| _ = file.remove("granite.attention.scale"), "`granite.attention.scale`");
    let experts = "granitehybrid.expert_count";
    refused("granitemoehybrid", &|file| _ = file.unsigned(experts, 8), "mixture of experts");
    let uneven = Value::List([0, 2, 1].map(Value::Unsigned).to_vec());
    let heads = "granitehybrid.attention.head_count_kv";
    refused("granitemoehybrid", &|file| _ = file.set(heads, uneven.clone()), "differs from layer to layer");
    let recurrent = Value::List([0, 2].map(Value::Unsigned).to_vec());
    refused("qwen2", &|file| _ = file.set("qwen2.attention.head_count_kv", recurrent.clone()), "layer_types");
}
