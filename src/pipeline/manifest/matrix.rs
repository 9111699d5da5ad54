//! `matrix:` of a stage: one node per combination of its axes, and which nodes a need then means.
//!
//! A stage without a matrix collects all nodes of a stage with one. Where both have axes of the same name,
//! a node takes those that agree with it on them: `answers` with the same matrix as `adapter` takes, node by
//! node, the adapter of its own combination.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::manifest::document::{Entries, StageDraft, is_name};
use crate::manifest::interpolate::Resolver;
use crate::manifest::needs::Edge;
use crate::manifest::node::{Node, Value, find};
use crate::manifest::problem::{Problem, Problems, quoted};
use crate::stage::{Arity, StageKind};

/// Most nodes that the matrices of one manifest may make.
pub(crate) const NODES_MAX: usize = 50_000;
/// Most axes of a matrix, or params of a sweep.
pub(crate) const AXES_MAX: usize = 32;
/// Longest value of an axis, as JSON.
const VALUE_BYTES_MAX: usize = 4096;
/// Longest part of a node's name that comes from one value.
const VALUE_CHARS_MAX: usize = 24;

/// One combination of the values of a matrix, by axis; empty for a stage without a matrix.
pub(crate) type Combination = Entries;

/// The combinations of a stage, the last axis changing fastest; a single empty one if it has no matrix. They
/// are taken out of `room`, the nodes the manifest may still have.
pub(crate) fn combinations(
    draft: &StageDraft,
    resolver: &mut Resolver<'_>,
    room: &mut usize,
) -> Vec<Combination> {
    let Some((word, node)) = &draft.matrix else { return vec![Vec::new()] };
    let resolved = resolver.resolve(node);
    let refused = |resolver: &mut Resolver<'_>, span, message: String| {
        let problem = Problem::new("manifest::matrix", span, message);
        resolver.tell(
            problem
                .hint("write a map from axis to a list of values: `matrix: { rank: [8, 16] }`")
                .stage(&draft.name.text),
        );
    };
    let Value::Map(axes) = resolved.value else {
        if resolved.value != Value::Broken {
            refused(resolver, *word, format!("`matrix` has to be a map, found {}", resolved.found()));
        }
        return vec![Vec::new()];
    };
    if axes.len() > AXES_MAX {
        refused(resolver, *word, format!("the matrix has more than {AXES_MAX} axes"));
        return vec![Vec::new()];
    }
    let mut combinations: Vec<Combination> = vec![Vec::new()];
    for (axis, values) in axes {
        let found = values.found();
        let values = match values.value {
            Value::List(items) if !items.is_empty() => items,
            Value::Broken => return vec![Vec::new()],
            _ => {
                refused(resolver, values.span, format!("axis `{}` needs a list, found {found}", axis.text));
                continue;
            }
        };
        if !is_name(&axis.text) {
            refused(resolver, axis.span, format!("{} cannot be the name of an axis", quoted(&axis.text)));
        }
        if combinations.len().saturating_mul(values.len()) > *room {
            refused(resolver, axis.span, format!("the manifest has more than {NODES_MAX} combinations"));
            break;
        }
        if let Some(long) = values.iter().find(|value| value.to_json().to_string().len() > VALUE_BYTES_MAX) {
            refused(resolver, long.span, format!("a value of an axis has more than {VALUE_BYTES_MAX} bytes"));
            break;
        }
        let with_value = |combination: &Combination, value: &Node| -> Combination {
            combination.iter().cloned().chain([(axis.clone(), value.clone())]).collect()
        };
        combinations = combinations
            .iter()
            .flat_map(|combination| values.iter().map(move |value| with_value(combination, value)))
            .collect();
    }
    *room -= combinations.len().min(*room);
    combinations
}

/// The names of a stage's nodes: `adapter-rank=8,seed=1`.
pub(crate) fn names(stage: &str, combinations: &[Combination]) -> Vec<String> {
    let mut taken = HashSet::new();
    combinations
        .iter()
        .map(|combination| {
            let plain = joined(stage, combination);
            let candidates = (2..).map(|count| format!("{plain}.{count}"));
            std::iter::once(plain.clone())
                .chain(candidates)
                .find(|name| taken.insert(name.clone()))
                .expect("there are endless numbers")
        })
        .collect()
}

fn joined(name: &str, combination: &[(crate::manifest::node::Key, Node)]) -> String {
    if combination.is_empty() {
        return name.to_owned();
    }
    let parts: Vec<String> =
        combination.iter().map(|(axis, value)| label(&axis.text, &value.to_json())).collect();
    format!("{name}-{}", parts.join(","))
}

/// `rank=8`, in characters that a folder's name may have.
pub(crate) fn label(axis: &str, value: &serde_json::Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
    let text: String = text.chars().take(VALUE_CHARS_MAX).map(plain).collect();
    format!("{axis}={text}")
}

/// The stages as nodes: which of them each needs.
pub(crate) struct Expansion<'a> {
    pub(crate) drafts: &'a [StageDraft],
    pub(crate) kinds: &'a [Option<&'static dyn StageKind>],
    /// By draft.
    pub(crate) combinations: &'a [Vec<Combination>],
}

/// A need of one node: the slot, and the node that fills it.
pub(crate) struct NodeNeed {
    pub(crate) slot: String,
    /// Draft and position among its combinations.
    pub(crate) node: (usize, usize),
}

impl Expansion<'_> {
    /// The needs of each node of the stage `draft`, given the edges into the stage.
    pub(crate) fn needs(&self, draft: usize, edges: &[Edge], problems: &mut Problems) -> Vec<Vec<NodeNeed>> {
        let own = &self.combinations[draft];
        let mut needs: Vec<Vec<NodeNeed>> = own.iter().map(|_| Vec::new()).collect();
        for edge in edges {
            if let Err(problem) = self.expand(draft, edge, &mut needs) {
                problems.push(problem.stage(&self.drafts[draft].name.text));
            }
        }
        needs
    }

    fn expand(&self, draft: usize, edge: &Edge, needs: &mut [Vec<NodeNeed>]) -> Result<(), Problem> {
        let (own, others) = (&self.combinations[draft], &self.combinations[edge.stage]);
        let (own_axes, other_axes) = (axes(own), axes(others));
        let shared: Vec<&str> = other_axes.iter().copied().filter(|axis| own_axes.contains(axis)).collect();
        let mut agreeing: HashMap<String, Vec<usize>> = HashMap::new();
        for (position, combination) in others.iter().enumerate() {
            agreeing.entry(values(combination, &shared)).or_default().push(position);
        }
        let takes_any = self.kinds[draft].is_none_or(|kind| {
            kind.inputs()
                .iter()
                .find(|slot| slot.name == edge.slot)
                .is_none_or(|slot| slot.arity == Arity::Any)
        });
        let needed = &self.drafts[edge.stage].name.text;
        for (combination, needs) in own.iter().zip(needs) {
            let found = agreeing.get(&values(combination, &shared)).map_or(&[][..], Vec::as_slice);
            if found.is_empty() {
                let own = joined("", combination);
                let message =
                    format!("`{needed}` has no combination that fits `{}`", own.trim_start_matches('-'));
                return Err(Problem::new("manifest::needs", edge.span, message)
                    .hint("axes of the same name have to have the same values in both stages"));
            }
            if !takes_any && found.len() != 1 {
                let message = format!(
                    "input `{}` takes one stage, and `{needed}` is {} by its matrix",
                    edge.slot,
                    found.len()
                );
                return Err(Problem::new("manifest::needs", edge.span, message).hint(format!(
                    "give `{}` the same `matrix`: each of its nodes then takes the one with the same values",
                    self.drafts[draft].name.text
                )));
            }
            let is_open = |axis: &str| !shared.contains(&axis);
            let rests: Vec<Combination> = found
                .iter()
                .map(|&other| others[other].iter().filter(|(axis, _)| is_open(&axis.text)).cloned().collect())
                .collect();
            let slots = names(&edge.slot, &rests);
            let nodes = slots.into_iter().zip(found);
            needs.extend(nodes.map(|(slot, &position)| NodeNeed { slot, node: (edge.stage, position) }));
        }
        Ok(())
    }
}

fn axes(combinations: &[Combination]) -> Vec<&str> {
    combinations.first().into_iter().flatten().map(|(axis, _)| axis.text.as_str()).collect()
}

/// The values on some axes, as a key for comparing.
fn values(combination: &Combination, axes: &[&str]) -> String {
    let values: BTreeMap<&str, serde_json::Value> = axes
        .iter()
        .filter_map(|axis| find(combination, axis).map(|value| (*axis, value.to_json())))
        .collect();
    serde_json::to_string(&values).expect("texts and numbers always have a JSON form")
}
