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
    let within = |value: &Value, range: std::ops::Range<f64>| range.contains(&value.as_f64().unwrap());
    assert!(within(&kept["peak_percent"], 0.0..100.0) && within(&kept["cpu_ms"], 0.0..1e6));
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
fn operations_are_held_against_what_the_machine_gives() {
    let project = Project::new();
    let options = ["bench", "kernels", "--threads", "2", "--tokens", "16", "--rounds", "1"];
    let figures: Value = project.json(&[&options[..], &["--json", "-"]].concat());
    let positive = |value: &Value| value.as_f64().unwrap() > 0.0;
    let peak = &figures["peak"];
    assert!(["thread_gflop_s", "gflop_s", "thread_gb_s", "gb_s"].iter().all(|name| positive(&peak[name])));
    assert!(figures["numerics"].as_str().unwrap().starts_with("cpu:") && figures["threads"] == 2);
    let kernels = figures["kernels"].as_array().unwrap();
    let of = |name: &str| kernels.iter().filter(|kernel| kernel["name"] == name).collect::<Vec<_>>();
    assert_eq!(of("linear").len(), 10, "five shapes in two encodings");
    assert_eq!((of("linear backward").len(), of("lora backward").len()), (10, 4));
    assert_eq!((of("attention").len(), of("cross-entropy").len(), of("glu backward").len()), (2, 1, 1));
    for kernel in kernels {
        assert!(positive(&kernel["ms"]) && positive(&kernel["peak_percent"]), "{kernel}");
        let by_rate = kernel["unit"] == "GFLOP/s";
        let top = peak[if by_rate { "gflop_s" } else { "gb_s" }].as_f64().unwrap();
        let share = 100.0 * kernel["rate"].as_f64().unwrap() / top;
        assert!((share - kernel["peak_percent"].as_f64().unwrap()).abs() < 1e-6 * share, "{kernel}");
    }
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

#[test]
fn instruction_set_that_is_not_here_is_named() {
    let project = Project::new();
    let mut command = project.command(&["bench", "train", "--model", "nowhere.gguf"]);
    let ran = Ran::from(command.env("TUNESMITH_CPU", "mmx").output().unwrap());
    ran.code(2)
        .says("`TUNESMITH_CPU` asks for `mmx`, which is no instruction set of this CPU; it has `portable`");
}

#[test]
fn operations_are_right_on_this_machine() {
    let project = Project::new();
    let test: Value =
        project.json(&["bench", "selftest", "--device", "cpu", "--threads", "2", "--json", "-"]);
    let operations = test["operations"].as_array().unwrap();
    assert!(test["ok"] == true && test["numerics"].as_str().unwrap().starts_with("cpu:"));
    assert!(operations.len() > 20 && operations.iter().all(|operation| operation["ok"] == true));
    // Plain loops are right, and nothing else is exactly as they are.
    assert!(operations.iter().any(|operation| operation["error"].as_f64().unwrap() > 0.0));
}
