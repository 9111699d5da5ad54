//! `run`: runs what is not in the store yet, shows it as it happens, and sums up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tunesmith_pipeline::graph::Pipeline;
use tunesmith_pipeline::lock::{Lock, lock_path};
use tunesmith_pipeline::manifest::memory_bytes;
use tunesmith_pipeline::runner::{self, ErrorReport, RunOptions, RunReport, StageState};
use tunesmith_pipeline::scheduler::Machine;
use tunesmith_pipeline::store::{Remote, Store};

use super::device::{DeviceArgs, Talk};
use super::exit_code::Failure;
use super::print::{self, Paint};
use super::progress::{Progress, rows_text};
use super::{ManifestArgs, problems, watch};

/// Options of `run`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// Only these stages and what they need
    stages: Vec<String>,
    /// Run this stage even if its result is known; may be repeated
    #[arg(long, value_name = "STAGE")]
    force: Vec<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// After a failure, go on with what does not need it
    #[arg(long)]
    keep_going: bool,
    /// Fail where a result would not be the one in `<manifest>.lock`
    #[arg(long)]
    locked: bool,
    /// Run everything once more and compare: name stages that make other bytes from the same inputs
    #[arg(long, conflicts_with = "force")]
    verify: bool,
    /// Run again whenever something a stage reads is another, until Ctrl-C
    #[arg(long, conflicts_with_all = ["force", "verify", "locked"])]
    watch: bool,
    /// Put the results here instead of `<cache>/out/<name>`
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Say only what goes wrong
    #[arg(long, short)]
    quiet: bool,
    /// Print the report of the run as JSON
    #[arg(long)]
    json: bool,
}

/// How much of the machine a run may take. Changes no result.
#[derive(Args)]
pub(super) struct MachineArgs {
    /// Stages that may run side by side [default: one per core]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Threads of a stage that uses the whole machine [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Cores that stages with `resources` share [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Memory that stages with `resources` share, such as `16GiB` [default: all]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// GPUs to lend to stages, by id: `0,1` [default: $CUDA_VISIBLE_DEVICES, else all of NVIDIA's]
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    gpus: Option<Vec<String>>,
    /// Look here for results that the store lacks, before running anything: a folder that `cache push` filled
    /// [default: $TUNESMITH_REMOTE]
    #[arg(long, value_name = "FOLDER")]
    remote: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
}

fn memory(text: &str) -> Result<u64, String> {
    memory_bytes(text).ok_or_else(|| "write a size such as `16GiB`".to_owned())
}

fn remote_of_environment() -> Option<String> {
    std::env::var("TUNESMITH_REMOTE").ok().filter(|folder| !folder.is_empty())
}

/// Ids of the GPUs there are.
fn all_gpus() -> Vec<String> {
    if let Some(visible) = std::env::var_os("CUDA_VISIBLE_DEVICES") {
        let visible = visible.to_string_lossy();
        return visible.split(',').map(str::trim).filter(|id| !id.is_empty()).map(str::to_owned).collect();
    }
    (0_u32..64)
        .take_while(|id| Path::new(&format!("/dev/nvidia{id}")).exists())
        .map(|id| id.to_string())
        .collect()
}

/// Bytes of memory of this machine; as much as anybody may want where that is not known.
fn all_memory() -> u64 {
    let kib = fs_err::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

impl MachineArgs {
    /// Lets the stages of `pipeline` compute where they should.
    pub(super) fn choose_device(
        &self,
        pipeline: &Pipeline,
        quiet: bool,
        as_json: bool,
    ) -> Result<(), Failure> {
        self.device.choose(pipeline, if quiet { Talk::Off } else { Talk::On }, as_json)
    }

    /// `options` with what was asked for.
    pub(super) fn apply(&self, options: RunOptions) -> RunOptions {
        RunOptions {
            jobs: self.jobs.map_or(options.jobs, usize::from),
            threads: self.threads.map_or(options.threads, usize::from),
            remote: self.remote.clone().or_else(remote_of_environment).as_deref().map(Remote::new),
            machine: Machine {
                cpu: self.cpus.unwrap_or(options.machine.cpu),
                memory_bytes: self.memory.unwrap_or_else(all_memory),
                gpus: self.gpus.clone().unwrap_or_else(all_gpus),
            },
            ..options
        }
    }
}

/// Runs the pipeline.
pub(super) fn main(options: &Options, store: &Store) -> Result<(), Failure> {
    let run = options.machine.apply(RunOptions {
        targets: options.stages.clone(),
        force: options.force.clone(),
        keep_going: options.keep_going,
        verify: options.verify,
        out: options.out.clone(),
        ..RunOptions::default()
    });
    let pipeline = options.manifest.load(options.json)?;
    options.machine.choose_device(&pipeline, options.quiet, options.json)?;
    let cancel = stop_signals();
    if options.watch {
        watch::watch(&options.manifest, store, &run, &cancel, || {
            once(options, &options.manifest.load(options.json)?, store, &run, &cancel)
        });
        return Ok(());
    }
    let report = once(options, &pipeline, store, &run, &cancel)?;
    if report.ok { Ok(()) } else { Err(Failure::Run) }
}

/// Runs the pipeline one time and shows what came of it.
fn once(
    options: &Options,
    pipeline: &Pipeline,
    store: &Store,
    run: &RunOptions,
    cancel: &AtomicBool,
) -> Result<RunReport, Failure> {
    let lock = options.locked.then(|| hold(pipeline, store, run, options.json)).transpose()?;
    let progress = Progress::new(options.quiet);
    let mut report = runner::run(pipeline, store, run, &progress, cancel)
        .map_err(|error| problems::show_runner(&error, options.json))?;
    if let Some(lock) = lock {
        report.errors.extend(lock.differences(&report));
        report.ok &= report.errors.is_empty();
    } else if options.stages.is_empty() && options.manifest.params.is_empty() {
        write_lock(pipeline, &report);
    }
    if options.json {
        print::json(&report);
    }
    report.errors.iter().for_each(problems::show_error_report);
    if !options.quiet && !options.json {
        sum_up(&report, options.verify);
    }
    Ok(report)
}

/// The lock that the run is held to. What would differ is shown here, before anything runs.
fn hold(pipeline: &Pipeline, store: &Store, run: &RunOptions, json: bool) -> Result<Lock, Failure> {
    let lock = Lock::read(&lock_path(&pipeline.path)).map_err(|error| {
        if json {
            let error = ErrorReport::plain("lock::unusable", error.to_string(), error.hint());
            print::json(&serde_json::json!({ "ok": false, "stages": [], "errors": [error] }));
        }
        problems::show_error(&error, error.hint());
        Failure::Usage
    })?;
    let plan = runner::plan(pipeline, store, run).map_err(|error| problems::show_runner(&error, json))?;
    let refused = lock.refusals(&plan);
    if refused.is_empty() {
        return Ok(lock);
    }
    if json {
        print::json(&serde_json::json!({ "ok": false, "stages": [], "errors": refused }));
    }
    refused.iter().for_each(problems::show_error_report);
    Err(Failure::Run)
}

/// Writes what the run made beside its manifest; where that cannot be, the run is no worse for it.
fn write_lock(pipeline: &Pipeline, report: &RunReport) {
    let Some(lock) = Lock::of(&pipeline.name, report) else { return };
    if let Err(error) = lock.write(&lock_path(&pipeline.path)) {
        tracing::warn!("the lock could not be written: {error}");
    }
}

/// The first Ctrl-C or SIGTERM asks the run to stop; the second ends the program.
pub(super) fn stop_signals() -> Arc<AtomicBool> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The order matters: on the first signal the flag is still down when the shutdown looks at it.
        let registered = flag::register_conditional_shutdown(signal, 130, Arc::clone(&cancel))
            .and_then(|_| flag::register(signal, Arc::clone(&cancel)));
        if let Err(error) = registered {
            tracing::warn!("signal {signal} will end the program at once: {error}");
        }
    }
    cancel
}

/// A table of the stages that did not simply stay as they were, their headline figures, and where the results are.
fn sum_up(report: &RunReport, verify: bool) {
    let paint = Paint::stderr();
    let width = report.stages.iter().map(|stage| stage.name.len()).max().unwrap_or(0);
    print::note("");
    for stage in &report.stages {
        let state = match stage.state {
            StageState::Ran => paint.green("ran    "),
            StageState::Failed => paint.red("failed "),
            StageState::Skipped => paint.dim("skipped"),
            // Already named when it was found.
            StageState::Cached => continue,
        };
        let rows = if stage.state == StageState::Ran && stage.rows.total > 0 {
            rows_text(&stage.rows)
        } else {
            String::new()
        };
        let seconds =
            if stage.state == StageState::Ran { format!("{:>7.1} s", stage.seconds) } else { " ".repeat(9) };
        print::note(format!("  {state} {:<width$} {seconds}  {rows}", stage.name).trim_end());
    }
    let ran = report.stages.iter().filter(|stage| stage.state == StageState::Ran).count();
    let cached = report.stages.iter().filter(|stage| stage.state == StageState::Cached).count();
    let verified = if verify { ", and made the same bytes again unless an error says otherwise" } else { "" };
    print::note(&format!("{ran} ran{verified}, {cached} cached, in {:.2} s", report.seconds));
    for stage in &report.stages {
        let pages = stage.outputs.iter().filter(|output| output.path.ends_with(".html"));
        for (folder, page) in
            stage.folder.iter().flat_map(|folder| pages.clone().map(move |page| (folder, page)))
        {
            print::note(&format!("{} {}", paint.bold("report:"), folder.join(&page.path).display()));
        }
    }
}
