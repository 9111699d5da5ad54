//! What a run reports at its end: the JSON that `run --json` prints.

use std::error::Error as _;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::graph::Stage;
use crate::key::Reason;
use crate::stage::{OutputFile, RowCounts, StageError};
use crate::store::StoreError;

use super::RunnerError;
use super::error::place_of;

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunReport {
    /// Id of the run.
    pub run: String,
    /// Whether every stage was settled.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
    /// The stages in order.
    pub stages: Vec<StageReport>,
    /// What went wrong.
    pub errors: Vec<ErrorReport>,
}

/// One stage of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// Its action key; `None` if it was skipped before its inputs were made.
    pub key: Option<Digest>,
    /// What became of it.
    pub state: StageState,
    /// How long it ran in this run; 0 if it did not.
    pub seconds: f64,
    /// Its rows; for a cached stage none are new.
    pub rows: RowCounts,
    /// Its metrics.
    pub metrics: Map<String, Value>,
    /// Its outputs, sorted by path.
    pub outputs: Vec<OutputFile>,
    /// Why it ran.
    pub reasons: Vec<Reason>,
    /// The folder in which its outputs stand under their own names.
    pub folder: Option<PathBuf>,
}

/// What became of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    /// Its result stood already.
    Cached,
    /// It ran.
    Ran,
    /// It failed.
    Failed,
    /// It was not run, or stopped before it was done.
    Skipped,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorReport {
    /// A stable code.
    pub code: String,
    /// What went wrong: a lowercase fragment.
    pub message: String,
    /// The file it is about.
    pub file: Option<String>,
    /// 1-based.
    pub line: Option<usize>,
    /// 1-based.
    pub column: Option<usize>,
    /// The stage.
    pub stage: Option<String>,
    /// The next step.
    pub hint: Option<String>,
}

impl ErrorReport {
    /// The error of a stage, at the place it names, else where the stage is written.
    pub(super) fn of_stage(stage: &Stage, error: &StageError) -> Self {
        let (file, line, column) = match (&error.place, place_of(stage, "")) {
            (Some((file, line)), _) => (Some(file.display().to_string()), *line, None),
            (None, Some(place)) => {
                (Some(place.file.display().to_string()), Some(place.line), Some(place.column))
            }
            (None, None) => (None, None, None),
        };
        Self {
            code: error.code.to_owned(),
            message: whole_message(error),
            file,
            line,
            column,
            stage: Some(stage.name.clone()),
            hint: error.hint.clone(),
        }
    }

    /// An error that belongs to no stage and no place.
    pub fn plain(code: &str, message: impl Into<String>, hint: Option<&str>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            file: None,
            line: None,
            column: None,
            stage: None,
            hint: hint.map(str::to_owned),
        }
    }

    /// An error of the store that belongs to no stage.
    pub(super) fn of_store(error: &StoreError) -> Self {
        Self::plain(error.code(), error.to_string(), error.hint())
    }

    /// The run was stopped by the user.
    pub(super) fn cancelled() -> Self {
        let hint = "run again to go on; everything finished is kept";
        Self::plain("run::cancelled", "the run was stopped before it was done", Some(hint))
    }
}

impl From<&RunnerError> for ErrorReport {
    fn from(error: &RunnerError) -> Self {
        let place = error.place();
        Self {
            code: error.stable_code().to_owned(),
            message: error.to_string(),
            file: place.map(|place| place.file.display().to_string()),
            line: place.map(|place| place.line),
            column: place.map(|place| place.column),
            stage: error.stage().map(str::to_owned),
            hint: error.hint(),
        }
    }
}

/// The message of a stage's error with its causes, each said once.
pub(super) fn whole_message(error: &StageError) -> String {
    let mut text = error.message.clone();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
