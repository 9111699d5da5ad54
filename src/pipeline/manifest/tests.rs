//! What a manifest means, what is refused, and how the refusal reads. Each case is a manifest and a snapshot
//! of what the user would see.

use std::fmt::Write as _;
use std::path::Path;

use expect_test::{Expect, expect};
use miette::{GraphicalReportHandler, GraphicalTheme};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::stage::{Arity, InputSlot, ParamProblem, StageContext, StageError};

mod files;
mod hostile;
mod meaning;
mod references;
mod values;
mod views;

/// Reads notes.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is used")]
struct IngestParams {
    /// Files, folders or globs.
    #[schemars(length(min = 1))]
    paths: Vec<String>,
    #[serde(default)]
    follow_links: bool,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is used")]
struct TrainParams {
    /// Rank of the adapter.
    #[schemars(range(min = 1, max = 512))]
    rank: u32,
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    #[serde(default)]
    dropout: f64,
    learning_rate: Option<f64>,
    seed: Option<u64>,
    #[serde(default)]
    schedule: Option<Schedule>,
    targets: Option<Targets>,
    stop: Option<Stop>,
    extra: Option<serde_json::Value>,
    labels: Option<std::collections::BTreeMap<String, u8>>,
    warmup: Option<usize>,
    epochs: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Schedule {
    /// Down in a straight line.
    Linear,
    /// Down along a cosine.
    Cosine,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
enum Targets {
    Named(TargetSet),
    Listed(Vec<String>),
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum TargetSet {
    Auto,
    Attention,
}

#[derive(Deserialize, JsonSchema)]
#[serde(tag = "when", rename_all = "lowercase", deny_unknown_fields)]
#[expect(dead_code, reason = "only its schema is used")]
enum Stop {
    Plateau { patience: u32 },
    Loss { below: f64 },
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ReportParams {}

/// A kind of stage that only declares itself.
struct Declared {
    name: &'static str,
    inputs: &'static [InputSlot],
    schema: fn() -> schemars::Schema,
}

impl StageKind for Declared {
    fn name(&self) -> &'static str {
        self.name
    }

    fn version(&self) -> u32 {
        1
    }

    fn doc(&self) -> &'static str {
        "A kind for tests."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        self.inputs
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    fn schema(&self) -> schemars::Schema {
        (self.schema)()
    }

    fn check(&self, with: &Json) -> Vec<ParamProblem> {
        let number = |name: &str| with.get(name).and_then(Json::as_u64);
        match (number("warmup"), number("epochs")) {
            (Some(warmup), Some(epochs)) if warmup >= epochs => vec![ParamProblem {
                path: "warmup".to_owned(),
                message: format!("warmup of `{warmup}` epochs leaves none of `{epochs}` to train"),
                hint: Some("make it smaller than `epochs`".to_owned()),
            }],
            _ => Vec::new(),
        }
    }

    fn run(&self, _context: &StageContext<'_>) -> Result<(), StageError> {
        unreachable!("no test here runs a stage")
    }
}

const fn slot(name: &'static str, arity: Arity) -> InputSlot {
    InputSlot { name, doc: "A table.", arity }
}

static KINDS: &[&dyn StageKind] = &[
    &Declared { name: "ingest", inputs: &[], schema: || schemars::schema_for!(IngestParams) },
    &Declared {
        name: "chunk",
        inputs: &[slot("documents", Arity::One)],
        schema: || schemars::schema_for!(ReportParams),
    },
    &Declared {
        name: "train",
        inputs: &[slot("data", Arity::One), slot("base", Arity::One), slot("previous", Arity::Optional)],
        schema: || schemars::schema_for!(TrainParams),
    },
    &Declared {
        name: "report",
        inputs: &[slot("adapter", Arity::Optional), slot("tables", Arity::Any)],
        schema: || schemars::schema_for!(ReportParams),
    },
];

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    }
    folder
}

/// Loads the first of `files`.
fn load_files(files: &[(&str, &str)], overrides: &Overrides) -> Result<Loaded, String> {
    let folder = folder(files);
    let overrides = Overrides {
        params_files: overrides.params_files.iter().map(|file| folder.path().join(file)).collect(),
        ..overrides.clone()
    };
    load(&folder.path().join(files[0].0), &overrides, KINDS)
        .map_err(|errors| rendered(&errors.problems, folder.path()))
}

/// What a user without colours would see, with the folder's name left out.
fn rendered(problems: &[ManifestProblem], folder: &Path) -> String {
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::none()).with_wrap_lines(false);
    let mut text = String::new();
    for problem in problems {
        if let Some(stage) = &problem.stage {
            write!(text, "[{stage}] ").unwrap();
        }
        handler.render_report(&mut text, problem).unwrap();
        text.push('\n');
    }
    let folder = format!("{}/", folder.display());
    text.replace(&folder, "").lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Checks what a user sees of the problems of a manifest.
fn check(yaml: &str, expected: &Expect) {
    check_files(&[("m.yaml", yaml)], &Overrides::default(), expected);
}

fn check_files(files: &[(&str, &str)], overrides: &Overrides, expected: &Expect) {
    match load_files(files, overrides) {
        Ok(_) => expected.assert_eq("no problem\n"),
        Err(text) => expected.assert_eq(&text),
    }
}

/// All that matters of a pipeline, but for the places.
fn summary(pipeline: &Pipeline) -> Json {
    let stages = pipeline.stages.iter().map(|stage| {
        let needs: Vec<String> = stage
            .needs
            .iter()
            .map(|need| format!("{}: {}", need.slot, pipeline.stage(need.stage).name))
            .collect();
        json!({ "name": stage.name, "uses": stage.kind.name(), "needs": needs, "with": stage.with })
    });
    json!({
        "name": pipeline.name,
        "params": pipeline.params,
        "stages": stages.collect::<Vec<_>>()
    })
}

/// The summary of a manifest that has no problems.
fn meaning(file: &str, text: &str, overrides: &Overrides) -> Json {
    summary(&load_files(&[(file, text)], overrides).unwrap_or_else(|text| panic!("{text}")).pipeline)
}
