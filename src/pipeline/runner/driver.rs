//! The runner's side of the scheduler: says what each stage needs, and writes down what became of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serde_json::Map;

use crate::digest::Digest;
use crate::events::{Reporter, RunEvent};
use crate::graph::{Need, Pipeline, Stage, StageId};
use crate::key::{Part, Reason};
use crate::memo::Memo;
use crate::runs::Recorder;
use crate::scheduler::{Settlement, Verdict, Work};
use crate::stage::{RowCounts, StageError};
use crate::store::{ActionRecord, Latest, Store, StoreError, folder_name};

use super::action::{Done, Failure, Job, JobInput};
use super::assess::{Assessment, Finding, Judge};
use super::demand::demand;
use super::report::{ErrorReport, RunReport, StageReport, StageState, whole_message};
use super::{RunOptions, inputs_of};

/// What coordinator and workers of one run share.
pub(super) struct Shared<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) store: &'a Store,
    pub(super) options: &'a RunOptions,
    pub(super) recorder: &'a Recorder<'a>,
    pub(super) cancelled: &'a AtomicBool,
    memo: OnceLock<Memo>,
}

impl<'a> Shared<'a> {
    pub(super) fn new(
        pipeline: &'a Pipeline,
        store: &'a Store,
        options: &'a RunOptions,
        recorder: &'a Recorder<'a>,
        cancelled: &'a AtomicBool,
    ) -> Self {
        Self { pipeline, store, options, recorder, cancelled, memo: OnceLock::new() }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The row memo, opened when the first stage runs.
    pub(super) fn memo(&self) -> Result<&Memo, StoreError> {
        if self.memo.get().is_none() {
            let memo = Memo::new(self.store.index().clone())?;
            // Another worker may have been quicker; then this one's memo is closed again.
            let _first = self.memo.set(memo);
        }
        Ok(self.memo.get().expect("set just above"))
    }

    /// Puts the results of a stage where the user finds them.
    pub(super) fn settle(&self, stage: &Stage, record: &ActionRecord) -> Result<(), StoreError> {
        self.store.publish(&self.folder(stage)?, record)
    }

    /// Notes the result of a stage as its newest.
    pub(super) fn set_latest(&self, stage: &Stage, record: &ActionRecord) -> Result<(), StoreError> {
        let latest = Latest { key: record.key, seconds: record.seconds };
        self.store.set_latest(&self.pipeline.name, &stage.name, latest)
    }

    /// Where the results of a stage stand.
    fn folder(&self, stage: &Stage) -> Result<PathBuf, StoreError> {
        let parent = match &self.options.out {
            Some(out) => std::path::absolute(out)?,
            None => self.store.out_folder(&self.pipeline.name),
        };
        Ok(parent.join(folder_name(&stage.name)))
    }

    /// Writes what is still in memory.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        if let Some(memo) = self.memo.get() {
            memo.flush()?;
        }
        Ok(self.store.files().flush()?)
    }
}

/// The state of one run, on the coordinating thread.
pub(super) struct Driver<'a> {
    shared: &'a Shared<'a>,
    /// What is known before anything ran; each finding is used once.
    assessment: Assessment,
    /// Stages still to be run by force.
    forced: BTreeSet<StageId>,
    /// The results that stand.
    records: BTreeMap<StageId, Arc<ActionRecord>>,
    /// Key and reasons of jobs handed out.
    started: BTreeMap<StageId, (Digest, Vec<Reason>)>,
    reports: BTreeMap<StageId, StageReport>,
    errors: Vec<ErrorReport>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, assessment: Assessment, forced: BTreeSet<StageId>) -> Self {
        Self {
            shared,
            assessment,
            forced,
            records: BTreeMap::new(),
            started: BTreeMap::new(),
            reports: BTreeMap::new(),
            errors: Vec::new(),
        }
    }

    /// The report of the run.
    pub(super) fn report(mut self, selected: &BTreeSet<StageId>) -> RunReport {
        let stages: Vec<StageReport> = selected.iter().filter_map(|id| self.reports.remove(id)).collect();
        let settled = |stage: &StageReport| matches!(stage.state, StageState::Cached | StageState::Ran);
        let all_settled = stages.len() == selected.len() && stages.iter().all(settled);
        if !all_settled && self.shared.is_cancelled() {
            self.errors.push(ErrorReport::cancelled());
        }
        RunReport {
            run: self.shared.recorder.id.clone(),
            ok: all_settled && self.errors.is_empty(),
            seconds: self.shared.recorder.elapsed().as_secs_f64(),
            stages,
            errors: self.errors,
        }
    }

    fn stage(&self, id: StageId) -> &'a Stage {
        &self.shared.pipeline.stages[id.0 as usize]
    }

    /// What is found out about a stage: from the assessment once, and only while all that the stage needs
    /// is as it was then; else anew.
    fn finding(&mut self, id: StageId) -> Result<Finding, StoreError> {
        let stage = self.stage(id);
        let is_cached = |need: &Need| {
            self.reports.get(&need.stage).is_some_and(|report| report.state == StageState::Cached)
        };
        let holds = stage.needs.iter().all(is_cached);
        let node = self.assessment.nodes.get_mut(&id).expect("BUG: a stage that was not assessed");
        let nothing = Finding::Blocked { reasons: Vec::new() };
        match std::mem::replace(&mut node.finding, nothing) {
            known @ (Finding::Cached(_) | Finding::Run { .. }) if holds => Ok(known),
            _ => {
                let judge = Judge {
                    pipeline: self.shared.pipeline,
                    store: self.shared.store,
                    latest: &self.assessment.latest,
                };
                judge.judge(stage, &node.sources, &self.records, self.forced.contains(&id))
            }
        }
    }

    /// Takes a result that stands; `Err` if it turns out not to.
    fn take_cached(&mut self, id: StageId, record: &Arc<ActionRecord>) -> Result<(), StoreError> {
        let (stage, shared) = (self.stage(id), self.shared);
        shared.settle(stage, record)?;
        let known = self.assessment.latest.get(&stage.name);
        if known.is_none_or(|latest| latest.key != record.key) {
            shared.set_latest(stage, record)?;
        }
        shared.recorder.report(&RunEvent::StageCached { stage: stage.name.clone() });
        self.settled(id, record, StageState::Cached, 0.0);
        Ok(())
    }

    fn job(&mut self, id: StageId, key: Digest, parts: Vec<Part>, reasons: Vec<Reason>) -> Job<'a> {
        let stage = self.stage(id);
        let pipeline = self.shared.pipeline;
        let inputs = inputs_of(pipeline, id, &self.records)
            .into_iter()
            .map(|(slot, stage, record)| JobInput {
                slot,
                stage,
                name: &pipeline.stages[stage.0 as usize].name,
                record: record.expect("BUG: a stage is resolved after its needs").clone(),
            })
            .collect();
        self.started.insert(id, (key, reasons.clone()));
        Job {
            stage,
            key,
            parts,
            reasons,
            inputs,
            sources: self.assessment.nodes[&id].sources.clone(),
            forced: self.forced.contains(&id),
            previous_seconds: self.assessment.latest.get(&stage.name).map(|latest| latest.seconds),
        }
    }

    /// Writes down that a result stands. True if another one stood before.
    fn settled(&mut self, id: StageId, record: &Arc<ActionRecord>, state: StageState, seconds: f64) -> bool {
        let rows = match state {
            StageState::Ran => record.rows,
            _ => RowCounts { new: 0, remembered: record.rows.total - record.rows.failed, ..record.rows },
        };
        let report = StageReport {
            key: Some(record.key),
            seconds,
            rows,
            metrics: record.metrics.clone(),
            outputs: record.outputs.clone(),
            folder: self.shared.folder(self.stage(id)).ok(),
            ..self.blank(id, state)
        };
        self.reports.insert(id, report);
        self.records.insert(id, record.clone()).is_some_and(|old| old.tree != record.tree)
    }

    fn failed(&mut self, id: StageId, failure: Failure) {
        let Failure { error, rows, metrics, seconds } = failure;
        let stage = self.stage(id);
        let message = whole_message(&error);
        self.shared.recorder.log(&stage.name, &format!("error: {message}"));
        self.shared.recorder.report(&RunEvent::StageFailed {
            stage: stage.name.clone(),
            message,
            hint: error.hint.clone(),
        });
        self.errors.push(ErrorReport::of_stage(stage, &error));
        let report = StageReport { seconds, rows, metrics, ..self.blank(id, StageState::Failed) };
        self.reports.insert(id, report);
    }

    fn blank(&self, id: StageId, state: StageState) -> StageReport {
        let started = self.started.get(&id).filter(|_| state != StageState::Cached);
        StageReport {
            name: self.stage(id).name.clone(),
            key: started.map(|(key, _)| *key),
            state,
            seconds: 0.0,
            rows: RowCounts::default(),
            metrics: Map::new(),
            outputs: Vec::new(),
            reasons: started.map(|(_, reasons)| reasons.clone()).unwrap_or_default(),
            folder: None,
        }
    }
}

impl<'a> Work for Driver<'a> {
    type Job = Job<'a>;
    type Done = Done;

    fn resolve(&mut self, id: StageId) -> Verdict<Job<'a>> {
        // A result that turns out to be damaged when it is put into place is looked at once more; by then
        // the damaged object is set aside, so that it has to be made again.
        for _ in 0..2 {
            let result = match self.finding(id) {
                Ok(Finding::Cached(record)) => self.take_cached(id, &record),
                Ok(Finding::Run { key, parts, reasons }) => {
                    let job = self.job(id, key, parts, reasons);
                    return Verdict::Start(job, demand(self.stage(id), &self.shared.options.machine));
                }
                Ok(Finding::Blocked { .. }) => unreachable!("BUG: a stage is resolved after its needs"),
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => return Verdict::Settled,
                Err(StoreError::Damaged { .. }) => {}
                Err(error) => {
                    self.failed(id, *Failure::new(error.into()));
                    return Verdict::Failed;
                }
            }
        }
        self.remade_too_often(id);
        Verdict::Failed
    }

    fn settle(&mut self, id: StageId, done: Result<Done, String>) -> Settlement {
        let stage = self.stage(id);
        let done = done.unwrap_or_else(|panic| {
            let text = format!("BUG: stage `{}` panicked: {panic}", stage.name);
            let error = StageError::new("run::panic", text);
            Done::Failed(Failure::new(error.hint("this is an error in tunesmith itself; please report it")))
        });
        match done {
            Done::Ran { record, seconds } => {
                self.forced.remove(&id);
                self.shared.recorder.report(&RunEvent::StageFinished {
                    stage: stage.name.clone(),
                    seconds,
                    rows: (record.rows.total > 0).then_some(record.rows),
                    metrics: record.metrics.clone(),
                });
                Settlement::Settled { changed: self.settled(id, &record, StageState::Ran, seconds) }
            }
            Done::Differs { record, seconds, error } => {
                self.forced.remove(&id);
                let message = whole_message(&error);
                self.shared.recorder.log(&stage.name, &format!("error: {message}"));
                let hint = error.hint.clone();
                self.shared.recorder.report(&RunEvent::StageFailed {
                    stage: stage.name.clone(),
                    message,
                    hint,
                });
                self.errors.push(ErrorReport::of_stage(stage, &error));
                Settlement::Settled { changed: self.settled(id, &record, StageState::Ran, seconds) }
            }
            Done::Found(record) => {
                self.shared.recorder.report(&RunEvent::StageCached { stage: stage.name.clone() });
                Settlement::Settled { changed: self.settled(id, &record, StageState::Cached, 0.0) }
            }
            Done::Damaged(needs) => Settlement::Remake(needs),
            Done::Failed(failure) => {
                self.failed(id, *failure);
                Settlement::Failed
            }
            Done::Stopped => Settlement::Stopped,
        }
    }

    fn skipped(&mut self, id: StageId, failed: Option<StageId>) {
        let because = failed.map_or_else(
            || "the run was stopped".to_owned(),
            |failed| format!("stage `{}` failed", self.stage(failed).name),
        );
        let stage = self.stage(id).name.clone();
        self.shared.recorder.report(&RunEvent::StageSkipped { stage, because });
        let report = self.blank(id, StageState::Skipped);
        self.reports.insert(id, report);
    }

    fn remade_too_often(&mut self, id: StageId) {
        let text = format!("objects that stage `{}` reads are damaged again and again", self.stage(id).name);
        let hint = "check the disk of the store, and run `tunesmith cache verify`";
        self.failed(id, *Failure::new(StageError::new("store::damaged", text).hint(hint)));
    }
}
