//! `cache`: what the store holds, and whether it is what it says.

use clap::Subcommand;
use tunesmith_pipeline::store::Store;

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
    /// Hash every object again and say which are not what they should be
    Verify {
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Counts or verifies.
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
                let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
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
