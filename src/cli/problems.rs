//! Shows what went wrong: manifest problems with their line and a caret, everything else as
//! `error: … hint: …`; or all of it as the JSON of the contract.

use std::error::Error;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};
use serde_json::json;
use tunesmith_pipeline::manifest::{ManifestErrors, ManifestProblem};
use tunesmith_pipeline::runner::{ErrorReport, RunnerError};

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
    print::note(&format!(
        "{} {count} {noun} in the manifest; nothing was run",
        Paint::stderr().red("error:")
    ));
}

/// Shows the warnings of a manifest that loaded.
pub(super) fn show_warnings(warnings: &[ManifestProblem]) {
    for warning in warnings {
        print::note(render(warning).trim_end());
    }
}

fn render(problem: &dyn Diagnostic) -> String {
    let theme =
        if Paint::stderr().is_on() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let mut text = String::new();
    let handler = GraphicalReportHandler::new_themed(theme).with_width(WIDTH).with_links(false);
    match handler.render_report(&mut text, problem) {
        Ok(()) => text,
        Err(_) => problem.to_string(),
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

/// Shows what is wrong with the command line, beyond what its parser sees.
pub(super) fn show_usage(code: &str, error: &dyn Error, hint: &str, as_json: bool) {
    if as_json {
        let error = json!({ "code": code, "message": error.to_string(), "hint": hint });
        print::json(&json!({ "ok": false, "stages": [], "errors": [error] }));
    } else {
        show_error(error, Some(hint));
    }
}

/// Shows why the runner did not run, and says how the program ends.
pub(super) fn show_runner(error: &RunnerError, as_json: bool) -> Failure {
    if as_json {
        print::json(&json!({ "ok": false, "stages": [], "errors": [ErrorReport::from(error)] }));
    } else {
        print::note(render(error).trim_end());
    }
    match error {
        RunnerError::UnknownStage { .. } | RunnerError::Source(_) | RunnerError::TooMuch { .. } => {
            Failure::Usage
        }
        RunnerError::Restless | RunnerError::Store(_) => Failure::Run,
    }
}

/// Shows one error of a run.
pub(super) fn show_error_report(error: &ErrorReport) {
    let paint = Paint::stderr();
    let stage = error.stage.as_ref().map(|stage| format!("stage `{stage}`: ")).unwrap_or_default();
    print::note(&format!("{} {stage}{}", paint.red("error:"), error.message));
    if let Some(file) = &error.file {
        let numbers = [error.line, error.column].into_iter().flatten().map(|number| format!(":{number}"));
        print::note(&format!("   {} {file}{}", paint.dim("at"), numbers.collect::<String>()));
    }
    if let Some(hint) = &error.hint {
        print::note(&format!(" {} {hint}", paint.dim("hint:")));
    }
}
