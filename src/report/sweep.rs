//! The page of a sweep: the table, the objective of every trial over each param, and all trials as lines
//! over parallel axes. Inline SVG, no script.

use maud::{Markup, html};
use serde_json::Value;
use tunesmith_pipeline::manifest::Direction;
use tunesmith_pipeline::sweep::{SweepReport, TrialReport};

use super::sections::Section;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 280.0;
const SIDE: f64 = 60.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 34.0;

/// The whole page.
pub(crate) fn page(report: &SweepReport) -> Markup {
    let section = |anchor: &str, title: &str, body: Markup| Section {
        anchor: anchor.to_owned(),
        title: title.to_owned(),
        body,
    };
    let mut sections = vec![section("table", "Results", table(report))];
    let plotted: Vec<&TrialReport> = report.trials.iter().filter(|trial| trial.objective.is_some()).collect();
    if !plotted.is_empty() {
        let plots =
            html! { @for name in &report.axes { figure { (objective_over(report, &plotted, name)) } } };
        sections.push(section("objective", "Objective by parameter", plots));
        sections.push(section("parallel", "All trials", html! { figure { (parallel(report, &plotted)) } }));
    }
    super::layout(&format!("{}: sweep", report.pipeline), &sections)
}

fn table(report: &SweepReport) -> Markup {
    let better = match report.direction {
        Direction::Maximize => "larger is better",
        Direction::Minimize => "smaller is better",
    };
    html! {
        p { (report.trials.len()) " trials; " code { (report.objective) } ", " (better) ". Mean ± standard deviation over seeds." }
        table {
            thead { tr {
                @for name in &report.axes { th { (name) } }
                th .number { (report.objective) } th .number { "±" } th .number { "seeds" } th .number { "failed" }
            } }
            tbody { @for point in &report.points { tr {
                @for name in &report.axes { td { (point.values.get(name).map(text).unwrap_or_default()) } }
                td .number { @if let Some(mean) = point.mean { (figure(mean)) } @else { "–" } }
                td .number { @if let Some(sd) = point.sd { (figure(sd)) } @else { "–" } }
                td .number { (point.seeds) } td .number { (point.failed) }
            } } }
        }
    }
}

/// One axis of a plot: where a value lies between 0 and 1.
struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
    /// The values in order, where they are not all numbers.
    words: Vec<String>,
}

impl Scale {
    fn new<'v>(values: impl Iterator<Item = &'v Value>) -> Self {
        let values: Vec<&Value> = values.collect();
        let numbers: Vec<f64> = values.iter().filter_map(|value| value.as_f64()).collect();
        if numbers.len() < values.len() {
            let mut words: Vec<String> = values.into_iter().map(text).collect();
            words.sort();
            words.dedup();
            let high = words.len().saturating_sub(1) as f64;
            return Self { low: 0.0, high, is_log: false, words };
        }
        Self::of_numbers(&numbers)
    }

    fn of_numbers(numbers: &[f64]) -> Self {
        let low = numbers.iter().copied().fold(f64::INFINITY, f64::min);
        let high = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Learning rates are told apart by their order of magnitude.
        let is_log = low > 0.0 && high / low > 50.0;
        Self { low, high, is_log, words: Vec::new() }
    }

    fn place(&self, value: &Value) -> f64 {
        let number = if self.words.is_empty() {
            value.as_f64().unwrap_or(self.low)
        } else {
            let word = text(value);
            self.words.iter().position(|known| *known == word).unwrap_or(0) as f64
        };
        let scaled = |number: f64| if self.is_log { number.ln() } else { number };
        let span = scaled(self.high) - scaled(self.low);
        if span > 0.0 { (scaled(number) - scaled(self.low)) / span } else { 0.5 }
    }

    fn ends(&self) -> (String, String) {
        match (self.words.first(), self.words.last()) {
            (Some(first), Some(last)) => (first.clone(), last.clone()),
            _ => (figure(self.low), figure(self.high)),
        }
    }
}

fn objectives(trials: &[&TrialReport]) -> Scale {
    let numbers: Vec<f64> = trials.iter().filter_map(|trial| trial.objective).collect();
    Scale { is_log: false, ..Scale::of_numbers(&numbers) }
}

fn y_of(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
}

fn objective_over(report: &SweepReport, trials: &[&TrialReport], name: &str) -> Markup {
    let with_value: Vec<(&Value, f64)> =
        trials.iter().filter_map(|trial| Some((trial.values.get(name)?, trial.objective?))).collect();
    let xs = Scale::new(with_value.iter().map(|(value, _)| *value));
    let ys = objectives(trials);
    let x_of = |share: f64| SIDE + share * (WIDTH - 2.0 * SIDE);
    let ((x_low, x_high), (y_low, y_high)) = (xs.ends(), ys.ends());
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label={ (report.objective) " over " (name) } {
            line .axis x1=(SIDE) x2=(WIDTH - SIDE) y1=(y_of(0.0)) y2=(y_of(0.0)) {}
            line .axis x1=(SIDE) x2=(SIDE) y1=(y_of(0.0)) y2=(y_of(1.0)) {}
            text x=(SIDE - 6.0) y=(y_of(0.0)) text-anchor="end" { (y_low) }
            text x=(SIDE - 6.0) y=(y_of(1.0) + 4.0) text-anchor="end" { (y_high) }
            text x=(SIDE) y=(HEIGHT - 10.0) { (x_low) }
            text x=(WIDTH - SIDE) y=(HEIGHT - 10.0) text-anchor="end" { (x_high) " " (name) @if xs.is_log { " (log)" } }
            @for (value, objective) in &with_value {
                circle .dot-0 cx=(coordinate(x_of(xs.place(value)))) cy=(coordinate(y_of(ys.place(&Value::from(*objective))))) r="4" {
                    title { (name) " = " (text(value)) ": " (figure(*objective)) }
                }
            }
        }
    }
}

/// Every trial as a line over the params and the objective; the best tenth stands out.
fn parallel(report: &SweepReport, trials: &[&TrialReport]) -> Markup {
    let scales: Vec<(String, Scale)> = report
        .axes
        .iter()
        .map(|name| (name.clone(), Scale::new(trials.iter().filter_map(|trial| trial.values.get(name)))))
        .chain([(report.objective.clone(), objectives(trials))])
        .collect();
    let step = (WIDTH - 2.0 * SIDE) / (scales.len() - 1).max(1) as f64;
    let x_of = |axis: usize| SIDE + step * axis as f64;
    let value = |trial: &TrialReport, axis: usize| -> Value {
        let own = report.axes.get(axis).map(|name| trial.values.get(name).cloned());
        own.unwrap_or_else(|| trial.objective.map(Value::from)).unwrap_or(Value::Null)
    };
    let best: Vec<usize> = {
        let count = trials.len().div_ceil(10);
        report.points.iter().flat_map(|point| point.trials.iter().copied()).take(count).collect()
    };
    let is_best =
        |trial: &TrialReport| best.iter().any(|&position| std::ptr::eq(&report.trials[position], trial));
    let points = |trial: &TrialReport| {
        let point = |(axis, (_, scale)): (usize, &(String, Scale))| {
            format!("{},{}", coordinate(x_of(axis)), coordinate(y_of(scale.place(&value(trial, axis)))))
        };
        scales.iter().enumerate().map(point).collect::<Vec<_>>().join(" ")
    };
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label="all trials over parallel axes" {
            @for trial in trials {
                polyline class={ @if is_best(trial) { "series-0" } @else { "series-1" } } fill="none"
                    stroke-width=(if is_best(trial) { "2.4" } else { "1" }) points=(points(trial)) {
                    title { (figure(trial.objective.unwrap_or(f64::NAN))) }
                }
            }
            @for (axis, (name, scale)) in scales.iter().enumerate() {
                @let (low, high) = scale.ends();
                line .axis x1=(coordinate(x_of(axis))) x2=(coordinate(x_of(axis))) y1=(y_of(0.0)) y2=(y_of(1.0)) {}
                text x=(coordinate(x_of(axis))) y="12" text-anchor="middle" { (name) }
                text x=(coordinate(x_of(axis))) y=(HEIGHT - 18.0) text-anchor="middle" { (low) }
                text x=(coordinate(x_of(axis))) y="24" text-anchor="middle" { (high) }
            }
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 1e-3 => format!("{value:.2e}"),
        _ => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

fn coordinate(value: f64) -> String {
    format!("{value:.1}")
}
