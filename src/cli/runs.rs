//! `runs`: the history of a store.

use clap::Subcommand;
use tunesmith_pipeline::runs::Runs;
use tunesmith_pipeline::store::Store;

use super::exit_code::Failure;
use super::{print, problems};

/// What to look at.
#[derive(Subcommand)]
pub(super) enum Command {
    /// List past runs, newest first
    List {
        /// Only runs of this pipeline
        pipeline: Option<String>,
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one run with its stages
    Show {
        /// Id of the run, from `runs list`
        run: String,
        /// Print the run as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Lists or shows.
pub(super) fn main(command: &Command, store: &Store) -> Result<(), Failure> {
    let failed = |error| {
        problems::show_error(&error, None);
        Failure::Run
    };
    let runs = Runs::new(store);
    match command {
        Command::List { pipeline, json } => {
            let list = runs.list(pipeline.as_deref()).map_err(failed)?;
            if *json {
                print::json(&list);
            } else {
                for run in &list {
                    let ended = match (run.ok, run.seconds) {
                        (Some(true), Some(seconds)) => format!("ok in {seconds:.1} s"),
                        (Some(false), Some(seconds)) => format!("failed after {seconds:.1} s"),
                        _ => "not ended".to_owned(),
                    };
                    print::data(&format!("{}  {}  {}  {ended}", run.run, run.started, run.pipeline));
                }
            }
        }
        Command::Show { run, json } => {
            let Some(details) = runs.show(run).map_err(failed)? else {
                print::note(&format!(
                    "error: no run `{run}` in this store\nhint:  `tunesmith runs list` shows the ids"
                ));
                return Err(Failure::Usage);
            };
            if *json {
                print::json(&details);
            } else {
                print::data(&serde_json::to_string_pretty(&details).expect("a run is JSON"));
            }
        }
    }
    Ok(())
}
