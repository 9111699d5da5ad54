//! `cache`: what the store holds, whether it is what it says, and what of it may go.

use std::time::Duration;

use clap::{Args, Subcommand};
use tunesmith_pipeline::manifest::{duration, memory_bytes};
use tunesmith_pipeline::runs::Runs;
use tunesmith_pipeline::store::{GcPolicy, Remote, Store, StoreError, Transfer};

use super::exit_code::Failure;
use super::{print, problems};

/// What to do with the store.
#[derive(Subcommand)]
pub(super) enum Command {
    /// Count what the store holds
    Stats {
        /// Print the figures as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove results that no kept run needs
    Gc(Gc),
    /// Copy results to a folder that other machines share
    Push(Share),
    /// Copy results from a folder that other machines share
    Pull(Share),
    /// Keep the results of a run from `gc`
    Pin {
        /// Id of the run, from `runs list`, or its beginning
        run: String,
    },
    /// No longer keep the results of a run
    Unpin {
        /// Id of the run, or its beginning
        run: String,
    },
    /// Hash every object again and say which are not what they should be
    Verify {
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
}

/// What may go.
#[derive(Args)]
pub(super) struct Gc {
    /// Keep the results of this many runs of each pipeline, newest first
    #[arg(long, value_name = "N", default_value_t = 3)]
    keep_last: usize,
    /// Remove older results only until the store is this small, such as `20GiB`
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_size: Option<u64>,
    /// Remove results older than this, such as `30d`
    #[arg(long, value_name = "TIME", value_parser = time)]
    max_age: Option<Duration>,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Where results are shared.
#[derive(Args)]
pub(super) struct Share {
    /// The folder, or its `file://` address
    folder: String,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn share(
    options: &Share,
    transfer: impl FnOnce(&Remote) -> Result<Transfer, StoreError>,
) -> Result<(), Failure> {
    if options.folder.contains("://") && !options.folder.starts_with("file://") {
        print::note(&format!(
            "error: `{}` is no folder\nhint:  results are shared through a folder, such as one that the network mounts",
            options.folder
        ));
        return Err(Failure::Usage);
    }
    let done = transfer(&Remote::new(&options.folder)).map_err(|error| {
        problems::show_error(&error, error.hint());
        Failure::Run
    })?;
    if options.json {
        print::json(&done);
    } else {
        let Transfer { actions, objects, bytes, refused } = done;
        print::data(&format!(
            "{actions} actions, {objects} objects, {:.1} MiB; {refused} not whole",
            mib(bytes)
        ));
    }
    if done.refused > 0 { Err(Failure::Run) } else { Ok(()) }
}

fn size(text: &str) -> Result<u64, String> {
    memory_bytes(text).ok_or_else(|| "write a size such as `20GiB`".to_owned())
}

fn time(text: &str) -> Result<Duration, String> {
    duration(text).ok_or_else(|| "write a time such as `30d`".to_owned())
}

fn collect(options: &Gc, store: &Store) -> Result<(), Failure> {
    let policy = GcPolicy {
        keep_last: options.keep_last,
        bytes_max: options.max_size,
        age_max: options.max_age,
        dry_run: options.dry_run,
    };
    let report = store.gc(&policy).map_err(|error| {
        problems::show_error(&error, error.hint());
        Failure::Run
    })?;
    if options.json {
        print::json(&report);
        return Ok(());
    }
    let went = if report.dry_run { "would go" } else { "removed" };
    for (stage, key) in &report.actions {
        print::data(&format!("{went}  {stage}  {}", key.short()));
    }
    print::data(&format!(
        "{went}: {} actions, {} objects, {:.1} MiB; {} objects stay ({:.1} MiB)",
        report.actions.len(),
        report.objects,
        mib(report.bytes),
        report.kept_objects,
        mib(report.kept_bytes)
    ));
    if report.bytes_over > 0 {
        print::note(&format!(
            "{:.1} MiB above `--max-size` belong to pinned runs and the last {} of each pipeline\nhint:  lower `--keep-last`, or `cache unpin` a run",
            mib(report.bytes_over),
            options.keep_last
        ));
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0 / 1024.0
}

/// Counts, verifies, removes or pins.
pub(super) fn main(command: &Command, store: &Store) -> Result<(), Failure> {
    let failed = |error| {
        problems::show_error(&error, None);
        Failure::Run
    };
    match command {
        Command::Stats { json } => {
            let stats = store.stats().map_err(failed)?;
            if *json {
                print::json(&stats);
            } else {
                print::data(&format!(
                    "{}: {} objects ({:.1} MiB), {} actions, {} remembered rows, {:.1} MiB of checkpoints, {} runs",
                    stats.path.display(),
                    stats.objects,
                    mib(stats.object_bytes),
                    stats.actions,
                    stats.memo_rows,
                    mib(stats.checkpoint_bytes),
                    stats.runs
                ));
            }
        }
        Command::Gc(options) => collect(options, store)?,
        Command::Push(options) => share(options, |remote| store.push(remote))?,
        Command::Pull(options) => share(options, |remote| store.pull(remote))?,
        Command::Pin { run } | Command::Unpin { run } => {
            let run = super::runs::details(&Runs::new(store), run)?.summary.run;
            store.pin(&run, matches!(command, Command::Pin { .. })).map_err(failed)?;
        }
        Command::Verify { json } => {
            let result = store.verify().map_err(failed)?;
            if *json {
                print::json(&result);
            } else {
                print::data(&format!(
                    "{} objects, {} corrupt, {} missing",
                    result.objects,
                    result.corrupt.len(),
                    result.missing.len()
                ));
                for digest in &result.corrupt {
                    print::data(&format!("corrupt {digest}"));
                }
                for digest in &result.missing {
                    print::data(&format!("missing {digest}"));
                }
            }
            if !result.corrupt.is_empty() || !result.missing.is_empty() {
                return Err(Failure::Run);
            }
        }
    }
    Ok(())
}
