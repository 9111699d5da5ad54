//! `check`: is the manifest right? Reads nothing but manifests and touches no store.

use clap::Args;

use super::exit_code::Failure;
use super::{ManifestArgs, print};

/// Options of `check`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Loads the manifest and says so.
pub(super) fn main(options: &Options) -> Result<(), Failure> {
    let pipeline = options.manifest.load(options.json)?;
    if options.json {
        print::json(&serde_json::json!({ "ok": true, "stages": pipeline.stages.len(), "errors": [] }));
    } else {
        print::note(&format!("{}: {} stages, nothing wrong", pipeline.path.display(), pipeline.stages.len()));
    }
    Ok(())
}
