//! A workbench for the tests of stages: runs one kind on tables and files given inline, with services that
//! remember rows between runs. Knows no particular kind; nothing here is built outside tests.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tempfile::TempDir;
use tunesmith_pipeline::digest::Digest;
use tunesmith_pipeline::stage::{
    Artifact, MessageLevel, OutputFile, RowCounts, RowOutcome, Services, SourceFile, StageContext,
    StageError, StageKind,
};

/// Services that keep everything in memory.
#[derive(Default)]
pub(crate) struct FakeServices {
    memo: Mutex<BTreeMap<Digest, Vec<u8>>>,
    rows: Mutex<RowCounts>,
    metrics: Mutex<Map<String, Value>>,
    messages: Mutex<Vec<String>>,
    cancelled: AtomicBool,
}

impl FakeServices {
    /// Asks the stage to stop.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Everything the memo holds, for tests that look for what must not be in it.
    pub(crate) fn memo_bytes(&self) -> Vec<u8> {
        self.memo.lock().unwrap().values().flatten().copied().collect()
    }
}

impl Services for FakeServices {
    fn recall(&self, row: &Digest) -> Option<Vec<u8>> {
        self.memo.lock().unwrap().get(row).cloned()
    }
    fn remember(&self, row: &Digest, value: &[u8]) {
        self.memo.lock().unwrap().insert(*row, value.to_vec());
    }
    fn count_row(&self, outcome: RowOutcome) {
        let mut rows = self.rows.lock().unwrap();
        rows.total += 1;
        match outcome {
            RowOutcome::New => rows.new += 1,
            RowOutcome::Remembered => rows.remembered += 1,
            RowOutcome::Failed => rows.failed += 1,
        }
    }
    fn progress(&self, _done: u64, _total: u64, _unit: &str, _detail: &str) {}
    fn message(&self, _level: MessageLevel, text: &str) {
        self.messages.lock().unwrap().push(text.to_owned());
    }
    fn metric(&self, name: &str, value: Value) {
        self.metrics.lock().unwrap().insert(name.to_owned(), value);
    }
    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// What one run of a stage left behind.
pub(crate) struct Outcome {
    /// The artifact's folder.
    pub(crate) out: PathBuf,
    /// The metrics, by name.
    pub(crate) metrics: Map<String, Value>,
    /// Rows handled in this run.
    pub(crate) rows: RowCounts,
    /// Messages of this run.
    pub(crate) messages: Vec<String>,
    /// Keeps the folder when the bench is gone.
    _dir: Arc<TempDir>,
}

impl Outcome {
    /// One file of the artifact.
    pub(crate) fn text(&self, file: &str) -> String {
        fs_err::read_to_string(self.out.join(file)).unwrap()
    }

    /// One table of the artifact.
    pub(crate) fn table<T: DeserializeOwned>(&self, file: &str) -> Vec<T> {
        crate::corpus::read_table(&self.out.join(file)).unwrap()
    }

    /// A metric that is a whole number.
    pub(crate) fn count(&self, name: &str) -> u64 {
        self.metrics.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("no count `{name}`"))
    }
}

/// One stage under test: its inputs, its sources, and a memo that outlives a run.
pub(crate) struct Bench {
    dir: Arc<TempDir>,
    inputs: Vec<(String, Artifact)>,
    sources: Vec<(String, Vec<SourceFile>)>,
    runs: usize,
    /// The services the stage sees.
    pub(crate) services: FakeServices,
}

impl Bench {
    /// An empty bench.
    pub(crate) fn new() -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Self { dir, inputs: Vec::new(), sources: Vec::new(), runs: 0, services: FakeServices::default() }
    }

    /// Fills the slot `slot` with an artifact of these files, replacing what was there.
    pub(crate) fn input(&mut self, slot: &str, files: &[(&str, &[u8])]) -> &mut Self {
        let folder = self.dir.path().join("inputs").join(format!("{slot}-{}", self.runs));
        let mut held = Vec::new();
        for (path, bytes) in files {
            let file = folder.join(path);
            fs_err::create_dir_all(file.parent().unwrap()).unwrap();
            fs_err::write(&file, bytes).unwrap();
            held.push(OutputFile {
                path: (*path).to_owned(),
                digest: Digest::of(bytes),
                bytes: bytes.len() as u64,
            });
        }
        let digest = Digest::of(format!("{held:?}").as_bytes());
        let artifact = Artifact { stage: slot.to_owned(), digest, files: held, metrics: Map::new(), folder };
        self.inputs.retain(|(name, _)| name != slot);
        self.inputs.push((slot.to_owned(), artifact));
        self
    }

    /// Fills the slot `slot` with an artifact of one table.
    pub(crate) fn table<T: serde::Serialize>(&mut self, slot: &str, file: &str, rows: &[T]) -> &mut Self {
        let text: String = rows.iter().map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
        self.input(slot, &[(file, text.as_bytes())])
    }

    /// Puts one file into the source `name`, replacing the file of that path.
    pub(crate) fn source(&mut self, name: &str, path: &str, bytes: &[u8]) -> &mut Self {
        let digest = Digest::of(bytes);
        let object = self.dir.path().join(digest.hex());
        fs_err::write(&object, bytes).unwrap();
        let file = SourceFile { path: path.to_owned(), digest, bytes: bytes.len() as u64, object };
        if !self.sources.iter().any(|(source, _)| source == name) {
            self.sources.push((name.to_owned(), Vec::new()));
        }
        let (_, files) = self.sources.iter_mut().find(|(source, _)| source == name).unwrap();
        files.retain(|file| file.path != path);
        files.push(file);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        self
    }

    #[expect(clippy::needless_pass_by_value, reason = "tests write `json!` at the call")]
    /// Runs the kind in a fresh output folder, as the runner would: schema first, then `check`, then `run`.
    pub(crate) fn run(&mut self, kind: &dyn StageKind, with: Value) -> Result<Outcome, StageError> {
        let schema = kind.schema().to_value();
        if let Err(error) = jsonschema::validate(&schema, &with) {
            return Err(StageError::new(
                "manifest::schema",
                format!("{error} at `{}`", error.instance_path()),
            ));
        }
        if let Some(problem) = kind.check(&with).into_iter().next() {
            return Err(StageError::new("manifest::check", format!("{}: {}", problem.path, problem.message)));
        }
        self.runs += 1;
        let out = self.dir.path().join(format!("out-{}", self.runs));
        let checkpoints = self.dir.path().join("checkpoints");
        fs_err::create_dir_all(&out).unwrap();
        fs_err::create_dir_all(&checkpoints).unwrap();
        *self.services.rows.lock().unwrap() = RowCounts::default();
        self.services.metrics.lock().unwrap().clear();
        self.services.messages.lock().unwrap().clear();
        kind.run(&StageContext {
            stage: "under-test",
            kind: (kind.name(), kind.version()),
            with: &with,
            inputs: &self.inputs,
            sources: &self.sources,
            out: &out,
            checkpoints: &checkpoints,
            manifest_dir: self.dir.path(),
            threads: 2,
            gpus: &[],
            services: &self.services,
        })?;
        for (file, _) in kind.outputs() {
            assert!(out.join(file).exists(), "`{}` declares `{file}` and did not write it", kind.name());
        }
        let rows = *self.services.rows.lock().unwrap();
        let metrics = self.services.metrics.lock().unwrap().clone();
        let messages = self.services.messages.lock().unwrap().clone();
        Ok(Outcome { out, metrics, rows, messages, _dir: self.dir.clone() })
    }

    /// Rows counted so far in the last run, also when it failed.
    pub(crate) fn rows(&self) -> RowCounts {
        *self.services.rows.lock().unwrap()
    }
}
