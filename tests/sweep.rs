//! `matrix` and `sweep`: one graph for all trials, so that what they share runs once; resumed after a kill, it
//! comes to the same table.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Project, Ran, stage, states};
use crate::tiny_model;

/// Fifteen trials behind one slow stage. Every execution leaves a line in `$LOG`.
const SWEEP: &str = r#"
name: swept
params: { rank: 8, seed: 1 }
stages:
  prefix:
    uses: exec
    with: { run: 'echo prefix >> "$LOG"; sleep 1; echo 100 > base', outputs: [base], env: { LOG: "${env.LOG}" } }
  by_rank:
    uses: exec
    needs: prefix
    with:
      run: 'echo by_rank >> "$LOG"; expr "$(cat prefix/base)" + "$RANK" > sum'
      outputs: [sum]
      env: { LOG: "${env.LOG}", RANK: "${params.rank}" }
  answers:
    uses: exec
    needs: by_rank
    with:
      run: 'echo answers >> "$LOG"; sleep 0.1; echo "{\"tuned\":{\"score\":$(expr "$(cat by_rank/sum)" + "$SEED")}}" > m.json'
      outputs: [m.json]
      metrics: m.json
      env: { LOG: "${env.LOG}", SEED: "${params.seed}" }
  unasked: { uses: exec, with: { run: "exit 1", outputs: [none] } }
sweep:
  matrix: { rank: [1, 2, 4, 8, 16], seed: [1, 2, 3] }
  objective: answers.tuned.score
"#;

fn project() -> Project {
    Project::new().file("swept.yaml", SWEEP).file("log/.keep", "")
}

fn command(project: &Project, arguments: &[&str]) -> std::process::Command {
    let mut command = project.command(arguments);
    command.env("LOG", project.path("log/ran"));
    command
}

fn sweep(project: &Project, more: &[&str]) -> Ran {
    let arguments: Vec<&str> = ["sweep", "swept.yaml"].iter().chain(more).copied().collect();
    Ran::from(command(project, &arguments).output().unwrap())
}

fn executions(project: &Project, name: &str) -> usize {
    let log = std::fs::read_to_string(project.path("log/ran")).unwrap_or_default();
    log.lines().filter(|line| *line == name).count()
}

#[test]
fn what_fifteen_trials_share_runs_once_however_many_run_at_a_time() {
    let project = project();
    let report = sweep(&project, &["-j", "3", "--json"]).success().json();
    assert_eq!((executions(&project, "prefix"), executions(&project, "by_rank")), (1, 5));
    assert_eq!(executions(&project, "answers"), 15);
    assert_eq!(report["trials"].as_array().unwrap().len(), 15);
    let points = report["points"].as_array().unwrap();
    let ranks: Vec<u64> = points.iter().map(|point| point["values"]["rank"].as_u64().unwrap()).collect();
    assert_eq!(ranks, [16, 8, 4, 2, 1], "a score is better when larger");
    assert_eq!((points[0]["mean"].as_f64(), points[0]["sd"].as_f64()), (Some(118.0), Some(1.0)));

    let again = sweep(&project, &["-j", "3"]).success();
    assert_eq!(executions(&project, "answers"), 15, "everything is known");
    assert_eq!(
        again.stdout,
        "rank  answers.tuned.score  ±  seeds\n  16                  118  1      3\n   8                  110  1      3\n   4                  106  1      3\n   2                  104  1      3\n   1                  103  1      3\n"
    );
    let page = project.read("cache/out/swept/sweep.html");
    assert!(page.matches("<polyline").count() == 15 && page.matches("<circle").count() == 15, "{page}");
    assert!(project.path("cache/out/swept/answers-rank=4,seed=2/m.json").exists());
}

#[test]
fn a_run_after_a_sweep_knows_what_the_sweep_made() {
    let project = project();
    sweep(&project, &["--quiet"]).success();
    let arguments = ["run", "swept.yaml", "answers", "--json", "--set", "rank=16"];
    let report = Ran::from(command(&project, &arguments).output().unwrap()).success().json();
    assert_eq!(states(&report), ["prefix=cached", "by_rank=cached", "answers=cached"]);
}

#[test]
fn killed_half_way_and_run_again_it_comes_to_the_same_table() {
    let whole = project();
    let expected = sweep(&whole, &["--json"]).success().json();
    let project = project();
    let mut child = command(&project, &["sweep", "swept.yaml", "-j", "3"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while executions(&project, "answers") < 6 {
        assert!(started.elapsed() < Duration::from_secs(60), "the sweep does not get on");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = sweep(&project, &["-j", "3", "--json"]).success().json();
    assert_eq!(resumed["points"], expected["points"]);
    assert_eq!(executions(&project, "prefix"), 1);
    let answers = executions(&project, "answers");
    assert!((15..=18).contains(&answers), "at most the three that were killed run again: {answers}");
}

#[test]
fn seeds_are_counted_up_from_the_param() {
    let project = project();
    let manifest = SWEEP.replace(", seed: [1, 2, 3] }", " }").replace("seed: 1", "seed: 10");
    project.write("swept.yaml", &manifest);
    let report = sweep(&project, &["--seeds", "4", "--json"]).success().json();
    let seeds: Vec<u64> = report["trials"].as_array().unwrap()[..4]
        .iter()
        .map(|trial| trial["seed"].as_u64().unwrap())
        .collect();
    assert_eq!(seeds, [10, 11, 12, 13]);
    assert_eq!(report["points"][0]["mean"].as_f64(), Some(127.5));
    project.write("swept.yaml", manifest.replace(", seed: 10 }", " }").replace("${params.seed}", "1"));
    sweep(&project, &["--seeds", "4"]).code(2).says("add `seed: 1` to `params`");
}

#[test]
fn halving_gives_the_best_a_larger_budget() {
    let project = Project::new().file(
        "h.yaml",
        r#"
params: { lr: 1, epochs: 1 }
stages:
  train:
    uses: exec
    with: { run: 'echo "{\"loss\": $((100 - LR * EPOCHS))}" > m.json', outputs: [m.json], metrics: m.json, env: { LR: "${params.lr}", EPOCHS: "${params.epochs}" } }
sweep:
  list: [{ lr: 1 }, { lr: 2 }, { lr: 3 }, { lr: 4 }, { lr: 5 }, { lr: 6 }, { lr: 7 }, { lr: 8 }, { lr: 9 }]
  objective: train.loss
  halving: { param: epochs, min: 1, max: 9, factor: 3 }
"#,
    );
    let report = project.json(&["sweep", "h.yaml", "--json"]);
    assert_eq!(report["runs"].as_array().unwrap().len(), 3);
    let rounds: Vec<u64> =
        report["trials"].as_array().unwrap().iter().map(|trial| trial["round"].as_u64().unwrap()).collect();
    assert_eq!(rounds, [1, 1, 1, 1, 1, 1, 2, 2, 3]);
    assert_eq!(report["points"][0]["values"]["lr"], 9);
    assert_eq!(report["points"][0]["mean"].as_f64(), Some(19.0));
}

#[test]
fn random_trials_are_the_same_every_time() {
    let manifest = r#"
params: { lr: 1e-3, rank: 8 }
stages:
  train: { uses: exec, with: { run: 'echo "{\"score\": $RANK}" > m.json', outputs: [m.json], metrics: m.json, env: { LR: "${params.lr}", RANK: "${params.rank}" } } }
sweep:
  random: { trials: 8, seed: 3, params: { lr: { low: 1e-5, high: 1e-3, scale: log }, rank: { low: 4, high: 64 } } }
  objective: train.score
"#;
    let values = |project: &Project| project.json(&["sweep", "r.yaml", "--json"])["points"].clone();
    let (one, other) = (Project::new().file("r.yaml", manifest), Project::new().file("r.yaml", manifest));
    let points = values(&one);
    assert_eq!(points, values(&other));
    for point in points.as_array().unwrap() {
        let (lr, rank) = (point["values"]["lr"].as_f64().unwrap(), point["values"]["rank"].as_i64().unwrap());
        assert!((1e-5..=1e-3).contains(&lr) && (4..=64).contains(&rank), "{point}");
    }
    assert_eq!(points.as_array().unwrap().len(), 8);
}

#[test]
fn a_trial_that_fails_stops_no_other_and_stands_last() {
    let project = Project::new().file(
        "f.yaml",
        r#"
params: { x: 1 }
stages:
  t: { uses: exec, with: { run: 'test "$X" != 2 && echo "{\"score\": $X}" > m.json', outputs: [m.json], metrics: m.json, env: { X: "${params.x}" } } }
sweep: { matrix: { x: [1, 2, 3] }, objective: t.score }
"#,
    );
    let report = project.run(&["sweep", "f.yaml", "--json"]).code(1).json();
    let order: Vec<&Value> =
        report["points"].as_array().unwrap().iter().map(|point| &point["values"]["x"]).collect();
    assert_eq!(order, [3, 1, 2]);
    assert_eq!(report["errors"][0]["stage"], "t-x=2");
}

#[test]
fn what_is_wrong_with_a_sweep_is_located() {
    let check = |sweep: &str, words: &str| {
        let text = SWEEP[..SWEEP.find("sweep:").unwrap()].to_owned() + sweep;
        let project = Project::new().file("swept.yaml", &text).file("log/.keep", "");
        let ran = super::sweep::sweep(&project, &["--json"]).code(2).json();
        let error = &ran["errors"][0];
        assert!(format!("{} {}", error["message"], error["hint"]).contains(words), "{error}");
        assert!(error["line"].as_u64().unwrap() > 1, "{error}");
        assert!(!project.path("log/ran").exists());
        let mut checked = command(&project, &["check", "swept.yaml"]);
        assert_eq!(checked.output().unwrap().status.code(), Some(2), "`check` sees it too");
    };
    check("sweep: { matrix: { rnk: [1] }, objective: answers.x }\n", "did you mean `rank`?");
    check("sweep: { matrix: { rank: [1] }, objective: answer.x }\n", "did you mean `answers`?");
    check("sweep: { matrix: { rank: [1] }, objective: answers }\n", "names no metric");
    check("sweep: { objective: answers.x }\n", "one of `matrix`, `list` and `random`");
    check("sweep: { matrix: { rank: [1] }, objectiv: answers.x, objective: answers.x }\n", "objectiv");
    let none = project();
    none.write("swept.yaml", &SWEEP[..SWEEP.find("sweep:").unwrap()]);
    super::sweep::sweep(&none, &[]).code(2).says("the manifest has no `sweep`");
    let wrong = project();
    wrong.write("swept.yaml", SWEEP.replace("answers.tuned.score", "answers.tuned.accuracy"));
    super::sweep::sweep(&wrong, &[])
        .code(1)
        .says("reported no number `tuned.accuracy`")
        .says("`tuned.score`");
}

#[test]
fn trainings_are_swept_over_one_split_and_one_base() {
    let rows: String = (0..24)
        .map(|n| {
            format!(
                "{{\"prompt\":\"Which river runs through town {n}?\",\"completion\":\"The river {n}.\"}}\n"
            )
        })
        .collect();
    let project = Project::new()
        .file(
            "t.yaml",
            r#"
params: { rank: 2, seed: 1, epochs: 1 }
stages:
  rows: { uses: load, with: { paths: [rows.jsonl] } }
  split: { uses: split, needs: rows, with: { validation: 0.2 } }
  base: { uses: model, with: { source: model } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    resources: { cpu: 1 }
    with: { rank: "${params.rank}", seed: "${params.seed}", epochs: "${params.epochs}", batch_examples: 4, stop_probe: warn }
sweep:
  matrix: { rank: [2, 4] }
  objective: adapter.eval_loss
"#,
        )
        .file("rows.jsonl", &rows);
    tiny_model::write(&project);
    let report = project.json(&["sweep", "t.yaml", "--seeds", "2", "-j", "2", "--cpus", "2", "--json"]);
    assert_eq!(report["direction"], "minimize");
    let points = report["points"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    assert!(points.iter().all(|point| point["sd"].as_f64().is_some() && point["seeds"] == 2), "{points:?}");
    let shown = project.json(&["runs", "show", report["runs"][0].as_str().unwrap(), "--json"]);
    let mut names: Vec<&str> =
        shown["stages"].as_array().unwrap().iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "adapter-rank=2,seed=1",
            "adapter-rank=2,seed=2",
            "adapter-rank=4,seed=1",
            "adapter-rank=4,seed=2",
            "base",
            "rows",
            "split"
        ]
    );
}

/// A stage by rank and seed, one after it by rank, and one that collects.
const MATRIX: &str = r#"
stages:
  adapter:
    uses: exec
    matrix: { rank: [8, 16], seed: [1, 2] }
    with: { run: 'echo "$RANK.$SEED" > out', outputs: [out], env: { RANK: "${matrix.rank}", SEED: "${matrix.seed}" } }
  scores:
    uses: exec
    needs: adapter
    matrix: { rank: [8, 16] }
    with: { run: 'cat */out > out', outputs: [out], env: { RANK: "${matrix.rank}" } }
  all: { uses: exec, needs: [adapter, scores], with: { run: 'ls > names; cat */out > out', outputs: [names, out] } }
"#;

#[test]
fn a_matrix_is_a_node_a_combination_collected_by_whoever_needs_it() {
    let project = Project::new().file("m.yaml", MATRIX);
    let report = project.json(&["run", "m.yaml", "--json"]);
    let names: Vec<&str> =
        report["stages"].as_array().unwrap().iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "adapter-rank=8,seed=1",
            "adapter-rank=8,seed=2",
            "adapter-rank=16,seed=1",
            "adapter-rank=16,seed=2",
            "scores-rank=8",
            "scores-rank=16",
            "all"
        ]
    );
    assert_eq!(project.read("cache/out/m/scores-rank=16/out"), "16.1\n16.2\n", "axes of one name agree");
    project
        .run(&["explain", "m.yaml", "scores"])
        .code(2)
        .says("by its matrix it is `scores-rank=8`, `scores-rank=16`");
    assert_eq!(
        project.read("cache/out/m/all/names"),
        "adapter-rank=16,seed=1\nadapter-rank=16,seed=2\nadapter-rank=8,seed=1\nadapter-rank=8,seed=2\nnames\nscores-rank=16\nscores-rank=8\n"
    );
    project.write(
        "m.yaml",
        MATRIX.replace("[8, 16], seed", "[8, 32], seed").replace("{ rank: [8, 16] }", "{ rank: [8] }"),
    );
    let report = project.json(&["run", "m.yaml", "--json", "scores"]);
    assert_eq!(stage(&report, "adapter-rank=8,seed=1")["state"], "cached");
    assert_eq!(states(&report).len(), 3, "a target takes all nodes of its stage and what they need");
}

#[test]
fn a_need_that_is_many_by_its_matrix_is_refused_where_one_is_taken() {
    let manifest = "stages:\n  notes: { uses: ingest, matrix: { p: [a, b] }, with: { paths: [\"${matrix.p}.md\"] } }\n  chunks: { uses: chunk, needs: notes }\n";
    let project = Project::new().file("m.yaml", manifest).file("a.md", "A").file("b.md", "B");
    project
        .run(&["check", "m.yaml"])
        .code(2)
        .says("input `documents` takes one stage, and `notes` is 2 by its matrix")
        .says("give `chunks` the same `matrix`");
    project.write("m.yaml", manifest.replace("uses: chunk,", "uses: chunk, matrix: { p: [a, b] },"));
    project.run(&["check", "m.yaml"]).success();
    project.write("m.yaml", manifest.replace("uses: chunk,", "uses: chunk, matrix: { p: [a, c] },"));
    project.run(&["check", "m.yaml"]).code(2).says("`notes` has no combination that fits `p=c`");
    project.write(
        "m.yaml",
        "stages:\n  a: { uses: exec, matrix: { x: 1 }, with: { run: \"echo ${matrix.y}\", outputs: [o] } }\n",
    );
    project.run(&["check", "m.yaml"]).code(2).says("axis `x` needs a list, found `1`");
}

#[test]
fn two_runs_are_told_apart_by_what_went_in_and_what_came_out() {
    let project = project();
    let run = |rank: &str| {
        let set = format!("rank={rank}");
        let arguments = ["run", "swept.yaml", "answers", "--json", "--set", &set];
        Ran::from(command(&project, &arguments).output().unwrap()).success().json()["run"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let (a, b, c) = (run("8"), run("16"), run("16"));
    let diff = project.run(&["runs", "diff", &a, &b]).success();
    assert_eq!(
        diff.stdout,
        "by_rank\n  in      with.env.RANK 8 → 16\n  file    sum\nanswers\n  in      input by_rank changed: sum\n  metric  tuned.score 109 → 117\n  file    m.json\n"
    );
    let json = project.json(&["runs", "diff", &a, &b, "--json"]);
    assert_eq!(json["stages"][1]["metrics"][0]["name"], "tuned.score");
    assert_eq!(project.json(&["runs", "diff", &b, &c, "--json"])["stages"].as_array().unwrap().len(), 0);
    project.run(&["runs", "diff", &a, "nonsense"]).code(2).says("no run `nonsense`");
}
