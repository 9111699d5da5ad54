//! `uses: report`: gathers what other stages found into one HTML file.
//!
//! Reads: any artifacts (findings, training log, evaluation, split). Writes: `report.html`.
//! Bump `VERSION` when the page changes.

use schemars::JsonSchema;
use serde::Deserialize;
use tunesmith_pipeline::stage::{Arity, InputSlot, StageContext, StageError, StageKind};

use crate::report::{self, Shown};

const VERSION: u32 = 1;

/// The `report` kind.
pub(crate) struct Report;

/// Parameters of `report`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Heading of the page; the stage's name if absent.
    title: Option<String>,
}

impl StageKind for Report {
    fn name(&self) -> &'static str {
        "report"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Writes one self-contained HTML page from whatever its needs hold: findings, loss curves, answers side by side, leak checks."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[InputSlot { name: "needs", doc: "stages to show: validate, split, train, eval", arity: Arity::Any }]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[("report.html", "the page")]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let shown: Vec<Shown<'_>> = context
            .inputs
            .iter()
            .map(|(_, artifact)| Shown {
                stage: &artifact.stage,
                folder: &artifact.folder,
                metrics: &artifact.metrics,
            })
            .collect();
        let title = params.title.as_deref().unwrap_or(context.stage);
        let page = report::page(title, &shown).map_err(|error| {
            StageError::new("report::input", error.to_string())
                .hint("run the stage it names again with `--force`")
        })?;
        fs_err::write(context.out.join("report.html"), page.into_string())?;
        Ok(())
    }
}
