//! `sweep`: runs the trials of a manifest's `sweep:` and shows a table of what they came to, best first.

use std::path::Path;

use clap::Args;
use serde_json::Value;
use tunesmith_pipeline::manifest::load_sweep;
use tunesmith_pipeline::runner::RunOptions;
use tunesmith_pipeline::store::Store;
use tunesmith_pipeline::sweep::{self, Point, SweepReport};

use super::exit_code::Failure;
use super::print::{self, Paint};
use super::progress::Progress;
use super::{ManifestArgs, problems, run};
use crate::report;
use crate::stages::STAGES;

/// Options of `sweep`.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    manifest: ManifestArgs,
    /// Repeat each trial with this many seeds, counted up from the param `seed`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    seeds: Option<u32>,
    #[command(flatten)]
    machine: run::MachineArgs,
    /// Say only what goes wrong
    #[arg(long, short)]
    quiet: bool,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the trials.
pub(super) fn main(options: &Options, store: &Store) -> Result<(), Failure> {
    let overrides = options.manifest.params.overrides();
    let sweep =
        load_sweep(&options.manifest.manifest, &overrides, options.seeds, STAGES).map_err(|errors| {
            problems::show(&errors, options.json);
            Failure::Usage
        })?;
    let pipeline = options.manifest.load(options.json)?;
    options.machine.choose_device(&pipeline, options.quiet, options.json)?;
    let cancel = run::stop_signals();
    let progress = Progress::new(options.quiet);
    let report = sweep::run(&sweep, store, &options.machine.apply(RunOptions::default()), &progress, &cancel)
        .map_err(|error| problems::show_runner(&error, options.json))?;
    let page = write_page(&report, &store.out_folder(&report.pipeline)).map_err(|error| {
        problems::show_error(&error, None);
        Failure::Run
    })?;
    if options.json {
        print::json(&report);
    } else {
        table(&report).iter().for_each(|line| print::data(line));
    }
    report.errors.iter().for_each(problems::show_error_report);
    if !options.quiet && !options.json {
        print::note(&format!("{} {}", Paint::stderr().bold("report:"), page.display()));
    }
    if report.ok { Ok(()) } else { Err(Failure::Run) }
}

/// `sweep.html` beside the results of the stages.
fn write_page(report: &SweepReport, folder: &Path) -> std::io::Result<std::path::PathBuf> {
    fs_err::create_dir_all(folder)?;
    let page = folder.join("sweep.html");
    fs_err::write(&page, report::sweep::page(report).into_string())?;
    Ok(page)
}

/// One line a set of values, best first, under a line of headings.
fn table(report: &SweepReport) -> Vec<String> {
    let has_rounds = report.trials.iter().any(|trial| trial.round > 1);
    let mut head: Vec<String> = report.axes.clone();
    head.push(report.objective.clone());
    head.extend(["±".to_owned(), "seeds".to_owned()]);
    if has_rounds {
        head.push("round".to_owned());
    }
    let cells = |point: &Point| -> Vec<String> {
        let value = |axis: &String| point.values.get(axis).map(plain).unwrap_or_default();
        let mut cells: Vec<String> = report.axes.iter().map(value).collect();
        cells.push(point.mean.map_or_else(|| "failed".to_owned(), number));
        cells.push(point.sd.map(number).unwrap_or_default());
        cells.push(point.seeds.to_string());
        if has_rounds {
            cells.push(point.round.to_string());
        }
        cells
    };
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(report.points.iter().map(cells)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A value without quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A number with as many digits as tell results apart.
fn number(value: f64) -> String {
    let text = format!("{value:.5}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "0" && value != 0.0 { format!("{value:.3e}") } else { text.to_owned() }
}
