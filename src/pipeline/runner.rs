//! Plans, runs and explains a pipeline: joins graph, keys, store and scheduler.
//!
//! ```text
//! sources ──► assess: one pass in order; a key can be made once all needs are known
//!               │ cached            │ run, blocked
//!               ▼                   ▼
//!            publish      scheduler ──► action: lease, link inputs, StageKind::run, commit, publish
//! ```
//!
//! Early cutoff needs no rule of its own: the key of a stage holds the content of its inputs, so a stage
//! that made the same bytes again leads its followers to the keys they had.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use crate::digest::Digest;
use crate::events::{Reporter, RunEvent};
use crate::graph::{Pipeline, Stage, StageId};
use crate::key::Reason;
use crate::runs::Recorder;
use crate::scheduler::{Limits, Machine, schedule};
use crate::store::{Remote, Store};

mod action;
mod assess;
mod demand;
mod driver;
mod error;
mod report;
mod services;
mod sources;
mod standing;

pub use error::{RunnerError, SourceError, SourceProblem};
pub use report::{ErrorReport, RunReport, StageReport, StageState};
pub use standing::{Standing, standing};

use assess::{Assessment, Finding};
use driver::{Driver, Shared};
use sources::Taking;

/// How often sources are looked at again when a note is edited just while they are taken into the store.
const SNAPSHOTS_MAX: usize = 5;

/// How to run a pipeline.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Stages to settle, with all they need; empty: all.
    pub targets: Vec<String>,
    /// Stages to run even if their result stands.
    pub force: Vec<String>,
    /// Stages at once.
    pub jobs: usize,
    /// Threads for a heavy stage. Changes no result.
    pub threads: usize,
    /// After a failure, still run what does not need the failed stage.
    pub keep_going: bool,
    /// Run stages whose result stands once more and compare: what differs is an error, and the result stays.
    pub verify: bool,
    /// Where results are put, `<out>/<stage>/`; else `out/<pipeline>/<stage>/` in the store.
    pub out: Option<PathBuf>,
    /// What the running stages may take together.
    pub machine: Machine,
    /// Where a result that is not in the store is looked for before its stage runs.
    pub remote: Option<Remote>,
}

impl Default for RunOptions {
    /// All stages, as many jobs and threads as the machine has cores, any memory, no GPU.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            targets: Vec::new(),
            force: Vec::new(),
            jobs: cores,
            threads: cores,
            keep_going: false,
            verify: false,
            out: None,
            remote: None,
            machine: Machine {
                cpu: u32::try_from(cores).unwrap_or(u32::MAX),
                memory_bytes: u64::MAX,
                gpus: Vec::new(),
            },
        }
    }
}

/// What would run and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The stages in order.
    pub stages: Vec<PlannedStage>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedStage {
    /// Its name.
    pub name: String,
    /// Its action key; `None` while an input is not made yet.
    pub key: Option<Digest>,
    /// What would happen.
    pub state: PlannedState,
    /// Why it would run; empty if it would not.
    pub reasons: Vec<Reason>,
    /// How long it took when it last ran.
    pub previous_seconds: Option<f64>,
}

/// What would happen to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedState {
    /// Its result stands.
    Cached,
    /// It would run.
    Run,
    /// A stage it needs would run first; whether it then runs depends on what that stage makes.
    Blocked,
}

/// Why a stage would run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Its name.
    pub stage: String,
    /// Its key now; `None` while an input is not made yet.
    pub key: Option<Digest>,
    /// The key of its newest result.
    pub previous_key: Option<Digest>,
    /// What changed between the two.
    pub reasons: Vec<Reason>,
    /// What would happen.
    pub state: PlannedState,
    /// The stages before it, direct or not, that have to run themselves: why a blocked stage waits.
    pub causes: Vec<Cause>,
}

/// A stage that runs, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cause {
    /// Its name.
    pub stage: String,
    /// Why it runs.
    pub reasons: Vec<Reason>,
}

/// Says what would run and why. Hashes sources, runs nothing.
pub fn plan(pipeline: &Pipeline, store: &Store, options: &RunOptions) -> Result<Plan, RunnerError> {
    let (selected, forced) = selection(pipeline, options)?;
    let assessment = Assessment::make(pipeline, store, &selected, &forced, Taking::Digests)?;
    store.files().flush().map_err(crate::store::StoreError::from)?;
    let stages = selected.iter().map(|stage| planned(pipeline, &assessment, *stage)).collect();
    Ok(Plan { stages })
}

/// Explains why a stage would run.
pub fn explain(pipeline: &Pipeline, store: &Store, stage: &str) -> Result<Explanation, RunnerError> {
    let options = RunOptions { targets: vec![stage.to_owned()], ..RunOptions::default() };
    let (selected, forced) = selection(pipeline, &options)?;
    let id = stage_id(pipeline, stage)?;
    let assessment = Assessment::make(pipeline, store, &selected, &forced, Taking::Digests)?;
    let PlannedStage { name, key, state, reasons, .. } = planned(pipeline, &assessment, id);
    let previous_key = assessment.latest.get(stage).map(|latest| latest.key);
    let causes = selected.iter().filter(|other| **other != id).map(|other| &assessment.nodes[other].finding);
    let names = selected.iter().filter(|other| **other != id).map(|other| &pipeline.stage(*other).name);
    let causes = names.zip(causes).filter_map(|(name, finding)| match finding {
        Finding::Run { reasons, .. } => Some(Cause { stage: name.clone(), reasons: reasons.clone() }),
        Finding::Cached(_) | Finding::Blocked { .. } => None,
    });
    Ok(Explanation { stage: name, key, previous_key, reasons, state, causes: causes.collect() })
}

/// Runs what does not stand in the store yet.
///
/// An error means that nothing was run. What happens to single stages is in the report: a run that failed
/// or was cancelled has `ok: false`, and keeps what was finished.
pub fn run(
    pipeline: &Pipeline,
    store: &Store,
    options: &RunOptions,
    reporter: &dyn Reporter,
    cancelled: &AtomicBool,
) -> Result<RunReport, RunnerError> {
    let (selected, forced) = selection(pipeline, options)?;
    let forced = if options.verify { selected.clone() } else { forced };
    demand::check(pipeline, &selected, &options.machine)?;
    let assessment = snapshot(pipeline, store, &selected, &forced)?;
    let recorder = Recorder::begin(pipeline, store, reporter)?;
    recorder.report(&RunEvent::RunStarted { run: recorder.id.clone(), stages: selected.len() });

    let shared = Shared::new(pipeline, store, options, &recorder, cancelled);
    let tasks: Vec<(StageId, Vec<StageId>)> = selected
        .iter()
        .map(|stage| {
            (*stage, pipeline.stages[stage.0 as usize].needs.iter().map(|need| need.stage).collect())
        })
        .collect();
    let limits =
        Limits { jobs: options.jobs, keep_going: options.keep_going, machine: options.machine.clone() };
    let mut driver = Driver::new(&shared, assessment, forced);
    schedule(&tasks, limits, cancelled, &mut driver, &|job, gpus| action::run(&shared, &job, gpus));
    let mut report = driver.report(&selected);

    let ended = shared.close().and_then(|()| recorder.end(&report, report.seconds));
    if let Err(error) = ended {
        // The results stand; only the record of the run is incomplete.
        report.errors.push(ErrorReport::of_store(&error));
        report.ok = false;
    }
    recorder.report(&RunEvent::RunFinished { ok: report.ok, seconds: report.seconds });
    Ok(report)
}

/// Assesses the stages, with the content of the sources of all that will run safely in the store.
fn snapshot(
    pipeline: &Pipeline,
    store: &Store,
    selected: &BTreeSet<StageId>,
    forced: &BTreeSet<StageId>,
) -> Result<Assessment, RunnerError> {
    for _ in 0..SNAPSHOTS_MAX {
        let assessment = Assessment::make(pipeline, store, selected, forced, Taking::Contents)?;
        if assessment.adopt_sources(pipeline, store)? {
            store.files().flush().map_err(crate::store::StoreError::from)?;
            return Ok(assessment);
        }
    }
    Err(RunnerError::Restless)
}

fn planned(pipeline: &Pipeline, assessment: &Assessment, stage: StageId) -> PlannedStage {
    let name = &pipeline.stages[stage.0 as usize].name;
    let (key, state, reasons) = match &assessment.nodes[&stage].finding {
        Finding::Cached(record) => (Some(record.key), PlannedState::Cached, Vec::new()),
        Finding::Run { key, reasons, .. } => (Some(*key), PlannedState::Run, reasons.clone()),
        Finding::Blocked { reasons } => (None, PlannedState::Blocked, reasons.clone()),
    };
    let previous_seconds = assessment.latest.get(name).map(|latest| latest.seconds);
    PlannedStage { name: name.clone(), key, state, reasons, previous_seconds }
}

/// The stages to settle, and those of them to run by force.
fn selection(
    pipeline: &Pipeline,
    options: &RunOptions,
) -> Result<(BTreeSet<StageId>, BTreeSet<StageId>), RunnerError> {
    let ids = |names: &[String]| -> Result<Vec<StageId>, RunnerError> {
        let mut ids = Vec::new();
        for name in names {
            let of_group = |stage: &&Stage| stage.group.as_ref() == Some(name);
            let group: Vec<StageId> = pipeline.stages.iter().filter(of_group).map(|stage| stage.id).collect();
            if group.is_empty() {
                ids.push(stage_id(pipeline, name)?);
            }
            ids.extend(group);
        }
        Ok(ids)
    };
    let forced: BTreeSet<StageId> = ids(&options.force)?.into_iter().collect();
    let mut open = ids(&options.targets)?;
    if open.is_empty() {
        open = pipeline.stages.iter().map(|stage| stage.id).collect();
    }
    let mut selected = BTreeSet::new();
    while let Some(stage) = open.pop() {
        if selected.insert(stage) {
            open.extend(pipeline.stages[stage.0 as usize].needs.iter().map(|need| need.stage));
        }
    }
    Ok((selected, forced))
}

fn stage_id(pipeline: &Pipeline, name: &str) -> Result<StageId, RunnerError> {
    let found = pipeline.stages.iter().find(|stage| stage.name == name);
    found.map(|stage| stage.id).ok_or_else(|| RunnerError::unknown_stage(pipeline, name))
}

/// The inputs of a stage by slot, taken from `of`.
fn inputs_of<'p, 'r, T>(
    pipeline: &'p Pipeline,
    stage: StageId,
    of: &'r BTreeMap<StageId, T>,
) -> Vec<(&'p str, StageId, Option<&'r T>)> {
    let needs = pipeline.stages[stage.0 as usize].needs.iter();
    needs.map(|need| (need.slot.as_str(), need.stage, of.get(&need.stage))).collect()
}

#[cfg(test)]
mod tests;
