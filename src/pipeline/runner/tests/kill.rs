//! A process killed in the middle of a stage leaves nothing believed, and keeps every row it remembered.
//!
//! The killed process is this test binary, started again with only [`child`] to run.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::*;

/// Tells the child which folder to work in.
const FOLDER: &str = "TUNESMITH_TEST_KILLED_IN";

/// Ten rows; `at_row` is called before each with how many were computed in this process.
fn rows(at_row: impl Fn(usize) + Send + Sync + 'static) -> &'static Kind {
    let computed: &'static AtomicUsize = Box::leak(Box::default());
    Kind::new(move |context| {
        fs_err::write(context.out.join("half"), "half a result")?;
        fs_err::write(context.checkpoints.join("step"), "5")?;
        let mut text = String::new();
        for row in 0..10_u32 {
            text += &context.memo(&[&row.to_le_bytes()], || {
                at_row(computed.fetch_add(1, Ordering::SeqCst));
                Ok(format!("{row} "))
            })?;
        }
        fs_err::remove_file(context.out.join("half"))?;
        Ok(fs_err::write(context.out.join("text"), text)?)
    })
}

#[test]
#[ignore = "not a test: the process that another test kills"]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let kind = rows(|computed| {
        if computed == 5 {
            // An answer took its time: the rows before it are written.
            std::thread::sleep(std::time::Duration::from_millis(100));
            println!("at row 5");
            std::io::stdout().flush().unwrap();
            loop {
                std::thread::park();
            }
        }
    });
    let folder = PathBuf::from(folder);
    let pipeline = pipeline(&folder.join("project"), &[("rows", kind, &[], json!({}))]);
    let store = Store::open(&folder.join("cache")).unwrap();
    run(&pipeline, &store, &RunOptions::default(), &Ears::default(), &AtomicBool::new(false)).unwrap();
}

#[test]
fn killed_run_loses_no_row_and_leaves_nothing_believed() {
    let desk = Desk::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "runner::tests::kill::child", "--ignored", "--nocapture"])
        .env(FOLDER, desk.dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let reached = lines.by_ref().any(|line| line.unwrap().contains("at row 5"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reached, "the child got to its fifth row");

    let kind = rows(|_| {});
    let lines: &[Line<'_>] = &[("rows", kind, &[], json!({}))];
    assert_eq!(desk.plan(lines), ["rows Run: first run"]);
    assert_eq!(fs_err::read_dir(desk.path("cache/tmp")).unwrap().count(), 0, "its scratch is cleared");
    let report = desk.run(lines);
    assert_eq!(report.stages[0].rows, RowCounts { total: 10, new: 5, remembered: 5, failed: 0 });
    assert_eq!(desk.text("rows"), "0 1 2 3 4 5 6 7 8 9 ");
    let store = desk.store();
    let runs = Runs::new(&store).list(None).unwrap();
    assert_eq!(runs.iter().map(|run| run.ok).collect::<Vec<_>>(), [Some(true), None]);
}
