//! Shows a run as it happens, on stderr: one live line per running stage on a terminal, a plain log
//! elsewhere, nothing with `--quiet`. The only place besides `cli::print` that draws.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tunesmith_pipeline::events::{Reporter, RunEvent};
use tunesmith_pipeline::stage::{MessageLevel, RowCounts};

use super::print::{Paint, note};

/// The plain log repeats progress at most this often per stage.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Draws the events of a run.
pub(crate) struct Progress {
    view: View,
}

enum View {
    /// Live lines that are redrawn in place.
    Live { lines: MultiProgress, bars: Mutex<HashMap<String, ProgressBar>> },
    /// One line an event.
    Plain { last: Mutex<HashMap<String, Instant>> },
    /// Warnings and failures only.
    Quiet,
}

impl Progress {
    /// Live on a terminal, plain elsewhere.
    pub(crate) fn new(quiet: bool) -> Self {
        let view = if quiet {
            View::Quiet
        } else if std::io::stderr().is_terminal() {
            View::Live {
                lines: MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)),
                bars: Mutex::default(),
            }
        } else {
            View::Plain { last: Mutex::default() }
        };
        Self { view }
    }

    fn line(&self, text: &str) {
        match &self.view {
            View::Live { lines, .. } => lines.suspend(|| note(text)),
            View::Plain { .. } | View::Quiet => note(text),
        }
    }

    fn talk(&self, text: &str) {
        if !matches!(self.view, View::Quiet) {
            self.line(text);
        }
    }

    fn start(&self, stage: &str) {
        if let View::Live { lines, bars } = &self.view {
            let bar = lines.add(ProgressBar::new_spinner().with_style(unknown_style()));
            bar.set_prefix(stage.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bars.lock().expect("no thread panics while drawing").insert(stage.to_owned(), bar);
        }
    }

    fn end(&self, stage: &str) {
        match &self.view {
            View::Live { bars, .. } => {
                if let Some(bar) = bars.lock().expect("no thread panics while drawing").remove(stage) {
                    bar.finish_and_clear();
                }
            }
            View::Plain { last } => {
                last.lock().expect("no thread panics while drawing").remove(stage);
            }
            View::Quiet => {}
        }
    }

    fn advance(&self, stage: &str, done: u64, total: u64, unit: &str, detail: &str) {
        match &self.view {
            View::Live { bars, .. } => {
                let bars = bars.lock().expect("no thread panics while drawing");
                let Some(bar) = bars.get(stage) else { return };
                if total > 0 && bar.length() != Some(total) {
                    bar.set_length(total);
                    bar.set_style(known_style());
                }
                bar.set_position(done);
                bar.set_message(format!("{unit} {detail}"));
            }
            View::Plain { last } => {
                let mut last = last.lock().expect("no thread panics while drawing");
                let now = Instant::now();
                let seen = *last.entry(stage.to_owned()).or_insert(now);
                if now.duration_since(seen) >= PLAIN_EVERY {
                    last.insert(stage.to_owned(), now);
                    let of = if total > 0 { format!(" of {total}") } else { String::new() };
                    note(format!("{stage}: {done}{of} {unit} {detail}").trim_end());
                }
            }
            View::Quiet => {}
        }
    }
}

fn unknown_style() -> ProgressStyle {
    ProgressStyle::with_template("  {spinner} {prefix:<12} {elapsed} {pos} {msg}")
        .expect("the template is well-formed")
}

fn known_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "  {spinner} {prefix:<12} [{bar:28}] {pos}/{len} {msg} {elapsed} (about {eta} left)",
    )
    .expect("the template is well-formed")
    .progress_chars("=> ")
}

impl Reporter for Progress {
    fn report(&self, event: &RunEvent) {
        let paint = Paint::stderr();
        match event {
            RunEvent::RunStarted { .. } | RunEvent::RunFinished { .. } => {}
            RunEvent::StageCached { stage } => self.talk(&format!("  {} {stage}", paint.dim("cached "))),
            RunEvent::StageStarted { stage, kind, reasons, previous_seconds } => {
                let before = previous_seconds
                    .filter(|seconds| *seconds >= 1.0)
                    .map(|seconds| {
                        format!(", took {} last time", HumanDuration(Duration::from_secs_f64(seconds)))
                    })
                    .unwrap_or_default();
                let why =
                    if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) };
                self.talk(&format!("  {} {stage}{why} ({kind}{before})", paint.bold("running")));
                self.start(stage);
            }
            RunEvent::StageWaiting { stage } => {
                self.talk(&format!("  {} {stage}: another run is making it", paint.dim("waiting")));
            }
            RunEvent::StageProgress { stage, done, total, unit, detail } => {
                self.advance(stage, *done, *total, unit, detail);
            }
            RunEvent::StageMessage { stage, level, text } => match level {
                MessageLevel::Info => self.talk(&format!("    {stage}: {text}")),
                MessageLevel::Warning => {
                    self.line(&format!("    {} {stage}: {text}", paint.yellow("warning:")));
                }
            },
            RunEvent::StageFinished { stage, seconds, rows, .. } => {
                self.end(stage);
                let rows = rows.map(|rows| format!(", {}", rows_text(&rows))).unwrap_or_default();
                self.talk(&format!("  {} {stage} in {seconds:.1} s{rows}", paint.green("done   ")));
            }
            RunEvent::StageFailed { stage, .. } => {
                self.end(stage);
                self.line(&format!("  {} {stage}", paint.red("failed ")));
            }
            RunEvent::StageSkipped { stage, because } => {
                self.talk(&format!("  {} {stage}: {because}", paint.dim("skipped")));
            }
        }
    }
}

/// `200 rows, 2 new, 198 remembered`.
pub(crate) fn rows_text(rows: &RowCounts) -> String {
    let mut text = format!("{} rows, {} new, {} remembered", rows.total, rows.new, rows.remembered);
    if rows.failed > 0 {
        text.push_str(", ");
        text.push_str(&rows.failed.to_string());
        text.push_str(" failed");
    }
    text
}
