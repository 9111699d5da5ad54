//! Reads a manifest: YAML or TOML, includes, profile, overrides and interpolation, and checks all of it
//! against the stage kinds. Everything that is wrong is told at once, each thing with its place in the file.
//!
//! ```text
//! source ──► yaml | toml ──► node ──► document ──► include ──► params ──► interpolate
//!                             (one located tree from here on)                  │
//!                        graph::Pipeline ◄── needs, check (kind's schema) ◄────┘
//! ```
//!
//! It runs nothing, reads no file but manifests and params files, and knows a kind only as
//! [`StageKind`]. Manifests may come from strangers: size, nesting, aliases, references and the number of
//! files are limited, and no input makes it panic.

mod check;
mod document;
mod editor_schema;
mod execution;
mod include;
mod interpolate;
mod matrix;
mod needs;
mod node;
mod origins;
mod params;
mod problem;
mod source;
mod sweep;
mod toml;
mod yaml;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

pub use crate::manifest::editor_schema::json_schema;
pub use crate::manifest::execution::{duration, memory_bytes};
pub(crate) use crate::manifest::matrix::label;
pub(crate) use crate::manifest::problem::suggestion;
pub use crate::manifest::problem::{ManifestErrors, ManifestProblem};
pub use crate::manifest::sweep::{Direction, LoadedSweep, Trial, load_sweep};

use crate::graph::{self, Execution, Need, Pipeline, Place, Stage, StageId};
use crate::manifest::document::{Document, Entries, StageDraft};
use crate::manifest::interpolate::Resolver;
use crate::manifest::matrix::{Combination, Expansion, NodeNeed};
use crate::manifest::needs::{Edge, StageNames};
use crate::manifest::node::{Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted};
use crate::manifest::source::{FileId, Sources, Span};
use crate::stage::StageKind;

/// What the command line says about params, weakest first: a profile, files, single values.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--profile NAME`.
    pub profile: Option<String>,
    /// `--set NAME=VALUE`: the dotted name, and the value as a YAML scalar or flow collection.
    pub set: Vec<(String, String)>,
    /// `--params FILE`: YAML, TOML or JSON, later ones win.
    pub params_files: Vec<PathBuf>,
}

/// A manifest that can be run.
pub struct Loaded {
    /// The stages in topological order, fully resolved.
    pub pipeline: Pipeline,
    /// What is doubtful but harmless: params nobody uses.
    pub warnings: Vec<ManifestProblem>,
}

/// Reads the manifest at `path`; TOML if it is called `.toml`, else YAML.
///
/// # Errors
/// Every problem of the manifest, its includes, the params files and the overrides, located. A file that
/// does not parse hides what depends on it.
pub fn load(
    path: &Path,
    overrides: &Overrides,
    kinds: &[&'static dyn StageKind],
) -> Result<Loaded, ManifestErrors> {
    let mut sources = Sources::default();
    let mut problems = Problems::default();
    let pipeline = read(path, overrides, kinds, &mut sources, &mut problems);
    let has_errors = problems.has_errors();
    let located = problems.into_located(&sources);
    match pipeline {
        Some(pipeline) if !has_errors => Ok(Loaded { pipeline, warnings: located }),
        _ => Err(ManifestErrors { problems: located }),
    }
}

fn read(
    path: &Path,
    overrides: &Overrides,
    kinds: &[&'static dyn StageKind],
    sources: &mut Sources,
    problems: &mut Problems,
) -> Option<Pipeline> {
    let mut document = include::read(path, sources, problems)?;
    if document.stages.is_empty() && !problems.has_errors() {
        problems.push(
            Problem::new("manifest::missing_key", Span::start_of(FileId::ROOT), "the manifest has no stages")
                .hint("add `stages`, a map from name to `{ uses: <kind> }`"),
        );
    }
    params::apply(&mut document, overrides, sources, problems);

    let pipeline = build(path, &document, &document.params, Unused::Told, kinds, sources, problems)?;
    sweep::check_sweep(&document, &pipeline, sources, problems);
    Some(pipeline)
}

/// What is done about params that no stage reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unused {
    /// A warning.
    Told,
    /// Nothing.
    Ignored,
}

/// The pipeline that a document stands for with these params.
fn build(
    path: &Path,
    document: &Document,
    params: &Entries,
    unused: Unused,
    kinds: &[&'static dyn StageKind],
    sources: &Sources,
    problems: &mut Problems,
) -> Option<Pipeline> {
    let mut resolver = Resolver::new(params, sources, problems);
    let drafts = document.stages.as_slice();
    let mut room = matrix::NODES_MAX;
    let combinations: Vec<Vec<Combination>> =
        drafts.iter().map(|draft| matrix::combinations(draft, &mut resolver, &mut room)).collect();
    let resolved: Vec<Vec<Node>> = drafts
        .iter()
        .zip(&combinations)
        .map(|(draft, all)| all.iter().map(|one| resolved_with(draft, one, &mut resolver)).collect())
        .collect();
    let executions: Vec<Node> =
        drafts.iter().map(|draft| resolver.resolve(&execution::words(draft))).collect();
    let used = resolver.used().clone();
    let all_params = resolver.all_params();
    for (index, (key, _)) in params.iter().enumerate() {
        if unused == Unused::Told && !used.contains(&index) && key.span.file == FileId::ROOT {
            let message = format!("param {} is not used by any stage", quoted(&key.text));
            problems.push(Problem::warning("manifest::unused_param", key.span, message));
        }
    }
    let checked = Checked::new(document, combinations, resolved, kinds, sources, problems);
    let order = checked.order(problems)?;
    let executions = read_executions(drafts, &executions, problems);
    let stages = checked.into_stages(&order, &executions, sources, problems);
    if problems.has_errors() {
        return None;
    }
    Some(Pipeline {
        name: document.name.clone().unwrap_or_else(|| name_of(path)),
        path: path.to_owned(),
        dir: match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        },
        params: all_params,
        stages,
    })
}

/// How each stage is run.
fn read_executions(drafts: &[StageDraft], words: &[Node], problems: &mut Problems) -> Vec<Execution> {
    let read = |(draft, words): (&StageDraft, &Node)| {
        execution::read(draft, words).unwrap_or_else(|found| {
            found.into_iter().for_each(|problem| problems.push(problem.stage(&draft.name.text)));
            Execution::default()
        })
    };
    drafts.iter().zip(words).map(read).collect()
}

/// The file's stem, with everything that no name may hold replaced.
fn name_of(path: &Path) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let name: String = stem.chars().take(100).map(|c| if is_plain(c) { c } else { '-' }).collect();
    if name.is_empty() { "pipeline".to_owned() } else { name }
}

/// `with`, filled in for one combination; an empty map where there is none.
fn resolved_with(draft: &StageDraft, combination: &Combination, resolver: &mut Resolver<'_>) -> Node {
    match &draft.with {
        Some((_, node)) => resolver.resolve_in(combination, node),
        None => Node::new(Value::Map(Vec::new()), draft.name.span),
    }
}

/// Stages held against their kinds, in the order of the manifest.
struct Checked<'a> {
    drafts: &'a [StageDraft],
    combinations: Vec<Vec<Combination>>,
    /// By stage and combination.
    withs: Vec<Vec<Node>>,
    kinds: Vec<Option<&'static dyn StageKind>>,
    edges: Vec<Vec<Edge>>,
}

impl<'a> Checked<'a> {
    fn new(
        document: &'a Document,
        combinations: Vec<Vec<Combination>>,
        withs: Vec<Vec<Node>>,
        kinds: &[&'static dyn StageKind],
        sources: &Sources,
        problems: &mut Problems,
    ) -> Self {
        let drafts = document.stages.as_slice();
        let ordered: Vec<&str> = drafts.iter().map(|draft| draft.name.text.as_str()).collect();
        let index = ordered.iter().enumerate().map(|(index, name)| (*name, index)).collect();
        let names = StageNames { ordered, index };
        let mut schemas = HashMap::new();
        let mut checked = Self { drafts, combinations, withs, kinds: Vec::new(), edges: Vec::new() };
        for (draft, withs) in drafts.iter().zip(&checked.withs) {
            let kind = kind_of(draft, kinds, problems);
            checked.edges.push(needs::resolve(draft, kind, &names, problems));
            checked.kinds.push(kind);
            if let Some(kind) = kind {
                let schema = schemas.entry(kind.name()).or_insert_with(|| kind.schema().to_value());
                // What is wrong with one combination is mostly wrong with all.
                let _found =
                    withs.iter().find(|with| !check_with(draft, with, kind, schema, sources, problems));
            }
        }
        checked
    }

    /// The stages, each after its needs. Cycles are told.
    fn order(&self, problems: &mut Problems) -> Option<Vec<usize>> {
        let needs: Vec<Vec<usize>> =
            self.edges.iter().map(|edges| edges.iter().map(|edge| edge.stage).collect()).collect();
        let cycles = match graph::order(&needs) {
            Ok(order) => return Some(order),
            Err(cycles) => cycles,
        };
        for cycle in cycles {
            let names = cycle.iter().chain(cycle.first()).map(|&stage| self.drafts[stage].name.text.as_str());
            let path = names.collect::<Vec<_>>().join(" -> ");
            let first = cycle[0];
            let next = cycle.get(1).copied().unwrap_or(first);
            let edge = self.edges[first].iter().find(|edge| edge.stage == next);
            let span = edge.map_or(self.drafts[first].name.span, |edge| edge.span);
            problems.push(
                Problem::new(
                    "manifest::cycle",
                    span,
                    format!("stages need each other in a circle: `{path}`"),
                )
                .hint("take one of these needs away")
                .stage(&self.drafts[first].name.text),
            );
        }
        None
    }

    /// The nodes of the stages in `order`. A stage whose kind is unknown, which has been told, is left out.
    fn into_stages(
        self,
        order: &[usize],
        executions: &[Execution],
        sources: &Sources,
        problems: &mut Problems,
    ) -> Vec<Stage> {
        let nodes =
            order.iter().flat_map(|&draft| (0..self.combinations[draft].len()).map(move |n| (draft, n)));
        let ids: HashMap<(usize, usize), StageId> = nodes.zip((0..).map(StageId)).collect();
        let expansion =
            Expansion { drafts: self.drafts, kinds: &self.kinds, combinations: &self.combinations };
        let mut stages = Vec::with_capacity(ids.len());
        for &draft in order {
            let (written, edges) = (&self.drafts[draft], &self.edges[draft]);
            let names = matrix::names(&written.name.text, &self.combinations[draft]);
            let needs = expansion.needs(draft, edges, problems);
            let Some(kind) = self.kinds[draft] else { continue };
            for (position, (name, needs)) in names.into_iter().zip(needs).enumerate() {
                let with = &self.withs[draft][position];
                let need = |need: NodeNeed| Need { slot: need.slot, stage: ids[&need.node] };
                stages.push(Stage {
                    id: ids[&(draft, position)],
                    group: (name != written.name.text).then(|| written.name.text.clone()),
                    name,
                    kind,
                    needs: needs.into_iter().map(need).collect(),
                    with: with.to_json(),
                    execution: executions[draft].clone(),
                    places: places(written, edges, with, sources),
                    origins: written
                        .with
                        .as_ref()
                        .map(|(_, with)| origins::origins(with))
                        .unwrap_or_default(),
                });
            }
        }
        stages
    }
}

fn kind_of(
    draft: &StageDraft,
    kinds: &[&'static dyn StageKind],
    problems: &mut Problems,
) -> Option<&'static dyn StageKind> {
    let uses = draft.uses.as_ref()?;
    if let Some(kind) = kinds.iter().find(|kind| kind.name() == uses.text) {
        return Some(*kind);
    }
    let message = format!("no kind of stage is called {}", quoted(&uses.text));
    let problem = Problem::new("manifest::unknown_kind", uses.span, message).stage(&draft.name.text);
    let hint = problems.suggest(&uses.text, kinds.iter().map(|kind| kind.name()));
    problems.push(match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    });
    None
}

/// Holds `with` against the schema, and, if it fits, against what the kind itself checks. True if all fits.
fn check_with(
    draft: &StageDraft,
    with: &Node,
    kind: &dyn StageKind,
    schema: &Json,
    sources: &Sources,
    problems: &mut Problems,
) -> bool {
    if problems.is_full() || with.value == Value::Broken {
        return false;
    }
    let at = draft.with.as_ref().map_or(draft.name.span, |(word, _)| *word);
    let mut found = match &with.value {
        Value::Map(_) => check::check(schema, with, at),
        _ => {
            let message = format!("`with` has to be a map, found {}", with.found());
            vec![Problem::new("manifest::wrong_type", with.span, message)]
        }
    };
    if found.is_empty() && !is_broken(with) {
        let spans = spans(with);
        found = kind
            .check(&with.to_json())
            .into_iter()
            .map(|problem| {
                let span = nearest_span(&spans, &problem.path).unwrap_or(at);
                let mut located = Problem::new("manifest::param", span, problem.message);
                located.hint = problem.hint;
                located
            })
            .collect();
    }
    let fits = found.is_empty();
    for mut problem in found {
        let written = sources.slice(problem.span).trim_matches(['"', '\'']);
        if problem.hint.is_none() && written.contains("${") {
            problem.hint = Some(format!("it comes from {}", quoted(written)));
        }
        problems.push(problem.stage(&draft.name.text));
    }
    fits
}

fn is_broken(node: &Node) -> bool {
    match &node.value {
        Value::Broken => true,
        Value::List(items) => items.iter().any(is_broken),
        Value::Map(entries) => entries.iter().any(|(_, node)| is_broken(node)),
        _ => false,
    }
}

/// The span of the parameter at a dotted path, or of the nearest one around it.
fn nearest_span(spans: &BTreeMap<String, Span>, path: &str) -> Option<Span> {
    let mut path = path;
    loop {
        if let Some(span) = spans.get(path) {
            return Some(*span);
        }
        path = path.rsplit_once('.')?.0;
    }
}

/// Where each parameter stands, by dotted path: single values at the value, maps and lists at their key.
fn spans(with: &Node) -> BTreeMap<String, Span> {
    fn walk(node: &Node, path: &str, spans: &mut BTreeMap<String, Span>) {
        let join = |part: &str| if path.is_empty() { part.to_owned() } else { format!("{path}.{part}") };
        match &node.value {
            Value::Map(entries) => {
                for (key, node) in entries {
                    let path = join(&key.text);
                    let is_single = !matches!(node.value, Value::Map(_) | Value::List(_));
                    spans.insert(path.clone(), if is_single { node.span } else { key.span });
                    walk(node, &path, spans);
                }
            }
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    let path = join(&index.to_string());
                    spans.insert(path.clone(), item.span);
                    walk(item, &path, spans);
                }
            }
            _ => {}
        }
    }
    let mut spans = BTreeMap::new();
    walk(with, "", &mut spans);
    spans
}

/// Everything about a stage that a later error may want to point at.
fn places(draft: &StageDraft, edges: &[Edge], with: &Node, sources: &Sources) -> BTreeMap<String, Place> {
    let mut spans_by_path = BTreeMap::from([(String::new(), draft.name.span)]);
    if let Some(uses) = &draft.uses {
        spans_by_path.insert("uses".to_owned(), uses.span);
    }
    if let Some((word, _)) = &draft.needs {
        spans_by_path.insert("needs".to_owned(), *word);
    }
    spans_by_path.extend(edges.iter().map(|edge| (format!("needs.{}", edge.slot), edge.span)));
    spans_by_path.extend(spans(with));
    spans_by_path.into_iter().map(|(path, span)| (path, sources.place(span))).collect()
}

#[cfg(test)]
mod tests;
