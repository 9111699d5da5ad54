//! One action on a worker thread: lease, inputs, the stage itself, outputs, commit.
//!
//! Everything happens in a scratch folder until the record is written. A failure, a panic or a kill before
//! that leaves nothing anybody believes; objects already stored are only content without a name.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use walkdir::WalkDir;

use crate::digest::Digest;
use crate::events::{Reporter, RunEvent};
use crate::graph::{Stage, StageId};
use crate::key::{Part, Reason};
use crate::lease::Lease;
use crate::stage::{Artifact, MessageLevel, OutputFile, RowCounts, SourceFile, StageContext, StageError};
use crate::store::{ActionRecord, Flush, StoreError, create_dir, folder_name, tree_digest, tree_encode};

use super::driver::Shared;
use super::services::StageServices;
use super::sources::{Snapshot, adopt};

/// How long to wait before the first retry, and at most before any.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);

/// An action that has to run.
pub(super) struct Job<'p> {
    pub(super) stage: &'p Stage,
    pub(super) key: Digest,
    pub(super) parts: Vec<Part>,
    pub(super) reasons: Vec<Reason>,
    pub(super) inputs: Vec<JobInput<'p>>,
    pub(super) sources: Arc<Vec<Snapshot>>,
    /// Run it even if somebody else has just finished it.
    pub(super) forced: bool,
    pub(super) previous_seconds: Option<f64>,
}

/// One input of an action.
pub(super) struct JobInput<'p> {
    pub(super) slot: &'p str,
    pub(super) stage: StageId,
    /// Name of that stage in this pipeline.
    pub(super) name: &'p str,
    pub(super) record: Arc<ActionRecord>,
}

/// What became of an action.
pub(super) enum Done {
    /// It ran and is committed.
    Ran { record: Arc<ActionRecord>, seconds: f64 },
    /// It ran once more and made something else; the result that stood is kept.
    Differs { record: Arc<ActionRecord>, seconds: f64, error: StageError },
    /// Somebody else finished it meanwhile.
    Found(Arc<ActionRecord>),
    /// The results of these stages are damaged.
    Damaged(Vec<StageId>),
    /// It failed.
    Failed(Box<Failure>),
    /// It was stopped.
    Stopped,
}

/// A failed action.
pub(super) struct Failure {
    pub(super) error: StageError,
    pub(super) rows: RowCounts,
    pub(super) metrics: Map<String, Value>,
    pub(super) seconds: f64,
}

impl Failure {
    pub(super) fn new(error: StageError) -> Box<Self> {
        Box::new(Self { error, rows: RowCounts::default(), metrics: Map::new(), seconds: 0.0 })
    }
}

impl From<StoreError> for StageError {
    fn from(error: StoreError) -> Self {
        let hint = error.hint().map(str::to_owned);
        Self { hint, ..Self::new(error.code(), error.to_string()) }
    }
}

/// Runs an action, unless another process finishes it first. `gpus` are lent to it meanwhile.
pub(super) fn run(shared: &Shared<'_>, job: &Job<'_>, gpus: &[String]) -> Done {
    match run_leased(shared, job, gpus) {
        Ok(done) => done,
        Err(error) => Done::Failed(Failure::new(error.into())),
    }
}

fn run_leased(shared: &Shared<'_>, job: &Job<'_>, gpus: &[String]) -> Result<Done, StoreError> {
    let store = shared.store;
    let mut waiting = || shared.recorder.report(&RunEvent::StageWaiting { stage: job.stage.name.clone() });
    let Some(_lease) = Lease::take(&store.lock_path(job.key), &|| shared.is_cancelled(), &mut waiting)?
    else {
        return Ok(Done::Stopped);
    };
    if !job.forced
        && let Some(record) = standing(shared, job.key)?
    {
        shared.set_latest(job.stage, &record)?;
        shared.settle(job.stage, &record)?;
        return Ok(Done::Found(Arc::new(record)));
    }
    shared.recorder.report(&RunEvent::StageStarted {
        stage: job.stage.name.clone(),
        kind: job.stage.kind.name(),
        reasons: job.reasons.iter().map(ToString::to_string).collect(),
        previous_seconds: job.previous_seconds,
    });
    let Some(_lent) = lend(shared, job, gpus)? else { return Ok(Done::Stopped) };
    let retries = job.stage.execution.retries;
    for attempt in 0..retries {
        let failure = match run_in_scratch(shared, job, gpus)? {
            Done::Failed(failure) if failure.error.transient => failure,
            done => return Ok(done),
        };
        if !pause_before_retry(shared, job, attempt, &failure.error) {
            return Ok(Done::Stopped);
        }
    }
    run_in_scratch(shared, job, gpus)
}

/// Takes the GPUs lent to the stage for this process; another one that uses the store may have them.
/// `None`: the run was stopped meanwhile.
fn lend(shared: &Shared<'_>, job: &Job<'_>, gpus: &[String]) -> Result<Option<Vec<Lease>>, StoreError> {
    let mut lent = Vec::with_capacity(gpus.len());
    // In one order everywhere, so that two processes never wait for each other.
    for gpu in gpus.iter().collect::<BTreeSet<_>>() {
        let mut waiting = || warn(shared, job, format!("waits for GPU {gpu}, which another run has"));
        let lock = shared.store.root().join("locks").join(format!("gpu-{}.lock", folder_name(gpu)));
        match Lease::take(&lock, &|| shared.is_cancelled(), &mut waiting)? {
            Some(lease) => lent.push(lease),
            None => return Ok(None),
        }
    }
    Ok(Some(lent))
}

/// The result of an action, if somebody has made it meanwhile, or the remote has it.
fn standing(shared: &Shared<'_>, key: Digest) -> Result<Option<ActionRecord>, StoreError> {
    let store = shared.store;
    if let Some(record) = store.action(key)?
        && store.damaged_output(&record)?.is_none()
    {
        return Ok(Some(record));
    }
    match &shared.options.remote {
        Some(remote) => store.fetch(remote, key),
        None => Ok(None),
    }
}

/// Waits a while that doubles from try to try. `false`: the run was stopped meanwhile.
fn pause_before_retry(shared: &Shared<'_>, job: &Job<'_>, attempt: u32, error: &StageError) -> bool {
    let pause = RETRY_PAUSE.saturating_mul(1 << attempt.min(16)).min(RETRY_PAUSE_MAX);
    let text = format!(
        "{}; try {} of {} in {:.1} s",
        error.message,
        attempt + 2,
        job.stage.execution.retries + 1,
        pause.as_secs_f64()
    );
    warn(shared, job, text);
    let until = Instant::now() + pause;
    while Instant::now() < until && !shared.is_cancelled() {
        std::thread::sleep(Duration::from_millis(20));
    }
    !shared.is_cancelled()
}

fn warn(shared: &Shared<'_>, job: &Job<'_>, text: String) {
    shared.recorder.log(&job.stage.name, &format!("warning: {text}"));
    let stage = job.stage.name.clone();
    shared.recorder.report(&RunEvent::StageMessage { stage, level: MessageLevel::Warning, text });
}

fn run_in_scratch(shared: &Shared<'_>, job: &Job<'_>, gpus: &[String]) -> Result<Done, StoreError> {
    let started = Instant::now();
    let store = shared.store;
    let scratch = store.scratch()?;
    let inputs = match link_inputs(shared, job, scratch.path())? {
        Ok(inputs) => inputs,
        Err(damaged) => return Ok(Done::Damaged(damaged)),
    };
    let sources = match checked_sources(shared, job)? {
        Ok(sources) => sources,
        Err(error) => return Ok(Done::Failed(Failure::new(error))),
    };
    let out = scratch.path().join("out");
    fs_err::create_dir(&out)?;
    let execution = &job.stage.execution;
    let services = StageServices::new(
        &job.stage.name,
        shared.memo()?,
        shared.recorder,
        shared.cancelled,
        execution.timeout,
    );
    let threads = execution.cpu.map(|cpu| cpu.min(shared.options.machine.cpu) as usize);
    let context = StageContext {
        stage: &job.stage.name,
        kind: (job.stage.kind.name(), job.stage.kind.version()),
        with: &job.stage.with,
        inputs: &inputs,
        sources: &sources,
        out: &out,
        checkpoints: &store.checkpoints(job.key)?,
        manifest_dir: &shared.pipeline.dir,
        threads: threads.unwrap_or(shared.options.threads).max(1),
        gpus,
        services: &services,
    };
    let result = job.stage.kind.run(&context);
    services.flush();
    let (rows, metrics) = (services.rows(), services.metrics());
    let failed = |error| {
        let seconds = started.elapsed().as_secs_f64();
        Ok(Done::Failed(Box::new(Failure { error, rows, metrics: metrics.clone(), seconds })))
    };
    if let Err(error) = result {
        return match execution.timeout {
            _ if shared.is_cancelled() => Ok(Done::Stopped),
            Some(timeout) if services.timed_out() => failed(timed_out(timeout)),
            _ => failed(error),
        };
    }
    let outputs = match take_outputs(shared, &out) {
        Ok(outputs) => outputs,
        Err(error) => return failed(error.into()),
    };
    let record = ActionRecord {
        tree: tree_digest(&outputs),
        outputs,
        metrics: metrics.clone(),
        rows,
        seconds: started.elapsed().as_secs_f64(),
        ..ActionRecord::new(job.key, &job.stage.name, job.parts.clone())
    };
    if shared.options.verify
        && let Some(standing) = store.action(job.key)?
        && store.damaged_output(&standing)?.is_none()
    {
        store.clear_checkpoints(job.key)?;
        shared.settle(job.stage, &standing)?;
        return Ok(compared(standing, &record));
    }
    commit(shared, job, &record)?;
    // What goes wrong from here on is a failure of this run, but the action itself is kept.
    shared.settle(job.stage, &record)?;
    Ok(Done::Ran { seconds: started.elapsed().as_secs_f64(), record: Arc::new(record) })
}

/// What a second run of an action came to.
fn compared(standing: ActionRecord, again: &ActionRecord) -> Done {
    let seconds = again.seconds;
    if standing.tree == again.tree {
        return Done::Ran { record: Arc::new(standing), seconds };
    }
    let digests = |record: &ActionRecord| -> BTreeMap<String, Digest> {
        record.outputs.iter().map(|file| (file.path.clone(), file.digest)).collect()
    };
    let (old, new) = (digests(&standing), digests(again));
    let paths: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let short = |digest: Option<&Digest>| digest.map_or_else(|| "nothing".to_owned(), Digest::short);
    let files: Vec<String> = paths
        .into_iter()
        .filter(|path| old.get(*path) != new.get(*path))
        .map(|path| format!("`{path}` ({} → {})", short(old.get(path)), short(new.get(path))))
        .collect();
    let text =
        format!("stage `{}` made other bytes from the same inputs: {}", standing.stage, files.join(", "));
    let error = StageError::new("run::nondeterministic", text).hint(
        "look for times, random numbers without a seed, or the order of a folder's files; the earlier result is kept",
    );
    Done::Differs { record: Arc::new(standing), seconds, error }
}

fn timed_out(timeout: Duration) -> StageError {
    let text = format!("the stage was not done after {} s, its `timeout`", timeout.as_secs_f64());
    StageError::new("run::timeout", text)
        .hint("give it more time, or less to do; rows it remembered are kept")
}

fn commit(shared: &Shared<'_>, job: &Job<'_>, record: &ActionRecord) -> Result<(), StoreError> {
    let store = shared.store;
    // The trees are there for explanations and for looking through the store.
    store.put_bytes(&tree_encode(&record.outputs), Flush::Lazy)?;
    for source in job.sources.iter() {
        store.put_bytes(&tree_encode(&source.listing()), Flush::Lazy)?;
    }
    store.commit(record)?;
    shared.set_latest(job.stage, record)?;
    store.clear_checkpoints(job.key)
}

type Inputs = Vec<(String, Artifact)>;

/// Makes a folder of each input. The inner error lists the stages whose results are damaged.
fn link_inputs(
    shared: &Shared<'_>,
    job: &Job<'_>,
    scratch: &Path,
) -> Result<Result<Inputs, Vec<StageId>>, StoreError> {
    let parent = scratch.join("inputs");
    if !job.inputs.is_empty() {
        create_dir(&parent)?;
    }
    let (mut inputs, mut damaged) = (Vec::new(), Vec::new());
    for JobInput { slot, stage, name, record } in &job.inputs {
        let folder = parent.join(folder_name(slot));
        match shared.store.link_into(&folder, &record.outputs) {
            Ok(()) => {}
            Err(error @ StoreError::Damaged { .. }) => {
                warn(
                    shared,
                    job,
                    format!("{error}; it is an output of stage `{name}`, which makes it again"),
                );
                damaged.push(*stage);
                continue;
            }
            Err(error) => return Err(error),
        }
        let artifact = Artifact {
            stage: (*name).to_owned(),
            digest: record.tree,
            files: record.outputs.clone(),
            metrics: record.metrics.clone(),
            folder,
        };
        inputs.push(((*slot).to_owned(), artifact));
    }
    Ok(if damaged.is_empty() { Ok(inputs) } else { Err(damaged) })
}

type Sources = Vec<(String, Vec<SourceFile>)>;

/// Re-hashes the objects of the sources; a damaged one is taken from its file again if that is unchanged.
fn checked_sources(shared: &Shared<'_>, job: &Job<'_>) -> Result<Result<Sources, StageError>, StoreError> {
    let store = shared.store;
    for file in job.sources.iter().flat_map(|source| &source.files) {
        match store.checked(file.digest, file.bytes) {
            Ok(_) => {}
            Err(StoreError::Damaged { .. }) if adopt(shared.pipeline, store, file)? => {}
            Err(StoreError::Damaged { damage, .. }) => {
                let text =
                    format!("the copy of `{}` in the store {damage}, and the file has changed", file.path);
                return Ok(Err(
                    StageError::new("source::damaged", text).hint("run again to use the file as it is")
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Ok(job.sources.iter().map(|source| (source.name.clone(), source.files.clone())).collect()))
}

/// Moves everything below `out` into the store, and lists it sorted by path.
fn take_outputs(shared: &Shared<'_>, out: &Path) -> Result<Vec<OutputFile>, StoreError> {
    let mut outputs = Vec::new();
    for entry in WalkDir::new(out) {
        let entry = entry.map_err(io::Error::from)?;
        if entry.file_type().is_dir() {
            continue;
        }
        let unfit = |problem| StoreError::Unfit { path: entry.path().to_owned(), problem };
        let relative = entry.path().strip_prefix(out).expect("a walk stays below its root");
        let path = relative.to_str().ok_or_else(|| unfit("is an output whose name is not valid UTF-8"))?;
        let placed = if entry.file_type().is_file() {
            shared.store.take_file(entry.path())?
        } else if entry.path().is_file() {
            shared.store.put_file(entry.path())?
        } else {
            return Err(unfit("is an output that is neither a file nor a folder"));
        };
        outputs.push(OutputFile { path: path.to_owned(), digest: placed.digest, bytes: placed.bytes });
    }
    outputs.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(outputs)
}
