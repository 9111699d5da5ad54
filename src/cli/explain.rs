//! `explain`: why a stage would run again, down to the file or parameter.

use clap::Args;
use tunesmith_pipeline::runner;
use tunesmith_pipeline::store::Store;

use super::device::{DeviceArgs, Talk};
use super::exit_code::Failure;
use super::{ManifestArgs, print, problems};

/// Options of `explain`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// The stage
    stage: String,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the explanation as JSON
    #[arg(long)]
    json: bool,
}

/// Prints one line a reason, and below a stage that waits why the stages before it run.
pub(super) fn main(options: &Options, store: &Store) -> Result<(), Failure> {
    let pipeline = options.manifest.load(options.json)?;
    options.device.choose(&pipeline, Talk::Off, options.json)?;
    let explanation = runner::explain(&pipeline, store, &options.stage)
        .map_err(|error| problems::show_runner(&error, options.json))?;
    if options.json {
        print::json(&explanation);
    } else if explanation.reasons.is_empty() {
        print::data(&format!("{} is up to date", options.stage));
    } else {
        for reason in &explanation.reasons {
            print::data(&format!("{}: {reason}", options.stage));
        }
        for cause in &explanation.causes {
            for reason in &cause.reasons {
                print::data(&format!("  {}: {reason}", cause.stage));
            }
        }
    }
    Ok(())
}
