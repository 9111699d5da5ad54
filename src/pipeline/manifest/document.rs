//! The words of a manifest file: which keys there are and what shape they have. An unknown word is an error
//! with a suggestion. What the words refer to (params, stages, kinds) is not looked at here.

use std::collections::HashMap;

use crate::manifest::node::{Key, Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted};
use crate::manifest::source::Span;

/// The words at the top of a file.
pub(crate) const WORDS: [&str; 7] =
    ["name", "description", "params", "profiles", "include", "stages", "sweep"];
/// The words of a stage.
pub(crate) const STAGE_WORDS: [&str; 8] =
    ["uses", "needs", "with", "matrix", "resources", "timeout", "retries", "description"];
/// What a name may be made of: it becomes a folder in the store.
pub(crate) const NAME_PATTERN: &str = "^[A-Za-z0-9_-]{1,100}$";

/// Most profiles of a file: each is checked against all params.
const PROFILES_MAX: usize = 200;

/// Entries of a map.
pub(crate) type Entries = Vec<(Key, Node)>;

/// One manifest file, or several after their includes are merged.
#[derive(Debug, Default)]
pub(crate) struct Document {
    pub(crate) name: Option<String>,
    pub(crate) params: Entries,
    pub(crate) profiles: Vec<(Key, Entries)>,
    pub(crate) stages: Vec<StageDraft>,
    /// The value, with the span of the word `sweep`.
    pub(crate) sweep: Option<(Span, Node)>,
}

/// A stage as it is written.
#[derive(Debug)]
pub(crate) struct StageDraft {
    pub(crate) name: Key,
    pub(crate) uses: Option<Text>,
    /// The value, with the span of the word `needs`.
    pub(crate) needs: Option<(Span, Node)>,
    /// The value, with the span of the word `with`.
    pub(crate) with: Option<(Span, Node)>,
    /// The value, with the span of the word `matrix`.
    pub(crate) matrix: Option<(Span, Node)>,
    /// `resources`, `timeout` and `retries`, those that are given.
    pub(crate) execution: Entries,
}

/// A text and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) text: String,
    pub(crate) span: Span,
}

/// A file's own content, and the files it includes.
#[derive(Debug, Default)]
pub(crate) struct ReadFile {
    pub(crate) document: Document,
    pub(crate) includes: Vec<Text>,
}

/// Sorts the content of a file under its words.
pub(crate) fn read(root: Node, problems: &mut Problems) -> ReadFile {
    let mut file = ReadFile::default();
    if root.value == Value::Null {
        return file;
    }
    let Some(entries) = map(root, "a manifest", problems) else { return file };
    for (key, node) in entries {
        let document = &mut file.document;
        match key.text.as_str() {
            "name" => {
                document.name = text(node, "name", problems).and_then(|name| checked_name(name, problems));
            }
            "description" => drop(text(node, "description", problems)),
            "params" => document.params = params(node, problems),
            "profiles" => {
                let profiles = optional_map(node, "`profiles`", problems);
                if profiles.len() > PROFILES_MAX {
                    let message = format!("more than {PROFILES_MAX} profiles");
                    problems.push(Problem::new("manifest::too_large", key.span, message));
                }
                for (name, node) in profiles.into_iter().take(PROFILES_MAX) {
                    let what = format!("profile `{}`", name.text);
                    let entries = optional_map(node, &what, problems);
                    document.profiles.push((name, entries));
                }
            }
            "include" => file.includes = texts(node, "include", problems),
            "stages" => {
                for (name, node) in optional_map(node, "`stages`", problems) {
                    document.stages.extend(stage(name, node, problems));
                }
            }
            "sweep" => document.sweep = (node.value != Value::Null).then_some((key.span, node)),
            _ => {
                let problem = unknown_word(&key, &WORDS, problems);
                problems.push(problem);
            }
        }
    }
    file
}

impl Document {
    /// Lays `top` over this: its params, its profiles' params and its stages win, each by name.
    pub(crate) fn overlay(&mut self, top: Self) {
        self.name = top.name.or(self.name.take());
        self.sweep = top.sweep.or(self.sweep.take());
        overlay(&mut self.params, top.params, |(key, _)| &key.text, |below, above| *below = above);
        overlay(
            &mut self.profiles,
            top.profiles,
            |(name, _)| &name.text,
            |(_, below), (_, above)| overlay(below, above, |(key, _)| &key.text, |old, new| *old = new),
        );
        overlay(&mut self.stages, top.stages, |stage| &stage.name.text, |below, above| *below = above);
    }
}

fn overlay<T>(below: &mut Vec<T>, above: Vec<T>, name: impl Fn(&T) -> &String, merge: impl Fn(&mut T, T)) {
    let index: HashMap<String, usize> =
        below.iter().enumerate().map(|(index, entry)| (name(entry).clone(), index)).collect();
    for entry in above {
        match index.get(name(&entry)) {
            Some(&index) => merge(&mut below[index], entry),
            None => below.push(entry),
        }
    }
}

fn stage(name: Key, node: Node, problems: &mut Problems) -> Option<StageDraft> {
    let name = checked_name(Text { text: name.text, span: name.span }, problems)
        .map(|text| Key { text, span: name.span })?;
    let mut draft =
        StageDraft { name, uses: None, needs: None, with: None, matrix: None, execution: Vec::new() };
    let mut has_uses = !matches!(node.value, Value::Map(_) | Value::Null);
    let entries = optional_map(node, &format!("stage `{}`", draft.name.text), problems);
    for (key, node) in entries {
        let is_given = node.value != Value::Null;
        match key.text.as_str() {
            "uses" => {
                has_uses = true;
                let uses = string(node).map_err(|node| expected(&node, "uses", "the kind of the stage"));
                match uses {
                    Ok(text) => draft.uses = Some(text),
                    Err(problem) => problems.push(problem.stage(&draft.name.text)),
                }
            }
            "needs" => draft.needs = is_given.then_some((key.span, node)),
            "with" => draft.with = is_given.then_some((key.span, node)),
            "resources" | "timeout" | "retries" if is_given => draft.execution.push((key, node)),
            "resources" | "timeout" | "retries" => {}
            "matrix" => draft.matrix = is_given.then_some((key.span, node)),
            "description" => drop(text(node, "description", problems)),
            _ => {
                let problem = unknown_word(&key, &STAGE_WORDS, problems);
                problems.push(problem.stage(&draft.name.text));
            }
        }
    }
    if !has_uses {
        let message = format!("stage `{}` does not say what it is", draft.name.text);
        problems.push(
            Problem::new("manifest::missing_key", draft.name.span, message)
                .hint("add `uses`, the kind of the stage")
                .stage(&draft.name.text),
        );
    }
    Some(draft)
}

fn params(node: Node, problems: &mut Problems) -> Entries {
    let entries = optional_map(node, "`params`", problems);
    for (key, _) in &entries {
        if !is_name(&key.text) {
            let message = format!("{} cannot be the name of a param", quoted(&key.text));
            problems.push(
                Problem::new("manifest::bad_name", key.span, message)
                    .hint("use letters, digits, `-` and `_`, so that `${params.name}` can reach it"),
            );
        }
    }
    entries
}

fn checked_name(name: Text, problems: &mut Problems) -> Option<String> {
    if is_name(&name.text) {
        return Some(name.text);
    }
    problems.push(
        Problem::new("manifest::bad_name", name.span, format!("{} cannot be a name", quoted(&name.text)))
            .hint("use letters, digits, `-` and `_`, at most 100 of them"),
    );
    None
}

/// True for what may name a stage, a param or an input: it becomes a folder in the store.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=100).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn unknown_word(key: &Key, known: &[&str], problems: &Problems) -> Problem {
    let problem =
        Problem::new("manifest::unknown_key", key.span, format!("unknown key {}", quoted(&key.text)));
    match problems.suggest(&key.text, known.iter().copied()) {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

fn expected(node: &Node, what: &str, wanted: &str) -> Problem {
    Problem::new("manifest::wrong_type", node.span, format!("`{what}` is {wanted}, found {}", node.found()))
}

/// The entries of a map that may be left empty.
pub(crate) fn optional_map(node: Node, what: &str, problems: &mut Problems) -> Entries {
    match node.value {
        Value::Null | Value::Broken => Vec::new(),
        _ => map(node, what, problems).unwrap_or_default(),
    }
}

fn map(node: Node, what: &str, problems: &mut Problems) -> Option<Entries> {
    if let Value::Map(entries) = node.value {
        return Some(entries);
    }
    let message = format!("{} has to be a map, found {}", what, node.found());
    problems.push(Problem::new("manifest::wrong_type", node.span, message));
    None
}

fn string(node: Node) -> Result<Text, Node> {
    match node.value {
        Value::String(text) => Ok(Text { text, span: node.span }),
        _ => Err(node),
    }
}

fn text(node: Node, what: &str, problems: &mut Problems) -> Option<Text> {
    string(node).map_err(|node| problems.push(expected(&node, what, "a text"))).ok()
}

fn texts(node: Node, what: &str, problems: &mut Problems) -> Vec<Text> {
    match node.value {
        Value::Null | Value::Broken => Vec::new(),
        Value::List(items) => items.into_iter().filter_map(|item| text(item, what, problems)).collect(),
        _ => string(node)
            .map_err(|node| problems.push(expected(&node, what, "a path or a list of paths")))
            .into_iter()
            .collect(),
    }
}
