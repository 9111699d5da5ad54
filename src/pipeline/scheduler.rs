//! Runs ready stages on worker threads. Knows nothing of keys, files or terminals: it sees [`StageId`]s,
//! asks a [`Work`] what each needs, and hands jobs to a callback.
//!
//! ```text
//!            needs settled          resolve: start           a free slot
//! Waiting ───────────────► resolve ───────────────► Ready ───────────────► Running ──► Settled | Failed
//!    ▲                        │ settled                                      │
//!    └────────────────────────┴─────── an input must be made again ◄─────────┘
//! ```
//!
//! At most `jobs` stages run at once, and together they demand no more cores, memory and GPUs than there
//! are; GPUs are lent by id. All decisions are made on the calling thread, in the order of the stages' ids.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;

use crate::graph::StageId;

/// Stack of a worker thread; parsers recurse.
const STACK_BYTES: usize = 16 << 20;

/// How often one stage may be made again in one run because an object of it was found damaged.
const REMAKES_MAX: u32 = 3;

/// Where a stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A stage it needs is not settled yet.
    Waiting,
    /// It has to run and waits for a free slot.
    Ready,
    /// A worker runs it.
    Running,
    /// Its result stands in the store.
    Settled,
    /// It could not be settled.
    Failed,
    /// It is not run, because a stage it needs failed or the run was stopped.
    Skipped,
}

/// How much may run at once.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Stages at once; at least one.
    pub jobs: usize,
    /// Whether stages that do not need a failed one still run.
    pub keep_going: bool,
    /// What the running stages may take together.
    pub machine: Machine,
}

/// What there is to be shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Cores.
    pub cpu: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Ids of GPUs, as `CUDA_VISIBLE_DEVICES` takes them.
    pub gpus: Vec<String>,
}

/// What one stage takes while it runs; never more than there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Cores.
    pub cpu: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// How many GPUs.
    pub gpu: usize,
}

impl Machine {
    fn has(&self, demand: Demand) -> bool {
        demand.cpu <= self.cpu && demand.memory_bytes <= self.memory_bytes && demand.gpu <= self.gpus.len()
    }

    /// Takes a demand out; gives the GPUs lent, the first of those that are free.
    fn take(&mut self, demand: Demand) -> Vec<String> {
        self.cpu -= demand.cpu;
        self.memory_bytes -= demand.memory_bytes;
        self.gpus.drain(..demand.gpu).collect()
    }

    fn give_back(&mut self, demand: Demand, gpus: Vec<String>, order: &[String]) {
        self.cpu += demand.cpu;
        self.memory_bytes += demand.memory_bytes;
        self.gpus.extend(gpus);
        self.gpus.sort_by_key(|gpu| order.iter().position(|other| other == gpu));
    }
}

/// What has to happen for a stage whose needs are settled.
pub enum Verdict<Job> {
    /// Nothing: its result stands.
    Settled,
    /// This job has to run.
    Start(Job, Demand),
    /// It cannot run; the work has reported why.
    Failed,
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// Its result stands. `changed`: it is another than the one that stood earlier in this run.
    Settled {
        /// Whether stages that were settled on the earlier result must be looked at again.
        changed: bool,
    },
    /// It failed; the work has reported why.
    Failed,
    /// These needs turned out to be damaged and must be made again first.
    Remake(Vec<StageId>),
    /// It was stopped by the user.
    Stopped,
}

/// What the scheduler drives.
pub trait Work {
    /// What a worker needs to run one stage.
    type Job: Send;
    /// What a worker brings back.
    type Done: Send;
    /// Says what has to happen for a stage whose needs are settled.
    fn resolve(&mut self, stage: StageId) -> Verdict<Self::Job>;
    /// Takes what a worker brings back; `Err` is the message of a panic.
    fn settle(&mut self, stage: StageId, done: Result<Self::Done, String>) -> Settlement;
    /// Told of each stage that is skipped because `failed` failed, or because the run was stopped.
    fn skipped(&mut self, stage: StageId, failed: Option<StageId>);
    /// Told of a stage that was to be made again too often.
    fn remade_too_often(&mut self, stage: StageId);
}

/// Runs a job with the GPUs lent to it.
pub type Run<'r, W> = dyn Fn(<W as Work>::Job, &[String]) -> <W as Work>::Done + Sync + 'r;

/// Settles `tasks`, each a stage with the stages it needs (all of them among the tasks, and listed before
/// it). `run` is called on worker threads with the job and the GPUs lent to it. Returns where each stage ended: settled, failed or skipped.
pub fn schedule<W: Work>(
    tasks: &[(StageId, Vec<StageId>)],
    limits: Limits,
    cancelled: &AtomicBool,
    work: &mut W,
    run: &Run<'_, W>,
) -> BTreeMap<StageId, State> {
    std::thread::scope(|scope| {
        let mut board = Board::new(tasks, limits, cancelled);
        let (sender, receiver) = channel();
        loop {
            board.resolve_all(work);
            while let Some((stage, job, gpus)) = board.next_job() {
                let sender = sender.clone();
                let worker = move || bring_back(stage, || run(job, &gpus), &sender);
                if let Err(error) = Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, worker) {
                    let message = format!("no thread to run it on: {error}");
                    board.settle(stage, Err(message), work);
                }
            }
            if board.running == 0 {
                // A thread that could not start may have settled the last one.
                if board.is_idle() {
                    break;
                }
                continue;
            }
            let (stage, done) = receiver.recv().expect("this thread holds a sender");
            board.settle(stage, done, work);
        }
        board.finish(work)
    })
}

fn bring_back<D>(stage: StageId, run: impl FnOnce() -> D, sender: &Sender<(StageId, Result<D, String>)>) {
    // What a panicking stage leaves behind is its scratch folder, which nobody reads.
    let done = catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
    });
    // The receiver lives until all workers are done.
    let _sent = sender.send((stage, done));
}

/// All stages and where they stand.
struct Board<'a, Job> {
    tasks: BTreeMap<StageId, Task>,
    limits: Limits,
    cancelled: &'a AtomicBool,
    /// Waiting stages whose needs are settled.
    to_resolve: BTreeSet<StageId>,
    /// Jobs of the ready stages.
    ready: BTreeMap<StageId, (Job, Demand)>,
    running: usize,
    /// What is not lent.
    free: Machine,
    /// What running stages have.
    lent: BTreeMap<StageId, (Demand, Vec<String>)>,
    failed: bool,
}

struct Task {
    state: State,
    needs: Vec<StageId>,
    needed_by: Vec<StageId>,
    remakes: u32,
}

impl<'a, Job> Board<'a, Job> {
    fn new(tasks: &[(StageId, Vec<StageId>)], limits: Limits, cancelled: &'a AtomicBool) -> Self {
        let mut by_id: BTreeMap<StageId, Task> = BTreeMap::new();
        for (stage, needs) in tasks {
            for need in needs {
                by_id.get_mut(need).expect("BUG: a stage is listed after its needs").needed_by.push(*stage);
            }
            let task =
                Task { state: State::Waiting, needs: needs.clone(), needed_by: Vec::new(), remakes: 0 };
            by_id.insert(*stage, task);
        }
        let to_resolve =
            tasks.iter().filter(|(_, needs)| needs.is_empty()).map(|(stage, _)| *stage).collect();
        Self {
            tasks: by_id,
            free: limits.machine.clone(),
            lent: BTreeMap::new(),
            limits,
            cancelled,
            to_resolve,
            ready: BTreeMap::new(),
            running: 0,
            failed: false,
        }
    }

    fn task(&mut self, stage: StageId) -> &mut Task {
        self.tasks.get_mut(&stage).expect("BUG: an unknown stage")
    }

    /// The one place where a stage changes its state.
    fn set(&mut self, stage: StageId, state: State) {
        use State::{Failed, Ready, Running, Settled, Skipped, Waiting};
        let old = std::mem::replace(&mut self.task(stage).state, state);
        let legal = matches!(
            (old, state),
            (Waiting, Ready | Settled | Failed | Skipped)
                | (Ready, Running | Waiting | Skipped)
                | (Running, Settled | Failed | Skipped | Waiting)
                | (Settled, Waiting)
        );
        assert!(legal, "BUG: stage {stage:?} went from {old:?} to {state:?}");
        match state {
            Settled => {
                for dependent in self.task(stage).needed_by.clone() {
                    self.resolve_if_possible(dependent);
                }
            }
            Failed => self.failed = true,
            Waiting => {
                self.ready.remove(&stage);
                self.resolve_if_possible(stage);
                for dependent in self.task(stage).needed_by.clone() {
                    self.resolve_if_possible(dependent);
                }
            }
            Ready | Running | Skipped => {}
        }
    }

    fn resolve_if_possible(&mut self, stage: StageId) {
        let task = &self.tasks[&stage];
        let settled = task.needs.iter().all(|need| self.tasks[need].state == State::Settled);
        if task.state == State::Waiting && settled {
            self.to_resolve.insert(stage);
        } else {
            self.to_resolve.remove(&stage);
        }
    }

    fn stopping(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || (self.failed && !self.limits.keep_going)
    }

    fn resolve_all(&mut self, work: &mut impl Work<Job = Job>) {
        while !self.stopping()
            && let Some(stage) = self.to_resolve.pop_first()
        {
            match work.resolve(stage) {
                Verdict::Settled => self.set(stage, State::Settled),
                Verdict::Failed => self.set(stage, State::Failed),
                Verdict::Start(job, demand) => {
                    self.set(stage, State::Ready);
                    self.ready.insert(stage, (job, demand));
                }
            }
        }
    }

    /// The next job that may start now, and the GPUs it is lent.
    fn next_job(&mut self) -> Option<(StageId, Job, Vec<String>)> {
        if self.stopping() || self.running >= self.limits.jobs.max(1) {
            return None;
        }
        let stage = *self.ready.iter().find(|(_, (_, demand))| self.free.has(*demand))?.0;
        let (job, demand) = self.ready.remove(&stage)?;
        self.set(stage, State::Running);
        self.running += 1;
        let gpus = self.free.take(demand);
        self.lent.insert(stage, (demand, gpus.clone()));
        Some((stage, job, gpus))
    }

    fn is_idle(&self) -> bool {
        self.stopping() || (self.ready.is_empty() && self.to_resolve.is_empty())
    }

    fn settle<W: Work<Job = Job>>(&mut self, stage: StageId, done: Result<W::Done, String>, work: &mut W) {
        self.running -= 1;
        let (demand, gpus) = self.lent.remove(&stage).expect("BUG: a job ends that was not started");
        self.free.give_back(demand, gpus, &self.limits.machine.gpus);
        match work.settle(stage, done) {
            Settlement::Settled { changed } => {
                self.set(stage, State::Settled);
                if changed {
                    self.reset_dependents(stage);
                }
            }
            Settlement::Failed => self.set(stage, State::Failed),
            Settlement::Stopped => {
                self.set(stage, State::Skipped);
                work.skipped(stage, None);
            }
            Settlement::Remake(needs) => self.remake(stage, &needs, work),
        }
    }

    /// Sends `needs` back to be made again, and `stage` back to wait for them.
    fn remake(&mut self, stage: StageId, needs: &[StageId], work: &mut impl Work<Job = Job>) {
        if self.task(stage).remakes >= REMAKES_MAX {
            work.remade_too_often(stage);
            return self.set(stage, State::Failed);
        }
        self.task(stage).remakes += 1;
        for need in needs {
            if self.task(*need).state == State::Settled {
                self.set(*need, State::Waiting);
            }
        }
        self.set(stage, State::Waiting);
    }

    /// Stages that were settled, or got ready, on an earlier result are looked at again.
    fn reset_dependents(&mut self, stage: StageId) {
        for dependent in self.task(stage).needed_by.clone() {
            if matches!(self.task(dependent).state, State::Settled | State::Ready) {
                self.set(dependent, State::Waiting);
                self.reset_dependents(dependent);
            }
        }
    }

    /// Marks all that did not come to run, and tells where each stage ended.
    fn finish(mut self, work: &mut impl Work<Job = Job>) -> BTreeMap<StageId, State> {
        let stages: Vec<StageId> = self.tasks.keys().copied().collect();
        let mut blocked_by: BTreeMap<StageId, StageId> = BTreeMap::new();
        for stage in stages {
            let task = &self.tasks[&stage];
            let because = task.needs.iter().find_map(|need| {
                if self.tasks[need].state == State::Failed {
                    Some(*need)
                } else {
                    blocked_by.get(need).copied()
                }
            });
            if matches!(task.state, State::Waiting | State::Ready) {
                if let Some(failed) = because {
                    blocked_by.insert(stage, failed);
                }
                self.set(stage, State::Skipped);
                work.skipped(stage, because);
            }
        }
        self.tasks.into_iter().map(|(stage, task)| (stage, task.state)).collect()
    }
}

#[cfg(test)]
#[path = "scheduler/tests.rs"]
mod tests;
