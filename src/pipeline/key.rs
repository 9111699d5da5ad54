//! The action key: one walk over all that a stage's result depends on.
//!
//! [`walk`] lists the parts; [`digest`] hashes the list into the key; [`compare`] explains the difference
//! between two lists. As both look at the same list, an explanation cannot disagree with a key. Times,
//! absolute paths, the host and the number of threads are no parts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::digest::Digest;
use crate::stage::StageKind;

mod changes;
mod reason;

pub use changes::{Context, compare};
pub use reason::{FileChange, Reason, ReasonKind, RowChange};

/// Bumped if the encoding of parts changes.
const DOMAIN: &[u8] = b"tunesmith action 1";

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

#[cfg(test)]
#[path = "key/tests.rs"]
mod tests;
