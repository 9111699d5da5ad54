//! Several runners on one store: each opens the store for itself, as another process would.

use std::sync::mpsc::channel;

use super::*;

/// Tells the test when a stage waits for another runner.
struct Waits(std::sync::mpsc::Sender<()>);

impl Reporter for Waits {
    fn report(&self, event: &RunEvent) {
        if matches!(event, RunEvent::StageWaiting { .. }) {
            self.0.send(()).unwrap();
        }
    }
}

#[test]
fn two_runners_run_one_action_once_and_the_second_says_that_it_waits() {
    let desk = Desk::new();
    let (started, has_started) = channel();
    let (wait, waited) = channel::<()>();
    let (started, waited) = (Mutex::new(started), Mutex::new(waited));
    let kind = Kind::new(move |context| {
        started.lock().unwrap().send(()).unwrap();
        // Goes on only once the other runner has said that it waits.
        waited.lock().unwrap().recv().unwrap();
        Ok(fs_err::write(context.out.join("text"), "once")?)
    });
    let lines: &[Line<'_>] = &[("a", kind, &[], json!({}))];
    let states = std::thread::scope(|scope| {
        let first = scope.spawn(|| desk.run(lines));
        has_started.recv().unwrap();
        let second = scope.spawn(|| {
            let pipeline = desk.pipeline(lines);
            let store = desk.store();
            run(&pipeline, &store, &RunOptions::default(), &Waits(wait), &AtomicBool::new(false)).unwrap()
        });
        [first, second].map(|runner| runner.join().unwrap().stages[0].state)
    });
    assert_eq!(states, [StageState::Ran, StageState::Cached]);
    assert_eq!(kind.runs(), 1);
    assert_eq!(desk.locks(), ["use.lock"], "only what every process shares");
}

#[test]
fn stages_with_one_key_run_once() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("a", kind, &[], json!({"add": "x"})), ("b", kind, &[], json!({"add": "x"}))];
    let report = desk.run(lines);
    assert!(report.ok);
    assert_eq!(kind.runs(), 1);
    assert_eq!(in_state(&report, StageState::Ran).len(), 1);
    assert_eq!((desk.text("a"), desk.text("b")), ("x".to_owned(), "x".to_owned()));
}

#[test]
fn many_runners_at_once_agree() {
    let desk = Desk::new();
    desk.write("notes/a.md", "one ");
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[
        ("notes", kind, &[], json!({"paths": ["notes"]})),
        ("b", kind, &["notes"], json!({"add": "b"})),
        ("c", kind, &["notes", "b"], json!({"add": "c"})),
    ];
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert!(desk.run(lines).ok));
        }
    });
    assert_eq!(kind.runs(), 3);
    assert_eq!(desk.text("c"), "one one bc");
}
