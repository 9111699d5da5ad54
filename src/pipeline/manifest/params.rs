//! The params of a run: the manifest's defaults, then a profile, then params files, then `--set`, each laid
//! over what was there. An override replaces the whole param, a map too (one provider is not a few words of
//! another); `--set a.b=1` reaches inside one. What no default names cannot be overridden: it would change
//! nothing and hide a typing error.

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
            .map(|root| optional_map(root, "a params file", problems))
            .unwrap_or_default();
        check_names(params, &entries, problems);
        lay(params, entries);
    }
    for (path, value) in &overrides.set {
        let text = format!("--set {path}={value}");
        let value_start = text.len() - value.len();
        let file = sources.add(COMMAND_LINE, text);
        if let Some(node) = set_value(file, value, value_start, problems) {
            let at = |range: std::ops::Range<usize>| {
                Span::new(file, "--set ".len() + range.start.."--set ".len() + range.end)
            };
            set(params, &at, path, node, problems);
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
    for (_, entries) in &document.profiles {
        check_names(&document.params, entries, problems);
    }
    for (name, entries) in std::mem::take(&mut document.profiles) {
        if chosen == Some(name.text.as_str()) {
            lay(&mut document.params, entries);
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

/// Sets the param at the dotted `path`; `at` says where a part of the path stands.
pub(crate) fn set(
    params: &mut Entries,
    at: &dyn Fn(std::ops::Range<usize>) -> Span,
    path: &str,
    value: Node,
    problems: &mut Problems,
) {
    let mut below = params;
    let mut start = 0;
    let mut parts = path.split('.').peekable();
    while let Some(part) = parts.next() {
        let key = Key { text: part.to_owned(), span: at(start..start + part.len()) };
        start += part.len() + 1;
        if parts.peek().is_none() {
            let entry = vec![(key, value)];
            check_names(below, &entry, problems);
            return lay(below, entry);
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

/// Tells every name in `above` that `below` does not have.
fn check_names(below: &Entries, above: &Entries, problems: &mut Problems) {
    for ((key, _), position) in above.iter().zip(positions(below, above)) {
        if position.is_none() {
            let message = format!("no param {} to override", quoted(&key.text));
            let problem = Problem::new("manifest::unknown_param", key.span, message);
            let hint = problems.suggest(&key.text, below.iter().map(|(key, _)| key.text.as_str()));
            problems.push(problem.hint(hint.unwrap_or_else(|| "the manifest has no `params`".to_owned())));
        }
    }
}

/// Lays `above` over `below`; names that `below` does not have are left out.
fn lay(below: &mut Entries, above: Entries) {
    let positions = positions(below, &above);
    for ((_, node), position) in above.into_iter().zip(positions) {
        if let Some(position) = position {
            below[position].1 = node;
        }
    }
}

/// Where in `below` each key of `above` is.
fn positions(below: &Entries, above: &Entries) -> Vec<Option<usize>> {
    const FEW: usize = 8;
    if above.len() <= FEW {
        let position = |name: &str| below.iter().position(|(key, _)| key.text == name);
        return above.iter().map(|(key, _)| position(&key.text)).collect();
    }
    let index: HashMap<&str, usize> =
        below.iter().enumerate().map(|(index, (key, _))| (key.text.as_str(), index)).collect();
    above.iter().map(|(key, _)| index.get(key.text.as_str()).copied()).collect()
}
