//! A disk that is full, or breaks, at any write of a run: nothing half done is believed, nothing finished is
//! lost, and the next run comes to the same bytes. The disk is `faults/fault.c`, preloaded into the binary.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Project, Ran, digest, repository};

const MANIFEST: &str = r#"
name: faults
params: { round: 0 }
stages:
  a: { uses: exec, with: { run: "seq 500 > out; echo ${params.round} >> out", inputs: [n.txt], outputs: [out] } }
  b: { uses: exec, needs: a, with: { run: "tac a/out > out; mkdir d; cp out d/copy", outputs: [out, d] } }
"#;

fn disk(folder: &Path) -> PathBuf {
    let library = folder.join("fault.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(repository().join("tests/faults/fault.c"))
        .arg("-ldl")
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

/// One run on a disk where the change `at` fails with `errno`, and with `on` all after it.
fn run(project: &Project, disk: &Path, round: u32, at: u64, errno: i32, on: bool) -> Ran {
    let set = format!("round={round}");
    let mut command = project.command(&["run", "faults.yaml", "--quiet", "--jobs", "1", "--set", &set]);
    command
        .env("LD_PRELOAD", disk)
        .env("FAULT_BELOW", project.path("cache"))
        .env("FAULT_AT", at.to_string())
        .env("FAULT_ERRNO", errno.to_string())
        .env("FAULT_COUNT", project.path("count"));
    if on {
        command.env("FAULT_ON", "1");
    }
    Ran::from(command.output().unwrap())
}

/// Fails `share` of the writes of a run, each in a run of its own.
fn check(share: u64) {
    let new = || Project::new().file("faults.yaml", MANIFEST).file("n.txt", "a note\n");
    let (project, whole) = (new(), new());
    let disk = disk(&project.path(""));
    run(&project, &disk, 0, 0, 0, false).success();
    let writes: u64 = project.read("count").trim().parse().unwrap();
    assert!(writes > 40, "{writes} writes were seen");
    let actions = || project.json(&["cache", "stats", "--json"])["actions"].as_u64().unwrap();
    let mut known = actions();
    let mut failed = 0;
    for (round, at) in (1..).zip((1..=writes).step_by(usize::try_from(share).unwrap())) {
        let (errno, on) = if round % 2 == 0 { (libc::EIO, false) } else { (libc::ENOSPC, true) };
        let ran = run(&project, &disk, round, at, errno, on);
        assert!(matches!(ran.code, Some(0 | 1)), "write {at}: {:?}\n{}", ran.code, ran.stderr);
        assert!(
            !ran.stderr.contains("panicked") && !ran.stderr.contains("BUG"),
            "write {at}:\n{}",
            ran.stderr
        );
        failed += u64::from(ran.code == Some(1));

        project.run(&["cache", "verify"]).success();
        let set = format!("round={round}");
        let arguments = ["run", "faults.yaml", "--json", "--set", &set];
        let (report, expected) = (project.json(&arguments), whole.json(&arguments));
        for (stage, path) in [("a", "out"), ("b", "out"), ("b", "d/copy")] {
            assert_eq!(digest(&report, stage, path), digest(&expected, stage, path), "write {at}");
        }
        let now = actions();
        assert_eq!(now, known + 2, "write {at}: an action was lost");
        known = now;
    }
    assert!(failed > writes / share / 3, "only {failed} of {} runs noticed", writes / share);
}

#[test]
fn a_failing_disk_loses_nothing_and_leaves_nothing_half_done() {
    check(9);
}

#[test]
#[ignore = "takes minutes"]
fn slow_every_single_write_may_fail() {
    check(1);
}
