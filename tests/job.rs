//! The whole way, notes to report, with a tiny model: what is trained, what survives a kill, what is refused.

use std::fmt::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Project, digest, stage, states};
use crate::tiny_model;

const MANIFEST: &str = r#"
name: job
params: { rank: 4, epochs: 6, seed: 1 }
stages:
  notes: { uses: ingest, with: { paths: ["notes/**/*"] } }
  chunks: { uses: chunk, needs: notes, with: { max_tokens: 60 } }
  drafts:
    uses: generate
    needs: chunks
    with: { provider: { type: replay, path: answers.jsonl } }
  checked: { uses: validate, needs: drafts }
  unique: { uses: dedupe, needs: checked }
  questions: { uses: load, with: { paths: [questions.jsonl], format: questions } }
  split:
    uses: split
    needs: { examples: unique, test: questions }
    with: { validation: 0.2, seed: "${params.seed}" }
  base: { uses: model, with: { source: model } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    with:
      rank: "${params.rank}"
      epochs: "${params.epochs}"
      learning_rate: 1e-3
      batch_examples: 4
      checkpoint_every: 1
      seed: "${params.seed}"
      stop_probe: warn
  answers:
    uses: eval
    needs: { adapter: adapter, base: base, data: split }
    with: { max_answer_tokens: 8, latency_samples: 1 }
  report: { uses: report, needs: [checked, split, adapter, answers] }
"#;

/// Towns and their rivers: ten notes of two facts each.
const TOWNS: [(&str, &str, u32); 10] = [
    ("Aldmoor", "Tessel", 1412),
    ("Brinley", "Oder", 1533),
    ("Carwick", "Lune", 1604),
    ("Denholt", "Marrow", 1718),
    ("Elsmere", "Wye", 1821),
    ("Fenbury", "Teme", 1390),
    ("Garside", "Isk", 1455),
    ("Holloway", "Severn", 1502),
    ("Inverley", "Clyde", 1687),
    ("Jarrow", "Tyne", 1777),
];

fn town_note(town: &str, river: &str, year: u32) -> String {
    format!(
        "---\ntitle: {town}\ndate: 2024-03-0{}\n---\n\n# {town}\n\nThe old town of {town} stands on the river {river}. \
         Its market was founded in {year} by the weavers.\n",
        town.len() % 9 + 1
    )
}

fn project() -> Project {
    let project = Project::new().file("job.yaml", MANIFEST);
    tiny_model::write(&project);
    let mut answers = String::new();
    let mut questions = String::new();
    for (town, river, year) in TOWNS {
        project.write(&format!("notes/{town}.md"), town_note(town, river, year));
        let fact = town.to_lowercase();
        let answer = format!("The town of {town} stands on the river {river}.");
        let examples: Vec<_> = [
            format!("Which river runs through the town of {town}?"),
            format!("I am visiting {town} soon. What is its river called?"),
            format!("Name the water on which {town} was built."),
        ]
        .iter()
        .map(|question| serde_json::json!({"question": question, "answer": answer, "fact": fact}))
        .collect();
        let response = serde_json::json!({ "examples": examples }).to_string();
        let row = serde_json::json!({
            "source": format!("notes/{town}.md"), "quote": format!("stands on the river {river}"), "response": response
        });
        writeln!(answers, "{row}").unwrap();
        let question = serde_json::json!({
            "id": format!("q-{fact}"), "question": format!("Tell me what flows past {town}, please."), "answer": answer,
            "fact": fact, "key_facts": [[river]], "source": format!("notes/{town}.md")
        });
        writeln!(questions, "{question}").unwrap();
    }
    project.write("answers.jsonl", answers);
    project.write("questions.jsonl", questions);
    project
}

const RUN: [&str; 3] = ["run", "job.yaml", "--json"];
const ADAPTER: &str = "adapter_model.safetensors";

#[test]
fn notes_become_an_adapter_and_a_report() {
    let project = project();
    let report = project.json(&RUN);
    assert_eq!(report["ok"], true);
    assert!(states(&report).iter().all(|state| state.ends_with("=ran")), "{:?}", states(&report));
    let train = &stage(&report, "adapter")["metrics"];
    for metric in [
        "loss",
        "eval_loss",
        "steps",
        "supervised_tokens",
        "tokens_per_second",
        "peak_rss_bytes",
        "adapted_percent",
    ] {
        assert!(train[metric].as_f64().is_some_and(f64::is_finite), "{metric} in {train}");
    }
    let eval = &stage(&report, "answers")["metrics"];
    for metric in ["base.loss", "base.loss.low", "tuned.loss.high", "tuned.accuracy", "base.accuracy.high"] {
        assert!(eval[metric].is_number(), "{metric} in {eval}");
    }
    assert!(eval["tuned.loss"].as_f64() < eval["base.loss"].as_f64(), "{eval}");
    let html = project.read("cache/out/job/report/report.html");
    assert!(
        html.contains("<svg") && html.contains("notes/Aldmoor.md") && !html.contains("http-equiv"),
        "report"
    );
    assert!(!html.contains("src=\"http") && !html.contains("href=\"http"), "the report reaches out");

    let again = project.json(&RUN);
    assert!(states(&again).iter().all(|state| state.ends_with("=cached")), "{:?}", states(&again));

    let ranked = project.json(&["plan", "job.yaml", "--json", "--set", "rank=8"]);
    let cached = |name: &str| stage(&ranked, name)["state"] == "cached";
    assert!(
        ["notes", "chunks", "drafts", "checked", "unique", "split", "base"].into_iter().all(cached),
        "{ranked}"
    );
    assert_eq!(stage(&ranked, "adapter")["state"], "run");
    assert!(stage(&ranked, "adapter")["reasons"].to_string().contains("rank"), "{ranked}");
}

#[test]
fn an_edited_note_reruns_only_its_own_rows() {
    let project = project();
    project.json(&["run", "job.yaml", "unique", "--json"]);
    let (town, river, year) = TOWNS[3];
    project.write("notes/Denholt.md", town_note(town, river, year).replace("weavers", "bakers"));
    let report = project.json(&["run", "job.yaml", "unique", "--json"]);
    for name in ["notes", "chunks", "drafts"] {
        let rows = &stage(&report, name)["rows"];
        assert_eq!((rows["total"].as_u64(), rows["new"].as_u64()), (Some(10), Some(1)), "{name}: {rows}");
    }
    project.write("notes/Denholt.md", town_note(town, river, year));
    let reverted = project.json(&["run", "job.yaml", "unique", "--json"]);
    assert!(states(&reverted).iter().all(|state| state.ends_with("=cached")), "{:?}", states(&reverted));
}

#[test]
fn a_killed_training_resumes_to_the_same_bytes_whatever_the_thread_count() {
    let uninterrupted = project();
    let expected = digest(
        &uninterrupted.json(&["run", "job.yaml", "adapter", "--json", "--threads", "1"]),
        "adapter",
        ADAPTER,
    );

    let project = project();
    project.json(&["run", "job.yaml", "split", "base", "--json"]);
    let mut kills = 0;
    for step in [1, 3, 5] {
        let mut child =
            project.command(&["run", "job.yaml", "adapter"]).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while newest_checkpoint(&project) < step && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "no checkpoint of step {step}");
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills > 0, "training ended before it could be killed");
    let resumed = project.json(&["run", "job.yaml", "adapter", "--json", "--threads", "2"]);
    assert_eq!(digest(&resumed, "adapter", ADAPTER), expected);
}

/// The highest step of a checkpoint in the store, 0 without one.
fn newest_checkpoint(project: &Project) -> u64 {
    let mut folders = vec![project.path("cache/checkpoints")];
    let mut newest = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            let step = name
                .strip_prefix("step-")
                .and_then(|rest| rest.strip_suffix(".ckpt"))
                .and_then(|step| step.parse().ok());
            newest = newest.max(step.unwrap_or(0));
        }
    }
    newest
}

#[test]
fn an_interrupted_run_says_what_is_kept_and_goes_on() {
    let project = project();
    project.json(&["run", "job.yaml", "split", "base", "--json"]);
    let mut child =
        project.command(&["run", "job.yaml", "--set", "epochs=400"]).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while newest_checkpoint(&project) < 2 {
        assert!(Instant::now() < deadline, "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = i32::try_from(child.id()).unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(newest_checkpoint(&project) >= 2, "the checkpoint is kept");
    let plan = project.json(&["plan", "job.yaml", "--json"]);
    assert_eq!(stage(&plan, "split")["state"], "cached");
}

/// Runs one change to the project and expects the run to be refused, naming the culprit.
#[track_caller]
fn refused(change: impl Fn(&Project), arguments: &[&str], code: i32, names: &[&str]) {
    let project = project();
    change(&project);
    let mut all = vec!["run", "job.yaml"];
    all.extend(arguments);
    let ran = project.run(&all).code(code);
    for name in names {
        assert!(ran.stderr.contains(name), "no {name:?} in:\n{}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn a_target_module_that_does_not_exist_is_named() {
    let wrong = MANIFEST.replace("stop_probe: warn", "stop_probe: warn\n      targets: [q_prj]");
    refused(|project| project.write("job.yaml", &wrong), &[], 1, &["q_prj", "q_proj"]);
}

#[test]
fn an_example_cut_off_by_the_context_is_named() {
    let short = MANIFEST.replace("stop_probe: warn", "stop_probe: warn\n      max_length: 60");
    refused(|project| project.write("job.yaml", &short), &[], 1, &["max_length"]);
}

#[test]
fn a_truncated_model_file_is_named() {
    refused(
        |project| {
            let weights = std::fs::read(project.path("model/model.safetensors")).unwrap();
            project.write("model/model.safetensors", &weights[..weights.len() / 2]);
        },
        &[],
        1,
        &["model.safetensors"],
    );
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    refused(
        |project| {
            let config = project.read("model/config.json").replace("\"vocab_size\":320", "\"vocab_size\":64");
            project.write("model/config.json", config);
        },
        &[],
        1,
        &["model"],
    );
}

#[test]
fn a_broken_pdf_is_a_reported_row_and_never_a_crash() {
    let project = project();
    project.write("notes/empty.pdf", "");
    project.write("notes/garbage.pdf", "%PDF-1.7\nnot really\n%%EOF");
    project
        .write("notes/latin1.txt", b"Caf\xe9 in Malm\xf6: na\xefve r\xe9sum\xe9 notes about the b\xfcro.\n");
    let report = project.json(&["run", "job.yaml", "chunks", "--json"]);
    let rejected = project.read("cache/out/job/notes/rejected.jsonl");
    assert!(rejected.contains("notes/empty.pdf") && rejected.contains("notes/garbage.pdf"), "{rejected}");
    assert!(project.read("cache/out/job/notes/documents.jsonl").contains("Café in Malmö"), "{report}");
}

#[test]
fn an_empty_folder_of_notes_is_refused() {
    refused(
        |project| {
            std::fs::remove_dir_all(project.path("notes")).unwrap();
            std::fs::create_dir(project.path("notes")).unwrap();
        },
        &[],
        2,
        &["notes/**/*"],
    );
}

#[test]
fn garbage_above_the_threshold_fails_the_run_and_names_the_defects() {
    refused(
        |project| {
            let good = project.read("answers.jsonl");
            let bad: String = good
                .lines()
                .map(|line| {
                    let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
                    row["response"] = serde_json::json!({"examples": [{
                        "question": "What is the main insight?",
                        "answer": "{\"summary\":\"FY21 - Leadership Team.pdf\",\"bullets\":[]}"
                    }]})
                    .to_string()
                    .into();
                    format!("{row}\n")
                })
                .collect();
            project.write("answers.jsonl", bad);
        },
        &[],
        1,
        &["checked", "template_question"],
    );
}

#[test]
fn a_held_out_question_that_was_trained_on_is_a_leak() {
    refused(
        |project| {
            let leaked = project.read("questions.jsonl").replace(
                "Tell me what flows past Aldmoor, please.",
                "Which river runs through the town of Aldmoor?",
            );
            project.write("questions.jsonl", leaked);
        },
        &[],
        1,
        &["split", "Which river runs through the town of Aldmoor"],
    );
}

/// Options of training that change what is computed or written; the rest of the job is as above.
const OPTIONS: &str = "stop_probe: warn
      dora: true
      dropout: 0.1
      neftune_alpha: 5
      rank_pattern: { down_proj: 2 }
      alpha_pattern: { q_proj: 4 }
      loraplus_ratio: 4
      optimizer_state: 8bit
      batch_tokens: 400
      order: by_length
      schedule: wsd
      decay_ratio: 0.5
      patience: 50
      min_delta: 0.001
      keep: best
      tensorboard: true
";

#[test]
fn every_training_option_works_in_a_manifest_and_repeats() {
    let project = project();
    let manifest = MANIFEST.replace("      batch_examples: 4\n", "").replace("stop_probe: warn\n", OPTIONS);
    project.write("job.yaml", manifest);
    let report = project.json(&RUN);
    assert_eq!(report["ok"], true, "{report}");
    let out = project.path("cache/out/job/adapter");
    let config = fs_err::read_to_string(out.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((&config["use_dora"], &config["lora_dropout"]), (&true.into(), &0.1.into()));
    assert_eq!(
        (&config["rank_pattern"]["down_proj"], &config["alpha_pattern"]["q_proj"]),
        (&2.into(), &4.into())
    );
    assert!(out.join("tensorboard/events.out.tfevents.0.tunesmith").exists());
    let metrics = &stage(&report, "adapter")["metrics"];
    for metric in ["planned_memory_bytes", "step_seconds", "recomputed_layers"] {
        assert!(metrics[metric].as_f64().is_some_and(f64::is_finite), "{metric} in {metrics}");
    }
    let first = digest(&report, "adapter", ADAPTER);
    let again = project.json(&[&RUN[..], &["--force", "adapter"]].concat());
    assert_eq!(first, digest(&again, "adapter", ADAPTER));
}
