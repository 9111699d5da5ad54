//! Shows what went wrong: manifest problems with their line and a caret, everything else as
//! `error: … hint: …`; or all of it as the JSON of the contract.

use std::error::Error;
use std::path::Path;

use miette::{GraphicalReportHandler, GraphicalTheme};
use serde_json::json;
use tunesmith_pipeline::manifest::{ManifestErrors, ManifestProblem};
use tunesmith_pipeline::runner::{RunnerError, StageFailure};

use super::exit_code::Failure;
use super::print::{self, Paint};

/// Width of a rendered problem; long lines are cut around the caret, not wrapped.
const WIDTH: usize = 110;

/// Shows all problems of a manifest.
pub(super) fn show(errors: &ManifestErrors, as_json: bool) {
    if as_json {
        print::json(&json!({ "ok": false, "stages": [], "errors": errors }));
        return;
    }
    for problem in &errors.problems {
        print::note(render(problem).trim_end());
    }
    let count = errors.problems.len();
    let noun = if count == 1 { "problem" } else { "problems" };
    print::note(&format!("{} {count} {noun} in the manifest; nothing was run", Paint::stderr().red("error:")));
}

/// Shows the warnings of a manifest that loaded.
pub(super) fn show_warnings(warnings: &[ManifestProblem]) {
    for warning in warnings {
        print::note(render(warning).trim_end());
    }
}

fn render(problem: &ManifestProblem) -> String {
    let theme = if Paint::stderr().is_on() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let mut text = String::new();
    let handler = GraphicalReportHandler::new_themed(theme).with_width(WIDTH).with_links(false);
    match handler.render_report(&mut text, problem) {
        Ok(()) => text,
        Err(_) => format!("{}:{}:{}: {problem}", problem.file.display(), problem.line, problem.column),
    }
}

/// Shows an error with its causes and a hint.
pub(super) fn show_error(error: &dyn Error, hint: Option<&str>) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        let more = below.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = below.source();
    }
    let paint = Paint::stderr();
    print::note(&format!("{} {text}", paint.red("error:")));
    if let Some(hint) = hint {
        print::note(&format!("{}  {hint}", paint.dim("hint:")));
    }
}

/// Shows why the runner did not run, and says how the program ends.
pub(super) fn show_runner(error: &RunnerError, as_json: bool) -> Failure {
    let failures = error.failures();
    if as_json {
        print::json(&json!({ "ok": false, "stages": [], "errors": failures }));
    } else {
        failures.iter().for_each(show_failure);
    }
    if error.is_usage() { Failure::Usage } else { Failure::Run }
}

/// Shows one failure of a run.
pub(super) fn show_failure(failure: &StageFailure) {
    let paint = Paint::stderr();
    let stage = failure.stage.as_ref().map(|stage| format!("stage `{stage}`: ")).unwrap_or_default();
    let place = failure.file.as_deref().map(|file| format!("{}: ", place(file, failure.line, failure.column)));
    print::note(&format!("{} {}{stage}{}", paint.red("error:"), place.unwrap_or_default(), failure.message));
    if let Some(hint) = &failure.hint {
        print::note(&format!("{}  {hint}", paint.dim("hint:")));
    }
}

fn place(file: &Path, line: Option<usize>, column: Option<usize>) -> String {
    let mut text = file.display().to_string();
    for number in [line, column].into_iter().flatten() {
        text.push(':');
        text.push_str(&number.to_string());
    }
    text
}
