//! `bench` on a tiny model: figures as JSON, and a model that is none.

use serde_json::Value;

use crate::harness::Project;
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
fn lines_are_gone_on_with_token_by_token() {
    let project = Project::new().file("texts", "a b\n\nc\n").file("none", "\n");
    tiny_model::write(&project);
    let command =
        ["bench", "generate", "--model", "model", "--base", "source", "--tokens", "3", "--json", "-"];
    let texts = |threads| project.json(&[&command[..], &["--threads", threads, "--text", "texts"]].concat());
    let (one, two) = (texts("1"), texts("2"));
    assert_eq!(one, two);
    assert_eq!(one[0]["prompt"], "a b");
    assert_eq!((one.as_array().unwrap().len(), one[1]["steps"].as_array().unwrap().len()), (2, 3));
    assert!(one[1]["steps"][2]["gap"].as_f64().unwrap() >= 0.0);
    project.run(&[&command[..], &["--text", "none"]].concat()).code(1).says("has no line");
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
