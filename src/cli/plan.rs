//! `plan`: what a run would do, and why. Hashes inputs; runs nothing.

use clap::Args;
use tunesmith_pipeline::runner::{self, PlannedState, RunOptions};
use tunesmith_pipeline::store::Store;

use super::device::{DeviceArgs, Talk};
use super::exit_code::Failure;
use super::print::{self, Paint};
use super::{ManifestArgs, problems};

/// Options of `plan`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// Only these stages and what they need
    stages: Vec<String>,
    /// Treat this stage as if it had to run; may be repeated
    #[arg(long, value_name = "STAGE")]
    force: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

/// Prints one line a stage.
pub(super) fn main(options: &Options, store: &Store) -> Result<(), Failure> {
    let pipeline = options.manifest.load(options.json)?;
    options.device.choose(&pipeline, Talk::Off, options.json)?;
    let run =
        RunOptions { targets: options.stages.clone(), force: options.force.clone(), ..RunOptions::default() };
    let plan =
        runner::plan(&pipeline, store, &run).map_err(|error| problems::show_runner(&error, options.json))?;
    if options.json {
        print::json(&plan);
        return Ok(());
    }
    let paint = Paint::stdout();
    for stage in &plan.stages {
        let reasons: Vec<String> = stage.reasons.iter().map(ToString::to_string).collect();
        let why = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) };
        let state = match stage.state {
            PlannedState::Cached => "cached ",
            PlannedState::Run => "run    ",
            PlannedState::Blocked => "blocked",
        };
        print::data(&format!("{} {}{why}", paint.bold(state), stage.name));
    }
    Ok(())
}
