//! What the runner asks of a stage kind, and what it gives a running stage.
//!
//! [`StageKind`] is the one seam between the runner and the work: a kind declares its parameters, the
//! inputs it takes, the files it reads, and runs inside a [`StageContext`]. A stage sees content, never
//! live files: sources are taken into the store when they are hashed and read from there.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::digest::Digest;

/// A kind of stage: one value per `uses:` word, listed once by the binary.
pub trait StageKind: Sync {
    /// The word after `uses:`.
    fn name(&self) -> &'static str;
    /// Bumped whenever the same inputs and parameters would give other bytes; part of the action key.
    fn version(&self) -> u32;
    /// One or two sentences for `docs/stages.md` and the editor's hover text.
    fn doc(&self) -> &'static str;
    /// The inputs the kind takes from `needs`.
    fn inputs(&self) -> &'static [InputSlot];
    /// The files the artifact holds, with a phrase on each.
    fn outputs(&self) -> &'static [(&'static str, &'static str)];
    /// JSON Schema of `with`, derived from the kind's parameter struct (`schemars::schema_for!`).
    fn schema(&self) -> schemars::Schema;
    /// What the schema cannot say: relations between parameters. `with` has passed the schema.
    fn check(&self, _with: &Value) -> Vec<ParamProblem> {
        Vec::new()
    }
    /// The files beside the manifest that the stage reads. They become part of the key by content.
    fn sources(&self, _with: &Value) -> Vec<SourceSpec> {
        Vec::new()
    }
    /// The numerics class (`cpu:fma-f32.3`) where results depend on the kernel path; part of the key.
    fn numerics(&self, _with: &Value) -> Option<String> {
        None
    }
    /// How much of the machine the stage takes.
    fn cost(&self) -> Cost {
        Cost::Light
    }
    /// Does the work. Everything written below [`StageContext::out`] becomes the artifact.
    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError>;
}

/// One input a kind takes.
#[derive(Debug, Clone, Copy)]
pub struct InputSlot {
    /// The key in `needs: { name: stage }`.
    pub name: &'static str,
    /// A phrase on what it must hold.
    pub doc: &'static str,
    /// How many stages may fill it.
    pub arity: Arity,
}

/// How many stages may fill an input slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arity {
    /// Exactly one.
    One,
    /// None or one.
    Optional,
    /// Any number; each arrives under the key it has in `needs`, or its stage's name.
    Any,
}

/// How much of the machine a stage takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// One core; runs beside others.
    Light,
    /// Every core it is given; one such stage at a time.
    Heavy,
}

/// Files a stage reads, as globs or paths relative to the manifest's folder (absolute ones are allowed).
#[derive(Debug, Clone)]
pub struct SourceSpec {
    /// The name under which the stage asks for them, [`StageContext::source`].
    pub name: String,
    /// Files, folders (everything below) or globs.
    pub patterns: Vec<String>,
    /// The parameter the patterns came from, dotted, for error messages: `paths`.
    pub param: String,
    /// What to do when nothing matches.
    pub empty: EmptySource,
}

/// Whether a source without a single file is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptySource {
    /// An error before anything runs.
    Refused,
    /// An empty list.
    Allowed,
}

/// Something wrong with a stage's parameters; the manifest turns it into a located error.
#[derive(Debug, Clone)]
pub struct ParamProblem {
    /// Dotted path inside `with`: `judge.model`, `targets.2`; empty for `with` itself.
    pub path: String,
    /// What is wrong: a lowercase fragment without a period.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Why a stage failed: shown to the user as it is.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StageError {
    /// A stable code, `train::not_finite`.
    pub code: &'static str,
    /// What failed, naming the culprit (file, row, tensor): a lowercase fragment without a period.
    pub message: String,
    /// The next step for the user.
    pub hint: Option<String>,
    /// The file, and the line in it, where that is known.
    pub place: Option<(PathBuf, Option<usize>)>,
    /// True when running again may help (network, rate limit); such a failure is never remembered.
    pub transient: bool,
    /// The cause below.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl StageError {
    /// An error with a code and a message.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, place: None, transient: false, source: None }
    }

    /// Adds the next step for the user.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the file, and the line in it.
    pub fn at(mut self, path: impl Into<PathBuf>, line: Option<usize>) -> Self {
        self.place = Some((path.into(), line));
        self
    }

    /// Says that running again may help.
    pub fn transient(mut self) -> Self {
        self.transient = true;
        self
    }

    /// Keeps the cause.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The error of a stage that stopped because the run was cancelled.
    pub fn cancelled() -> Self {
        Self::new("run::cancelled", "stopped before it was done")
    }
}

impl From<std::io::Error> for StageError {
    fn from(error: std::io::Error) -> Self {
        let hint = (error.kind() == std::io::ErrorKind::StorageFull)
            .then(|| "free some disk space and run again; nothing finished is lost".to_owned());
        Self { hint, ..Self::new("stage::io", error.to_string()) }
    }
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct OutputFile {
    /// Path inside the artifact, `/` between parts.
    pub path: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Size of the content.
    pub bytes: u64,
}

/// The finished output of a stage, as a later stage sees it.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Name of the stage that made it.
    pub stage: String,
    /// Digest of the whole tree.
    pub digest: Digest,
    /// Its files, sorted by path.
    pub files: Vec<OutputFile>,
    /// The metrics its stage reported.
    pub metrics: serde_json::Map<String, Value>,
    /// A read-only folder that holds the files under their own names (links into the store).
    pub folder: PathBuf,
}

impl Artifact {
    /// The path of one file, or an error that names the stage and what it holds instead.
    pub fn file(&self, path: &str) -> Result<PathBuf, StageError> {
        if self.files.iter().any(|file| file.path == path) {
            return Ok(self.folder.join(path));
        }
        let held = self.files.iter().map(|file| format!("`{}`", file.path)).collect::<Vec<_>>().join(", ");
        Err(StageError::new(
            "stage::input_file",
            format!("input `{}` holds no `{path}`; it holds {held}", self.stage),
        )
        .hint("check that `needs` names a stage of the right kind"))
    }
}

/// One file of a source, as it was when the key was made.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Path relative to the manifest's folder (or absolute, when the pattern was), `/` between parts.
    pub path: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Size of the content.
    pub bytes: u64,
    /// Where the content can be read: an object of the store.
    pub object: PathBuf,
}

/// How many rows a stage handled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct RowCounts {
    /// All rows.
    pub total: u64,
    /// Rows computed in this run.
    pub new: u64,
    /// Rows taken from the row memo.
    pub remembered: u64,
    /// Rows that failed; they are never remembered.
    pub failed: u64,
}

/// What the runner does for a running stage. Implemented by the runner; a test may bring its own.
pub trait Services: Sync {
    /// Looks a row up in the memo.
    fn recall(&self, row: &Digest) -> Option<Vec<u8>>;
    /// Remembers a row.
    fn remember(&self, row: &Digest, value: &[u8]);
    /// Counts one row.
    fn count_row(&self, outcome: RowOutcome);
    /// Reports progress: `done` of `total` units; `total` 0 means unknown.
    fn progress(&self, done: u64, total: u64, unit: &str, detail: &str);
    /// A line for the stage's log and the user.
    fn message(&self, level: MessageLevel, text: &str);
    /// Records a metric; the last value of a name wins.
    fn metric(&self, name: &str, value: Value);
    /// True once the user asked to stop.
    fn cancelled(&self) -> bool;
}

/// What became of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOutcome {
    /// Computed now.
    New,
    /// Taken from the memo.
    Remembered,
    /// Failed; not remembered.
    Failed,
}

/// How loud a message of a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageLevel {
    /// Worth a line in the log.
    Info,
    /// Worth the user's attention.
    Warning,
}

/// Everything a running stage may see.
pub struct StageContext<'a> {
    /// The stage's name in the manifest.
    pub stage: &'a str,
    /// The kind's name and version, part of every row key.
    pub kind: (&'static str, u32),
    /// The resolved `with`.
    pub with: &'a Value,
    /// Inputs by slot, in the order of `needs`; an `Arity::Any` slot's inputs carry their own keys.
    pub inputs: &'a [(String, Artifact)],
    /// Sources by name.
    pub sources: &'a [(String, Vec<SourceFile>)],
    /// The scratch folder whose content becomes the artifact.
    pub out: &'a Path,
    /// A folder keyed by the action that survives a kill, for checkpoints; emptied once the action is committed.
    pub checkpoints: &'a Path,
    /// The folder the manifest is in (for messages; stages read sources, not this).
    pub manifest_dir: &'a Path,
    /// Threads a heavy stage may use. Never changes a result.
    pub threads: usize,
    /// The GPUs lent to the stage, as `CUDA_VISIBLE_DEVICES` takes them.
    pub gpus: &'a [String],
    /// The services of the runner.
    pub services: &'a dyn Services,
}

impl StageContext<'_> {
    /// The typed parameters. The schema has been checked, so this fails only on a bug in the kind.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, StageError> {
        serde_json::from_value(self.with.clone()).map_err(|error| {
            StageError::new("stage::params", format!("parameters do not fit the stage: {error}"))
        })
    }

    /// The input in slot `name`.
    pub fn input(&self, name: &str) -> Result<&Artifact, StageError> {
        self.optional_input(name).ok_or_else(|| {
            StageError::new("stage::input", format!("stage `{}` has no input `{name}`", self.stage))
        })
    }

    /// The input in slot `name`, if `needs` fills it.
    pub fn optional_input(&self, name: &str) -> Option<&Artifact> {
        self.inputs.iter().find(|(slot, _)| slot == name).map(|(_, artifact)| artifact)
    }

    /// The files of source `name`; empty if the kind declared none.
    pub fn source(&self, name: &str) -> &[SourceFile] {
        self.sources.iter().find(|(source, _)| source == name).map_or(&[], |(_, files)| files.as_slice())
    }

    /// Computes one row, or takes it from the memo: `parts` are all that the row depends on besides the
    /// kind and its version. A failed row is counted, never remembered.
    pub fn memo<T, F>(&self, parts: &[&[u8]], compute: F) -> Result<T, StageError>
    where
        T: Serialize + DeserializeOwned,
        F: FnOnce() -> Result<T, StageError>,
    {
        let key = self.row_key(parts);
        if let Some(bytes) = self.services.recall(&key)
            && let Ok(value) = serde_json::from_slice(&bytes)
        {
            self.services.count_row(RowOutcome::Remembered);
            return Ok(value);
        }
        match compute() {
            Ok(value) => {
                let bytes = serde_json::to_vec(&value).map_err(|error| {
                    StageError::new("memo::encode", format!("a row cannot be remembered: {error}"))
                })?;
                self.services.remember(&key, &bytes);
                self.services.count_row(RowOutcome::New);
                Ok(value)
            }
            Err(error) => {
                self.services.count_row(RowOutcome::Failed);
                Err(error)
            }
        }
    }

    /// True if the row would be taken from the memo.
    pub fn remembers(&self, parts: &[&[u8]]) -> bool {
        self.services.recall(&self.row_key(parts)).is_some()
    }

    fn row_key(&self, parts: &[&[u8]]) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let (name, version) = self.kind;
        for part in [name.as_bytes(), &version.to_le_bytes()].into_iter().chain(parts.iter().copied()) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().into()
    }

    /// An error if the user asked to stop. Long stages call it often.
    pub fn check_cancelled(&self) -> Result<(), StageError> {
        if self.services.cancelled() { Err(StageError::cancelled()) } else { Ok(()) }
    }

    /// Reports progress: `done` of `total` units.
    pub fn progress(&self, done: u64, total: u64, unit: &str) {
        self.services.progress(done, total, unit, "");
    }

    /// A line for the stage's log.
    pub fn info(&self, text: &str) {
        self.services.message(MessageLevel::Info, text);
    }

    /// A line the user should see.
    pub fn warn(&self, text: &str) {
        self.services.message(MessageLevel::Warning, text);
    }

    /// Records a metric.
    pub fn metric(&self, name: &str, value: impl Into<Value>) {
        self.services.metric(name, value.into());
    }
}
