//! YAML 1.2 into the located tree, from the parser's events. JSON is read here too, being YAML.
//!
//! Stricter than YAML where it would surprise: keys are plain text and stand once, there are no tags and no
//! merge keys, one document a file, and only `true` and `false` are booleans (core schema). Aliases are
//! copied under a budget, so an alias bomb ends at once.

use std::collections::{BTreeMap, HashMap};

use serde_yaml::granit_parser::{Event, Parser, ScalarStyle, Span as EventSpan};

use crate::manifest::node::{DEPTH_MAX, Key, NODES_MAX, Node, Value};
use crate::manifest::problem::{Problem, Problems, quoted};
use crate::manifest::source::{FileId, Span};

/// How much all aliases of a file may copy: a value counts one, and one more for each 64 bytes of text.
const ALIAS_WEIGHT_MAX: usize = 10_000;

/// Reads `text`, which stands at byte `offset` of `file`. `None` if it cannot be read to its end.
pub(crate) fn parse(file: FileId, text: &str, offset: usize, problems: &mut Problems) -> Option<Node> {
    let mut options = serde_yaml::granit_parser::options! {
        flow_nesting_limit: 2 * DEPTH_MAX,
        block_nesting_limit: 2 * DEPTH_MAX,
    };
    options.set_emit_comments(false);
    let mut builder = Builder {
        file,
        offset,
        open: Vec::new(),
        anchors: BTreeMap::new(),
        alias_weight: 0,
        nodes: 0,
        root: None,
        is_done: false,
        problems,
    };
    for event in Parser::new_from_str_with_options(text, options) {
        match event {
            Ok((event, span)) => builder.take(event, &span).ok()?,
            Err(error) => {
                let at = error.marker().byte_offset().unwrap_or(text.len());
                let span = Span::new(file, offset + at..offset + at + 1);
                builder.problems.push(syntax_problem(span, &error.info(), &text[at.min(text.len())..]));
                return None;
            }
        }
    }
    let Builder { root, .. } = builder;
    Some(root.unwrap_or_else(|| Node::new(Value::Null, Span::new(file, offset..offset))))
}

fn syntax_problem(span: Span, message: &str, rest: &str) -> Problem {
    let problem = Problem::new("manifest::syntax", span, message.trim_end_matches('.').to_owned());
    if message.contains("tab") || rest.starts_with('\t') {
        return problem.hint("indent with spaces; YAML does not allow tabs there");
    }
    if rest.starts_with(['@', '`', '%', '*', '&', '!']) {
        return problem.hint("a value that starts with this character needs quotes");
    }
    problem
}

/// The file cannot be read any further; the problem has been told.
struct Stop;

/// A list or map whose end has not come yet.
struct Open {
    start: usize,
    anchor: usize,
    entries: Entries,
}

enum Entries {
    List(Vec<Node>),
    Map { entries: Vec<(Key, Node)>, key: Option<Key> },
}

/// What an alias copies.
struct Anchored {
    node: Node,
    weight: usize,
    height: usize,
}

struct Builder<'a> {
    file: FileId,
    offset: usize,
    open: Vec<Open>,
    anchors: BTreeMap<usize, Anchored>,
    alias_weight: usize,
    nodes: usize,
    root: Option<Node>,
    is_done: bool,
    problems: &'a mut Problems,
}

impl Builder<'_> {
    fn take(&mut self, event: Event<'_>, span: &EventSpan) -> Result<(), Stop> {
        let span = self.span(span);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_tag(tag.is_some(), span);
                self.scalar(&text, style, anchor, span)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), span);
                self.start(Entries::List(Vec::new()), anchor, span)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), span);
                self.start(Entries::Map { entries: Vec::new(), key: None }, anchor, span)
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(span),
            Event::Alias(anchor) => self.alias(anchor, span),
            Event::DocumentStart(..) if self.is_done => Err(self.stop(
                Problem::new("manifest::syntax", span, "a second YAML document starts here")
                    .hint("put it in a file of its own"),
            )),
            Event::DocumentEnd => {
                self.is_done = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn span(&self, span: &EventSpan) -> Span {
        let range = span.byte_range().unwrap_or(0..0);
        Span::new(self.file, range.start + self.offset..range.end + self.offset)
    }

    fn stop(&mut self, problem: Problem) -> Stop {
        self.problems.push(problem);
        Stop
    }

    fn refuse_tag(&mut self, has_tag: bool, span: Span) {
        if has_tag {
            self.problems.push(
                Problem::new("manifest::syntax", span, "tags such as `!!str` have no meaning here")
                    .hint("leave the tag out; quote the value if it is a text"),
            );
        }
    }

    fn awaits_key(&self) -> bool {
        matches!(self.open.last(), Some(Open { entries: Entries::Map { key: None, .. }, .. }))
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, anchor: usize, span: Span) -> Result<(), Stop> {
        if self.awaits_key() {
            return self.key(text, style, span);
        }
        let value = match style {
            ScalarStyle::Plain => plain_scalar(text).unwrap_or_else(|problem| {
                self.problems.push(Problem::new("manifest::number", span, problem));
                Value::Broken
            }),
            _ => Value::String(text.to_owned()),
        };
        self.place(Node::new(value, span), anchor)
    }

    fn key(&mut self, text: &str, style: ScalarStyle, span: Span) -> Result<(), Stop> {
        if text == "<<" && style == ScalarStyle::Plain {
            return Err(self.stop(
                Problem::new("manifest::syntax", span, "merge keys (`<<`) are not supported")
                    .hint("write the keys out, or keep what is shared in `params`"),
            ));
        }
        if let Some(Open { entries: Entries::Map { key, .. }, .. }) = self.open.last_mut() {
            *key = Some(Key { text: text.to_owned(), span });
        }
        Ok(())
    }

    fn start(&mut self, entries: Entries, anchor: usize, span: Span) -> Result<(), Stop> {
        if self.awaits_key() {
            return Err(self.stop(Problem::new("manifest::syntax", span, "a key has to be a plain text")));
        }
        if self.open.len() >= DEPTH_MAX {
            return Err(self.stop(too_deep(span)));
        }
        self.open.push(Open { start: span.start, anchor, entries });
        Ok(())
    }

    fn end(&mut self, span: Span) -> Result<(), Stop> {
        let Some(Open { start, anchor, entries }) = self.open.pop() else { return Ok(()) };
        let span = Span::new(self.file, start..span.end.max(start + 1));
        let value = match entries {
            Entries::List(items) => Value::List(items),
            Entries::Map { entries, .. } => Value::Map(self.without_duplicates(entries)),
        };
        self.place(Node::new(value, span), anchor)
    }

    fn without_duplicates(&mut self, entries: Vec<(Key, Node)>) -> Vec<(Key, Node)> {
        let mut first: HashMap<String, ()> = HashMap::with_capacity(entries.len());
        let mut kept = Vec::with_capacity(entries.len());
        for (key, node) in entries {
            if first.insert(key.text.clone(), ()).is_none() {
                kept.push((key, node));
            } else {
                let message = format!("key {} stands twice in one map", quoted(&key.text));
                self.problems.push(Problem::new("manifest::duplicate_key", key.span, message));
            }
        }
        kept
    }

    fn alias(&mut self, anchor: usize, span: Span) -> Result<(), Stop> {
        if self.awaits_key() {
            return Err(self.stop(Problem::new("manifest::syntax", span, "a key has to be a plain text")));
        }
        let Some(Anchored { weight, height, .. }) = self.anchors.get(&anchor) else {
            return Err(self.stop(Problem::new("manifest::syntax", span, "an alias inside its own anchor")));
        };
        self.alias_weight = self.alias_weight.saturating_add(*weight);
        if self.alias_weight > ALIAS_WEIGHT_MAX {
            return Err(self.stop(
                Problem::new("manifest::alias_budget", span, "the aliases of this file copy too much")
                    .hint("keep what is shared in `params` or in an included file"),
            ));
        }
        if self.open.len() + height > DEPTH_MAX {
            return Err(self.stop(too_deep(span)));
        }
        let node = self.anchors[&anchor].node.clone();
        self.place(node, 0)
    }

    /// Puts a finished value where it belongs.
    fn place(&mut self, node: Node, anchor: usize) -> Result<(), Stop> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(self.stop(Problem::new(
                "manifest::too_large",
                node.span,
                "too many values in one file",
            )));
        }
        if anchor != 0 {
            let (weight, height) = measure(&node);
            self.anchors.insert(anchor, Anchored { node: node.clone(), weight, height });
        }
        match self.open.last_mut().map(|open| &mut open.entries) {
            None => self.root = Some(node),
            Some(Entries::List(items)) => items.push(node),
            Some(Entries::Map { entries, key }) => {
                let key = key.take().expect("a value in a map comes after its key");
                entries.push((key, node));
            }
        }
        Ok(())
    }
}

fn too_deep(span: Span) -> Problem {
    Problem::new("manifest::too_deep", span, format!("nested more than {DEPTH_MAX} levels deep"))
}

/// Weight and height of a tree. Its depth is limited, so this cannot overflow the stack.
fn measure(node: &Node) -> (usize, usize) {
    let fold = |(weight, height): (usize, usize), child: &Node| {
        let (child_weight, child_height) = measure(child);
        (weight + child_weight, height.max(child_height + 1))
    };
    match &node.value {
        Value::String(text) => (1 + text.len() / 64, 0),
        Value::List(items) => items.iter().fold((1, 1), fold),
        Value::Map(entries) => entries.iter().map(|(_, child)| child).fold((1, 1), fold),
        _ => (1, 0),
    }
}

/// What an unquoted text means (YAML 1.2 core schema): nothing, a boolean, a number, or itself.
pub(crate) fn plain_scalar(text: &str) -> Result<Value, String> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Value::Null),
        "true" | "True" | "TRUE" => return Ok(Value::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Value::Bool(false)),
        _ => {}
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Ok(Value::String(text.to_owned()));
    }
    if matches!(digits, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") {
        return Err(format!("`{text}` is not a finite number"));
    }
    let radix_digits = text.strip_prefix("0x").map(|rest| (rest, 16));
    let radix_digits = radix_digits.or_else(|| text.strip_prefix("0o").map(|rest| (rest, 8)));
    if let Some((rest, radix)) = radix_digits {
        return match rest.chars().all(|c| c.is_digit(radix)) && !rest.is_empty() {
            true => i64::from_str_radix(rest, radix).map(Value::Int).map_err(|_| too_large(text)),
            false => Ok(Value::String(text.to_owned())),
        };
    }
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Value::Int).map_err(|_| too_large(text));
    }
    let is_number =
        digits.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
    match text.parse::<f64>() {
        Ok(number) if is_number && number.is_finite() => Ok(Value::Float(number)),
        Ok(_) if is_number => Err(too_large(text)),
        _ => Ok(Value::String(text.to_owned())),
    }
}

/// What is wrong with a number that does not fit.
pub(crate) fn too_large(text: &str) -> String {
    format!("the number {} is too large", quoted(text))
}
