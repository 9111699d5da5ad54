//! `bench` on a tiny model: figures as JSON, and a model that is none.

use serde_json::Value;

use crate::harness::{Project, Ran};
use crate::tiny_model;

#[test]
fn training_and_generation_give_their_figures() {
    let project = Project::new();
    tiny_model::write(&project);
    let train = ["bench", "train", "--model", "model", "--batch", "2", "--seq", "16", "--rank", "2"];
    let figures = |extra: &[&str]| {
        project.json(&[&train[..], &["--steps", "3", "--lr", "0.01", "--json", "-"], extra].concat())
    };
    let (kept, twice) = (figures(&["--threads", "1"]), figures(&["--threads", "2", "--recompute", "all"]));
    assert!(kept["tok_s"].as_f64().unwrap() > 0.0 && kept["peak_rss_bytes"].as_u64().unwrap() > 0);
    assert_eq!(kept["losses"].as_array().map(Vec::len), Some(5), "warmup and measured steps");
    assert_eq!(kept["losses"], twice["losses"], "threads and recomputation change no loss");
    assert_ne!(kept["losses"], figures(&["--base", "bf16"])["losses"]);
    let figures: Value = project.json(&[
        "bench", "generate", "--model", "model", "--prompt", "8", "--tokens", "4", "--batch", "3",
        "--rounds", "1", "--json", "-",
    ]);
    assert!(
        figures["prefill_tok_s"].as_f64().unwrap() > 0.0 && figures["decode_tok_s"].as_f64().unwrap() > 0.0
    );
}

#[test]
fn what_cannot_be_measured_is_named() {
    let project = Project::new().file("tokens.i32", "12345678");
    tiny_model::write(&project);
    project.run(&["bench", "train", "--model", "nowhere.gguf"]).code(1).says("nowhere.gguf");
    project
        .run(&["bench", "train", "--model", "model", "--tokens", "tokens.i32"])
        .code(1)
        .says("holds 2 tokens, but 7168 are needed for 7 steps");
}

#[test]
fn instruction_set_that_is_not_here_is_named() {
    let project = Project::new();
    let mut command = project.command(&["bench", "train", "--model", "nowhere.gguf"]);
    let ran = Ran::from(command.env("TUNESMITH_CPU", "mmx").output().unwrap());
    ran.code(2)
        .says("`TUNESMITH_CPU` asks for `mmx`, which is no instruction set of this CPU; it has `portable`");
}
