//! What the store promises: damage is found, named and healed; what is removed was needed by nobody.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::{Project, digest, states};

const MANIFEST: &str = r#"
name: kept
params: { n: 1, last: x }
stages:
  a: { uses: exec, with: { run: "seq ${params.n} > out", inputs: [in.txt], outputs: [out] } }
  b: { uses: exec, needs: a, with: { run: "cat a/out a/out > out", outputs: [out] } }
  c: { uses: exec, needs: b, with: { run: "cat b/out > out; echo ${params.last} >> out", outputs: [out] } }
"#;

fn project() -> Project {
    Project::new().file("kept.yaml", MANIFEST).file("in.txt", "an input\n")
}

fn run(project: &Project, more: &[&str]) -> Value {
    let arguments: Vec<&str> = ["run", "kept.yaml", "--json"].iter().chain(more).copied().collect();
    project.json(&arguments)
}

fn object(project: &Project, digest: &str) -> PathBuf {
    project.path("cache/objects").join(&digest[..2]).join(digest)
}

/// Changes a byte and nothing that can be seen from outside: size, time and mode stay.
fn alter(path: &std::path::Path) {
    let before = std::fs::metadata(path).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(path, bytes).unwrap();
    std::fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(before.modified().unwrap())
        .unwrap();
    std::fs::set_permissions(path, before.permissions()).unwrap();
}

fn make_short(path: &std::path::Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().set_len(1).unwrap();
}

type Harm = fn(&std::path::Path);

#[test]
fn altered_short_and_missing_objects_are_found_named_and_healed() {
    let ways: [(&str, Harm); 3] = [
        ("corrupt", alter),
        ("corrupt", make_short),
        ("missing", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (word, harm) in ways {
        let project = project();
        let before = run(&project, &[]);
        let name = digest(&before, "a", "out");
        harm(&object(&project, &name));
        let found = project.run(&["cache", "verify"]).code(1);
        assert!(found.stdout.contains(&format!("{word} {name}")), "{}", found.stdout);
        let after = run(&project, &[]);
        assert_eq!(states(&after), ["a=ran", "b=cached", "c=cached"]);
        assert_eq!(digest(&after, "a", "out"), name, "the same bytes again");
        assert_eq!(after["stages"][0]["reasons"][0]["kind"], "output_missing");
        project.run(&["cache", "verify"]).success();
    }
}

#[test]
fn damage_nobody_looked_for_is_found_when_the_object_is_used() {
    let project = project();
    let before = run(&project, &[]);
    let name = digest(&before, "b", "out");
    alter(&object(&project, &name));
    let ran = project.run(&["run", "kept.yaml", "--set", "last=y", "--json"]).success();
    assert_eq!(states(&ran.json()), ["a=cached", "b=ran", "c=ran"]);
    let ran = ran.says(&format!("object `{name}` of the store has been altered"));
    ran.says("an output of stage `b`, which makes it again");
    assert_eq!(project.read("cache/out/kept/c/out"), "1\n1\ny\n");
    project.run(&["cache", "verify"]).success();
}

#[test]
fn gc_keeps_the_last_runs_and_removes_what_only_older_ones_had() {
    let project = project();
    for n in ["3", "4", "5", "6"] {
        run(&project, &["--set", &format!("n={n}")]);
    }
    let objects = project.json(&["cache", "stats", "--json"])["objects"].as_u64().unwrap();
    let dry = project.json(&["cache", "gc", "--keep-last", "2", "--dry-run", "--json"]);
    assert_eq!(dry["actions"].as_array().unwrap().len(), 6, "a, b and c of two runs: {dry}");
    assert_eq!(project.json(&["cache", "stats", "--json"])["objects"], objects, "a dry run removes nothing");
    let real = project.json(&["cache", "gc", "--keep-last", "2", "--json"]);
    assert_eq!((&real["actions"], &real["bytes"]), (&dry["actions"], &dry["bytes"]));
    let stats = project.json(&["cache", "stats", "--json"]);
    assert_eq!(stats["objects"], real["kept_objects"]);
    assert_eq!(stats["actions"], 6);
    project.run(&["cache", "verify"]).success();
    assert_eq!(states(&run(&project, &["--set", "n=6"])), ["a=cached", "b=cached", "c=cached"]);
    assert_eq!(states(&run(&project, &["--set", "n=5"])), ["a=cached", "b=cached", "c=cached"]);
    assert_eq!(states(&run(&project, &["--set", "n=3"])), ["a=ran", "b=ran", "c=ran"]);
}

#[test]
fn a_pinned_run_stays_until_it_is_unpinned() {
    let project = project();
    let first = run(&project, &["--set", "n=3"])["run"].as_str().unwrap().to_owned();
    run(&project, &["--set", "n=4"]);
    project.run(&["cache", "pin", &first]).success();
    assert!(project.run(&["runs", "list"]).success().stdout.contains("pinned"));
    let gone = |project: &Project| {
        project.json(&["cache", "gc", "--keep-last", "1", "--json"])["actions"].as_array().unwrap().len()
    };
    assert_eq!(gone(&project), 0);
    project.run(&["cache", "unpin", &first]).success();
    assert_eq!(gone(&project), 3);
    project.run(&["cache", "pin", "nonsense"]).code(2).says("no run `nonsense`");
}

#[test]
fn size_and_age_say_how_much_goes() {
    let project = project();
    for n in ["1000", "2000", "3000", "4000"] {
        run(&project, &["--set", &format!("n={n}")]);
    }
    let gc = |more: &[&str]| {
        let arguments: Vec<&str> = ["cache", "gc", "--json"].iter().chain(more).copied().collect();
        project.json(&arguments)
    };
    assert_eq!(gc(&["--keep-last", "1", "--max-age", "1d"])["actions"].as_array().unwrap().len(), 0);
    assert_eq!(gc(&["--keep-last", "1", "--max-size", "1GiB"])["actions"].as_array().unwrap().len(), 0);
    let some = gc(&["--keep-last", "1", "--max-size", "200kB"]);
    let count = some["actions"].as_array().unwrap().len();
    assert!((1..9).contains(&count) && some["kept_bytes"].as_u64().unwrap() <= 200_000, "{some}");
    let most = gc(&["--keep-last", "1", "--max-size", "1kB"]);
    assert!(most["bytes_over"].as_u64().unwrap() > 0, "the last run is never given up: {most}");
    assert_eq!(states(&run(&project, &["--set", "n=4000"])), ["a=cached", "b=cached", "c=cached"]);
}

#[test]
fn a_store_in_use_is_left_alone() {
    let project = project().file(
        "slow.yaml",
        "stages: { s: { uses: exec, with: { run: 'echo 1 > out; sleep 1.5', outputs: [out] } } }\n",
    );
    run(&project, &[]);
    let mut child = project.command(&["run", "slow.yaml"]).stderr(Stdio::null()).spawn().unwrap();
    while std::fs::read_dir(project.path("cache/runs")).unwrap().count() < 2 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    project.run(&["cache", "gc", "--keep-last", "0"]).code(1).says("is in use by another tunesmith");
    child.kill().unwrap();
    child.wait().unwrap();
    project.run(&["cache", "gc", "--keep-last", "0"]).success();
}

#[test]
fn an_edited_result_is_kept_aside() {
    let project = project();
    run(&project, &[]);
    project.write("cache/out/kept/c/out", "my own words\n");
    run(&project, &[]);
    assert_eq!(project.read("cache/out/kept/c/out"), "1\n1\nx\n");
    assert_eq!(project.read("cache/out/kept/c/out.edited"), "my own words\n");
}

#[test]
fn a_newer_store_is_refused_and_left_as_it_is() {
    let project = project().file("cache/format", "tunesmith store 2\n");
    project.run(&["run", "kept.yaml"]).code(1).says("has format `tunesmith store 2`").says("newer tunesmith");
    assert_eq!(std::fs::read_dir(project.path("cache")).unwrap().count(), 1);
}

#[test]
fn results_are_shared_through_a_folder_and_damaged_ones_are_not_believed() {
    let here = project();
    let made = run(&here, &[]);
    let folder = here.path("shared");
    let folder = folder.to_str().unwrap();
    let pushed = here.json(&["cache", "push", folder, "--json"]);
    assert_eq!((pushed["actions"].as_u64(), pushed["refused"].as_u64()), (Some(3), Some(0)));
    assert_eq!(
        here.json(&["cache", "push", folder, "--json"])["objects"],
        0,
        "what is there is not copied again"
    );

    let there = project();
    assert_eq!(states(&run(&there, &["--remote", folder])), ["a=cached", "b=cached", "c=cached"]);
    assert_eq!(there.read("cache/out/kept/c/out"), "1\n1\nx\n");
    there.run(&["cache", "verify"]).success();

    let pulling = project();
    assert_eq!(pulling.json(&["cache", "pull", folder, "--json"])["actions"], 3);
    assert_eq!(states(&run(&pulling, &[])), ["a=cached", "b=cached", "c=cached"]);

    let name = digest(&made, "b", "out");
    alter(&here.path("shared/objects").join(&name[..2]).join(&name));
    let wary = project();
    assert_eq!(states(&run(&wary, &["--remote", folder])), ["a=cached", "b=ran", "c=cached"]);
    wary.run(&["cache", "verify"]).success();
    assert_eq!(project().run(&["cache", "pull", folder, "--json"]).code(1).json()["refused"], 1);
    wary.run(&["cache", "pull", "s3://bucket"]).code(2).says("is no folder");
    wary.run(&["cache", "pull", "nowhere"]).code(1).says("holds no results");
}
