//! The action key: one walk over all that a stage's result depends on.
//!
//! [`walk`] lists the parts; [`digest`] hashes the list into the key; [`compare`] explains the difference
//! between two lists. As both look at the same list, an explanation cannot disagree with a key. Times,
//! absolute paths, the host and the number of threads are no parts.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::digest::Digest;
use crate::stage::{OutputFile, StageKind};

/// Bumped if the encoding of parts changes.
const DOMAIN: &[u8] = b"tunesmith action 1";

/// Changed files listed by name; the rest is counted.
const FILES_LISTED_MAX: usize = 10;

/// Characters of a value shown in a line for people.
const VALUE_SHOWN_MAX: usize = 60;

/// One named part of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `kind`, `version`, `with.<path>`, `input.<slot>`, `source.<name>` or `numerics`.
    pub name: String,
    /// Its canonical value.
    pub value: String,
}

/// All that goes into a key beside the kind and its parameters.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Content digest of each input by slot, in the order of `needs`. `None`: not made yet.
    pub inputs: &'a [(&'a str, Option<Digest>)],
    /// Tree digest of each source by name.
    pub sources: &'a [(&'a str, Digest)],
}

/// Lists the parts of a stage's key. With an input that is not made yet the list is good only for
/// [`compare`].
pub fn walk(kind: &dyn StageKind, with: &Value, inputs: Inputs<'_>) -> Vec<Part> {
    let part = |name: String, value: String| Part { name, value };
    let mut parts = vec![
        part("kind".to_owned(), kind.name().to_owned()),
        part("version".to_owned(), kind.version().to_string()),
    ];
    if with.as_object().is_none_or(|with| !with.is_empty()) {
        walk_value("with", with, &mut parts);
    }
    for (slot, digest) in inputs.inputs {
        parts.push(part(format!("input.{slot}"), digest.map_or_else(String::new, |digest| digest.hex())));
    }
    for (name, tree) in inputs.sources {
        parts.push(part(format!("source.{name}"), tree.hex()));
    }
    if let Some(numerics) = kind.numerics(with) {
        parts.push(part("numerics".to_owned(), numerics));
    }
    parts
}

/// The key that a list of parts stands for.
pub fn digest(parts: &[Part]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(DOMAIN);
    for part in parts {
        add(part.name.as_bytes());
        add(part.value.as_bytes());
    }
    hasher.finalize().into()
}

fn walk_value(path: &str, value: &Value, parts: &mut Vec<Part>) {
    match value {
        Value::Object(object) if !object.is_empty() => {
            for (name, value) in object.iter().collect::<BTreeMap<_, _>>() {
                walk_value(&format!("{path}.{}", path_segment(name)), value, parts);
            }
        }
        Value::Array(values) if !values.is_empty() => {
            for (position, value) in values.iter().enumerate() {
                walk_value(&format!("{path}.{position}"), value, parts);
            }
        }
        Value::Number(number) => {
            parts.push(Part { name: path.to_owned(), value: canonical_number(number) });
        }
        leaf => parts.push(Part { name: path.to_owned(), value: leaf.to_string() }),
    }
}

/// An object's key inside a dotted path; quoted where it could be taken for a path or a list position.
fn path_segment(name: &str) -> String {
    let plain = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
    let position = name.chars().all(|c| c.is_ascii_digit());
    if plain && !position { name.to_owned() } else { Value::from(name).to_string() }
}

/// One spelling a number: `0.20` is `0.2`, and `1e3`, `1000.0` are `1000`.
fn canonical_number(number: &Number) -> String {
    /// Up to here each whole number has its own float.
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;
    match number.as_f64() {
        Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() <= WHOLE_MAX => {
            // Adding zero makes -0 a 0.
            format!("{:.0}", float + 0.0)
        }
        _ => number.to_string(),
    }
}

/// What made a stage run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasonKind {
    /// Nothing is known of an earlier run.
    FirstRun,
    /// A parameter has another value.
    Param,
    /// An input has other content, or is not made yet.
    Input,
    /// A source file was changed, added or removed.
    Source,
    /// The kind of the stage, or its code version, is another.
    Version,
    /// Another class of arithmetic.
    Numerics,
    /// The user asked for it.
    Forced,
    /// The result is known but no longer whole.
    OutputMissing,
}

/// One reason why a stage runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// What sort of reason.
    pub kind: ReasonKind,
    /// The parameter, the input slot, the file.
    pub what: String,
    /// The value before; digests for content.
    pub old: Option<Value>,
    /// The value now.
    pub new: Option<Value>,
    /// For an input: the stage that fills the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
}

impl Reason {
    /// A reason with nothing to compare.
    pub fn new(kind: ReasonKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), old: None, new: None, stage: None }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.what;
        let shown = |value: &Option<Value>| value.as_ref().map_or_else(|| "unset".to_owned(), shortened);
        let change = || format!("{} → {}", shown(&self.old), shown(&self.new));
        match self.kind {
            ReasonKind::FirstRun => f.write_str("first run"),
            ReasonKind::Forced => f.write_str("forced"),
            ReasonKind::Param => write!(f, "params: {what} {}", change()),
            ReasonKind::Version | ReasonKind::Numerics => write!(f, "{what} {}", change()),
            ReasonKind::OutputMissing => write!(f, "output {what} is missing or damaged"),
            ReasonKind::Input => {
                let stage = self.stage.as_ref().map_or_else(String::new, |stage| format!(" (stage {stage})"));
                let verb = match (&self.old, &self.new) {
                    (Some(_), Some(_)) => "changed",
                    (None, Some(_)) => "added",
                    (Some(_), None) if self.stage.is_none() => "removed",
                    _ => "is made first",
                };
                write!(f, "input {what}{stage} {verb}")
            }
            ReasonKind::Source => match (&self.old, &self.new) {
                (None, None) => f.write_str(what),
                (Some(_), Some(_)) => write!(f, "{what} changed"),
                (None, Some(_)) => write!(f, "{what} added"),
                (Some(_), None) => write!(f, "{what} removed"),
            },
        }
    }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= VALUE_SHOWN_MAX {
        return text;
    }
    text.chars().take(VALUE_SHOWN_MAX).chain(['…']).collect()
}

/// What [`compare`] has to look up to speak of files and stages.
pub trait Context {
    /// The files of a tree, if they are still known.
    fn tree(&self, digest: Digest) -> Option<Vec<OutputFile>>;
    /// The stage that fills an input slot.
    fn stage_of(&self, slot: &str) -> Option<String>;
}

/// Why two lists of parts are not the same; empty if they are.
pub fn compare(old: &[Part], new: &[Part], context: &dyn Context) -> Vec<Reason> {
    let by_name = |parts: &[Part]| -> BTreeMap<String, String> {
        parts.iter().map(|part| (part.name.clone(), part.value.clone())).collect()
    };
    let (old_values, new_values) = (by_name(old), by_name(new));
    let removed = old.iter().filter(|part| !new_values.contains_key(&part.name));
    let mut reasons = Vec::new();
    for name in new.iter().chain(removed).map(|part| &part.name) {
        let (before, now) = (old_values.get(name), new_values.get(name));
        if before != now {
            explain_part(name, before, now, context, &mut reasons);
        }
    }
    if reasons.is_empty() && old != new {
        reasons.push(Reason::new(ReasonKind::Input, "order"));
    }
    reasons
}

fn explain_part(
    name: &str,
    old: Option<&String>,
    new: Option<&String>,
    context: &dyn Context,
    reasons: &mut Vec<Reason>,
) {
    let (group, rest) = name.split_once('.').unwrap_or((name, ""));
    let texts =
        |value: Option<&String>| value.filter(|text| !text.is_empty()).map(|t| Value::from(t.as_str()));
    let parsed = |value: Option<&String>| value.map(|text| serde_json::from_str(text).unwrap_or(Value::Null));
    match group {
        "source" => explain_files(rest, old, new, context, reasons),
        "input" => reasons.push(Reason {
            old: texts(old),
            new: texts(new),
            stage: context.stage_of(rest),
            ..Reason::new(ReasonKind::Input, rest)
        }),
        "with" => reasons.push(Reason {
            old: parsed(old),
            new: parsed(new),
            ..Reason::new(ReasonKind::Param, name)
        }),
        "numerics" => reasons.push(Reason {
            old: texts(old),
            new: texts(new),
            ..Reason::new(ReasonKind::Numerics, name)
        }),
        _ => reasons.push(Reason {
            old: texts(old),
            new: texts(new),
            ..Reason::new(ReasonKind::Version, name)
        }),
    }
}

/// The difference between two trees, file by file.
fn explain_files(
    source: &str,
    old: Option<&String>,
    new: Option<&String>,
    context: &dyn Context,
    reasons: &mut Vec<Reason>,
) {
    let files = |tree: Option<&String>| -> Option<BTreeMap<String, Digest>> {
        let Some(tree) = tree else { return Some(BTreeMap::new()) };
        let files = context.tree(tree.parse().ok()?)?;
        Some(files.into_iter().map(|file| (file.path, file.digest)).collect())
    };
    let (Some(before), Some(now)) = (files(old), files(new)) else {
        reasons.push(Reason::new(ReasonKind::Source, format!("files of source {source} changed")));
        return;
    };
    let mut changes = Vec::new();
    let paths = before.keys().chain(now.keys().filter(|path| !before.contains_key(*path)));
    for path in paths {
        let (was, is) = (before.get(path), now.get(path));
        if was != is {
            let value = |digest: Option<&Digest>| digest.map(|digest| Value::from(digest.hex()));
            changes.push(Reason {
                old: value(was),
                new: value(is),
                ..Reason::new(ReasonKind::Source, path.as_str())
            });
        }
    }
    changes.sort_by(|a, b| a.what.cmp(&b.what));
    let rest = changes.split_off(changes.len().min(FILES_LISTED_MAX));
    reasons.append(&mut changes);
    if !rest.is_empty() {
        let count = |was: bool, is: bool| {
            rest.iter().filter(|r| r.old.is_some() == was && r.new.is_some() == is).count()
        };
        reasons.push(Reason::new(
            ReasonKind::Source,
            format!(
                "and {} more files: {} changed, {} added, {} removed",
                rest.len(),
                count(true, true),
                count(false, true),
                count(true, false)
            ),
        ));
    }
}

#[cfg(test)]
#[path = "key/tests.rs"]
mod tests;
