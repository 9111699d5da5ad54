//! Why a stage runs, as `plan`, `explain` and the run itself say it: down to the file, the rows and the param.

use crate::harness::{Project, stage};

const MANIFEST: &str = r#"
name: why
params: { lr: 2e-4, word: one }
stages:
  rows:
    uses: exec
    with: { run: "grep -v skip notes/all.jsonl > rows.jsonl", inputs: ["notes/"], outputs: [rows.jsonl] }
  adapter:
    uses: exec
    needs: rows
    with: { run: 'echo "$LR" > lr; wc -l < rows/rows.jsonl >> lr', outputs: [lr], env: { LR: "lr ${params.lr}" } }
  sized:
    uses: exec
    needs: rows
    with:
      run: "wc -c < rows/rows.jsonl > size"
      outputs: [size]
      env: { WORD: "${params.word}" }
"#;

fn project() -> Project {
    let project = Project::new()
        .file("why.yaml", MANIFEST)
        .file("notes/all.jsonl", "{\"a\":1}\n{\"a\":2}\n{\"a\":3}\n")
        .file("notes/other.txt", "unchanged\n");
    project.run(&["run", "why.yaml"]).success();
    project
}

#[test]
fn a_param_is_named_with_old_and_new_value_and_only_where_it_is_read() {
    let project = project();
    let plan = project.json(&["plan", "why.yaml", "--set", "word=two", "--json"]);
    assert_eq!(stage(&plan, "adapter")["state"], "cached");
    let reason = &stage(&plan, "sized")["reasons"][0];
    assert_eq!(reason["kind"], "param");
    assert_eq!(reason["what"], "with.env.WORD");
    assert_eq!(reason["from"], "params.word");
    assert_eq!((reason["old"].as_str(), reason["new"].as_str()), (Some("one"), Some("two")));

    let plan = project.run(&["plan", "why.yaml", "--set", "word=two"]).success();
    assert!(plan.stdout.contains("cached  adapter\n"), "{}", plan.stdout);
    let line = r#"sized: params.word "one" → "two" (with.env.WORD)"#;
    assert!(plan.stdout.contains(line), "{}", plan.stdout);
    let explained = project.run(&["explain", "why.yaml", "sized", "--set", "word=two"]).success();
    assert_eq!(explained.stdout, format!("{line}\n"));
    project.run(&["run", "why.yaml", "--set", "word=two"]).success().says(line);
}

#[test]
fn a_number_is_told_with_its_param() {
    let rows: String = (0..8).map(|n| format!("{{\"prompt\":\"p{n}\",\"completion\":\"c{n}\"}}\n")).collect();
    let project = Project::new()
        .file(
            "m.yaml",
            "params: { held: 0.5 }\nstages:\n  d: { uses: load, with: { paths: [e.jsonl] } }\n  split: { uses: split, needs: d, with: { validation: \"${params.held}\" } }\n",
        )
        .file("e.jsonl", &rows);
    project.run(&["run", "m.yaml"]).success();
    let line = "split: params.held 0.5 → 0.25 (with.validation)";
    project.run(&["run", "m.yaml", "--set", "held=0.25"]).success().says(line);
}

#[test]
fn a_file_is_named_and_its_rows_are_counted() {
    let project = project();
    project.write("notes/all.jsonl", "{\"a\":1}\n{\"a\":3}\n{\"a\":4}\n{\"a\":5}\n");
    let explained = project.run(&["explain", "why.yaml", "adapter"]).success();
    assert_eq!(
        explained.stdout,
        "adapter: input rows (stage rows) is made first\n  rows: notes/all.jsonl changed, 3 → 4 rows (+2 -1)\n"
    );
    let json = project.json(&["explain", "why.yaml", "adapter", "--json"]);
    assert_eq!(json["causes"][0]["stage"], "rows");
    assert_eq!(json["causes"][0]["reasons"][0]["what"], "notes/all.jsonl");
    project
        .run(&["run", "why.yaml"])
        .success()
        .says("rows: notes/all.jsonl changed, 3 → 4 rows (+2 -1)")
        .says("adapter: input rows (stage rows) changed: rows.jsonl 3 → 4 rows (+2 -1)");
}

#[test]
fn a_stage_that_makes_the_same_again_is_no_reason() {
    let project = project();
    project.write("notes/all.jsonl", "{\"a\":1}\n{\"a\":2}\n{\"skip\":3}\n{\"a\":3}\n");
    let report = project.json(&["run", "why.yaml", "--json"]);
    assert_eq!(stage(&report, "rows")["state"], "ran");
    assert_eq!(stage(&report, "adapter")["state"], "cached");
}

#[test]
fn comments_formatting_and_spelling_are_no_reason() {
    let project = project();
    let written = MANIFEST
        .replace(
            "params: { lr: 2e-4, word: one }",
            "# two params\nparams:\n  word: 'one'   # first\n  lr: 0.00020",
        )
        .replace("    needs: rows\n", "    needs: [ rows ]\n");
    assert_ne!(written, MANIFEST);
    project.write("why.yaml", written);
    for name in ["rows", "adapter", "sized"] {
        let explained = project.run(&["explain", "why.yaml", name]).success();
        assert_eq!(explained.stdout, format!("{name} is up to date\n"));
    }
}
