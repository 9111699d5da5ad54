//! `sweep:` of a manifest: which params are tried with which values, and what is compared. Turns the words
//! into trials, each a whole pipeline with its own params; runs nothing.

mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use crate::graph::Pipeline;
use crate::manifest::document::{Document, Entries};
use crate::manifest::interpolate::Resolver;
use crate::manifest::matrix::AXES_MAX;
use crate::manifest::node::{Node, Value, find};
use crate::manifest::problem::{ManifestErrors, Problem, Problems, quoted, suggestion};
use crate::manifest::source::{FileId, Sources, Span};
use crate::manifest::{Overrides, Unused, build, check, include, params};
use crate::stage::StageKind;

use random::Random;

/// Most trials of a sweep, seeds counted.
const TRIALS_MAX: usize = 10_000;
/// The param that only repeats a trial: results are averaged over it.
pub(crate) const SEED: &str = "seed";

/// What a sweep tries and compares. One of `matrix`, `list` and `random` says which values.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    /// Every combination of these values, by param.
    #[serde(default)]
    #[schemars(extend("minProperties" = 1))]
    matrix: Option<BTreeMap<String, Vec<Json>>>,
    /// These sets of values, one trial each.
    #[serde(default)]
    #[schemars(length(min = 1))]
    list: Option<Vec<Map<String, Json>>>,
    /// Values drawn at random.
    #[serde(default)]
    random: Option<Random>,
    /// The metric that is compared, `stage.metric`: `answers.tuned.accuracy`.
    objective: String,
    /// Which values are better; by default `minimize` for a metric with `loss`, `error`, `perplexity`, `seconds`
    /// or `bytes` in its name, else `maximize`.
    #[serde(default)]
    direction: Option<Direction>,
    /// Gives all trials a small budget first and goes on with the best only.
    #[serde(default)]
    halving: Option<Halving>,
}

/// Which values of the objective are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Large ones.
    Maximize,
    /// Small ones.
    Minimize,
}

/// Successive halving: rounds with growing budgets and ever fewer trials.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Halving {
    /// The param that is the budget: `epochs`.
    param: String,
    /// Budget of the first round.
    #[schemars(range(min = 1))]
    min: u64,
    /// Budget of the last round.
    #[schemars(range(min = 1))]
    max: u64,
    /// By how much the budget grows, and how many times fewer trials go on, from round to round.
    #[serde(default = "three")]
    #[schemars(range(min = 2))]
    factor: u64,
}

fn three() -> u64 {
    3
}

/// A sweep, ready to be run.
pub struct LoadedSweep {
    /// Name of the pipeline.
    pub name: String,
    /// The stage whose metric is compared.
    pub stage: String,
    /// The metric.
    pub metric: String,
    /// Which values of it are better.
    pub direction: Direction,
    /// Budgets of the rounds of successive halving, by param; a single empty one without.
    pub rounds: Vec<Map<String, Json>>,
    /// Of how many trials one goes on to the next round.
    pub factor: u64,
    /// The params tried, in order, without the seed.
    pub axes: Vec<String>,
    /// The trials.
    pub trials: Vec<Trial>,
}

/// One set of values.
pub struct Trial {
    /// The values tried, by param, without the seed.
    pub values: Map<String, Json>,
    /// The seed, where seeds are repeated.
    pub seed: Option<Json>,
    /// The pipeline with these values, for each round.
    pub pipelines: Vec<Pipeline>,
}

/// Reads the manifest at `path` and its sweep. `seeds`: each trial is repeated with that many seeds, counted
/// up from the param `seed`.
///
/// # Errors
/// As [`load`](super::load), and everything that is wrong with the sweep.
pub fn load_sweep(
    path: &Path,
    overrides: &Overrides,
    seeds: Option<u32>,
    kinds: &[&'static dyn StageKind],
) -> Result<LoadedSweep, ManifestErrors> {
    let mut sources = Sources::default();
    let mut problems = Problems::default();
    let sweep = read(path, overrides, seeds, kinds, &mut sources, &mut problems);
    let has_errors = problems.has_errors();
    let located = problems.into_located(&sources);
    match sweep {
        Some(sweep) if !has_errors => Ok(sweep),
        _ => Err(ManifestErrors { problems: located }),
    }
}

fn read(
    path: &Path,
    overrides: &Overrides,
    seeds: Option<u32>,
    kinds: &[&'static dyn StageKind],
    sources: &mut Sources,
    problems: &mut Problems,
) -> Option<LoadedSweep> {
    let mut document = include::read(path, sources, problems)?;
    params::apply(&mut document, overrides, sources, problems);
    // The pipeline itself first: what is wrong with it is not the sweep's fault.
    let plain = build(path, &document, &document.params, Unused::Ignored, kinds, sources, problems)?;
    if document.sweep.is_none() {
        let at = Span::start_of(FileId::ROOT);
        problems.push(
            Problem::new("manifest::missing_key", at, "the manifest has no `sweep`")
                .hint("add `sweep: { matrix: { <param>: [...] }, objective: <stage>.<metric> }`"),
        );
    }
    let Written { mut sweep, points, word, node } = written(&document, &plain, sources, problems)?;
    let seeds = match seeds {
        None => None,
        Some(count) => Some(first_seeds(&document, count, word, problems)?),
    };
    for (values, seed) in repeated(points, seeds.as_deref()) {
        let mut pipelines = Vec::with_capacity(sweep.rounds.len());
        for budget in &sweep.rounds {
            let mut params = document.params.clone();
            let seed = seed.iter().map(|seed| (SEED, seed));
            let values = values.iter().chain(budget).map(|(name, value)| (name.as_str(), value));
            set(&mut params, values.chain(seed), word, &node, problems);
            // One trial is as right or wrong as the next; the first wrong one says enough.
            pipelines.push(build(path, &document, &params, Unused::Ignored, kinds, sources, problems)?);
            if problems.has_errors() {
                return None;
            }
        }
        sweep.trials.push(Trial { values, seed, pipelines });
        if sweep.trials.len() > TRIALS_MAX {
            let message = format!("the sweep has more than {TRIALS_MAX} trials");
            problems.push(Problem::new("manifest::sweep", word, message));
            return None;
        }
    }
    Some(sweep)
}

/// Tells what is wrong with the sweep of a manifest, if it has one, without making its trials.
pub(crate) fn check_sweep(
    document: &Document,
    pipeline: &Pipeline,
    sources: &Sources,
    problems: &mut Problems,
) {
    let Some(Written { sweep, points, word, node }) = written(document, pipeline, sources, problems) else {
        return;
    };
    let (Some(point), Some(budget)) = (points.first(), sweep.rounds.first()) else { return };
    let values = point.iter().chain(budget).map(|(name, value)| (name.as_str(), value));
    set(&mut document.params.clone(), values, word, &node, problems);
}

/// A sweep as it is written, without its trials.
struct Written {
    sweep: LoadedSweep,
    points: Vec<Map<String, Json>>,
    word: Span,
    node: Node,
}

fn written(
    document: &Document,
    pipeline: &Pipeline,
    sources: &Sources,
    problems: &mut Problems,
) -> Option<Written> {
    let (word, node) = document.sweep.as_ref()?;
    let word = *word;
    let node = Resolver::new(&document.params, sources, problems).resolve(node);
    let spec = spec(word, &node, problems)?;
    let at = |key: &str| node.get(key).map_or(word, |node| node.span);
    let (stage, metric) = objective(&spec, pipeline, at("objective"), problems)?;
    let points = points(&spec, word, problems)?;
    let (rounds, factor) = rounds(&spec, at("halving"), problems)?;
    let sweep = LoadedSweep {
        name: pipeline.name.clone(),
        stage,
        direction: spec.direction.unwrap_or_else(|| usual_direction(&metric)),
        metric,
        rounds,
        factor,
        axes: axes(&points),
        trials: Vec::new(),
    };
    Some(Written { sweep, points, word, node })
}

/// Sets the params of a trial; a name that is no param is told where the sweep has it.
fn set<'v>(
    params: &mut Entries,
    values: impl Iterator<Item = (&'v str, &'v Json)>,
    word: Span,
    node: &Node,
    problems: &mut Problems,
) {
    for (name, value) in values {
        let written = ["matrix", "random"].iter().find_map(|key| {
            let values = node.get(key)?;
            values.get("params").unwrap_or(values).get(name)
        });
        let span = written.map_or(word, |node| node.span);
        params::set(params, &|_| span, name, Node::from_json(value, span), problems);
    }
}

fn spec(word: Span, node: &Node, problems: &mut Problems) -> Option<Spec> {
    let found = check::check(schemars::schema_for!(Spec).as_value(), node, word);
    let is_right = found.is_empty();
    found.into_iter().for_each(|problem| problems.push(problem));
    if !is_right {
        return None;
    }
    let spec = serde_json::from_value::<Spec>(node.to_json())
        .map_err(|error| problems.push(Problem::new("manifest::sweep", word, format!("{error}"))))
        .ok()?;
    let ways = [spec.matrix.is_some(), spec.list.is_some(), spec.random.is_some()];
    if ways.iter().filter(|given| **given).count() != 1 {
        let message = "a sweep needs one of `matrix`, `list` and `random`";
        problems.push(Problem::new("manifest::sweep", word, message));
        return None;
    }
    Some(spec)
}

/// The stage and the metric of `stage.metric`.
fn objective(
    spec: &Spec,
    pipeline: &Pipeline,
    at: Span,
    problems: &mut Problems,
) -> Option<(String, String)> {
    let (stage, metric) = spec.objective.split_once('.').unwrap_or((&spec.objective, ""));
    let names = || pipeline.stages.iter().map(|stage| stage.name.as_str());
    let problem = if metric.is_empty() {
        let message = format!("{} names no metric of a stage", quoted(&spec.objective));
        Problem::new("manifest::sweep", at, message)
            .hint("write `<stage>.<metric>`: `answers.tuned.accuracy`")
    } else if names().any(|name| name == stage) {
        return Some((stage.to_owned(), metric.to_owned()));
    } else if pipeline.stages.iter().any(|one| one.group.as_deref() == Some(stage)) {
        let message = format!("stage `{stage}` has a matrix, so its metric is not one number");
        Problem::new("manifest::sweep", at, message).hint("name a stage that collects it, or sweep its axes")
    } else {
        let problem = Problem::new("manifest::unknown_stage", at, format!("no stage {}", quoted(stage)));
        problem.hint(suggestion(stage, names()).unwrap_or_else(|| "the pipeline has no stages".to_owned()))
    };
    problems.push(problem);
    None
}

fn usual_direction(metric: &str) -> Direction {
    let small_is_good = ["loss", "error", "perplexity", "seconds", "bytes"];
    let is_cost = small_is_good.iter().any(|word| metric.contains(word));
    if is_cost { Direction::Minimize } else { Direction::Maximize }
}

/// The sets of values, the seed still among them.
fn points(spec: &Spec, word: Span, problems: &mut Problems) -> Option<Vec<Map<String, Json>>> {
    let mut refused = |message: &str| {
        problems.push(Problem::new("manifest::sweep", word, message));
        None
    };
    let tried = spec.matrix.as_ref().map(BTreeMap::len);
    let tried = tried.or(spec.random.as_ref().map(|random| random.params.len()));
    if tried.is_some_and(|count| count > AXES_MAX) {
        return refused("the sweep tries too many params at once");
    }
    if let Some(matrix) = &spec.matrix {
        let count = matrix.values().map(Vec::len).try_fold(1_usize, usize::checked_mul);
        match count {
            Some(0) => return refused("an axis of the sweep's `matrix` has no values"),
            Some(count) if count <= TRIALS_MAX => {}
            _ => return refused("the sweep's `matrix` has too many combinations"),
        }
        let mut points = vec![Map::new()];
        for (name, values) in matrix {
            let with = |point: &Map<String, Json>, value: &Json| {
                let mut point = point.clone();
                point.insert(name.clone(), value.clone());
                point
            };
            points =
                points.iter().flat_map(|point| values.iter().map(move |value| with(point, value))).collect();
        }
        return Some(points);
    }
    if let Some(random) = &spec.random {
        return match random.draw() {
            Ok(points) => Some(points),
            Err(name) => refused(&format!(
                "param `{name}` cannot be drawn: give a list that is not empty, or `low` below `high`, above 0 for `log`"
            )),
        };
    }
    Some(spec.list.clone().unwrap_or_default())
}

/// The params that are tried, in order, without the seed.
fn axes(points: &[Map<String, Json>]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let names = points.iter().flat_map(Map::keys).filter(|name| name.as_str() != SEED);
    names.filter(|name| seen.insert(name.as_str())).cloned().collect()
}

/// `count` seeds, counted up from the param `seed`.
fn first_seeds(document: &Document, count: u32, word: Span, problems: &mut Problems) -> Option<Vec<Json>> {
    let params: &Entries = &document.params;
    let Some(Value::Int(first)) = find(params, SEED).map(|node| &node.value) else {
        problems.push(
            Problem::new(
                "manifest::sweep",
                word,
                "seeds can only be repeated where a param `seed` is a whole number",
            )
            .hint("add `seed: 1` to `params` and read it as `${params.seed}`"),
        );
        return None;
    };
    Some((0..i64::from(count)).map(|n| Json::from(first.saturating_add(n))).collect())
}

/// Each point with each seed; its own seed, if it has one, where no others are asked for.
fn repeated(
    points: Vec<Map<String, Json>>,
    seeds: Option<&[Json]>,
) -> Vec<(Map<String, Json>, Option<Json>)> {
    let mut seen = BTreeSet::new();
    let mut repeated = Vec::new();
    for mut point in points {
        let own = point.shift_remove(SEED);
        let wanted: Vec<Option<Json>> = match seeds {
            Some(seeds) => seeds.iter().cloned().map(Some).collect(),
            None => vec![own],
        };
        for seed in wanted {
            let identity = serde_json::to_string(&(&point, &seed)).expect("values are JSON");
            if seen.insert(identity) {
                repeated.push((point.clone(), seed));
            }
        }
    }
    repeated
}

/// The budgets of the rounds.
fn rounds(spec: &Spec, at: Span, problems: &mut Problems) -> Option<(Vec<Map<String, Json>>, u64)> {
    let Some(halving) = &spec.halving else { return Some((vec![Map::new()], 1)) };
    if halving.min > halving.max {
        problems.push(Problem::new("manifest::sweep", at, "`min` of `halving` is above `max`"));
        return None;
    }
    let budgets = std::iter::successors(Some(halving.min), |budget| budget.checked_mul(halving.factor));
    let below = budgets.take_while(|budget| *budget < halving.max);
    let budget = |budget: u64| Map::from_iter([(halving.param.clone(), Json::from(budget))]);
    Some((below.chain([halving.max]).map(budget).collect(), halving.factor))
}
