//! What a run tells the outside: one enum of events, one trait that receives them.
//! The binary has the receivers (a terminal with live lines, a plain log, JSON lines); the runner only sends.

use serde::Serialize;
use serde_json::Value;

use crate::stage::{MessageLevel, RowCounts};

/// Something that happened in a run. Stage names are the manifest's. As JSON the field `event` names the
/// variant: `{"event":"stage_cached","stage":"notes"}`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// The run began, with this many stages to look at.
    RunStarted { run: String, stages: usize },
    /// A stage was found in the store.
    StageCached { stage: String },
    /// A stage starts, and why it has to (`params.rank: 16 → 32`); `previous_seconds` is how long it took last time.
    StageStarted { stage: String, kind: &'static str, reasons: Vec<String>, previous_seconds: Option<f64> },
    /// Another process runs the same action; this one waits for it.
    StageWaiting { stage: String },
    /// Progress inside a stage; `total` 0 means unknown.
    StageProgress { stage: String, done: u64, total: u64, unit: String, detail: String },
    /// A line from a stage.
    StageMessage { stage: String, level: MessageLevel, text: String },
    /// A stage ended well.
    StageFinished {
        stage: String,
        seconds: f64,
        rows: Option<RowCounts>,
        metrics: serde_json::Map<String, Value>,
    },
    /// A stage failed.
    StageFailed { stage: String, message: String, hint: Option<String> },
    /// A stage was not run because one it needs failed.
    StageSkipped { stage: String, because: String },
    /// The run ended.
    RunFinished { ok: bool, seconds: f64 },
}

/// Receives the events of a run, from several threads at once.
pub trait Reporter: Sync {
    /// Takes one event.
    fn report(&self, event: &RunEvent);
}
