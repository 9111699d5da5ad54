//! `runs`: the history of a store.

use clap::{Subcommand, ValueEnum};
use serde_json::Value;
use tunesmith_pipeline::runs::{RunDetails, RunDiff, Runs, StageChange};
use tunesmith_pipeline::store::Store;

use super::exit_code::Failure;
use super::{print, problems};

/// What to look at.
#[derive(Subcommand)]
pub(super) enum Command {
    /// List past runs, newest first
    List {
        /// Only runs of this pipeline
        pipeline: Option<String>,
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what is different between two runs: what went in, and what came out
    Diff {
        /// Id of the first run, or its beginning
        a: String,
        /// Id of the second run, or its beginning
        b: String,
        /// Print the difference as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a run in a form that other tools read
    Export {
        /// Id of the run, or its beginning
        run: String,
        /// The form
        #[arg(long, value_enum)]
        format: Format,
    },
    /// Show one run with its stages
    Show {
        /// Id of the run, from `runs list`
        run: String,
        /// Print the run as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Format {
    /// When each stage ran, for chrome://tracing and Perfetto
    Trace,
    /// The metrics of every stage as JSON
    Metrics,
    /// The numbers of every stage as OpenMetrics text, for Prometheus
    Openmetrics,
    /// What was made from what, as RO-Crate metadata (JSON-LD)
    RoCrate,
}

/// Lists, shows, compares or exports.
pub(super) fn main(command: &Command, store: &Store) -> Result<(), Failure> {
    let failed = |error| {
        problems::show_error(&error, None);
        Failure::Run
    };
    let runs = Runs::new(store);
    match command {
        Command::List { pipeline, json } => {
            let list = runs.list(pipeline.as_deref()).map_err(failed)?;
            if *json {
                print::json(&list);
            } else {
                for run in &list {
                    let ended = match (run.ok, run.seconds) {
                        (Some(true), Some(seconds)) => format!("ok in {seconds:.1} s"),
                        (Some(false), Some(seconds)) => format!("failed after {seconds:.1} s"),
                        _ => "not ended".to_owned(),
                    };
                    let pinned = if run.pinned { ", pinned" } else { "" };
                    print::data(&format!("{}  {}  {}  {ended}{pinned}", run.run, run.started, run.pipeline));
                }
            }
        }
        Command::Show { run, json } => {
            let details = details(&runs, run)?;
            if *json {
                print::json(&details);
            } else {
                show_run(&details);
            }
        }
        Command::Export { run, format } => {
            let details = details(&runs, run)?;
            match format {
                Format::Trace => print::json(&details.trace().map_err(failed)?),
                Format::Metrics => print::json(&details.metrics()),
                Format::Openmetrics => print::data(details.open_metrics().trim_end()),
                Format::RoCrate => print::json(&runs.ro_crate(&details).map_err(failed)?),
            }
        }
        Command::Diff { a, b, json } => {
            let diff = runs.diff(&details(&runs, a)?, &details(&runs, b)?).map_err(failed)?;
            if *json {
                print::json(&diff);
            } else {
                show(&diff);
            }
        }
    }
    Ok(())
}

/// A run by its id; an unknown one is told here.
pub(super) fn details(runs: &Runs<'_>, run: &str) -> Result<RunDetails, Failure> {
    let found = runs.show(run).map_err(|error| {
        problems::show_error(&error, None);
        Failure::Run
    })?;
    found.ok_or_else(|| {
        print::note(&format!(
            "error: no run `{run}` in this store\nhint:  `tunesmith runs list` shows the ids"
        ));
        Failure::Usage
    })
}

/// The run, one line a stage, and what went wrong.
fn show_run(run: &RunDetails) {
    let ended =
        run.summary.seconds.map_or_else(|| "not ended".to_owned(), |seconds| format!("{seconds:.1} s"));
    print::data(&format!("{}  {}  {}  {ended}", run.summary.run, run.summary.started, run.summary.manifest));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    for stage in run.stages.as_array().into_iter().flatten() {
        let rows = &stage["rows"];
        let rows = match rows["total"].as_u64() {
            Some(total) if total > 0 => {
                format!("  {total} rows, {} new, {} remembered", rows["new"], rows["remembered"])
            }
            _ => String::new(),
        };
        let seconds = stage["seconds"].as_f64().unwrap_or(0.0);
        print::data(&format!("  {:<7} {} {seconds:.1} s{rows}", text(&stage["state"]), text(&stage["name"])));
        for (metric, value) in stage["metrics"].as_object().into_iter().flatten() {
            print::data(&format!("            {metric} {}", text(value)));
        }
    }
    for error in run.errors.as_array().into_iter().flatten() {
        print::data(&format!("  error: {}", text(&error["message"])));
    }
    print::data(&format!("  journal and logs: {}", run.folder.display()));
}

/// One line a difference, below the stage it belongs to.
fn show(diff: &RunDiff) {
    if diff.stages.is_empty() {
        print::note("the two runs are the same");
    }
    let text = |value: &Option<Value>| value.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
    for stage in &diff.stages {
        let only = match stage.change {
            StageChange::Changed => "",
            StageChange::Added => " (only in the second run)",
            StageChange::Removed => " (only in the first run)",
        };
        print::data(&format!("{}{only}", stage.name));
        for reason in &stage.reasons {
            print::data(&format!("  in      {reason}"));
        }
        for metric in &stage.metrics {
            print::data(&format!("  metric  {} {} → {}", metric.name, text(&metric.old), text(&metric.new)));
        }
        for file in &stage.files {
            print::data(&format!("  file    {file}"));
        }
    }
}
