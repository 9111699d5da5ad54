//! What training refuses, each from its real cause and through the whole program: numbers that are not finite, rows
//! learnt by heart, rows that teach nothing, a template that never ends a turn, a model that does not stop, an adapter
//! that changes nothing. Nothing of a refused run is kept as a result.

use crate::harness::{Project, stage};
use crate::tiny_model;

const MANIFEST: &str = r"
name: guards
stages:
  rows: { uses: load, with: { paths: [rows.jsonl] } }
  split: { uses: split, needs: rows, with: { validation: 0.25, test: 0.25 } }
  base: { uses: model, with: { source: model } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    with: { rank: 8, batch_examples: 4, checkpoint_every: 0, max_length: 200, OPTIONS }
";

fn project(options: &str) -> Project {
    let answers = ["Seven bells.", "Ask the harbour master.", "Never on Sundays.", "At high water only."];
    let rows: Vec<String> = (0..12)
        .map(|n| {
            format!(r#"{{"question": "When does berth {n} open?", "answer": "{}"}}"#, answers[n * 7 % 4])
        })
        .collect();
    let project = Project::new()
        .file("guards.yaml", &MANIFEST.replace("OPTIONS", options))
        .file("rows.jsonl", &rows.join("\n"));
    tiny_model::write(&project);
    project
}

/// Runs, expects the train stage to fail with these words, and that nothing of it is kept.
#[track_caller]
fn refused(project: &Project, words: &[&str]) {
    let ran = project.run(&["run", "guards.yaml"]).code(1);
    for word in words {
        assert!(ran.stderr.contains(word), "no {word:?} in:\n{}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    let plan = project.json(&["plan", "guards.yaml", "--json"]);
    assert_eq!(stage(&plan, "adapter")["state"], "run");
    assert!(!project.path("cache/out/guards/adapter").exists());
}

#[test]
fn a_number_that_is_not_finite_is_named_with_tensor_step_and_rows() {
    let project = project("alpha: 1.0e+36, learning_rate: 0.5, warmup_ratio: 0, epochs: 4, stop_probe: warn");
    refused(
        &project,
        &["stage `adapter`", "model.layers.0.", "is not finite in step 2, rows `", "lower `learning_rate`"],
    );
}

#[test]
fn rows_learnt_by_heart_are_named_while_the_validation_loss_rises() {
    let learnt = "learning_rate: 0.003, schedule: constant, epochs: 400, eval_every: 10, stop_probe: warn";
    let project = project(learnt);
    // Logits eight times as sharp as the tiny model's own, which cannot be sure of anything: the last 64 values of
    // the file are the weight of the norm before them.
    let mut weights = std::fs::read(project.path("model/model.safetensors")).unwrap();
    let norm = weights.len() - 64 * 4;
    weights[norm..].copy_from_slice(&8.0_f32.to_le_bytes().repeat(64));
    project.write("model/model.safetensors", weights);
    refused(&project, &["training loss is 0.0", "while validation loss rose to", "fewer `epochs`"]);
    let gentle = learnt.replace("0.003", "0.001").replace("400", "30");
    project.write("guards.yaml", MANIFEST.replace("OPTIONS", &gentle));
    project.run(&["run", "guards.yaml"]).success();
}

#[test]
fn a_row_that_teaches_nothing_is_named() {
    let project = project("epochs: 1, stop_probe: warn");
    let silent = r#"{"messages": [{"role": "user", "content": "Anybody there?"}]}"#;
    project.write("rows.jsonl", silent);
    project.run(&["run", "guards.yaml"]).code(1).says("assistant");
    let project = self::project("epochs: 1, stop_probe: warn");
    let long = project.read("rows.jsonl").replace(" open?", &" open, and why so late?".repeat(9));
    project.write("rows.jsonl", long);
    refused(&project, &["row `", "a limit of 200 would cut its answer"]);
}

#[test]
fn a_template_that_never_ends_a_turn_is_named() {
    let project = project("epochs: 1, stop_probe: warn");
    let config = project.read("model/tokenizer_config.json").replace(" + '<|im_end|>'", "");
    project.write("model/tokenizer_config.json", config);
    refused(&project, &["row `", "no end-of-turn token follows message 1"]);
}

#[test]
fn a_model_that_does_not_stop_is_refused_or_warned_of() {
    let project = project("epochs: 1, learning_rate: 1.0e-6");
    refused(&project, &["answers did not end within 128 tokens (rows", "`stop_probe: warn`"]);
    project.write(
        "guards.yaml",
        MANIFEST.replace("OPTIONS", "epochs: 1, learning_rate: 1.0e-6, stop_probe: warn"),
    );
    project.run(&["run", "guards.yaml"]).success().says("answers did not end within 128 tokens");
}

#[test]
fn an_adapter_that_changes_nothing_is_refused() {
    let project = project("epochs: 1, learning_rate: 1.0e-38, stop_probe: warn");
    refused(&project, &["does not change a single logit after the prompt of row `"]);
}

#[test]
fn constants_of_a_scan_are_not_looked_for_in_a_model_without_one() {
    let project = project("epochs: 1, train_ssm: true, stop_probe: warn");
    refused(&project, &["`train_ssm` trains A_log, D and dt_bias of Mamba layers, and this model has none"]);
}
