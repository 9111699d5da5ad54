//! Which references a stage's parameters were filled in from, so that an explanation can name the param a
//! person changed and not only the parameter it ended up in. Looks at the manifest as it is written.

use std::collections::BTreeMap;

use crate::graph::Origin;
use crate::manifest::node::{Node, Value};

/// The references in `with`, by dotted path.
pub(crate) fn origins(with: &Node) -> BTreeMap<String, Origin> {
    let mut found = BTreeMap::new();
    walk(with, "", &mut found);
    found
}

fn walk(node: &Node, path: &str, found: &mut BTreeMap<String, Origin>) {
    let join = |part: &str| if path.is_empty() { part.to_owned() } else { format!("{path}.{part}") };
    match &node.value {
        Value::String(text) => {
            let mut references = references(text);
            references.dedup();
            let origin = match references.as_slice() {
                [] => return,
                [only] if text.len() == only.written.len() => Origin::Whole(only.name.clone()),
                _ => Origin::Inside(references.into_iter().map(|reference| reference.name).collect()),
            };
            found.insert(path.to_owned(), origin);
        }
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, &join(&index.to_string()), found);
            }
        }
        Value::Map(entries) => {
            for (key, node) in entries {
                walk(node, &join(&key.text), found);
            }
        }
        _ => {}
    }
}

#[derive(PartialEq)]
struct Reference<'t> {
    /// `${params.x}`.
    written: &'t str,
    /// `params.x`.
    name: String,
}

/// The references in a text, in order; `$${` is none.
fn references(text: &str) -> Vec<Reference<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let after = &rest[start..];
        let Some(end) = after.find('}').filter(|_| !rest[..start].ends_with('$')) else {
            rest = &after[2..];
            continue;
        };
        let name = after[2..end].split('.').map(str::trim).collect::<Vec<_>>().join(".");
        found.push(Reference { written: &after[..=end], name });
        rest = &after[end + 1..];
    }
    found
}
