//! `graph`: draws the stages and their needs.

use clap::{Args, ValueEnum};

use super::exit_code::Failure;
use super::{ManifestArgs, print};

/// Options of `graph`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// The form of the drawing
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// An indented list for the terminal
    Text,
    /// Graphviz
    Dot,
    /// Mermaid, as GitHub renders it
    Mermaid,
}

/// Prints the drawing.
pub(super) fn main(options: &Options) -> Result<(), Failure> {
    let pipeline = options.manifest.load(false)?;
    let drawing = match options.format {
        Format::Text => pipeline.to_text(),
        Format::Dot => pipeline.to_dot(),
        Format::Mermaid => pipeline.to_mermaid(),
    };
    print::data(drawing.trim_end());
    Ok(())
}
