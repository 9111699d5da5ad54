//! `schema`: the JSON Schema of the manifest, from the same Rust types the stages read.

use clap::Args;
use tunesmith_pipeline::manifest;

use super::print;
use crate::stages::STAGES;

/// Options of `schema`.
#[derive(Args)]
pub(super) struct Options {
    /// Print a Markdown page on every stage kind instead
    #[arg(long)]
    markdown: bool,
}

/// Prints the schema.
pub(super) fn main(options: &Options) {
    if options.markdown {
        print::data(crate::stages::markdown().trim_end());
    } else {
        let schema = manifest::json_schema(STAGES);
        print::data(&serde_json::to_string_pretty(&schema).expect("a schema is JSON"));
    }
}
