//! Fills in `${params.x}`, `${env.X}` and, in a stage with a matrix, `${matrix.x}`.
//!
//! A text that is one `${...}` and nothing else takes the value with its type; inside a longer text the
//! value is written out. `$${` means a plain `${`. Params may refer to params; a cycle is an error that shows
//! it. Filled-in values stand, for every later problem, at the place that uses them.
//!
//! Depth and total size are limited: params that double each other end in an error, not in memory.

use std::collections::{BTreeSet, HashMap};

use crate::manifest::document::Entries;
use crate::manifest::node::{Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted, suggestion};
use crate::manifest::source::{Sources, Span};

/// How deep references and values may nest, counted together.
const DEPTH_MAX: usize = 100;
/// How much filling in may produce: bytes of text, and this much for each value.
const OUTPUT_BYTES_MAX: usize = 32 * 1024 * 1024;
const NODE_BYTES: usize = 64;

/// Resolves references to one set of params.
pub(crate) struct Resolver<'a> {
    params: &'a Entries,
    index: HashMap<&'a str, usize>,
    sources: &'a Sources,
    problems: &'a mut Problems,
    /// The params being worked out, outermost first.
    active: Vec<String>,
    told_cycles: BTreeSet<BTreeSet<String>>,
    used: BTreeSet<usize>,
    output_bytes: usize,
    /// The values of the combination that is being filled in; all of them filled in already.
    matrix: Entries,
}

/// A reference, as it is written.
struct Reference<'t> {
    /// `${...}`.
    raw: &'t str,
    /// What is between the braces, in parts.
    path: Vec<&'t str>,
    /// Where it is used.
    span: Span,
}

impl<'a> Resolver<'a> {
    /// A resolver for `params`.
    pub(crate) fn new(params: &'a Entries, sources: &'a Sources, problems: &'a mut Problems) -> Self {
        let index = params.iter().enumerate().map(|(index, (key, _))| (key.text.as_str(), index)).collect();
        Self {
            params,
            index,
            sources,
            problems,
            active: Vec::new(),
            told_cycles: BTreeSet::new(),
            used: BTreeSet::new(),
            output_bytes: 0,
            matrix: Vec::new(),
        }
    }

    /// `node` with everything filled in; what cannot be is told and left broken.
    pub(crate) fn resolve(&mut self, node: &Node) -> Node {
        self.resolve_at(node, 0)
    }

    /// `node` with everything filled in for one combination of a stage's matrix.
    pub(crate) fn resolve_in(&mut self, matrix: &Entries, node: &Node) -> Node {
        self.matrix.clone_from(matrix);
        let resolved = self.resolve(node);
        self.matrix.clear();
        resolved
    }

    /// Takes a problem that came up while values were filled in.
    pub(crate) fn tell(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// Positions of the params that what was resolved so far has read, directly or through other params.
    pub(crate) fn used(&self) -> &BTreeSet<usize> {
        &self.used
    }

    /// Every param, filled in.
    pub(crate) fn all_params(&mut self) -> serde_json::Value {
        let params = self.params;
        let resolved = params.iter().map(|(key, node)| {
            let node = self.entered(&key.text, node.span, |this| this.resolve_at(node, 1));
            (key.text.clone(), node.map_or(serde_json::Value::Null, |node| node.to_json()))
        });
        serde_json::Value::Object(resolved.collect())
    }

    fn resolve_at(&mut self, node: &Node, depth: usize) -> Node {
        if let Err(problem) = self.charge(node, depth) {
            self.problems.push(problem);
            return Node::new(Value::Broken, node.span);
        }
        let value = match &node.value {
            Value::String(text) if text.contains("${") => {
                self.text(text, node.span, depth).unwrap_or(Value::Broken)
            }
            Value::List(items) => {
                Value::List(items.iter().map(|item| self.resolve_at(item, depth + 1)).collect())
            }
            Value::Map(entries) => Value::Map(
                entries.iter().map(|(key, node)| (key.clone(), self.resolve_at(node, depth + 1))).collect(),
            ),
            other => other.clone(),
        };
        Node::new(value, node.span)
    }

    fn charge(&mut self, node: &Node, depth: usize) -> Result<(), Problem> {
        if depth > DEPTH_MAX {
            let message = format!("params refer to each other more than {DEPTH_MAX} levels deep");
            return Err(Problem::new("manifest::too_deep", node.span, message));
        }
        let text_bytes = if let Value::String(text) = &node.value { text.len() } else { 0 };
        self.output_bytes += NODE_BYTES + text_bytes;
        if self.output_bytes > OUTPUT_BYTES_MAX {
            let message = "the manifest grows too large when its params are filled in";
            return Err(Problem::new("manifest::too_large", node.span, message));
        }
        Ok(())
    }

    /// A text that holds at least one `${`. `None` if something in it was wrong, and told.
    fn text(&mut self, text: &str, span: Span, depth: usize) -> Option<Value> {
        let mut written = String::new();
        let mut rest = text;
        let mut is_whole = true;
        while let Some(start) = rest.find("${") {
            if rest[..start].ends_with('$') {
                written.push_str(&rest[..start]);
                written.push('{');
                rest = &rest[start + 2..];
                continue;
            }
            written.push_str(&rest[..start]);
            let after = &rest[start..];
            let Some(end) = after.find('}') else {
                let at = self.find_raw(after, span);
                self.problems.push(
                    Problem::new("manifest::interpolation", at, "`${` is not closed")
                        .hint("close it with `}`, or write `$${` for a plain `${`"),
                );
                return None;
            };
            let raw = &after[..=end];
            let reference = self.reference(raw, span);
            let value = self.look_up(&reference, depth);
            rest = &after[end + 1..];
            match value {
                Some(node) if raw.len() == text.len() => return Some(node.value),
                Some(node) => is_whole &= self.write(&node, &reference, &mut written),
                None => is_whole = false,
            }
        }
        written.push_str(rest);
        is_whole.then_some(Value::String(written))
    }

    fn reference<'t>(&self, raw: &'t str, span: Span) -> Reference<'t> {
        let path = raw[2..raw.len() - 1].trim().split('.').map(str::trim).collect();
        Reference { raw, path, span: self.find_raw(raw, span) }
    }

    /// The part of `span` that is written as `raw`; all of it where it is written in another way.
    fn find_raw(&self, raw: &str, span: Span) -> Span {
        match self.sources.slice(span).find(raw) {
            Some(index) => Span::new(span.file, span.start + index..span.start + index + raw.len()),
            None => span,
        }
    }

    /// Writes a value into a longer text.
    fn write(&mut self, node: &Node, reference: &Reference<'_>, text: &mut String) -> bool {
        let written = match &node.value {
            Value::String(value) => value.clone(),
            Value::Bool(value) => value.to_string(),
            Value::Int(value) => value.to_string(),
            Value::Float(value) => format!("{value:?}"),
            Value::Broken => return false,
            Value::Null | Value::List(_) | Value::Map(_) => {
                let message =
                    format!("`{}` is {}, which cannot be put into a text", reference.raw, node.found());
                self.problems.push(
                    Problem::new("manifest::interpolation", reference.span, message)
                        .hint("let the reference be the whole value, or refer to a part of it"),
                );
                return false;
            }
        };
        text.push_str(&written);
        true
    }

    fn look_up(&mut self, reference: &Reference<'_>, depth: usize) -> Option<Node> {
        match reference.path.as_slice() {
            ["params", path @ ..] if !path.is_empty() => self.param(reference, path, depth),
            ["env", name] if !name.is_empty() => self.variable(reference, name),
            ["matrix", axis, path @ ..] => self.axis(reference, axis, path),
            [root, ..] => {
                let problem = Problem::new(
                    "manifest::interpolation",
                    reference.span,
                    match *root {
                        "stages" => "what another stage made cannot be used in a manifest".to_owned(),
                        _ => format!("`{}` refers to nothing", reference.raw),
                    },
                );
                self.problems.push(problem.hint(match *root {
                    "stages" => "pass results along with `needs`".to_owned(),
                    _ => format!(
                        "write `${{params.name}}` or `${{env.NAME}}`, or `${}` for a plain text",
                        reference.raw
                    ),
                }));
                None
            }
            [] => None,
        }
    }

    /// A value of the stage's combination.
    fn axis(&mut self, reference: &Reference<'_>, axis: &str, path: &[&str]) -> Option<Node> {
        if let Some((_, value)) = self.matrix.iter().find(|(key, _)| key.text == axis) {
            let value = value.clone();
            return self.inside(reference, &value, &format!("matrix.{axis}"), path);
        }
        let message = format!("`{}` refers to no axis of this stage's `matrix`", reference.raw);
        let problem = Problem::new("manifest::interpolation", reference.span, message);
        let hint = suggestion(axis, self.matrix.iter().map(|(key, _)| key.text.as_str()));
        self.problems.push(problem.hint(hint.unwrap_or_else(|| "the stage has no `matrix`".to_owned())));
        None
    }

    fn variable(&mut self, reference: &Reference<'_>, name: &str) -> Option<Node> {
        let message = match std::env::var(name) {
            Ok(value) => return Some(Node::new(Value::String(value), reference.span)),
            Err(std::env::VarError::NotPresent) => {
                format!("the environment variable {} is not set", quoted(name))
            }
            Err(std::env::VarError::NotUnicode(_)) => {
                format!("the environment variable {} is not UTF-8", quoted(name))
            }
        };
        self.problems.push(Problem::new("manifest::unknown_env", reference.span, message));
        None
    }

    /// The param at a dotted path. The parts before the last are maps, or references to maps.
    fn param(&mut self, reference: &Reference<'_>, path: &[&str], depth: usize) -> Option<Node> {
        let params = self.params;
        let Some(&index) = self.index.get(path[0]) else {
            return self.unknown(reference, path[0], "", params);
        };
        self.used.insert(index);
        let mut name = path[0].to_owned();
        let mut written = &params[index].1;
        for (position, part) in path.iter().enumerate().skip(1) {
            if matches!(&written.value, Value::String(text) if text.contains("${")) {
                let resolved =
                    self.entered(&name, reference.span, |this| this.resolve_at(written, depth + 1))?;
                return self.inside(reference, &resolved, &name, &path[position..]);
            }
            let Some(inner) = written.get(part) else {
                return self.unknown_inside(reference, written, &name, part);
            };
            name = format!("{name}.{part}");
            written = inner;
        }
        let resolved = self.entered(&name, reference.span, |this| this.resolve_at(written, depth + 1))?;
        Some(self.moved(resolved, reference.span))
    }

    /// The part at `path` of a value that is filled in already.
    fn inside(&mut self, reference: &Reference<'_>, value: &Node, name: &str, path: &[&str]) -> Option<Node> {
        let mut node = value;
        for part in path {
            match node.get(part) {
                Some(inner) => node = inner,
                None if node.value == Value::Broken => return None,
                None => return self.unknown_inside(reference, node, name, part),
            }
        }
        Some(self.moved(node.clone(), reference.span))
    }

    fn unknown_inside(
        &mut self,
        reference: &Reference<'_>,
        node: &Node,
        name: &str,
        part: &str,
    ) -> Option<Node> {
        if let Value::Map(entries) = &node.value {
            return self.unknown(reference, part, &format!("{name}."), entries);
        }
        let message = format!("param {} is {}, not a map with {}", quoted(name), node.found(), quoted(part));
        self.problems.push(Problem::new("manifest::unknown_param", reference.span, message));
        None
    }

    fn unknown(
        &mut self,
        reference: &Reference<'_>,
        part: &str,
        prefix: &str,
        known: &Entries,
    ) -> Option<Node> {
        if self.problems.is_full() {
            return None;
        }
        let message = format!("no param {}", quoted(&format!("{prefix}{part}")));
        let problem = Problem::new("manifest::unknown_param", reference.span, message);
        let hint = suggestion(part, known.iter().map(|(key, _)| key.text.as_str()));
        self.problems.push(problem.hint(hint.unwrap_or_else(|| "the manifest has no `params`".to_owned())));
        None
    }

    /// Works something out under the name of the param it belongs to; `None` if that param is being worked
    /// out already.
    fn entered(&mut self, name: &str, at: Span, work: impl FnOnce(&mut Self) -> Node) -> Option<Node> {
        if let Some(start) = self.active.iter().position(|active| active == name) {
            let cycle = &self.active[start..];
            if self.told_cycles.insert(cycle.iter().cloned().collect()) {
                let path = cycle.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(" -> ");
                let message = format!("params refer to each other in a circle: `{path}`");
                self.problems.push(Problem::new("manifest::param_cycle", at, message));
            }
            return None;
        }
        self.active.push(name.to_owned());
        let node = work(self);
        self.active.pop();
        Some(node)
    }

    /// `node` as if it stood at `span`.
    fn moved(&mut self, mut node: Node, span: Span) -> Node {
        self.output_bytes += move_to(&mut node, span) * NODE_BYTES;
        node
    }
}

fn move_to(node: &mut Node, span: Span) -> usize {
    node.span = span;
    match &mut node.value {
        Value::List(items) => 1 + items.iter_mut().map(|item| move_to(item, span)).sum::<usize>(),
        Value::Map(entries) => {
            let moved = entries.iter_mut().map(|(key, node)| {
                key.span = span;
                move_to(node, span)
            });
            1 + moved.sum::<usize>()
        }
        _ => 1,
    }
}
