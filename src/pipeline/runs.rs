//! The history of runs: one row a run in the index, and `runs/<id>/` with the journal (JSON lines), the
//! resolved pipeline and the log of each stage that had something to say. The clock is read here alone;
//! nothing of it reaches a key.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;
use serde_json::{Value, json};

use crate::events::{Reporter, RunEvent};
use crate::graph::Pipeline;
use crate::runner::RunReport;
use crate::store::{Store, StoreError, folder_name};

mod diff;
mod export;

pub use diff::{MetricChange, RunDiff, StageChange, StageDiff};

/// One run, as the list shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunSummary {
    /// Its id; ids sort by time.
    pub run: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// The manifest file.
    pub manifest: String,
    /// When it started, UTC: `2026-11-21T11:30:07Z`.
    pub started: String,
    /// How long it took; `None`: it was killed, or still runs.
    pub seconds: Option<f64>,
    /// How it ended.
    pub ok: Option<bool>,
    /// Whether its results are kept from `cache gc`.
    pub pinned: bool,
}

/// One run with all its stages.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunDetails {
    /// The summary.
    #[serde(flatten)]
    pub summary: RunSummary,
    /// The stages, as in the report of the run.
    pub stages: Value,
    /// The errors, as in the report of the run.
    pub errors: Value,
    /// Folder with the journal and the logs.
    pub folder: PathBuf,
}

/// The history of a store.
#[derive(Debug, Clone, Copy)]
pub struct Runs<'s> {
    store: &'s Store,
}

impl<'s> Runs<'s> {
    /// The history of `store`.
    pub fn new(store: &'s Store) -> Self {
        Self { store }
    }

    /// All runs, newest first; of one pipeline if `pipeline` names it.
    pub fn list(&self, pipeline: Option<&str>) -> Result<Vec<RunSummary>, StoreError> {
        let mut list: Vec<RunSummary> = self.store.index().with(|connection| {
            connection
                .prepare_cached(
                    "SELECT id, pipeline, manifest, started, seconds, ok FROM runs
                     WHERE ?1 IS NULL OR pipeline = ?1 ORDER BY id DESC",
                )?
                .query_map([pipeline], summary_at)?
                .collect()
        })?;
        for run in &mut list {
            run.pinned = self.store.is_pinned(&run.run);
        }
        Ok(list)
    }

    /// One run by its id, or by the beginning of its id if only one run starts so.
    pub fn show(&self, run: &str) -> Result<Option<RunDetails>, StoreError> {
        let mut candidates = self.list(None)?;
        candidates.retain(|summary| summary.run.starts_with(run));
        if let Some(exact) = candidates.iter().position(|summary| summary.run == run) {
            candidates = vec![candidates.swap_remove(exact)];
        }
        let Ok([summary]) = <[RunSummary; 1]>::try_from(candidates) else { return Ok(None) };
        let texts: Option<(Option<String>, Option<String>)> = self.store.index().with(|connection| {
            connection
                .prepare_cached("SELECT stages, errors FROM runs WHERE id = ?1")?
                .query_row([&summary.run], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })?;
        let parsed = |text: Option<String>| {
            text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_else(|| json!([]))
        };
        let (stages, errors) = texts.unwrap_or_default();
        let folder = run_folder(self.store, &summary.run);
        Ok(Some(RunDetails { summary, stages: parsed(stages), errors: parsed(errors), folder }))
    }
}

fn summary_at(row: &Row<'_>) -> rusqlite::Result<RunSummary> {
    Ok(RunSummary {
        run: row.get(0)?,
        pipeline: row.get(1)?,
        manifest: row.get(2)?,
        started: row.get(3)?,
        seconds: row.get(4)?,
        ok: row.get(5)?,
        pinned: false,
    })
}

fn run_folder(store: &Store, run: &str) -> PathBuf {
    store.root().join("runs").join(run)
}

/// The record of the run that is going on: passes events on and writes them to the journal.
pub(crate) struct Recorder<'a> {
    /// Id of the run.
    pub(crate) id: String,
    store: &'a Store,
    reporter: &'a dyn Reporter,
    started: Instant,
    folder: PathBuf,
    journal: Mutex<fs_err::File>,
}

impl<'a> Recorder<'a> {
    /// Begins the record of a run.
    pub(crate) fn begin(
        pipeline: &Pipeline,
        store: &'a Store,
        reporter: &'a dyn Reporter,
    ) -> Result<Self, StoreError> {
        let id = fresh_id();
        let folder = run_folder(store, &id);
        fs_err::create_dir(&folder)?;
        let journal = Mutex::new(fs_err::File::create_new(folder.join("journal.jsonl"))?);
        fs_err::write(folder.join("pipeline.json"), resolved(pipeline).to_string())?;
        let manifest = pipeline.path.display().to_string();
        store.index().with(|connection| {
            connection
                .prepare_cached("INSERT INTO runs (id, pipeline, manifest, started) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![id, pipeline.name, manifest, utc(now())])
        })?;
        Ok(Self { id, store, reporter, started: Instant::now(), folder, journal })
    }

    /// Time since the run began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends the record.
    pub(crate) fn end(&self, report: &RunReport, seconds: f64) -> Result<(), StoreError> {
        let stages = serde_json::to_string(&report.stages).map_err(io::Error::from)?;
        let errors = serde_json::to_string(&report.errors).map_err(io::Error::from)?;
        self.store.index().with(|connection| {
            connection
                .prepare_cached(
                    "UPDATE runs SET seconds = ?2, ok = ?3, stages = ?4, errors = ?5 WHERE id = ?1",
                )?
                .execute(params![self.id, seconds, report.ok, stages, errors])
        })?;
        Ok(())
    }

    /// Adds a line to the log of a stage.
    pub(crate) fn log(&self, stage: &str, line: &str) {
        let path = self.folder.join(format!("{}.log", folder_name(stage)));
        let written = fs_err::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{:9.3}s {line}", self.elapsed().as_secs_f64()));
        if let Err(error) = written {
            tracing::warn!("the stage's log is incomplete: {error}");
        }
    }

    fn write_event(&self, event: &RunEvent) -> io::Result<()> {
        let mut line = json!({ "at": (self.elapsed().as_secs_f64() * 1000.0).round() / 1000.0 });
        if let (Some(line), Ok(Value::Object(fields))) = (line.as_object_mut(), serde_json::to_value(event)) {
            line.extend(fields);
        }
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.write_all(format!("{line}\n").as_bytes())
    }
}

impl Reporter for Recorder<'_> {
    fn report(&self, event: &RunEvent) {
        let passing = matches!(event, RunEvent::StageProgress { .. } | RunEvent::StageCached { .. });
        if !passing && let Err(error) = self.write_event(event) {
            tracing::warn!("the run's journal is incomplete: {error}");
        }
        self.reporter.report(event);
    }
}

/// The pipeline as resolved, for the record.
fn resolved(pipeline: &Pipeline) -> Value {
    let stages: Vec<Value> = pipeline
        .stages
        .iter()
        .map(|stage| {
            let needs: serde_json::Map<String, Value> = stage
                .needs
                .iter()
                .map(|need| {
                    let name = &pipeline.stages[need.stage.0 as usize].name;
                    (need.slot.clone(), Value::from(name.as_str()))
                })
                .collect();
            json!({ "name": stage.name, "uses": stage.kind.name(), "needs": needs, "with": stage.with })
        })
        .collect();
    json!({
        "runner": concat!("tunesmith ", env!("CARGO_PKG_VERSION")),
        "name": pipeline.name,
        "manifest": path_text(&pipeline.path),
        "params": pipeline.params,
        "stages": stages,
    })
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// A new id that sorts by time, to the microsecond: `20261121T113007-9f2c41d8`.
pub(crate) fn fresh_id() -> String {
    // The standard library's only source of randomness: the seed of a hash map, different in each process,
    // joined with the time and the process so that two calls differ as well.
    let now = now();
    let random = RandomState::new().hash_one((now.as_nanos(), std::process::id()));
    let stamp: String = utc(now).chars().filter(|c| !"-:Z".contains(*c)).collect();
    format!("{stamp}-{:05x}{:03x}", now.subsec_micros(), random >> 52)
}

fn now() -> Duration {
    // A clock before 1970 gives ids that sort wrongly, and nothing worse.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A time since 1970 as `2026-11-21T11:30:07Z`.
fn utc(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date after Howard Hinnant, <http://howardhinnant.github.io/date_algorithms.html>:
    // years start in March, eras have 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        let at = |seconds| utc(Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn ids_sort_by_time_and_differ() {
        let (a, b) = (fresh_id(), fresh_id());
        assert_ne!(a, b);
        assert!(a[..21] <= b[..21] && a.len() == 24, "{a} {b}");
    }
}
