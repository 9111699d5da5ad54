//! What the runner promises, seen from outside: what runs, what does not, and what survives.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Project, digest, stage, states};

/// Two stages that count their executions in a file outside the project's view.
const CHAIN: &str = r#"
name: chain
params: { word: one }
stages:
  lines:
    uses: exec
    with:
      run: 'echo ran >> "$LOG/lines"; sort notes/*.txt > lines.txt'
      inputs: ["notes/"]
      outputs: [lines.txt]
      env: { LOG: "${env.LOG}" }
  words:
    uses: exec
    needs: lines
    with:
      run: 'echo ran >> "$LOG/words"; { echo ${params.word}; wc -l < lines/lines.txt; } > words.txt'
      outputs: [words.txt]
      env: { LOG: "${env.LOG}" }
"#;

struct Chain {
    project: Project,
}

impl Chain {
    fn new() -> Self {
        let project = Project::new()
            .file("chain.yaml", CHAIN)
            .file("notes/a.txt", "alpha\n")
            .file("notes/b.txt", "beta\n")
            .file("log/.keep", "");
        Self { project }
    }

    fn run(&self, more: &[&str]) -> serde_json::Value {
        let mut arguments = vec!["run", "chain.yaml", "--json"];
        arguments.extend(more);
        let mut command = self.project.command(&arguments);
        crate::harness::Ran::from(command.env("LOG", self.project.path("log")).output().unwrap())
            .success()
            .json()
    }

    fn executions(&self, name: &str) -> usize {
        std::fs::read_to_string(self.project.path("log").join(name)).map_or(0, |log| log.lines().count())
    }
}

#[test]
fn a_second_run_executes_nothing() {
    let chain = Chain::new();
    assert_eq!(states(&chain.run(&[])), ["lines=ran", "words=ran"]);
    assert_eq!(states(&chain.run(&[])), ["lines=cached", "words=cached"]);
    assert_eq!((chain.executions("lines"), chain.executions("words")), (1, 1));
}

#[test]
fn touching_a_note_executes_nothing() {
    let chain = Chain::new();
    chain.run(&[]);
    let note = std::fs::File::options().append(true).open(chain.project.path("notes/a.txt")).unwrap();
    note.set_modified(std::time::SystemTime::now() + Duration::from_secs(60)).unwrap();
    assert_eq!(states(&chain.run(&[])), ["lines=cached", "words=cached"]);
}

#[test]
fn an_edit_that_changes_nothing_downstream_stops_there() {
    let chain = Chain::new();
    chain.run(&[]);
    chain.project.write("notes/a.txt", "gamma\n");
    let report = chain.run(&[]);
    assert_eq!(states(&report), ["lines=ran", "words=ran"], "the content of lines.txt changed");
    chain.project.write("notes/a.txt", "beta\n");
    chain.project.write("notes/b.txt", "gamma\n");
    let swapped = chain.run(&[]);
    assert_eq!(states(&swapped), ["lines=ran", "words=cached"], "sorting gives the same bytes again");
    assert_eq!(digest(&report, "words", "words.txt"), digest(&swapped, "words", "words.txt"));
}

#[test]
fn reverting_an_edit_is_served_from_the_store() {
    let chain = Chain::new();
    chain.run(&[]);
    chain.project.write("notes/a.txt", "alpha\nmore\n");
    chain.run(&[]);
    chain.project.write("notes/a.txt", "alpha\n");
    assert_eq!(states(&chain.run(&[])), ["lines=cached", "words=cached"]);
    assert_eq!(chain.executions("lines"), 2);
}

#[test]
fn a_parameter_reruns_only_the_stage_that_reads_it() {
    let chain = Chain::new();
    chain.run(&[]);
    assert_eq!(states(&chain.run(&["--set", "word=two"])), ["lines=cached", "words=ran"]);
}

#[test]
fn explain_names_the_file_and_the_parameter() {
    let chain = Chain::new();
    chain.run(&[]);
    chain.project.write("notes/b.txt", "other\n");
    let mut command = chain.project.command(&["explain", "chain.yaml", "lines", "--json"]);
    let explained =
        crate::harness::Ran::from(command.env("LOG", chain.project.path("log")).output().unwrap())
            .success()
            .json();
    let reasons = explained["reasons"].to_string();
    assert!(reasons.contains("notes/b.txt") && !reasons.contains("notes/a.txt"), "{reasons}");
}

#[test]
fn a_failed_stage_keeps_what_finished_and_skips_what_follows() {
    let project = Project::new().file(
        "fails.yaml",
        r#"
stages:
  good: { uses: exec, with: { run: "echo 1 > a", outputs: [a] } }
  bad: { uses: exec, needs: good, with: { run: "echo something is wrong >&2; exit 3", outputs: [b] } }
  after: { uses: exec, needs: bad, with: { run: "echo 1 > c", outputs: [c] } }
"#,
    );
    let ran = project.run(&["run", "fails.yaml", "--json"]).code(1);
    let report = ran.json();
    assert_eq!(states(&report), ["good=ran", "bad=failed", "after=skipped"]);
    assert_eq!(report["errors"][0]["stage"], "bad");
    assert!(report["errors"][0]["message"].as_str().unwrap().contains("exit code 3"), "{report}");
    let again = project.run(&["run", "fails.yaml", "--json"]).code(1).json();
    assert_eq!(stage(&again, "good")["state"], "cached");
}

#[test]
fn a_missing_output_is_an_error_that_shows_what_is_there() {
    let project = Project::new().file(
        "m.yaml",
        "stages: { one: { uses: exec, with: { run: 'echo 1 > other', outputs: [wanted] } } }\n",
    );
    project.run(&["run", "m.yaml"]).code(1).says("did not write `wanted`").says("other");
}

#[test]
fn an_undeclared_input_is_not_there() {
    let project = Project::new().file("secret.txt", "x").file(
        "m.yaml",
        "stages: { one: { uses: exec, with: { run: 'cat secret.txt > out', outputs: [out] } } }\n",
    );
    project.run(&["run", "m.yaml"]).code(1).says("secret.txt");
}

#[test]
fn a_stage_reads_the_note_as_it_was_when_its_key_was_made() {
    let project = Project::new().file("in.txt", "old\n").file(
        "m.yaml",
        "stages: { one: { uses: exec, with: { run: 'sleep 1; cp in.txt out.txt', inputs: [in.txt], outputs: [out.txt] } } }\n",
    );
    let mut child = project.command(&["run", "m.yaml"]).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    project.write("in.txt", "new\n");
    assert!(child.wait().unwrap().success());
    assert_eq!(project.read("cache/out/m/one/out.txt"), "old\n");
    assert_eq!(
        states(&project.json(&["run", "m.yaml", "--json"])),
        ["one=ran"],
        "the edit is seen by the next run"
    );
    assert_eq!(project.read("cache/out/m/one/out.txt"), "new\n");
}

#[test]
fn two_runs_at_once_execute_a_stage_once() {
    let project = Project::new().file("log/.keep", "").file(
        "m.yaml",
        "stages: { one: { uses: exec, with: { run: 'echo ran >> \"$LOG\"; sleep 1; echo 1 > out', outputs: [out], env: { LOG: '${env.LOG}' } } } }\n",
    );
    let start = || {
        let mut command = project.command(&["run", "m.yaml"]);
        command.env("LOG", project.path("log/one")).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut both = [start(), start()];
    for child in &mut both {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(project.read("log/one").lines().count(), 1);
}

#[test]
fn watch_runs_what_an_edit_touches_and_a_touch_is_no_edit() {
    let chain = Chain::new();
    let mut command = chain.project.command(&["run", "chain.yaml", "--watch", "--quiet"]);
    command.env("LOG", chain.project.path("log")).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let result = || std::fs::read_to_string(chain.project.path("cache/out/chain/words/words.txt")).ok();
    let until = |is_so: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !is_so() {
            assert!(started.elapsed() < Duration::from_secs(30), "{:?}", result());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    until(&|| result().as_deref() == Some("one\n2\n"));
    chain.project.write("notes/c.txt", "gamma\n");
    until(&|| result().as_deref() == Some("one\n3\n"));
    let note = std::fs::File::options().append(true).open(chain.project.path("notes/a.txt")).unwrap();
    note.set_modified(std::time::SystemTime::now() + Duration::from_secs(60)).unwrap();
    chain.project.write("chain.yaml", "stages: [");
    std::thread::sleep(Duration::from_millis(600));
    chain.project.write("chain.yaml", CHAIN.replace("word: one", "word: two"));
    until(&|| result().as_deref() == Some("two\n3\n"));
    assert_eq!((chain.executions("lines"), chain.executions("words")), (2, 3));
    // SAFETY: kill(2) takes plain numbers; the process is this test's own child, not waited for yet.
    unsafe { libc::kill(libc::pid_t::try_from(child.id()).unwrap(), libc::SIGINT) };
    assert!(child.wait().unwrap().success(), "Ctrl-C is how a watch ends");
}

#[test]
fn eight_runs_at_once_execute_each_of_many_stages_once() {
    let stage = |n: u32| {
        let needs = if n < 3 { String::new() } else { format!("needs: [s{}, s{}], ", n - 3, n - 2) };
        format!(
            "  s{n}: {{ uses: exec, {needs}with: {{ run: 'echo {n} >> \"$LOG\"; sleep 0.02; echo {n} > out', outputs: [out], env: {{ LOG: '${{env.LOG}}' }} }} }}\n"
        )
    };
    let manifest = format!("stages:\n{}", (0..12).map(stage).collect::<String>());
    let project = Project::new().file("log/.keep", "").file("m.yaml", &manifest);
    let start = |_| {
        let mut command = project.command(&["run", "m.yaml", "--jobs", "2", "--json"]);
        command.env("LOG", project.path("log/all")).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let children: Vec<_> = (0..8).map(start).collect();
    for child in children {
        crate::harness::Ran::from(child.wait_with_output().unwrap()).success();
    }
    let mut ran: Vec<u32> = project.read("log/all").lines().map(|line| line.parse().unwrap()).collect();
    ran.sort_unstable();
    assert_eq!(ran, (0..12).collect::<Vec<_>>());
    project.run(&["cache", "verify"]).success();
}

/// Half a minute of kills; `cargo test -- --ignored slow_` runs it.
#[test]
#[ignore = "takes half a minute"]
fn slow_killed_at_two_hundred_moments_nothing_committed_is_lost() {
    const MANIFEST: &str = r#"
params: { round: 0 }
stages:
  a: { uses: exec, with: { run: "seq 3000 > out; echo ${params.round} >> out", outputs: [out] } }
  b: { uses: exec, needs: a, with: { run: "tac a/out > out", outputs: [out] } }
  c: { uses: exec, needs: b, with: { run: "wc -l < b/out > out; mkdir d; cp b/out d/copy", outputs: [out, d] } }
  d: { uses: exec, with: { run: "echo beside > out", outputs: [out] } }
"#;
    let whole = Project::new().file("m.yaml", MANIFEST);
    let project = Project::new().file("m.yaml", MANIFEST);
    let actions = || project.json(&["cache", "stats", "--json"])["actions"].as_u64().unwrap();
    let mut known = 0;
    // A fixed sequence of moments between 0 and 60 ms, by Knuth's linear congruential generator.
    let mut random = 7_u64;
    for kill in 0..200_u32 {
        let round = format!("round={}", kill / 10);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut command = project.command(&["run", "m.yaml", "--set", &round]);
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros((random >> 33) % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let verified = project.run(&["cache", "verify", "--json"]).success().json();
        assert_eq!(verified["corrupt"].as_array().unwrap().len(), 0, "{verified}");
        let now = actions();
        assert!(now >= known, "kill {kill}: {known} actions were committed, {now} are left");
        known = now;
        if kill % 10 == 9 {
            let report = project.json(&["run", "m.yaml", "--json", "--set", &round]);
            let expected = whole.json(&["run", "m.yaml", "--json", "--set", &round]);
            for (name, path) in [("a", "out"), ("b", "out"), ("c", "d/copy"), ("d", "out")] {
                assert_eq!(digest(&report, name, path), digest(&expected, name, path));
            }
            known = actions();
        }
    }
    assert_eq!(std::fs::read_dir(project.path("cache/tmp")).unwrap().count(), 0);
}

#[test]
fn independent_stages_run_side_by_side() {
    let project = Project::new().file(
        "m.yaml",
        r#"
stages:
  a: { uses: exec, with: { run: "sleep 1; echo a > out", outputs: [out] } }
  b: { uses: exec, with: { run: "sleep 1; echo b > out", outputs: [out] } }
"#,
    );
    let started = Instant::now();
    project.run(&["run", "m.yaml", "--jobs", "2"]).success();
    assert!(started.elapsed() < Duration::from_millis(1900), "{:?}", started.elapsed());
}

#[test]
fn killed_at_any_moment_nothing_half_done_is_believed() {
    let project = Project::new().file(
        "m.yaml",
        r#"
stages:
  a: { uses: exec, with: { run: "seq 20000 > out; sleep 0.1", outputs: [out] } }
  b: { uses: exec, needs: a, with: { run: "tac a/out > out; sleep 0.1", outputs: [out] } }
  c: { uses: exec, needs: b, with: { run: "wc -l < b/out > out; sleep 0.1", outputs: [out] } }
"#,
    );
    let reference = Project::new().file("m.yaml", &project.read("m.yaml"));
    let expected = reference.json(&["run", "m.yaml", "--json"]);
    for delay in [5, 40, 90, 130, 180, 230, 260, 300] {
        let mut child = project.command(&["run", "m.yaml"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        let verified = project.json(&["cache", "verify", "--json"]);
        assert_eq!(verified["corrupt"].as_array().unwrap().len(), 0, "{verified}");
    }
    let report = project.json(&["run", "m.yaml", "--json"]);
    for name in ["a", "b", "c"] {
        assert_eq!(digest(&report, name, "out"), digest(&expected, name, "out"));
    }
}

#[test]
fn an_altered_object_is_found_before_it_is_used() {
    let project = Project::new().file(
        "m.yaml",
        "params: { n: 1 }\nstages:\n  a: { uses: exec, with: { run: 'echo hello > out', outputs: [out] } }\n  b: { uses: exec, needs: a, with: { run: 'cat a/out > out; echo ${params.n} >> out', outputs: [out] } }\n",
    );
    let report = project.json(&["run", "m.yaml", "--json"]);
    let object = digest(&report, "a", "out");
    let path = project.path("cache/objects").join(&object[..2]).join(&object);
    let path = if path.exists() {
        path
    } else {
        project.path("cache/objects").join(&object[..2]).join(&object[2..])
    };
    let metadata = std::fs::metadata(&path).unwrap();
    let mut permissions = metadata.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&path, permissions).unwrap();
    std::fs::write(&path, "jello\n").unwrap();
    let verified = project.run(&["cache", "verify", "--json"]).code(1).json();
    assert!(verified["corrupt"].to_string().contains(&object), "{verified}");
    project.run(&["run", "m.yaml", "--set", "n=2"]).success();
    assert_eq!(project.read("cache/out/m/b/out"), "hello\n2\n");
}
