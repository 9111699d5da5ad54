//! Whole runs in a temporary folder, with stage kinds that count how often they ran.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::*;
use crate::graph::{Need, Place, Stage};
use crate::runs::Runs;
use crate::stage::{
    Arity, Cost, EmptySource, InputSlot, RowCounts, SourceSpec, StageContext, StageError, StageKind,
};

mod damage;
mod kill;
mod several;

type Body = Box<dyn Fn(&StageContext<'_>) -> Result<(), StageError> + Send + Sync>;

/// A kind whose work is a closure; lives as long as the test process.
struct Kind {
    version: u32,
    cost: Cost,
    runs: AtomicUsize,
    body: Body,
}

impl Kind {
    fn new(
        body: impl Fn(&StageContext<'_>) -> Result<(), StageError> + Send + Sync + 'static,
    ) -> &'static Self {
        Self::with(1, Cost::Light, body)
    }

    fn with(
        version: u32,
        cost: Cost,
        body: impl Fn(&StageContext<'_>) -> Result<(), StageError> + Send + Sync + 'static,
    ) -> &'static Self {
        Box::leak(Box::new(Self { version, cost, runs: AtomicUsize::new(0), body: Box::new(body) }))
    }

    /// Writes all its sources, all its inputs and its `with.add`, in this order, into `text`.
    fn join() -> &'static Self {
        Self::new(join)
    }

    /// How often it ran since last asked.
    fn runs(&self) -> usize {
        self.runs.swap(0, Ordering::SeqCst)
    }
}

fn join(context: &StageContext<'_>) -> Result<(), StageError> {
    let mut text = String::new();
    for file in context.source("paths") {
        text += &fs_err::read_to_string(&file.object)?;
    }
    for (_, input) in context.inputs {
        text += &fs_err::read_to_string(input.file("text")?)?;
    }
    text += context.with["add"].as_str().unwrap_or_default();
    Ok(fs_err::write(context.out.join("text"), text)?)
}

impl StageKind for Kind {
    fn name(&self) -> &'static str {
        "test"
    }
    fn version(&self) -> u32 {
        self.version
    }
    fn doc(&self) -> &'static str {
        "A kind for tests."
    }
    fn inputs(&self) -> &'static [InputSlot] {
        &[InputSlot { name: "any", doc: "anything", arity: Arity::Any }]
    }
    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[("text", "a text")]
    }
    fn schema(&self) -> schemars::Schema {
        true.into()
    }
    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        let Some(paths) = with["paths"].as_array() else { return Vec::new() };
        let patterns = paths.iter().filter_map(|path| path.as_str().map(str::to_owned)).collect();
        vec![SourceSpec {
            name: "paths".to_owned(),
            patterns,
            param: "paths".to_owned(),
            empty: EmptySource::Refused,
        }]
    }
    fn cost(&self) -> Cost {
        self.cost
    }
    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        (self.body)(context)
    }
}

/// Collects events as short lines.
#[derive(Default)]
struct Ears(Mutex<Vec<String>>);

impl Reporter for Ears {
    fn report(&self, event: &RunEvent) {
        let line = match event {
            RunEvent::StageStarted { stage, reasons, .. } => format!("{stage}: {}", reasons.join(", ")),
            RunEvent::StageWaiting { stage } => format!("{stage} waits"),
            RunEvent::StageMessage { stage, text, .. } => format!("{stage} says {text}"),
            _ => return,
        };
        self.0.lock().unwrap().push(line);
    }
}

/// One stage of a test's pipeline: name, kind, needs, parameters.
type Line<'a> = (&'a str, &'static Kind, &'a [&'a str], Value);

/// A project folder with its store.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { dir: tempfile::tempdir().unwrap() };
        fs_err::create_dir(desk.path("project")).unwrap();
        desk
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path("project").join(path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    }

    fn store(&self) -> Store {
        Store::open(&self.path("cache")).unwrap()
    }

    fn pipeline(&self, lines: &[Line<'_>]) -> Pipeline {
        pipeline(&self.path("project"), lines)
    }

    fn run(&self, lines: &[Line<'_>]) -> RunReport {
        self.run_with(lines, &RunOptions::default())
    }

    fn run_with(&self, lines: &[Line<'_>], options: &RunOptions) -> RunReport {
        let pipeline = self.pipeline(lines);
        run(&pipeline, &self.store(), options, &Ears::default(), &AtomicBool::new(false)).unwrap()
    }

    /// The names of stages that ran, with what stands in `text` for each stage.
    fn ran(&self, lines: &[Line<'_>]) -> Vec<String> {
        let report = self.run(lines);
        assert!(report.ok, "{:?}", report.errors);
        in_state(&report, StageState::Ran)
    }

    fn locks(&self) -> Vec<String> {
        let locks = fs_err::read_dir(self.path("cache/locks")).unwrap();
        locks.map(|lock| lock.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn text(&self, stage: &str) -> String {
        fs_err::read_to_string(self.path("cache/out/test").join(stage).join("text")).unwrap()
    }

    /// `stage state: reason, reason` for each stage.
    fn plan(&self, lines: &[Line<'_>]) -> Vec<String> {
        let plan = plan(&self.pipeline(lines), &self.store(), &RunOptions::default()).unwrap();
        let line = |stage: &PlannedStage| {
            let reasons: Vec<String> = stage.reasons.iter().map(ToString::to_string).collect();
            format!("{} {:?}: {}", stage.name, stage.state, reasons.join(", "))
        };
        plan.stages.iter().map(line).collect()
    }
}

fn pipeline(dir: &Path, lines: &[Line<'_>]) -> Pipeline {
    let place = Place { file: dir.join("test.yaml"), line: 3, column: 5 };
    let stages = (0..).zip(lines).map(|(id, (name, kind, needs, with))| Stage {
        id: StageId(id),
        name: (*name).to_owned(),
        group: None,
        execution: crate::graph::Execution::default(),
        kind: *kind,
        needs: needs
            .iter()
            .map(|need| {
                let position = lines.iter().position(|line| line.0 == *need).unwrap();
                Need { slot: (*need).to_owned(), stage: StageId(u32::try_from(position).unwrap()) }
            })
            .collect(),
        with: with.clone(),
        places: BTreeMap::from([(String::new(), place.clone())]),
        origins: BTreeMap::new(),
    });
    Pipeline {
        name: "test".to_owned(),
        path: dir.join("test.yaml"),
        dir: dir.to_owned(),
        params: json!({}),
        stages: stages.collect(),
    }
}

fn in_state(report: &RunReport, state: StageState) -> Vec<String> {
    report.stages.iter().filter(|stage| stage.state == state).map(|stage| stage.name.clone()).collect()
}

fn none() -> Vec<String> {
    Vec::new()
}

#[test]
fn hit_skips_execution() {
    let desk = Desk::new();
    desk.write("notes/a.md", "one ");
    let kind = Kind::join();
    let lines: &[Line<'_>] =
        &[("notes", kind, &[], json!({"paths": ["notes"]})), ("copy", kind, &["notes"], json!({}))];
    assert_eq!(desk.ran(lines), ["notes", "copy"]);
    assert_eq!(desk.text("copy"), "one ");
    let before = kind.runs();
    assert_eq!(before, 2);
    let report = desk.run(lines);
    assert_eq!(in_state(&report, StageState::Cached), ["notes", "copy"]);
    assert_eq!(kind.runs(), 0);
    assert_eq!(report.stages[1].outputs[0].path, "text");
    fs_err::remove_dir_all(desk.path("cache/out")).unwrap();
    assert_eq!(desk.ran(lines), none());
    assert_eq!(desk.text("copy"), "one ", "results are put back into place without running");
}

#[test]
fn same_output_stops_the_wave() {
    let desk = Desk::new();
    desk.write("notes/a.md", "One");
    let lower = Kind::new(|context| {
        let text = fs_err::read_to_string(&context.source("paths")[0].object)?.to_lowercase();
        Ok(fs_err::write(context.out.join("text"), text)?)
    });
    let join = Kind::join();
    let lines: &[Line<'_>] =
        &[("lower", lower, &[], json!({"paths": ["notes"]})), ("copy", join, &["lower"], json!({}))];
    desk.run(lines);
    desk.write("notes/a.md", "ONE");
    assert_eq!(
        desk.plan(lines),
        ["lower Run: notes/a.md changed", "copy Blocked: input lower (stage lower) is made first"]
    );
    assert_eq!(desk.ran(lines), ["lower"]);
}

#[test]
fn parameter_rekeys_only_its_stage_and_what_follows() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines = |add: &str| -> [Line<'static>; 4] {
        [
            ("a", kind, &[], json!({"add": "a"})),
            ("b", kind, &["a"], json!({"add": add})),
            ("c", kind, &["b"], json!({"add": "c"})),
            ("d", kind, &["a"], json!({"add": "d"})),
        ]
    };
    assert_eq!(desk.ran(&lines("b")), ["a", "b", "c", "d"]);
    assert_eq!(desk.plan(&lines("B"))[1], r#"b Run: with.add "b" → "B""#);
    assert_eq!(desk.ran(&lines("B")), ["b", "c"]);
    assert_eq!(desk.text("c"), "aBc");
    assert_eq!(desk.ran(&lines("b")), none(), "going back is served from the store");
    assert_eq!(desk.text("c"), "abc");
}

#[test]
fn touched_file_reruns_nothing() {
    let desk = Desk::new();
    desk.write("notes/a.md", "one");
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("notes", kind, &[], json!({"paths": ["notes"]}))];
    desk.run(lines);
    let file = fs_err::OpenOptions::new().write(true).open(desk.path("project/notes/a.md")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)).unwrap();
    assert_eq!(desk.ran(lines), none());
    let store = desk.store();
    let objects = store.stats().unwrap().objects;
    drop(store);
    desk.run(lines);
    assert_eq!(desk.store().stats().unwrap().objects, objects);
}

#[test]
fn edited_note_is_seen_and_reverting_it_is_free() {
    let desk = Desk::new();
    desk.write("notes/a.md", "one ");
    desk.write("notes/b.md", "two ");
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("notes", kind, &[], json!({"paths": ["notes/**/*.md"]}))];
    desk.run(lines);
    desk.write("notes/b.md", "TWO ");
    desk.write("notes/c.md", "three");
    assert_eq!(desk.plan(lines), ["notes Run: notes/b.md changed, notes/c.md added"]);
    assert_eq!(desk.ran(lines), ["notes"]);
    assert_eq!(desk.text("notes"), "one TWO three");
    desk.write("notes/b.md", "two ");
    fs_err::remove_file(desk.path("project/notes/c.md")).unwrap();
    assert_eq!(desk.ran(lines), none());
    assert_eq!(desk.text("notes"), "one two ");
}

#[test]
fn order_of_writing_does_not_count() {
    let desk = Desk::new();
    let forwards = Kind::new(|context| write_all(context, &["a", "b/c", "d"]));
    let backwards = Kind::new(|context| write_all(context, &["d", "b/c", "a"]));
    let tree = |kind| {
        let report = desk.run_with(
            &[("write", kind, &[], json!({}))],
            &RunOptions { force: vec!["write".to_owned()], ..RunOptions::default() },
        );
        report.stages[0].outputs.clone()
    };
    let first = tree(forwards);
    assert_eq!(first, tree(backwards));
    assert_eq!(first.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["a", "b/c", "d"]);
}

fn write_all(context: &StageContext<'_>, files: &[&str]) -> Result<(), StageError> {
    for file in files {
        let path = context.out.join(file);
        fs_err::create_dir_all(path.parent().unwrap())?;
        fs_err::write(path, file)?;
    }
    Ok(())
}

#[test]
fn failed_stage_keeps_what_finished() {
    let desk = Desk::new();
    let broken = AtomicBool::new(true);
    let fails = Kind::new(move |context| {
        fs_err::write(context.out.join("text"), "half")?;
        if broken.swap(false, Ordering::SeqCst) {
            return Err(StageError::new("test::broken", "row 7 of `a.md` is broken").hint("mend it"));
        }
        Ok(())
    });
    let join = Kind::join();
    let lines: &[Line<'_>] = &[
        ("a", join, &[], json!({"add": "a"})),
        ("b", fails, &["a"], json!({})),
        ("c", join, &["b"], json!({})),
    ];
    let report = desk.run(lines);
    assert!(!report.ok);
    let states: Vec<StageState> = report.stages.iter().map(|stage| stage.state).collect();
    assert_eq!(states, [StageState::Ran, StageState::Failed, StageState::Skipped]);
    let error = serde_json::to_value(&report.errors).unwrap();
    let file = desk.path("project/test.yaml");
    assert_eq!(
        error,
        json!([{
            "code": "test::broken", "message": "row 7 of `a.md` is broken", "file": file, "line": 3, "column": 5,
            "stage": "b", "hint": "mend it"
        }])
    );
    assert!(!desk.path("cache/out/test/b").exists());
    assert_eq!(desk.ran(lines), ["b", "c"]);
}

#[test]
fn keep_going_runs_what_does_not_need_the_failed_stage() {
    let desk = Desk::new();
    let fails = Kind::new(|_| Err(StageError::new("test::broken", "broken")));
    let join = Kind::join();
    let lines: &[Line<'_>] =
        &[("a", fails, &[], json!({})), ("b", join, &["a"], json!({})), ("c", join, &[], json!({}))];
    let options = |keep_going| RunOptions { keep_going, jobs: 1, ..RunOptions::default() };
    assert_eq!(in_state(&desk.run_with(lines, &options(false)), StageState::Ran), none());
    assert_eq!(in_state(&desk.run_with(lines, &options(true)), StageState::Ran), ["c"]);
}

#[test]
fn panic_is_an_error_that_names_the_stage() {
    let desk = Desk::new();
    let panics = Kind::new(|_| panic!("index out of range"));
    let report = desk.run(&[("a", panics, &[], json!({}))]);
    assert_eq!(report.errors[0].code, "run::panic");
    assert_eq!(report.errors[0].message, "BUG: stage `a` panicked: index out of range");
    assert_eq!(fs_err::read_dir(desk.path("cache/tmp")).unwrap().count(), 0);
    assert_eq!(desk.locks(), ["use.lock"], "only what every process shares");
}

#[test]
fn rows_are_remembered_across_runs_and_failed_ones_are_not() {
    let desk = Desk::new();
    let computed: &'static AtomicUsize = Box::leak(Box::default());
    let rows = Kind::new(|context| {
        let mut out = String::new();
        for file in context.source("paths") {
            let text = fs_err::read_to_string(&file.object)?;
            let row = context.memo(&[text.as_bytes()], || {
                computed.fetch_add(1, Ordering::SeqCst);
                if text.contains("bad") {
                    return Err(StageError::new("test::row", "bad row").transient());
                }
                Ok(text.to_uppercase())
            });
            out += &row.unwrap_or_default();
        }
        Ok(fs_err::write(context.out.join("text"), out)?)
    });
    let lines: &[Line<'_>] = &[("rows", rows, &[], json!({"paths": ["notes"]}))];
    for (name, text) in [("a", "one "), ("b", "bad "), ("c", "two ")] {
        desk.write(&format!("notes/{name}.md"), text);
    }
    let report = desk.run(lines);
    assert_eq!(report.stages[0].rows, RowCounts { total: 3, new: 2, remembered: 0, failed: 1 });
    assert_eq!(computed.swap(0, Ordering::SeqCst), 3);
    desk.write("notes/c.md", "three ");
    let report = desk.run(lines);
    assert_eq!(report.stages[0].rows, RowCounts { total: 3, new: 1, remembered: 1, failed: 1 });
    assert_eq!(computed.swap(0, Ordering::SeqCst), 2, "the edited row and the failed one");
    assert_eq!(desk.text("rows"), "ONE THREE ");
}

#[test]
fn forced_stage_runs_and_its_followers_do_not() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("a", kind, &[], json!({"add": "a"})), ("b", kind, &["a"], json!({}))];
    desk.run(lines);
    let options = RunOptions { force: vec!["a".to_owned()], ..RunOptions::default() };
    let report = desk.run_with(lines, &options);
    assert_eq!(in_state(&report, StageState::Ran), ["a"]);
    assert_eq!(report.stages[0].reasons[0].to_string(), "forced");
}

#[test]
fn target_takes_only_what_it_needs() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[
        ("a", kind, &[], json!({})),
        ("b", kind, &["a"], json!({})),
        ("other", kind, &[], json!({"paths": ["gone"]})),
    ];
    let options = RunOptions { targets: vec!["b".to_owned()], ..RunOptions::default() };
    assert_eq!(in_state(&desk.run_with(lines, &options), StageState::Ran), ["a", "b"]);
    let options = RunOptions { targets: vec!["bb".to_owned()], ..RunOptions::default() };
    let error = plan(&desk.pipeline(lines), &desk.store(), &options).unwrap_err();
    assert_eq!(error.stable_code(), "run::unknown_stage");
    assert_eq!(error.hint().unwrap(), "did you mean `b`?");
}

#[test]
fn source_without_files_is_an_error_before_anything_runs() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] =
        &[("a", kind, &[], json!({})), ("notes", kind, &[], json!({"paths": ["notes/*.md", "more"]}))];
    let ears = Ears::default();
    let error =
        run(&desk.pipeline(lines), &desk.store(), &RunOptions::default(), &ears, &AtomicBool::new(false))
            .unwrap_err();
    assert_eq!(error.stable_code(), "source::empty");
    let folder = desk.pipeline(lines).dir;
    assert_eq!(
        error.to_string(),
        format!(
            "stage `notes` cannot use its sources: `paths` matches no file below `{}` (`notes/*.md`, `more`)",
            folder.display()
        )
    );
    assert_eq!(error.place().map(|place| (place.line, place.column)), Some((3, 5)));
    assert!(error.hint().is_some());
    assert_eq!(kind.runs(), 0);
}

#[test]
fn stage_reads_the_version_that_was_hashed() {
    let desk = Desk::new();
    desk.write("notes/a.md", "before");
    let live = desk.path("project/notes/a.md");
    let edits = Kind::new(move |context| {
        // The user saves the note while the stage runs.
        fs_err::write(&live, "after")?;
        join(context)
    });
    let lines: &[Line<'_>] = &[("notes", edits, &[], json!({"paths": ["notes"]}))];
    desk.run(lines);
    assert_eq!(desk.text("notes"), "before");
    assert_eq!(desk.ran(lines), ["notes"], "the next run sees the edit");
    assert_eq!(desk.text("notes"), "after");
    assert_eq!(desk.ran(lines), none());
}

#[test]
fn output_that_cannot_be_written_names_its_path() {
    let desk = Desk::new();
    let kind = Kind::new(|context| {
        fs_err::write(context.out.join("text"), "a file")?;
        Ok(fs_err::write(context.out.join("text/below"), "x")?)
    });
    let report = desk.run(&[("a", kind, &[], json!({}))]);
    assert_eq!(report.errors[0].code, "stage::io");
    assert!(report.errors[0].message.contains("out/text/below"), "{}", report.errors[0].message);

    desk.write("taken", "a file");
    let options = RunOptions { out: Some(desk.path("project/taken")), ..RunOptions::default() };
    let report = desk.run_with(&[("b", Kind::join(), &[], json!({}))], &options);
    assert_eq!(report.errors[0].code, "store::io");
    assert!(report.errors[0].message.contains("project/taken"), "{}", report.errors[0].message);
}

#[test]
fn results_go_where_the_user_wants_them() {
    let desk = Desk::new();
    let kind = Kind::join();
    let options = RunOptions { out: Some(desk.path("results")), ..RunOptions::default() };
    let report = desk.run_with(&[("a", kind, &[], json!({"add": "x"}))], &options);
    assert_eq!(report.stages[0].folder, Some(desk.path("results/a")));
    assert_eq!(fs_err::read_to_string(desk.path("results/a/text")).unwrap(), "x");
}

#[test]
fn cancelled_run_keeps_what_is_done() {
    let desk = Desk::new();
    let cancelled: &'static AtomicBool = Box::leak(Box::default());
    let first = Kind::join();
    let long = Kind::new(move |context| {
        cancelled.store(true, Ordering::SeqCst);
        context.check_cancelled()
    });
    let lines: &[Line<'_>] =
        &[("a", first, &[], json!({})), ("b", long, &["a"], json!({})), ("c", first, &["b"], json!({}))];
    let report =
        run(&desk.pipeline(lines), &desk.store(), &RunOptions::default(), &Ears::default(), cancelled)
            .unwrap();
    assert!(!report.ok);
    let states: Vec<StageState> = report.stages.iter().map(|stage| stage.state).collect();
    assert_eq!(states, [StageState::Ran, StageState::Skipped, StageState::Skipped]);
    assert_eq!(report.errors.iter().map(|error| error.code.as_str()).collect::<Vec<_>>(), ["run::cancelled"]);
    assert_eq!(desk.plan(lines)[0], "a Cached: ");
}

#[test]
fn new_version_of_a_kind_runs_again() {
    let desk = Desk::new();
    let lines =
        |version| -> [Line<'static>; 1] { [("a", Kind::with(version, Cost::Heavy, join), &[], json!({}))] };
    desk.run(&lines(1));
    assert_eq!(desk.plan(&lines(2)), [r#"a Run: version "1" → "2""#]);
}

#[test]
fn checkpoints_survive_a_failure_and_go_after_the_commit() {
    let desk = Desk::new();
    let kind = Kind::new(|context| {
        let step = context.checkpoints.join("step");
        if !step.exists() {
            fs_err::write(&step, "1")?;
            return Err(StageError::new("test::broken", "stopped after step 1"));
        }
        Ok(fs_err::write(context.out.join("text"), fs_err::read_to_string(&step)?)?)
    });
    let lines: &[Line<'_>] = &[("train", kind, &[], json!({}))];
    assert!(!desk.run(lines).ok);
    assert_eq!(desk.ran(lines), ["train"]);
    assert_eq!(desk.text("train"), "1");
    assert_eq!(fs_err::read_dir(desk.path("cache/checkpoints")).unwrap().count(), 0);
}

#[test]
fn history_journal_and_explanation_tell_the_same() {
    let desk = Desk::new();
    let kind = Kind::new(|context| {
        context.warn("one note is empty");
        context.metric("loss", 0.5);
        join(context)
    });
    let lines = |add: &str| -> [Line<'static>; 1] { [("a", kind, &[], json!({"add": add}))] };
    let first = desk.run(&lines("x"));
    let store = desk.store();
    let runs = Runs::new(&store);
    let list = runs.list(Some("test")).unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].run.as_str(), list[0].ok), (first.run.as_str(), Some(true)));
    let details = runs.show(&first.run[..20]).unwrap().unwrap();
    assert_eq!(details.stages, serde_json::to_value(&first.stages).unwrap());
    assert_eq!(details.stages[0]["metrics"]["loss"], 0.5);
    let journal = fs_err::read_to_string(details.folder.join("journal.jsonl")).unwrap();
    let events: Vec<Value> = journal.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events[0]["event"], "run_started");
    assert!(events.iter().any(|event| event["event"] == "stage_message" && event["level"] == "warning"));
    let log = fs_err::read_to_string(details.folder.join("a.log")).unwrap();
    assert!(log.contains("one note is empty"), "{log}");

    let explanation = explain(&desk.pipeline(&lines("y")), &store, "a").unwrap();
    assert_eq!(explanation.previous_key, first.stages[0].key);
    assert_ne!(explanation.key, explanation.previous_key);
    assert_eq!(
        serde_json::to_value(&explanation.reasons).unwrap(),
        json!([{"kind": "param", "what": "with.add", "old": "x", "new": "y"}])
    );
}

#[test]
fn long_chain_and_wide_fan_run_and_are_cached() {
    let desk = Desk::new();
    let kind = Kind::join();
    let names: Vec<String> = (0..60).map(|n| format!("s{n}")).collect();
    let needs: Vec<Vec<&str>> =
        (0..60).map(|n| if n % 2 == 1 { vec![names[n - 1].as_str()] } else { Vec::new() }).collect();
    let lines: Vec<Line<'_>> = names
        .iter()
        .zip(&needs)
        .map(|(name, needs)| (name.as_str(), kind, needs.as_slice(), json!({"add": name})))
        .collect();
    assert_eq!(desk.ran(&lines).len(), 60);
    assert_eq!(desk.ran(&lines), none());
    assert_eq!(kind.runs(), 60);
}
