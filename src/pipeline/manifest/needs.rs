//! Which stage fills which input. `needs` is a name, a list of names, or a map from input to name; all three
//! become edges that name an input slot of the kind.
//!
//! Names alone are enough where they can mean one thing only: a kind with a single slot, a stage named like
//! the slot it fills, or a kind that takes any number. Everything else is an error that shows the map to
//! write; nothing is guessed.

use std::collections::{BTreeSet, HashMap};

use crate::manifest::document::{StageDraft, Text, is_name};
use crate::manifest::node::{Key, Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted, suggestion};
use crate::manifest::source::Span;
use crate::stage::{Arity, InputSlot, StageKind};

/// One stage that fills one slot.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Edge {
    /// The slot's name, or for a slot of any number the key in `needs` or the stage's name.
    pub(crate) slot: String,
    /// Position of the stage in the manifest.
    pub(crate) stage: usize,
    /// Where it is written.
    pub(crate) span: Span,
}

/// The stages of a manifest by name.
pub(crate) struct StageNames<'a> {
    /// In the order of the manifest.
    pub(crate) ordered: Vec<&'a str>,
    /// Position of each.
    pub(crate) index: HashMap<&'a str, usize>,
}

/// `needs` as it is written.
enum Written {
    Listed(Vec<Text>),
    ByKey(Vec<(Key, KeyNeeds)>),
}

enum KeyNeeds {
    One(Text),
    List(Vec<Text>),
}

/// The edges into `draft`. Whatever cannot be placed is told.
pub(crate) fn resolve(
    draft: &StageDraft,
    kind: Option<&dyn StageKind>,
    names: &StageNames<'_>,
    problems: &mut Problems,
) -> Vec<Edge> {
    let mut found = Vec::new();
    let edges = match (kind, read(draft, &mut found)) {
        (_, None) => Vec::new(),
        (_, Some(Written::Listed(list))) => {
            let count = list.len();
            let list = known(list, names, problems, &draft.name.text);
            match kind {
                Some(kind) if list.len() == count => place_list(kind, draft, &list, names, &mut found),
                // Without a kind there are no slots, and with a wrong name there is no telling.
                _ => by_name(&list, names),
            }
        }
        (Some(kind), Some(Written::ByKey(entries))) => {
            place_map(kind, entries, names, problems, draft, &mut found)
        }
        (None, Some(Written::ByKey(entries))) => {
            let lists = entries.into_iter().map(|(_, needs)| match needs {
                KeyNeeds::One(text) => vec![text],
                KeyNeeds::List(list) => list,
            });
            by_name(&known(lists.flatten().collect(), names, problems, &draft.name.text), names)
        }
    };
    if kind.is_some() {
        refuse_same_slot(&edges, &mut found);
    }
    for problem in found {
        problems.push(problem.stage(&draft.name.text));
    }
    edges
}

fn read(draft: &StageDraft, found: &mut Vec<Problem>) -> Option<Written> {
    let Some((_, node)) = &draft.needs else { return Some(Written::Listed(Vec::new())) };
    match &node.value {
        Value::Map(entries) => {
            let entries = entries.iter().filter_map(|(key, node)| {
                let needs = match &node.value {
                    Value::List(_) => KeyNeeds::List(names(node, found)?),
                    _ => KeyNeeds::One(names(node, found)?.pop()?),
                };
                Some((key.clone(), needs))
            });
            Some(Written::ByKey(entries.collect()))
        }
        _ => names(node, found).map(Written::Listed),
    }
}

/// A name or a list of names.
fn names(node: &Node, found: &mut Vec<Problem>) -> Option<Vec<Text>> {
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let mut texts = Vec::with_capacity(items.len());
    for item in items {
        let Value::String(text) = &item.value else {
            let message = format!("`needs` names stages, found {}", item.found());
            found.push(
                Problem::new("manifest::wrong_type", item.span, message)
                    .hint("write a stage's name, a list of names, or a map from input to name"),
            );
            return None;
        };
        texts.push(Text { text: text.clone(), span: item.span });
    }
    Some(texts)
}

/// Those of `list` that are stages; the others are told.
fn known(list: Vec<Text>, names: &StageNames<'_>, problems: &mut Problems, stage: &str) -> Vec<Text> {
    let mut kept = Vec::with_capacity(list.len());
    for text in list {
        if names.index.contains_key(text.text.as_str()) {
            kept.push(text);
            continue;
        }
        let problem =
            Problem::new("manifest::unknown_stage", text.span, format!("no stage {}", quoted(&text.text)));
        let problem = match problems.suggest(&text.text, names.ordered.iter().copied()) {
            Some(hint) => problem.hint(hint),
            None => problem,
        };
        problems.push(problem.stage(stage));
    }
    kept
}

fn edge(slot: &str, text: &Text, names: &StageNames<'_>) -> Edge {
    Edge { slot: slot.to_owned(), stage: names.index[text.text.as_str()], span: text.span }
}

fn by_name(list: &[Text], names: &StageNames<'_>) -> Vec<Edge> {
    list.iter().map(|text| edge(&text.text, text, names)).collect()
}

/// Places names that come without a slot.
fn place_list(
    kind: &dyn StageKind,
    draft: &StageDraft,
    list: &[Text],
    names: &StageNames<'_>,
    found: &mut Vec<Problem>,
) -> Vec<Edge> {
    let slots = kind.inputs();
    let takes_any = slots.iter().any(|slot| slot.arity == Arity::Any);
    let at = draft.needs.as_ref().map_or(draft.name.span, |(_, node)| node.span);
    if slots.is_empty() && !list.is_empty() {
        let message = format!("`{}` takes no input", kind.name());
        found.push(Problem::new("manifest::unknown_slot", at, message).hint("remove `needs`"));
        return Vec::new();
    }
    let single = match slots {
        [slot] if !takes_any => Some(slot),
        _ => None,
    };
    let mut edges = Vec::new();
    let mut rest = Vec::new();
    for text in list {
        let same_name = || slots.iter().find(|slot| slot.name == text.text && slot.arity != Arity::Any);
        match single.or_else(same_name) {
            Some(slot) => edges.push(edge(slot.name, text, names)),
            None => rest.push(text),
        }
    }
    if let Some(slot) = single.filter(|_| edges.len() > 1) {
        let message = format!("`{}` takes one input, `{}`, found {}", kind.name(), slot.name, edges.len());
        found.push(Problem::new("manifest::needs", at, message));
        return Vec::new();
    }
    let is_empty =
        |slot: &&InputSlot| slot.arity == Arity::One && !edges.iter().any(|edge| edge.slot == slot.name);
    let mut empty: Vec<&InputSlot> = slots.iter().filter(is_empty).collect();
    if let ([slot], [text]) = (empty.as_slice(), rest.as_slice()) {
        edges.push(edge(slot.name, text, names));
        empty.clear();
        rest.clear();
    }
    if list.is_empty() {
        found.extend(empty.iter().map(|slot| missing(kind, slot, draft)));
    } else if !empty.is_empty() || (!takes_any && !rest.is_empty()) {
        found.push(unplaced(kind, at, &edges, &rest, names));
    }
    edges.extend(rest.into_iter().map(|text| edge(&text.text, text, names)));
    edges
}

/// Places names that come with a slot.
fn place_map(
    kind: &dyn StageKind,
    entries: Vec<(Key, KeyNeeds)>,
    names: &StageNames<'_>,
    problems: &mut Problems,
    draft: &StageDraft,
    found: &mut Vec<Problem>,
) -> Vec<Edge> {
    let slots = kind.inputs();
    let takes_any = slots.iter().any(|slot| slot.arity == Arity::Any);
    let mut edges = Vec::new();
    let mut given = BTreeSet::new();
    for (key, needs) in entries {
        let slot = slots.iter().find(|slot| slot.name == key.text);
        given.insert(key.text.clone());
        let is_any = slot.map_or(takes_any, |slot| slot.arity == Arity::Any);
        if slot.is_none() && !takes_any {
            found.push(unknown_slot(kind, &key));
            continue;
        }
        if !is_name(&key.text) {
            let message = format!("{} cannot be the name of an input", quoted(&key.text));
            found.push(
                Problem::new("manifest::bad_name", key.span, message)
                    .hint("use letters, digits, `-` and `_`, at most 100 of them"),
            );
            continue;
        }
        match needs {
            KeyNeeds::List(list) if is_any => {
                edges.extend(by_name(&known(list, names, problems, &draft.name.text), names));
            }
            KeyNeeds::List(list) if list.len() != 1 => {
                let message = format!("input `{}` takes one stage, found {}", key.text, list.len());
                found.push(Problem::new("manifest::needs", key.span, message));
            }
            KeyNeeds::List(list) => {
                let list = known(list, names, problems, &draft.name.text);
                edges.extend(list.iter().map(|text| edge(&key.text, text, names)));
            }
            KeyNeeds::One(text) => {
                let list = known(vec![text], names, problems, &draft.name.text);
                edges.extend(list.iter().map(|text| edge(&key.text, text, names)));
            }
        }
    }
    let is_empty = |slot: &&InputSlot| slot.arity == Arity::One && !given.contains(slot.name);
    found.extend(slots.iter().filter(is_empty).map(|slot| missing(kind, slot, draft)));
    edges
}

fn refuse_same_slot(edges: &[Edge], found: &mut Vec<Problem>) {
    let mut seen = BTreeSet::new();
    for edge in edges {
        if !seen.insert(edge.slot.as_str()) {
            let message = format!("two inputs are called {}", quoted(&edge.slot));
            found.push(
                Problem::new("manifest::needs", edge.span, message)
                    .hint("write `needs` as a map and give each its own name"),
            );
        }
    }
}

fn missing(kind: &dyn StageKind, slot: &InputSlot, draft: &StageDraft) -> Problem {
    let span = draft.needs.as_ref().map_or(draft.name.span, |(word, _)| *word);
    let message = format!("input `{}` of `{}` is missing", slot.name, kind.name());
    let doc = slot.doc.trim_end_matches('.');
    Problem::new("manifest::missing_need", span, message)
        .hint(format!("add `{}: <stage>` to `needs`: {doc}", slot.name))
}

fn unknown_slot(kind: &dyn StageKind, key: &Key) -> Problem {
    let message = format!("`{}` has no input {}", kind.name(), quoted(&key.text));
    let problem = Problem::new("manifest::unknown_slot", key.span, message);
    match suggestion(&key.text, kind.inputs().iter().map(|slot| slot.name)) {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

/// Names that could go into more than one slot: shows the map to write, the open slots filled in order.
fn unplaced(
    kind: &dyn StageKind,
    at: Span,
    edges: &[Edge],
    rest: &[&Text],
    names: &StageNames<'_>,
) -> Problem {
    let mut rest = rest.iter();
    let mut entries = Vec::new();
    for slot in kind.inputs() {
        let filled = edges.iter().find(|edge| edge.slot == slot.name).map(|edge| names.ordered[edge.stage]);
        let next = || rest.next().map(|text| text.text.as_str());
        let stage = match slot.arity {
            Arity::One => filled.or_else(next).or(Some("<stage>")),
            Arity::Optional => filled.or_else(next),
            Arity::Any => None,
        };
        entries.extend(stage.map(|stage| format!("{}: {stage}", slot.name)));
    }
    if kind.inputs().iter().any(|slot| slot.arity == Arity::Any) {
        entries.extend(rest.map(|text| format!("{0}: {0}", text.text)));
    }
    let message = format!("it is not clear which input of `{}` each of these fills", kind.name());
    Problem::new("manifest::needs", at, message)
        .hint(format!("say it: `needs: {{ {} }}`", entries.join(", ")))
}
