//! What happens when stages take too much, too long, fail, or are stopped.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Project, Ran, stage, states};

fn manifest(stages: &str) -> Project {
    Project::new().file("m.yaml", &format!("stages:\n{stages}\n")).file("log/.keep", "")
}

fn run(project: &Project, more: &[&str]) -> Ran {
    let arguments: Vec<&str> = ["run", "m.yaml"].iter().chain(more).copied().collect();
    Ran::from(project.command(&arguments).env("LOG", project.path("log/ran")).output().unwrap())
}

fn tries(project: &Project) -> usize {
    std::fs::read_to_string(project.path("log/ran")).map_or(0, |log| log.lines().count())
}

const LOG: &str = "env: { LOG: \"${env.LOG}\" }";

#[test]
fn an_error_that_may_pass_is_tried_again_and_others_are_not() {
    let flaky = |code: u32| {
        manifest(&format!(
            "  a: {{ uses: exec, retries: 3, with: {{ run: 'echo x >> $LOG; test $(wc -l < $LOG) -ge 3 || exit {code}; echo ok > out', outputs: [out], {LOG} }} }}"
        ))
    };
    let passing = flaky(75);
    run(&passing, &[]).success().says("try 2 of 4").says("try 3 of 4");
    assert_eq!(tries(&passing), 3);
    let broken = flaky(1);
    run(&broken, &[]).code(1).says("exit code 1");
    assert_eq!(tries(&broken), 1);
}

#[test]
fn an_error_that_does_not_pass_is_not_remembered() {
    let project = manifest(&format!(
        "  a: {{ uses: exec, retries: 1, with: {{ run: 'echo x >> $LOG; exit 75', outputs: [out], {LOG} }} }}"
    ));
    run(&project, &[]).code(1);
    run(&project, &[]).code(1);
    assert_eq!(tries(&project), 4);
}

#[test]
fn a_stage_that_takes_too_long_is_stopped_with_all_it_started() {
    let project = manifest(&format!(
        "  a: {{ uses: exec, timeout: 0.5, with: {{ run: '(sleep 2; echo late >> $LOG) & wait', outputs: [out], {LOG} }} }}\n  b: {{ uses: exec, needs: a, with: {{ run: 'echo b > out', outputs: [out] }} }}"
    ));
    let started = Instant::now();
    run(&project, &[]).code(1).says("the stage was not done after 0.5 s, its `timeout`");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    std::thread::sleep(Duration::from_millis(2200).saturating_sub(started.elapsed()));
    assert_eq!(tries(&project), 0, "the child of the command is gone too");
    project.write("m.yaml", project.read("m.yaml").replace("timeout: 0.5", "timeout: 1m"));
    assert_eq!(stage(&project_json(&project), "a")["state"], "run", "a timeout is nothing a key holds");
}

fn project_json(project: &Project) -> serde_json::Value {
    let mut command = project.command(&["plan", "m.yaml", "--json"]);
    Ran::from(command.env("LOG", project.path("log/ran")).output().unwrap()).success().json()
}

#[test]
fn gpus_are_lent_by_id_and_hidden_from_others() {
    let one = |name: &str, gpu: u32| {
        format!(
            "  {name}: {{ uses: exec, resources: {{ gpu: {gpu} }}, with: {{ run: 'echo \"[$CUDA_VISIBLE_DEVICES]\" > out; sleep 0.5; : {name}', outputs: [out] }} }}"
        )
    };
    let project = manifest(&[one("a", 1), one("b", 1), one("c", 2), one("d", 0)].join("\n"));
    run(&project, &["-j", "4", "--gpus", "3,5"]).success();
    let seen = |name: &str| project.read(&format!("cache/out/m/{name}/out"));
    assert_eq!([seen("a"), seen("b"), seen("c"), seen("d")], ["[3]\n", "[5]\n", "[3,5]\n", "[]\n"]);
    let again = run(&project, &["--gpus", "0,1", "--json"]).success().json();
    assert_eq!(
        states(&again),
        ["a=cached", "b=cached", "c=cached", "d=cached"],
        "no result depends on an id"
    );
}

#[test]
fn stages_share_cores_and_memory() {
    let stages: Vec<String> = (0..3)
        .map(|n| {
            format!("  s{n}: {{ uses: exec, resources: {{ memory: 4GiB }}, with: {{ run: 'echo + >> $LOG; sleep 0.2; echo - >> $LOG; echo {n} > out', outputs: [out], {LOG} }} }}")
        })
        .collect();
    let most = |limits: &[&str]| {
        let project = manifest(&stages.join("\n"));
        run(&project, limits).success();
        let mut now = 0_i32;
        let log = project.read("log/ran");
        let counts = log.lines().map(|line| {
            now += if line == "+" { 1 } else { -1 };
            now
        });
        counts.max().unwrap()
    };
    assert_eq!(most(&["-j", "3", "--memory", "5GiB"]), 1);
    assert_eq!(most(&["-j", "3", "--memory", "9GiB"]), 2);
}

#[test]
fn what_can_never_be_given_is_refused_before_anything_runs() {
    let project = manifest(
        "  first: { uses: exec, with: { run: 'echo 1 > out', outputs: [out] } }\n  a: { uses: exec, resources: { gpu: 2 }, with: { run: 'echo a > out', outputs: [out] } }",
    );
    run(&project, &["--gpus", "0"])
        .code(2)
        .says("stage `a` wants 2 GPUs, and there is 1 GPU")
        .says("`--gpus`");
    assert!(!project.path("cache/out/m/first").exists());
    let check = |words: &str, message: &str| {
        let project =
            manifest(&format!("  a: {{ uses: exec, {words}, with: {{ run: 'x', outputs: [out] }} }}"));
        run(&project, &[]).code(2).says(message).says("m.yaml:2");
    };
    check("resources: { cpus: 2 }", "did you mean `cpu`?");
    check("resources: { memory: lots }", "write `4GiB` or `500MB`");
    check("timeout: 10 minutes", "write `90s`, `10m` or `2h`");
    check("retries: many", "expected an integer");
}

#[test]
fn what_a_command_does_not_declare_is_an_error_and_tmpdir_is_free() {
    let project = manifest(
        "  a: { uses: exec, with: { run: 'echo 1 > out; mkdir d; echo 2 > d/more; echo 3 > left', outputs: [out] } }",
    );
    run(&project, &[])
        .code(1)
        .says("the command wrote `d/more`, `left`, which it does not declare")
        .says("$TMPDIR");
    let project = manifest(
        "  a: { uses: exec, with: { run: 'echo 1 > \"$TMPDIR/t\"; mv \"$TMPDIR/t\" out; mktemp > /dev/null', outputs: [out] } }",
    );
    run(&project, &[]).success();
}

#[test]
fn outputs_that_overlap_are_refused() {
    let project = manifest("  a: { uses: exec, with: { run: 'x', outputs: [o, o/inner] } }");
    run(&project, &[]).code(2).says("outputs `o` and `o/inner` overlap");
}

#[test]
fn the_environment_is_an_allow_list() {
    let project =
        manifest("  a: { uses: exec, with: { run: 'env | cut -d= -f1 | sort > out', outputs: [out] } }");
    let mut command = project.command(&["run", "m.yaml"]);
    Ran::from(command.env("MY_SECRET", "x").env("LANG", "C").output().unwrap()).success();
    let seen = project.read("cache/out/m/a/out");
    assert!(!seen.contains("MY_SECRET") && seen.contains("LANG") && seen.contains("PATH"), "{seen}");
}

#[test]
fn a_secret_reaches_the_command_and_nothing_else() {
    let project = manifest(
        "  a: { uses: exec, with: { run: 'echo \"it is $TOKEN\"; test -n \"$TOKEN\"; echo done > out', secrets: [TOKEN], outputs: [out] } }",
    );
    let run = |token: &str| {
        let mut command = project.command(&["run", "m.yaml", "--json"]);
        Ran::from(command.env("TOKEN", token).output().unwrap()).success()
    };
    run("hunter2").says("a: it is ***");
    assert_eq!(states(&run("other").json()), ["a=cached"], "its value is in no key");
    let found = std::process::Command::new("grep")
        .args(["-r", "hunter2", project.path("cache").to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(found.stdout).unwrap(), "");
    project.write("m.yaml", project.read("m.yaml").replace("echo done", "echo more"));
    project.run(&["run", "m.yaml"]).code(1).says("the environment variable `TOKEN` is not set");
}

#[test]
fn what_a_command_leaves_running_ends_with_it() {
    let project = manifest(&format!(
        "  a: {{ uses: exec, with: {{ run: '(sleep 1; echo late >> $LOG) & echo 1 > out', outputs: [out], {LOG} }} }}"
    ));
    let started = Instant::now();
    run(&project, &[]).success();
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(tries(&project), 0);
}

#[test]
fn a_signal_stops_the_run_cleanly_and_what_was_done_is_kept() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let project = manifest(&format!(
            "  a: {{ uses: exec, with: {{ run: 'echo a > out', outputs: [out] }} }}\n  b: {{ uses: exec, needs: a, with: {{ run: 'echo started >> $LOG; (sleep 1; echo late >> $LOG) & wait; echo b > out', outputs: [out], {LOG} }} }}"
        ));
        let mut command = project.command(&["run", "m.yaml", "--json"]);
        let child = command
            .env("LOG", project.path("log/ran"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while tries(&project) == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        // SAFETY: kill(2) takes plain numbers; the process is this test's own child, not waited for yet.
        unsafe { libc::kill(libc::pid_t::try_from(child.id()).unwrap(), signal) };
        let report = Ran::from(child.wait_with_output().unwrap()).code(1).json();
        assert_eq!(states(&report), ["a=ran", "b=skipped"]);
        assert_eq!(report["errors"][0]["code"], "run::cancelled");
        assert_eq!(std::fs::read_dir(project.path("cache/tmp")).unwrap().count(), 0, "no scratch is left");
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(tries(&project), 1, "what the command started is gone");
        let again = run(&project, &["--json"]).success().json();
        assert_eq!(states(&again), ["a=cached", "b=ran"]);
    }
}

#[test]
fn after_a_failure_keep_going_runs_what_does_not_need_it() {
    let project = manifest(
        "  bad: { uses: exec, with: { run: 'exit 1', outputs: [out] } }\n  after: { uses: exec, needs: bad, with: { run: 'echo 1 > out', outputs: [out] } }\n  other: { uses: exec, with: { run: 'sleep 0.2; echo 1 > out', outputs: [out] } }\n  last: { uses: exec, needs: other, with: { run: 'echo 1 > out', outputs: [out] } }",
    );
    let report = run(&project, &["--json", "--jobs", "1"]).code(1).json();
    assert_eq!(states(&report), ["bad=failed", "after=skipped", "other=skipped", "last=skipped"]);
    let report = run(&project, &["--json", "--jobs", "1", "--keep-going"]).code(1).json();
    assert_eq!(states(&report), ["bad=failed", "after=skipped", "other=ran", "last=ran"]);
    let log = std::fs::read_dir(project.path("cache/runs")).unwrap().count();
    assert_eq!(log, 2);
}

#[test]
fn a_gpu_is_lent_to_one_of_several_processes() {
    let stage = |name: &str| {
        format!(
            "  {name}: {{ uses: exec, resources: {{ gpu: 1 }}, with: {{ run: 'echo + >> $LOG; sleep 0.3; echo - >> $LOG; echo {name} > out', outputs: [out], {LOG} }} }}"
        )
    };
    let project = manifest(&[stage("a"), stage("b")].join("\n"));
    let start = |target: &str| {
        let mut command = project.command(&["run", "m.yaml", target, "--gpus", "0"]);
        command.env("LOG", project.path("log/ran")).stderr(Stdio::piped()).spawn().unwrap()
    };
    for child in [start("a"), start("b")] {
        Ran::from(child.wait_with_output().unwrap()).success();
    }
    assert_eq!(project.read("log/ran"), "+\n-\n+\n-\n");
}
