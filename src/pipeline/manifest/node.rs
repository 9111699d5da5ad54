//! One located tree for YAML, TOML and the command line: from here on a manifest has one meaning, whatever
//! it was written in. Every key and every value knows where it stands.

use serde_json::Value as Json;

use crate::manifest::problem::quoted;
use crate::manifest::source::Span;

/// Deepest nesting of a file.
pub(crate) const DEPTH_MAX: usize = 64;
/// Most values in a file.
pub(crate) const NODES_MAX: usize = 500_000;

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) span: Span,
}

/// What a manifest can hold. Numbers are normal: `0.20` and `0.2` are the same `Float`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    /// Always finite.
    Float(f64),
    String(String),
    List(Vec<Node>),
    /// In the order of the file; no key twice.
    Map(Vec<(Key, Node)>),
    /// A value that could not be worked out and whose problem has been told; it fits everywhere.
    Broken,
}

/// A key of a map and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    pub(crate) text: String,
    pub(crate) span: Span,
}

impl Node {
    /// A value at `span`.
    pub(crate) fn new(value: Value, span: Span) -> Self {
        Self { value, span }
    }

    /// What was found, for `expected ..., found ...`.
    pub(crate) fn found(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("`{value}`"),
            Value::Int(value) => format!("`{value}`"),
            Value::Float(value) => format!("`{value:?}`"),
            Value::String(text) => quoted(&format!("{text:?}")),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
            Value::Broken => "an unknown value".to_owned(),
        }
    }

    /// The value under `key`, if this is a map that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => find(entries, key),
            _ => None,
        }
    }

    /// A JSON value as if it stood at `span`. A number too large for a whole one becomes a float.
    pub(crate) fn from_json(json: &Json, span: Span) -> Self {
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(*value),
            Json::Number(number) => match number.as_i64() {
                Some(whole) => Value::Int(whole),
                None => Value::Float(number.as_f64().unwrap_or_default()),
            },
            Json::String(text) => Value::String(text.clone()),
            Json::Array(items) => Value::List(items.iter().map(|item| Self::from_json(item, span)).collect()),
            Json::Object(entries) => {
                let entry = |(text, value): (&String, &Json)| {
                    (Key { text: text.clone(), span }, Self::from_json(value, span))
                };
                Value::Map(entries.iter().map(entry).collect())
            }
        };
        Self::new(value, span)
    }

    /// The same value as JSON.
    pub(crate) fn to_json(&self) -> Json {
        match &self.value {
            Value::Null | Value::Broken => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Int(value) => Json::from(*value),
            Value::Float(value) => Json::from(*value),
            Value::String(text) => Json::String(text.clone()),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(entries) => {
                Json::Object(entries.iter().map(|(key, node)| (key.text.clone(), node.to_json())).collect())
            }
        }
    }
}

/// The value under `key`.
pub(crate) fn find<'a>(entries: &'a [(Key, Node)], key: &str) -> Option<&'a Node> {
    entries.iter().find(|(entry, _)| entry.text == key).map(|(_, node)| node)
}
