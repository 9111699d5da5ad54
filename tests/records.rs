//! What a run leaves behind for later: the lock, and the proof that the same inputs make the same bytes.

use serde_json::Value;

use crate::harness::{Project, digest, states};

const MANIFEST: &str = r#"
name: locked
params: { n: 3 }
stages:
  rows: { uses: exec, with: { run: "head -n ${params.n} in.txt > out", inputs: [in.txt], outputs: [out] } }
  sum: { uses: exec, needs: rows, with: { run: "wc -l < rows/out > out", outputs: [out] } }
"#;

fn project() -> Project {
    Project::new().file("m.yaml", MANIFEST).file("in.txt", "a\nb\nc\nd\n")
}

fn lock(project: &Project) -> Value {
    serde_json::from_str(&project.read("m.yaml.lock")).unwrap()
}

#[test]
fn a_whole_run_writes_a_lock_that_names_every_digest() {
    let project = project();
    let report = project.json(&["run", "m.yaml", "--json"]);
    let written = lock(&project);
    for name in ["rows", "sum"] {
        assert_eq!(written["stages"][name]["outputs"]["out"], digest(&report, name, "out"));
    }
    project.run(&["run", "m.yaml", "--set", "n=2"]).success();
    project.run(&["run", "m.yaml", "rows"]).success();
    assert_eq!(lock(&project), written, "only a whole run with the manifest's own params is locked");
    project.run(&["run", "m.yaml", "--locked"]).success();
    std::fs::remove_dir_all(project.path("cache")).unwrap();
    project.run(&["run", "m.yaml", "--locked"]).success();
}

#[test]
fn the_lock_is_no_source_of_the_stages_that_read_its_folder() {
    let project = Project::new().file(
        "m.yaml",
        "stages: { all: { uses: exec, with: { run: 'ls > \"$TMPDIR/l\"; mv \"$TMPDIR/l\" names', inputs: [\"**/*\"], outputs: [names] } } }\n",
    );
    project.run(&["run", "m.yaml"]).success();
    assert_eq!(states(&project.json(&["run", "m.yaml", "--json"])), ["all=cached"]);
    assert_eq!(project.read("cache/out/m/all/names"), "m.yaml\n");
}

#[test]
fn a_locked_run_refuses_what_would_differ_before_anything_runs() {
    let project = project();
    project.run(&["run", "m.yaml", "--locked"]).code(2).says("there is no `m.yaml.lock`");
    project.run(&["run", "m.yaml"]).success();
    let runs = || std::fs::read_dir(project.path("cache/runs")).unwrap().count();
    let before = (lock(&project), runs());
    project.write("in.txt", "x\nb\nc\nd\n");
    project
        .run(&["run", "m.yaml", "--locked"])
        .code(1)
        .says("stage `rows`: the result would not be the one locked: in.txt changed");
    let refused = project.run(&["run", "m.yaml", "--locked", "--set", "n=1", "--json"]).code(1).json();
    assert_eq!(refused["errors"][0]["code"], "lock::differs");
    assert_eq!((lock(&project), runs()), before, "nothing ran");
    project.write("in.txt", "a\nb\nc\nd\n");
    project.run(&["run", "m.yaml", "--locked"]).success();
    project.write("m.yaml.lock", "{}");
    project.run(&["run", "m.yaml", "--locked"]).code(2).says("is no lock of format 1");
}

#[test]
fn a_locked_run_fails_where_a_stage_makes_something_else() {
    let project = Project::new()
        .file("m.yaml", "stages: { t: { uses: exec, with: { run: 'date +%N > out', outputs: [out] } } }\n");
    project.run(&["run", "m.yaml"]).success();
    std::fs::remove_dir_all(project.path("cache")).unwrap();
    project.run(&["run", "m.yaml", "--locked"]).code(1).says("`out` is not what was locked");
}

#[test]
fn verify_runs_everything_again_and_finds_the_same_bytes() {
    let project = project();
    let before = project.json(&["run", "m.yaml", "--json"]);
    let verified = project.json(&["run", "m.yaml", "--verify", "--json"]);
    assert_eq!(states(&verified), ["rows=ran", "sum=ran"]);
    for name in ["rows", "sum"] {
        assert_eq!(digest(&verified, name, "out"), digest(&before, name, "out"));
    }
}

#[test]
fn verify_names_the_stage_that_makes_other_bytes_and_keeps_what_stood() {
    let project = Project::new().file(
        "m.yaml",
        r#"
stages:
  clock: { uses: exec, with: { run: "date +%N > out; echo same > steady", outputs: [out, steady] } }
  after: { uses: exec, needs: clock, with: { run: "cat clock/out > out", outputs: [out] } }
"#,
    );
    let before = project.json(&["run", "m.yaml", "--json"]);
    let ran = project.run(&["run", "m.yaml", "--verify", "--json"]).code(1);
    let report = ran.json();
    let errors = report["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 1, "the stage after it is right: {report}");
    assert_eq!((&errors[0]["code"], &errors[0]["stage"]), (&"run::nondeterministic".into(), &"clock".into()));
    let message = errors[0]["message"].as_str().unwrap();
    assert!(message.contains("`out` (") && !message.contains("steady"), "{message}");
    let after = project.json(&["run", "m.yaml", "--json"]);
    assert_eq!(states(&after), ["clock=cached", "after=cached"]);
    assert_eq!(digest(&after, "clock", "out"), digest(&before, "clock", "out"));
    project.run(&["cache", "verify"]).success();
}

#[test]
fn a_run_is_exported_as_trace_metrics_and_provenance() {
    let project = Project::new().file(
        "m.yaml",
        r#"
stages:
  a: { uses: exec, with: { run: "sleep 0.2; cat n.txt > out", inputs: [n.txt], outputs: [out] } }
  b: { uses: exec, with: { run: "sleep 0.2; echo 2 > out", outputs: [out] } }
  c: { uses: exec, needs: [a, b], with: { run: 'echo "{\"loss\": 0.5, \"deep\": {\"er\": 2}}" > m.json', outputs: [m.json], metrics: m.json } }
"#,
    )
    .file("n.txt", "1\n");
    let run = project.json(&["run", "m.yaml", "--json", "--jobs", "2"])["run"].as_str().unwrap().to_owned();
    let export = |format: &str| project.run(&["runs", "export", &run, "--format", format]).success();

    let trace = export("trace").json();
    let events = trace["traceEvents"].as_array().unwrap();
    assert_eq!(events.len(), 3);
    let of = |name: &str| events.iter().find(|event| event["name"] == name).unwrap();
    assert_ne!(of("a")["tid"], of("b")["tid"], "side by side");
    assert!(of("a")["dur"].as_f64().unwrap() >= 200_000.0 && of("c")["ts"].as_f64() > of("a")["ts"].as_f64());

    assert_eq!(export("metrics").json()["stages"]["c"]["deep.er"], 2);
    let text = export("openmetrics").stdout;
    assert!(
        text.contains("tunesmith_stage_metric{pipeline=\"m\",stage=\"c\",metric=\"loss\"} 0.5\n"),
        "{text}"
    );
    assert!(text.ends_with("# EOF\n"));

    let graph = export("ro-crate").json()["@graph"].as_array().unwrap().clone();
    let node = |id: &str| graph.iter().find(|node| node["@id"] == id).unwrap_or_else(|| panic!("no {id}"));
    assert_eq!(node("#c")["object"], serde_json::json!([{ "@id": "out/m/a/out" }, { "@id": "out/m/b/out" }]));
    assert_eq!(node("#c")["result"][0]["@id"], "out/m/c/m.json");
    assert_eq!(node("#a")["object"], serde_json::json!([{ "@id": "n.txt" }]));
    assert_eq!(node("./")["hasPart"].as_array().unwrap().len(), 4);
    for file in node("./")["hasPart"].as_array().unwrap() {
        let id = file["@id"].as_str().unwrap();
        assert!(project.path("cache").join(id).exists() || id == "n.txt", "{id}");
        assert!(node(id)["identifier"].as_str().unwrap().starts_with("blake3:"));
    }
    let shown = project.run(&["runs", "show", &run]).success().stdout;
    assert!(shown.contains("ran     c 0.0 s\n            deep.er 2\n"), "{shown}");
}
