//! What the runner does for a running stage: row memo, counters, progress, messages, metrics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::events::{Reporter, RunEvent};
use crate::memo::Memo;
use crate::runs::Recorder;
use crate::stage::{MessageLevel, RowCounts, RowOutcome, Services};
use crate::store::IndexError;

/// Progress of one stage is passed on at most this often.
const PROGRESS_PAUSE: Duration = Duration::from_millis(50);

/// The services for one stage.
pub(super) struct StageServices<'a> {
    stage: &'a str,
    memo: &'a Memo,
    recorder: &'a Recorder<'a>,
    cancelled: &'a AtomicBool,
    /// When the stage has had its time.
    deadline: Option<Instant>,
    /// Whether the stage was told to stop because of that.
    timed_out: AtomicBool,
    new: AtomicU64,
    remembered: AtomicU64,
    failed: AtomicU64,
    metrics: Mutex<Map<String, Value>>,
    progress: Mutex<Option<Instant>>,
    memo_failed: AtomicBool,
}

impl<'a> StageServices<'a> {
    pub(super) fn new(
        stage: &'a str,
        memo: &'a Memo,
        recorder: &'a Recorder<'a>,
        cancelled: &'a AtomicBool,
        timeout: Option<Duration>,
    ) -> Self {
        Self {
            stage,
            memo,
            recorder,
            cancelled,
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            timed_out: AtomicBool::new(false),
            new: AtomicU64::new(0),
            remembered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            metrics: Mutex::default(),
            progress: Mutex::default(),
            memo_failed: AtomicBool::new(false),
        }
    }

    /// Whether the stage was told to stop because it has had its time.
    pub(super) fn timed_out(&self) -> bool {
        self.timed_out.load(Ordering::Relaxed)
    }

    /// The rows counted.
    pub(super) fn rows(&self) -> RowCounts {
        let [new, remembered, failed] =
            [&self.new, &self.remembered, &self.failed].map(|count| count.load(Ordering::Relaxed));
        RowCounts { total: new + remembered + failed, new, remembered, failed }
    }

    /// The metrics recorded, sorted by name so that their order does not depend on threads.
    pub(super) fn metrics(&self) -> Map<String, Value> {
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner).clone();
        metrics.sort_keys();
        metrics
    }

    /// Writes gathered rows.
    pub(super) fn flush(&self) {
        self.check_memo(self.memo.flush());
    }

    /// A memo that fails costs time, not results: the stage goes on, and the user is told once.
    fn check_memo<T>(&self, result: Result<T, IndexError>) -> Option<T> {
        result
            .map_err(|error| {
                if !self.memo_failed.swap(true, Ordering::Relaxed) {
                    self.message(MessageLevel::Warning, &format!("rows cannot be remembered: {error}"));
                }
            })
            .ok()
    }
}

impl Services for StageServices<'_> {
    fn recall(&self, row: &Digest) -> Option<Vec<u8>> {
        self.check_memo(self.memo.recall(row)).flatten()
    }

    fn remember(&self, row: &Digest, value: &[u8]) {
        self.check_memo(self.memo.remember(row, value));
    }

    fn count_row(&self, outcome: RowOutcome) {
        let count = match outcome {
            RowOutcome::New => &self.new,
            RowOutcome::Remembered => &self.remembered,
            RowOutcome::Failed => &self.failed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn progress(&self, done: u64, total: u64, unit: &str, detail: &str) {
        let mut last = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if done != total && last.is_some_and(|last| last.elapsed() < PROGRESS_PAUSE) {
            return;
        }
        *last = Some(Instant::now());
        drop(last);
        self.recorder.report(&RunEvent::StageProgress {
            stage: self.stage.to_owned(),
            done,
            total,
            unit: unit.to_owned(),
            detail: detail.to_owned(),
        });
    }

    fn message(&self, level: MessageLevel, text: &str) {
        let label = if level == MessageLevel::Warning { "warning: " } else { "" };
        self.recorder.log(self.stage, &format!("{label}{text}"));
        self.recorder.report(&RunEvent::StageMessage {
            stage: self.stage.to_owned(),
            level,
            text: text.to_owned(),
        });
    }

    fn metric(&self, name: &str, value: Value) {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), value);
    }

    fn cancelled(&self) -> bool {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.timed_out.store(true, Ordering::Relaxed);
        }
        self.timed_out() || self.cancelled.load(Ordering::Relaxed)
    }
}
