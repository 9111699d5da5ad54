//! Runs the trials of a sweep as one graph and compares what they reach.
//!
//! ```text
//! trials ──► merge (common stages become one node) ──► runner ──► metric of each ──► table
//!    ▲                                                              │
//!    └────────── successive halving: the best go on with more ◄─────┘
//! ```
//!
//! It remembers nothing itself: a sweep that was killed is run again, finds all that was finished in the
//! store, and comes to the same table.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicBool, Ordering as MemoryOrdering};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::events::Reporter;
use crate::manifest::{Direction, LoadedSweep};
use crate::runner::{self, ErrorReport, RunOptions, RunReport, RunnerError, StageState};
use crate::store::Store;

mod merge;

use merge::{Part, merge};

/// What a sweep came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepReport {
    /// Name of the pipeline.
    pub pipeline: String,
    /// Ids of the runs, one a round.
    pub runs: Vec<String>,
    /// Whether every trial came to a value.
    pub ok: bool,
    /// `stage.metric`.
    pub objective: String,
    /// Which values of it are better.
    pub direction: Direction,
    /// The params tried, in order, without the seed.
    pub axes: Vec<String>,
    /// The sets of values, best first.
    pub points: Vec<Point>,
    /// The trials, in the order of the manifest.
    pub trials: Vec<TrialReport>,
    /// What went wrong.
    pub errors: Vec<ErrorReport>,
}

/// One set of values over all its seeds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The values, by param.
    pub values: Map<String, Value>,
    /// Mean of the objective; `None` if no trial came to a value.
    pub mean: Option<f64>,
    /// Standard deviation over the seeds (n - 1); `None` with fewer than two.
    pub sd: Option<f64>,
    /// Trials that came to a value.
    pub seeds: usize,
    /// Trials that failed.
    pub failed: usize,
    /// The last round it took part in, from 1.
    pub round: usize,
    /// Positions of its trials in [`SweepReport::trials`].
    pub trials: Vec<usize>,
}

/// One trial.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrialReport {
    /// The values, by param, without the seed.
    pub values: Map<String, Value>,
    /// The seed, where seeds are repeated.
    pub seed: Option<Value>,
    /// The objective in the last round it took part in.
    pub objective: Option<f64>,
    /// The last round it took part in, from 1.
    pub round: usize,
    /// What became of the objective's stage.
    pub state: StageState,
    /// That stage's name among the trials.
    pub stage: String,
    /// Its key.
    pub key: Option<Digest>,
}

/// Runs the trials that are not known yet.
///
/// # Errors
/// As [`runner::run`]. A trial that fails is in the report and stops no other.
pub fn run(
    sweep: &LoadedSweep,
    store: &Store,
    options: &RunOptions,
    reporter: &dyn Reporter,
    cancelled: &AtomicBool,
) -> Result<SweepReport, RunnerError> {
    let mut report = SweepReport {
        pipeline: sweep.name.clone(),
        runs: Vec::new(),
        ok: true,
        objective: format!("{}.{}", sweep.stage, sweep.metric),
        direction: sweep.direction,
        axes: sweep.axes.clone(),
        points: Vec::new(),
        trials: sweep.trials.iter().map(unstarted).collect(),
        errors: Vec::new(),
    };
    let mut alive: Vec<usize> = (0..sweep.trials.len()).collect();
    for round in 0..sweep.rounds.len() {
        run_round(sweep, round, &alive, &mut report, |pipeline, targets| {
            let options = RunOptions { targets, keep_going: true, ..options.clone() };
            runner::run(pipeline, store, &options, reporter, cancelled)
        })?;
        if cancelled.load(MemoryOrdering::Relaxed) {
            break;
        }
        if round + 1 < sweep.rounds.len() {
            alive = survivors(&report, &alive, sweep.factor);
        }
    }
    report.ok &= report.errors.is_empty() && report.trials.iter().all(|trial| trial.objective.is_some());
    report.points = points(&report.trials, report.direction);
    Ok(report)
}

fn unstarted(trial: &crate::manifest::Trial) -> TrialReport {
    TrialReport {
        values: trial.values.clone(),
        seed: trial.seed.clone(),
        objective: None,
        round: 0,
        state: StageState::Skipped,
        stage: String::new(),
        key: None,
    }
}

/// Runs the trials `alive` as one graph, and notes what each came to.
fn run_round(
    sweep: &LoadedSweep,
    round: usize,
    alive: &[usize],
    report: &mut SweepReport,
    run: impl FnOnce(&crate::graph::Pipeline, Vec<String>) -> Result<RunReport, RunnerError>,
) -> Result<(), RunnerError> {
    let part = |&trial: &usize| {
        let trial = &sweep.trials[trial];
        let mut values = trial.values.clone();
        values.extend(trial.seed.clone().map(|seed| ("seed".to_owned(), seed)));
        Part { values, pipeline: &trial.pipelines[round] }
    };
    let parts: Vec<Part<'_>> = alive.iter().map(part).collect();
    let merged = merge(&parts, &sweep.stage);
    let name = |position: usize| &merged.pipeline.stage(merged.objectives[position]).name;
    let mut targets: Vec<String> = (0..alive.len()).map(|position| name(position).clone()).collect();
    targets.dedup();
    let ran = run(&merged.pipeline, targets)?;
    report.runs.push(ran.run.clone());
    report.errors.extend(ran.errors);
    for (position, &trial) in alive.iter().enumerate() {
        let Some(stage) = ran.stages.iter().find(|stage| stage.name == *name(position)) else { continue };
        let settled = matches!(stage.state, StageState::Cached | StageState::Ran);
        let objective = stage.metrics.get(&sweep.metric).and_then(Value::as_f64).filter(|_| settled);
        if settled && objective.is_none() {
            report.errors.push(no_objective(&stage.name, &sweep.metric, &stage.metrics));
        }
        let trial = &mut report.trials[trial];
        trial.objective = objective;
        trial.round = round + 1;
        trial.state = stage.state;
        trial.stage.clone_from(&stage.name);
        trial.key = stage.key;
    }
    Ok(())
}

fn no_objective(stage: &str, metric: &str, metrics: &Map<String, Value>) -> ErrorReport {
    let known: Vec<String> = metrics.keys().map(|name| format!("`{name}`")).collect();
    let hint = match known.as_slice() {
        [] => "it reported no metrics; an `exec` stage reports what `metrics: FILE` names".to_owned(),
        _ => format!("it reported {}", known.join(", ")),
    };
    let message = format!("stage `{stage}` reported no number `{metric}`");
    ErrorReport {
        stage: Some(stage.to_owned()),
        ..ErrorReport::plain("sweep::no_objective", message, Some(&hint))
    }
}

/// The trials of the best points, one point in `factor`, at least one.
fn survivors(report: &SweepReport, alive: &[usize], factor: u64) -> Vec<usize> {
    let ranked = points(&report.trials, report.direction);
    let ranked: Vec<&Point> =
        ranked.iter().filter(|point| point.trials.iter().any(|trial| alive.contains(trial))).collect();
    let keep = ranked.len().div_ceil(usize::try_from(factor).unwrap_or(usize::MAX)).max(1);
    let mut kept: Vec<usize> = ranked.into_iter().take(keep).flat_map(|point| point.trials.clone()).collect();
    kept.sort_unstable();
    kept
}

/// Trials by their values, best first: who got further, then who has the better mean.
fn points(trials: &[TrialReport], direction: Direction) -> Vec<Point> {
    let mut points: Vec<Point> = Vec::new();
    for (position, trial) in trials.iter().enumerate() {
        match points.iter_mut().find(|point| point.values == trial.values) {
            Some(point) => point.trials.push(position),
            None => points.push(Point {
                values: trial.values.clone(),
                mean: None,
                sd: None,
                seeds: 0,
                failed: 0,
                round: trial.round,
                trials: vec![position],
            }),
        }
    }
    for point in &mut points {
        let values: Vec<f64> = point.trials.iter().filter_map(|trial| trials[*trial].objective).collect();
        let failed = |trial: &&usize| trials[**trial].state == StageState::Failed;
        point.failed = point.trials.iter().filter(failed).count();
        point.seeds = values.len();
        (point.mean, point.sd) = mean_and_sd(&values);
    }
    points.sort_by(|a, b| b.round.cmp(&a.round).then_with(|| better(a.mean, b.mean, direction)));
    points
}

/// The better first, what has no value last.
fn better(a: Option<f64>, b: Option<f64>, direction: Direction) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) if direction == Direction::Maximize => b.total_cmp(&a),
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

fn mean_and_sd(values: &[f64]) -> (Option<f64>, Option<f64>) {
    if values.is_empty() {
        return (None, None);
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (Some(mean), (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(rank: u32, objective: Option<f64>, round: usize) -> TrialReport {
        TrialReport {
            values: Map::from_iter([("rank".to_owned(), rank.into())]),
            seed: None,
            objective,
            round,
            state: if objective.is_some() { StageState::Ran } else { StageState::Failed },
            stage: String::new(),
            key: None,
        }
    }

    fn ranks(trials: &[TrialReport], direction: Direction) -> Vec<u64> {
        points(trials, direction).iter().filter_map(|point| point.values["rank"].as_u64()).collect()
    }

    #[test]
    fn points_are_means_over_seeds_with_their_sample_deviation() {
        let trials =
            [trial(8, Some(1.0), 1), trial(8, Some(3.0), 1), trial(8, None, 1), trial(4, Some(5.0), 1)];
        let points = points(&trials, Direction::Maximize);
        assert_eq!((points[1].mean, points[1].sd), (Some(2.0), Some(2_f64.sqrt())));
        assert_eq!((points[1].seeds, points[1].failed), (2, 1));
        assert_eq!((points[0].mean, points[0].sd), (Some(5.0), None));
    }

    #[test]
    fn the_best_come_first_and_failures_last() {
        let trials =
            [trial(1, Some(0.5), 1), trial(2, None, 1), trial(3, Some(0.1), 1), trial(4, Some(0.9), 1)];
        assert_eq!(ranks(&trials, Direction::Minimize), [3, 1, 4, 2]);
        assert_eq!(ranks(&trials, Direction::Maximize), [4, 1, 3, 2]);
        let further = [trial(1, Some(0.1), 1), trial(2, Some(0.9), 2)];
        assert_eq!(ranks(&further, Direction::Minimize), [2, 1], "who got further stands first");
    }

    #[test]
    fn one_in_factor_goes_on_and_never_none() {
        let report = |count: u32| SweepReport {
            pipeline: "p".to_owned(),
            runs: Vec::new(),
            ok: true,
            objective: "a.loss".to_owned(),
            direction: Direction::Minimize,
            axes: Vec::new(),
            points: Vec::new(),
            trials: (0..count).map(|rank| trial(rank, Some(f64::from(rank)), 1)).collect(),
            errors: Vec::new(),
        };
        assert_eq!(survivors(&report(9), &(0..9).collect::<Vec<_>>(), 3), [0, 1, 2]);
        assert_eq!(survivors(&report(4), &(0..4).collect::<Vec<_>>(), 3), [0, 1]);
        assert_eq!(survivors(&report(1), &[0], 3), [0]);
    }
}
