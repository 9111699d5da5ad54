//! The params of a run: the manifest's defaults, then a profile, then params files, then `--set`, each laid
//! over what was there. A map lands on a map key by key; anything else replaces. What no default names
//! cannot be overridden: it would change nothing and hide a typing error.

use std::collections::HashMap;

use crate::manifest::document::{Document, Entries, optional_map};
use crate::manifest::node::{Key, Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted};
use crate::manifest::source::{FileId, Sources, Span};
use crate::manifest::{Overrides, include, yaml};

/// The name under which the words of the command line appear in problems.
const COMMAND_LINE: &str = "command line";

/// Lays everything that overrides the defaults over `document.params`.
pub(crate) fn apply(
    document: &mut Document,
    overrides: &Overrides,
    sources: &mut Sources,
    problems: &mut Problems,
) {
    apply_profiles(document, overrides.profile.as_deref(), sources, problems);
    let params = &mut document.params;
    for path in &overrides.params_files {
        let entries = sources
            .read(path, None, problems)
            .and_then(|file| include::parse(file, sources, problems))
            .map(|root| optional_map(root, "a params file", problems));
        lay(params, entries.unwrap_or_default(), "", problems);
    }
    for (path, value) in &overrides.set {
        let text = format!("--set {path}={value}");
        let value_start = text.len() - value.len();
        let file = sources.add(COMMAND_LINE, text);
        if let Some(node) = set_value(file, value, value_start, problems) {
            set(params, file, path, node, problems);
        }
    }
}

/// Checks every profile against the params, and lays the chosen one over them.
fn apply_profiles(
    document: &mut Document,
    chosen: Option<&str>,
    sources: &mut Sources,
    problems: &mut Problems,
) {
    let is_known = chosen.is_none_or(|name| document.profiles.iter().any(|(key, _)| key.text == name));
    if let Some(name) = chosen.filter(|_| !is_known) {
        let text = format!("--profile {name}");
        let span = text.len() - name.len()..text.len();
        let span = Span::new(sources.add(COMMAND_LINE, text), span);
        let problem = Problem::new("manifest::unknown_profile", span, format!("no profile {}", quoted(name)));
        let hint = problems.suggest(name, document.profiles.iter().map(|(key, _)| key.text.as_str()));
        problems.push(problem.hint(hint.unwrap_or_else(|| "the manifest has no `profiles`".to_owned())));
    }
    let defaults = document.params.clone();
    for (name, entries) in std::mem::take(&mut document.profiles) {
        if chosen == Some(name.text.as_str()) {
            lay(&mut document.params, entries, "", problems);
        } else {
            lay(&mut defaults.clone(), entries, "", problems);
        }
    }
}

/// The value of `--set name=value`: a flow list, a flow map or a quoted text is YAML; anything else is one
/// plain scalar, so that `#`, `*` and `: ` mean themselves.
fn set_value(file: FileId, text: &str, start: usize, problems: &mut Problems) -> Option<Node> {
    if text.starts_with(['[', '{', '"', '\'']) {
        return yaml::parse(file, text, start, problems);
    }
    let span = Span::new(file, start..start + text.len());
    match yaml::plain_scalar(text) {
        Ok(value) => Some(Node::new(value, span)),
        Err(message) => {
            problems.push(Problem::new("manifest::number", span, message));
            None
        }
    }
}

/// Sets the param at the dotted `path`, which stands after `--set ` in `file`.
fn set(params: &mut Entries, file: FileId, path: &str, value: Node, problems: &mut Problems) {
    let mut below = params;
    let mut start = "--set ".len();
    let mut parts = path.split('.').peekable();
    while let Some(part) = parts.next() {
        let key = Key { text: part.to_owned(), span: Span::new(file, start..start + part.len()) };
        start += part.len() + 1;
        if parts.peek().is_none() {
            return lay(below, vec![(key, value)], "", problems);
        }
        let index = below.iter().position(|(entry, _)| entry.text == part);
        let Some(index) = index.filter(|&index| matches!(below[index].1.value, Value::Map(_))) else {
            let message = match index {
                Some(_) => format!("param {} is not a map, so nothing in it can be set", quoted(part)),
                None => format!("no param {} to override", quoted(part)),
            };
            let hint = problems.suggest(part, below.iter().map(|(key, _)| key.text.as_str()));
            let problem = Problem::new("manifest::unknown_param", key.span, message);
            return problems.push(match hint.filter(|_| index.is_none()) {
                Some(hint) => problem.hint(hint),
                None => problem,
            });
        };
        let Value::Map(entries) = &mut below[index].1.value else { return };
        below = entries;
    }
}

/// Lays `above` over `below`.
fn lay(below: &mut Entries, above: Entries, prefix: &str, problems: &mut Problems) {
    let index: HashMap<String, usize> =
        below.iter().enumerate().map(|(index, (key, _))| (key.text.clone(), index)).collect();
    for (key, node) in above {
        let path = format!("{prefix}{}", key.text);
        let Some(&index) = index.get(&key.text) else {
            let problem = Problem::new(
                "manifest::unknown_param",
                key.span,
                format!("no param {} to override", quoted(&path)),
            );
            let hint = problems.suggest(&key.text, below.iter().map(|(key, _)| key.text.as_str()));
            problems.push(problem.hint(hint.unwrap_or_else(|| "the manifest has no `params`".to_owned())));
            continue;
        };
        let old = &mut below[index].1;
        match (&mut old.value, node.value) {
            (Value::Map(old), Value::Map(new)) if !old.is_empty() => {
                lay(old, new, &format!("{path}."), problems);
            }
            (_, value) => *old = Node::new(value, node.span),
        }
    }
}
