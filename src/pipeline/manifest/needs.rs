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
    let written = read(draft, &mut found);
    let mut edges = Vec::new();
    match (kind, written) {
        (Some(kind), Some(Written::Listed(list))) => {
            let list = known(list, names, problems, &draft.name.text);
            edges = place_list(kind, draft, list, names, &mut found);
        }
        (Some(kind), Some(Written::ByKey(entries))) => {
            edges = place_map(kind, entries, names, problems, draft, &mut found);
        }
        // Without a kind there are no slots; the names are checked all the same.
        (None, Some(Written::Listed(list))) => {
            edges = by_name(known(list, names, problems, &draft.name.text), names)
        }
        (None, Some(Written::ByKey(entries))) => {
            for (_, needs) in entries {
                let list = match needs {
                    KeyNeeds::One(text) => vec![text],
                    KeyNeeds::List(list) => list,
                };
                edges.extend(by_name(known(list, names, problems, &draft.name.text), names));
            }
        }
        (_, None) => {}
    }
    refuse_same_slot(&edges, &mut found);
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

fn by_name(list: Vec<Text>, names: &StageNames<'_>) -> Vec<Edge> {
    list.iter().map(|text| edge(&text.text, text, names)).collect()
}

/// Places names that come without a slot.
fn place_list(
    kind: &dyn StageKind,
    draft: &StageDraft,
    list: Vec<Text>,
    names: &StageNames<'_>,
    found: &mut Vec<Problem>,
) -> Vec<Edge> {
    let slots = kind.inputs();
    let takes_any = slots.iter().any(|slot| slot.arity == Arity::Any);
    let single = <&[InputSlot; 1]>::try_from(slots).ok().map(|[slot]| slot).filter(|_| !takes_any);
    let written = draft.needs.as_ref().map_or(0, |(_, node)| match &node.value {
        Value::List(items) => items.len(),
        _ => 1,
    });
    if let (Some((_, node)), true) = (&draft.needs, slots.is_empty() && written > 0) {
        let message = format!("a `{}` stage takes no input", kind.name());
        found.push(Problem::new("manifest::unknown_slot", node.span, message).hint("remove `needs`"));
        return Vec::new();
    }
    let mut edges = Vec::new();
    let mut rest = Vec::new();
    for text in &list {
        let slot = slots.iter().find(|slot| slot.name == text.text && slot.arity != Arity::Any);
        match (single, slot) {
            (Some(slot), _) => edges.push(edge(slot.name, text, names)),
            (None, Some(slot)) => edges.push(edge(slot.name, text, names)),
            (None, None) => rest.push(text),
        }
    }
    let empty = empty_slots(slots, &edges);
    let is_placed = (takes_any || rest.is_empty()) && (empty.is_empty() || written == 0);
    if list.len() < written {
        // A name in it is wrong; what is missing follows from that.
    } else if let (Some(slot), true) = (single, edges.len() > 1) {
        let message =
            format!("a `{}` stage takes one input, `{}`, found {}", kind.name(), slot.name, edges.len());
        let span = draft.needs.as_ref().map_or(draft.name.span, |(_, node)| node.span);
        found.push(Problem::new("manifest::needs", span, message));
        return Vec::new();
    } else if is_placed {
        found.extend(empty.iter().map(|slot| missing(kind, slot, draft)));
    } else {
        found.push(unplaced(kind, draft, &edges, &empty, &rest, names));
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
                edges.extend(by_name(known(list, names, problems, &draft.name.text), names));
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

fn empty_slots(slots: &'static [InputSlot], edges: &[Edge]) -> Vec<&'static InputSlot> {
    let is_empty =
        |slot: &&InputSlot| slot.arity == Arity::One && !edges.iter().any(|edge| edge.slot == slot.name);
    slots.iter().filter(is_empty).collect()
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
    let message = format!("input `{}` of a `{}` stage is missing", slot.name, kind.name());
    let doc = slot.doc.trim_end_matches('.');
    Problem::new("manifest::missing_need", span, message)
        .hint(format!("add `{}: <stage>` to `needs`: {doc}", slot.name))
}

fn unknown_slot(kind: &dyn StageKind, key: &Key) -> Problem {
    let message = format!("a `{}` stage has no input {}", kind.name(), quoted(&key.text));
    let problem = Problem::new("manifest::unknown_slot", key.span, message);
    match suggestion(&key.text, kind.inputs().iter().map(|slot| slot.name)) {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

/// Names that could go into more than one slot: shows the map to write, the open slots filled in order.
fn unplaced(
    kind: &dyn StageKind,
    draft: &StageDraft,
    edges: &[Edge],
    empty: &[&InputSlot],
    rest: &[&Text],
    names: &StageNames<'_>,
) -> Problem {
    let mut rest = rest.iter();
    let takes_any = kind.inputs().iter().any(|slot| slot.arity == Arity::Any);
    let mut entries: Vec<String> =
        edges.iter().map(|edge| format!("{}: {}", edge.slot, names.ordered[edge.stage])).collect();
    let open = kind.inputs().iter().filter(|slot| {
        empty.iter().any(|empty| empty.name == slot.name)
            || (slot.arity == Arity::Optional && !edges.iter().any(|edge| edge.slot == slot.name))
    });
    for slot in open {
        match rest.next() {
            Some(text) => entries.push(format!("{}: {}", slot.name, text.text)),
            None if slot.arity == Arity::One => entries.push(format!("{}: <stage>", slot.name)),
            None => {}
        }
    }
    if takes_any {
        entries.extend(rest.map(|text| format!("{0}: {0}", text.text)));
    }
    let message = format!("it is not clear which input of a `{}` stage each of these fills", kind.name());
    let span = draft.needs.as_ref().map_or(draft.name.span, |(_, node)| node.span);
    Problem::new("manifest::needs", span, message)
        .hint(format!("say it: `needs: {{ {} }}`", entries.join(", ")))
}
