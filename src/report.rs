//! The report: one self-contained HTML file that opens offline. It reads the artifacts of other stages by
//! the files they hold and shows what it finds; it computes no figure of its own and runs no model.

pub(crate) mod chart;
pub(crate) mod sections;
pub(crate) mod sweep;

use std::path::Path;

use maud::{DOCTYPE, Markup, PreEscaped, html};

/// One stage whose artifact the report may show.
pub(crate) struct Shown<'a> {
    /// Stage name in the manifest.
    pub(crate) stage: &'a str,
    /// Folder with the artifact's files.
    pub(crate) folder: &'a Path,
    /// The metrics the stage reported.
    pub(crate) metrics: &'a serde_json::Map<String, serde_json::Value>,
}

/// A file in an artifact that is not what its stage writes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReportError {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The file is not the expected JSON.
    #[error("`{file}` of stage `{stage}` is not what the report expects: {source}")]
    Shape { stage: String, file: String, source: serde_json::Error },
    /// A table row is not the expected JSON.
    #[error(transparent)]
    Table(#[from] crate::corpus::TableError),
}

/// The whole page.
pub(crate) fn page(title: &str, shown: &[Shown<'_>]) -> Result<Markup, ReportError> {
    Ok(layout(title, &sections::all(shown)?))
}

/// A page of sections with what it needs in itself.
fn layout(title: &str, sections: &[sections::Section]) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) " · tunesmith report" }
                style { (PreEscaped(include_str!("report/style.css"))) }
            }
            body {
                header {
                    h1 { (title) }
                    nav {
                        @for section in sections { a href={ "#" (section.anchor) } { (section.title) } }
                    }
                }
                main {
                    @for section in sections {
                        section id=(section.anchor) { h2 { (section.title) } (section.body) }
                    }
                }
                footer { "Written by tunesmith " (env!("CARGO_PKG_VERSION")) ". Everything on this page is in this file." }
            }
        }
    }
}
