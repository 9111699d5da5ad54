//! Manifests as users write them: every one we ship loads, every kind of mistake is located, and nothing runs
//! before all of it is right.

use crate::harness::{Project, repository};

/// Runs `check` on a manifest and returns the errors of the JSON form, as `line:column code message (hint)`.
fn errors(name: &str, text: &str) -> Vec<String> {
    let project = Project::new().file(name, text);
    let report = project.run(&["check", name, "--json"]).code(2).json();
    report["errors"]
        .as_array()
        .expect("errors")
        .iter()
        .map(|error| {
            format!(
                "{}:{} {} {} ({})",
                error["line"],
                error["column"],
                error["code"].as_str().unwrap_or_default(),
                error["message"].as_str().unwrap_or_default(),
                error["hint"].as_str().unwrap_or_default()
            )
        })
        .collect()
}

#[track_caller]
fn check(name: &str, text: &str, expected: &[(&str, &str)]) {
    let errors = errors(name, text);
    assert_eq!(errors.len(), expected.len(), "{errors:#?}");
    for (error, (place, words)) in errors.iter().zip(expected) {
        assert!(error.starts_with(&format!("{place} ")), "expected {place}: {error}");
        assert!(error.contains(words), "expected {words:?}: {error}");
    }
}

#[test]
fn every_shipped_manifest_loads_and_draws() {
    let mut found = 0;
    for entry in std::fs::read_dir(repository().join("pipelines")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml" || extension == "toml") {
            let path = path.to_str().unwrap();
            let project = Project::new();
            project.run(&["check", path]).success();
            assert!(
                project.run(&["graph", path, "--format", "mermaid"]).success().stdout.contains("flowchart")
            );
            found += 1;
        }
    }
    assert!(found >= 2, "{found} manifests");
}

#[test]
fn an_unknown_parameter_is_located_and_the_right_name_is_suggested() {
    check(
        "m.yaml",
        "stages:\n  notes: { uses: ingest, with: { paths: [\"n/*\"] } }\n  chunks:\n    uses: chunk\n    needs: notes\n    with: { max_token: 320 }\n",
        &[("6:13", "max_tokens")],
    );
}

#[test]
fn all_mistakes_are_said_at_once() {
    check(
        "m.yaml",
        "stages:\n  notes: { uses: ingestt, with: { paths: [a] } }\n  chunks: { uses: chunk, needs: note, with: { max_tokens: many } }\n",
        &[("2:18", "ingest"), ("3:33", "notes"), ("3:59", "integer")],
    );
}

#[test]
fn a_cycle_prints_its_path() {
    let errors = errors(
        "m.yaml",
        "stages:\n  a: { uses: exec, needs: b, with: { run: x, outputs: [o] } }\n  b: { uses: exec, needs: a, with: { run: x, outputs: [o] } }\n",
    );
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("a -> b -> a") || errors[0].contains("b -> a -> b"), "{errors:?}");
}

#[test]
fn a_duplicate_key_is_located_in_yaml_and_in_toml() {
    assert!(errors("m.yaml", "name: a\nname: b\nstages: {}\n")[0].starts_with("2:1 "));
    assert!(errors("m.toml", "name = \"a\"\nname = \"b\"\n")[0].starts_with("2:1 "));
}

#[test]
fn a_negative_rank_is_refused_where_it_stands() {
    let manifest = "stages:\n  m: { uses: model, with: { source: x } }\n  d: { uses: load, with: { paths: [x] } }\n  s: { uses: split, needs: d }\n  t:\n    uses: train\n    needs: { data: s, base: m }\n    with:\n      rank: -1\n";
    check("m.yaml", manifest, &[("9:13", "-1")]);
}

#[test]
fn yaml_and_toml_mean_the_same() {
    let yaml =
        "name: twin\nstages:\n  one: { uses: exec, with: { run: \"echo 1 > out\", outputs: [out] } }\n";
    let toml = "name = \"twin\"\n[stages.one]\nuses = \"exec\"\nwith = { run = \"echo 1 > out\", outputs = [\"out\"] }\n";
    let project = Project::new().file("twin.yaml", yaml).file("twin.toml", toml);
    project.run(&["run", "twin.yaml"]).success();
    let plan = project.json(&["plan", "twin.toml", "--json"]);
    assert_eq!(plan["stages"][0]["state"], "cached", "{plan}");
}

#[test]
fn formatting_comments_and_the_spelling_of_a_number_change_no_key() {
    let first = "params: { x: 0.2 }\nstages:\n  one: { uses: exec, with: { run: \"echo ${params.x} > out\", outputs: [out] } }\n";
    let second = "# a comment\nparams:\n  x: 0.20\nstages:\n  one:\n    uses: exec\n    with:\n      outputs: [out]\n      run: \"echo ${params.x} > out\"\n";
    let project = Project::new().file("m.yaml", first);
    project.run(&["run", "m.yaml"]).success();
    project.write("m.yaml", second);
    assert_eq!(project.json(&["plan", "m.yaml", "--json"])["stages"][0]["state"], "cached");
}

#[test]
fn a_wrong_override_is_refused_with_a_suggestion() {
    let project = Project::new().file("m.yaml", "params: { rank: 8 }\nstages:\n  one: { uses: exec, with: { run: 'echo ${params.rank} > o', outputs: [o] } }\n");
    project.run(&["plan", "m.yaml", "--set", "rnk=16"]).code(2).says("rank");
}

#[test]
fn a_source_that_matches_nothing_is_refused_before_anything_runs() {
    let project = Project::new().file(
        "m.yaml",
        "stages:\n  first: { uses: exec, with: { run: 'echo 1 > o', outputs: [o] } }\n  notes: { uses: ingest, with: { paths: [\"nowhere/**/*.md\"] } }\n",
    );
    project.run(&["run", "m.yaml"]).code(2).says("nowhere/**/*.md").says("m.yaml:3");
    assert!(!project.path("cache/out/m/first").exists());
}
