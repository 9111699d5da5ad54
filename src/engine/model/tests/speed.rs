//! Tokens a second at the shape of SmolLM2-135M, random weights. Run by hand:
//! `cargo test --release -p tunesmith-engine model::tests::speed -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

fn smollm2() -> ModelConfig {
    let text = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "rope_theta": 100000, "tie_word_embeddings": true}"#;
    ModelConfig::from_json(text).unwrap()
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn model() -> Model {
    random_model(&smollm2(), Stored::Nf4, &Compute { threads: setting("THREADS", 2), ..CPU })
}

/// Measures `work` over `tokens` tokens: wall time, and time on cores.
fn measure(what: &str, tokens: usize, work: impl FnOnce()) {
    let (start, busy) = (Instant::now(), cpu_seconds());
    work();
    let (seconds, busy) = (start.elapsed().as_secs_f64(), cpu_seconds() - busy);
    let (rate, core_rate) = (tokens as f64 / seconds, tokens as f64 / busy);
    println!("{what}: {rate:.1} tokens/s, {core_rate:.1} a core-second");
}

/// Forward and backward over 512 tokens in sequences of `ROW` (57), of which the first `SHARED` (0) are the same in
/// all, with every linear adapted, rank 16. Tokens of sequences count, however often they are computed.
#[test]
#[ignore = "a measurement"]
fn training_step() {
    let model = model();
    let adapter = busy_adapter(&model, 16);
    let mut tokens: Vec<u32> = noise(5, 512).iter().map(|value| ((value + 1.0) * 20_000.0) as u32).collect();
    let (row, shared) = (setting("ROW", 57), setting("SHARED", 0));
    for sequence in tokens.chunks_mut(row) {
        sequence.iter_mut().zip(0..shared as u32).for_each(|(token, common)| *token = common);
    }
    // Nothing is predicted within the beginning, as in a conversation.
    let marks: Vec<bool> = (0..512).map(|index| index % row > shared).collect();
    let pack = model.pack(&tokens.chunks(row).zip(marks.chunks(row)).collect::<Vec<_>>());
    println!("{} of 512 rows", pack.tokens.len());
    let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
    for step in 0..setting("STEPS", 4) {
        measure(&format!("training step {step}"), 512, || {
            model.loss_and_gradients(&adapter, &pack, 1e-3, &mut gradients, &mut workspace).unwrap();
        });
    }
    println!("peak memory {}", peak_memory());
}

/// Prompts of 32 tokens, then `STEPS` (16) of one token each, for several numbers of sequences or `BATCH`.
#[test]
#[ignore = "a measurement"]
fn decoding() {
    let model = model();
    let adapter = busy_adapter(&model, 16);
    let mut workspace = Workspace::default();
    let prompt: Vec<u32> = (0..32).collect();
    for (name, adapter) in [("base", None), ("adapted", Some(&adapter))] {
        for batch in [1, 4, 16, 64].into_iter().filter(|batch| [0, *batch].contains(&setting("BATCH", 0))) {
            let mut cache = model.new_cache(batch, 32 + setting("STEPS", 16));
            measure(&format!("{name}, batch {batch}: prefill"), 32 * batch, || {
                model.extend(adapter, &mut cache, &vec![&prompt[..]; batch], &mut workspace).unwrap();
            });
            measure(&format!("{name}, batch {batch}: decode"), setting("STEPS", 16) * batch, || {
                for token in 0..setting("STEPS", 16) as u32 {
                    model.extend(adapter, &mut cache, &vec![&[token][..]; batch], &mut workspace).unwrap();
                }
            });
        }
    }
}

/// One layer of the shape of Granite 4.0 H Micro.
#[test]
#[ignore = "a measurement"]
fn mamba_layer() {
    for kind in ["mamba", "attention"] {
        let config = serde_json::json!({"model_type": "granitemoehybrid", "layer_types": [kind],
            "hidden_size": 2048, "shared_intermediate_size": 8192, "num_hidden_layers": 1,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1024, "num_local_experts": 0,
            "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "tie_word_embeddings": true});
        let config = ModelConfig::from_json(&config.to_string()).unwrap();
        let model = random_model(&config, Stored::Nf4, &Compute { threads: setting("THREADS", 2), ..CPU });
        let adapter = busy_adapter(&model, 16);
        let tokens: Vec<u32> = noise(5, 512).iter().map(|value| ((value + 1.0) * 500.0) as u32).collect();
        let pack = Pack::new(&[(&tokens, &[true; 512])]);
        let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
        for _ in 0..3 {
            let start = cpu_seconds();
            model.loss(Some(&adapter), &pack, &mut workspace).unwrap();
            let forward = cpu_seconds() - start;
            model.loss_and_gradients(&adapter, &pack, 1e-3, &mut gradients, &mut workspace).unwrap();
            let step = cpu_seconds() - start - forward;
            println!("{kind}: forward {forward:.2} core-seconds, step {step:.2} core-seconds for 512 tokens");
        }
    }
}

/// Time all threads have spent computing: what counts on a machine that others use too.
fn cpu_seconds() -> f64 {
    let stat = fs_err::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap_or(0.0) / 100.0).sum()
}

fn peak_memory() -> String {
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("unknown").to_owned()
}
