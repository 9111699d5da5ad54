//! The memory plan against what a process really takes, and computing twice instead of keeping.

use std::collections::HashMap;
use std::process::Command;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};

use super::*;

#[test]
fn layers_computed_twice_change_no_bit() {
    let rows = rows(10, 3);
    let noisy = LoraConfig { dora: true, dropout: 0.2, ..lora() };
    for lora in [lora(), noisy, LoraConfig { targets: Targets::Regex(".*1.self_attn.*".into()), ..lora() }] {
        let options = TrainOptions { lora, ..options() };
        let mut adapters = (0..=2).map(|recomputed| {
            let mut run = Run::new(&MODEL, &rows, &[], &options).unwrap();
            run.workspace.recompute_layers(recomputed);
            while !run.is_over() {
                run.advance(&mut ()).unwrap();
            }
            bits(&run.adapter)
        });
        let kept = adapters.next().unwrap();
        assert!(adapters.all(|adapter| adapter == kept));
    }
}

#[test]
fn a_budget_is_kept_by_computing_twice_or_refused() {
    let rows = rows(10, 3);
    let with_budget = |memory_budget| {
        let options = TrainOptions { memory_budget, ..options() };
        Run::new(&MODEL, &rows, &[], &options).map(|run| run.outlook.memory)
    };
    let free = with_budget(None).unwrap();
    assert_eq!((free.recomputed_layers, free.layers), (0, 2));
    // The program grows while tests run beside this one: what is below is far from it either way.
    let error = with_budget(Some(1 << 20)).err().unwrap();
    assert_eq!(error.code(), "memory");
    assert!(error.to_string().contains("lower `pack_tokens`"), "{error}");
    let bit_equal = |memory_budget| {
        let options = TrainOptions { memory_budget, ..options() };
        bits(&train(&MODEL, &rows, &[], &options, &mut ()).unwrap().adapter)
    };
    assert_eq!(bit_equal(None), bit_equal(Some(1 << 40)));
}

/// A llama of 10 million weights: large enough that a pass takes more than the program, small enough for a test.
const MIDDLE: (usize, usize, usize, usize) = (384, 1024, 6, 2048);

fn write_middle_model(folder: &std::path::Path) {
    let (c, i, layers, v) = MIDDLE;
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": c, "intermediate_size": i,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": v,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"
    });
    fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut random = Random::new(&[9]);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let bound = if shape.len() == 1 { 0.0 } else { 1.0 / (shape[1] as f64).sqrt() };
        let values = (0..shape.iter().product()).flat_map(|_| {
            let value = if bound == 0.0 { 1.0 } else { bound * (2.0 * random.unit() - 1.0) };
            bf16::from_f64(value).to_le_bytes()
        });
        let bytes = values.collect();
        tensors.push((name, shape, bytes));
    };
    add("model.embed_tokens.weight".into(), vec![v, c]);
    add("model.norm.weight".into(), vec![c]);
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for part in ["input_layernorm", "post_attention_layernorm"] {
            add(name(part), vec![c]);
        }
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(name(&format!("self_attn.{part}")), vec![c, c]);
        }
        for (part, out, input) in [("gate_proj", i, c), ("up_proj", i, c), ("down_proj", c, i)] {
            add(name(&format!("mlp.{part}")), vec![out, input]);
        }
    }
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, shape, bytes)| (&**name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// The child of [`slow_plan_is_within_15_percent_of_the_peak`]: trains one step of 1024 tokens and says what it took.
#[test]
#[ignore = "run in a process of its own by the test below"]
fn one_step_in_a_process_of_its_own() {
    let Some(folder) = std::env::var_os("TUNESMITH_TEST_MODEL") else { return };
    let threads = Compute::cpu(2);
    let model = Model::open(std::path::Path::new(&folder), &threads).unwrap();
    let mut random = Random::new(&[4]);
    let rows: Vec<TokenizedExample> = (0..4)
        .map(|index| TokenizedExample {
            id: format!("row{index}"),
            tokens: (0..256).map(|_| random.below(2048) as u32).collect(),
            supervised: (0..256).map(|index| index > 100).collect(),
        })
        .collect();
    let budget = std::env::var("TUNESMITH_TEST_BUDGET").ok().and_then(|budget| budget.parse().ok());
    let lora = match std::env::var("TUNESMITH_TEST_KIND").as_deref() {
        Ok("dora") => LoraConfig { dora: true, dropout: 0.1, ..LoraConfig::default() },
        _ => LoraConfig::default(),
    };
    let options = TrainOptions {
        batch: Batch::Rows(4),
        pack_tokens: 1024,
        memory_budget: budget,
        ..TrainOptions::new(lora)
    };
    let report = train(&model, &rows, &[], &options, &mut ()).unwrap().report;
    let plan = &report.plan.memory;
    let line = format!("{} {} {}", plan.total(), report.peak_rss_bytes, plan.recomputed_layers);
    fs_err::write(std::path::Path::new(&folder).join("taken"), line).unwrap();
    fs_err::write(std::path::Path::new(&folder).join("plan"), plan.to_string()).unwrap();
}

#[test]
fn slow_plan_is_within_15_percent_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    write_middle_model(folder.path());
    let taken = |kind: &str, budget: Option<u64>| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let name = "trainer::tests::memory::one_step_in_a_process_of_its_own";
        child.args(["--exact", name, "--ignored"]).env("TUNESMITH_TEST_MODEL", folder.path());
        child.env("TUNESMITH_TEST_KIND", kind);
        if let Some(budget) = budget {
            child.env("TUNESMITH_TEST_BUDGET", budget.to_string());
        }
        assert!(child.output().unwrap().status.success());
        let text = fs_err::read_to_string(folder.path().join("taken")).unwrap();
        let numbers: Vec<u64> = text.split(' ').map(|number| number.parse().unwrap()).collect();
        let error = numbers[0] as f64 / numbers[1] as f64 - 1.0;
        let plan = fs_err::read_to_string(folder.path().join("plan")).unwrap();
        println!("{kind}: {plan}, took {} MiB, off by {error:.3}", numbers[1] >> 20);
        assert!(error.abs() < 0.15, "{kind}: {plan} is off by {error:.3} of {}", numbers[1]);
        (numbers[1], numbers[2])
    };
    let (free, recomputed) = taken("lora", None);
    assert_eq!(recomputed, 0);
    let budget = free * 7 / 10;
    let (within, recomputed) = taken("lora", Some(budget));
    assert!(recomputed > 0 && within < budget * 115 / 100, "{within} of {budget}, {recomputed} layers twice");
    taken("dora", None);
}
