//! TOML into the located tree. Dates become their text, as they are in YAML, and tables are put back into
//! the order of the file, so that a manifest means the same in both languages.

use std::ops::Range;

use ::toml::de::{DeTable, DeValue, Error};

use crate::manifest::node::{DEPTH_MAX, Key, Node, Value};
use crate::manifest::problem::{Problem, Problems};
use crate::manifest::source::{FileId, Span};
use crate::manifest::yaml::too_large;

/// In a file up to this size all errors are looked for, else the first one.
const RECOVERED_BYTES_MAX: usize = 256 * 1024;
/// More errors than this are echoes of the first ones.
const RECOVERED_MAX: usize = 10;

/// Reads `text`. `None` if it is not TOML.
pub(crate) fn parse(file: FileId, text: &str, problems: &mut Problems) -> Option<Node> {
    match DeTable::parse(text) {
        Ok(table) => {
            let mut reader = Reader { file, text, problems };
            let root = reader.table(table.get_ref(), 0)?;
            Some(Node::new(root, Span::start_of(file)))
        }
        Err(first) => {
            let errors = match text.len() <= RECOVERED_BYTES_MAX {
                true => DeTable::parse_recoverable(text).1,
                false => vec![first],
            };
            for error in errors.iter().take(RECOVERED_MAX) {
                problems.push(syntax_problem(file, error));
            }
            None
        }
    }
}

fn syntax_problem(file: FileId, error: &Error) -> Problem {
    let span = Span::new(file, error.span().unwrap_or(0..0));
    let code = match error.message().starts_with("duplicate key") {
        true => "manifest::duplicate_key",
        false => "manifest::syntax",
    };
    Problem::new(code, span, error.message())
}

struct Reader<'a> {
    file: FileId,
    text: &'a str,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn table(&mut self, table: &DeTable<'_>, depth: usize) -> Option<Value> {
        let mut entries = Vec::with_capacity(table.len());
        for (key, value) in table {
            let node = self.node(value.get_ref(), value.span(), depth + 1)?;
            let key = Key { text: key.get_ref().to_string(), span: Span::new(self.file, key.span()) };
            entries.push((key, node));
        }
        entries.sort_by_key(|(key, _)| key.span.start);
        Some(Value::Map(entries))
    }

    fn node(&mut self, value: &DeValue<'_>, range: Range<usize>, depth: usize) -> Option<Node> {
        let span = Span::new(self.file, range.clone());
        if depth > DEPTH_MAX {
            let message = format!("nested more than {DEPTH_MAX} levels deep");
            self.problems.push(Problem::new("manifest::too_deep", span, message));
            return None;
        }
        let value = match value {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Int(number),
                Err(_) => self.broken(span, too_large(number.as_str())),
            },
            DeValue::Float(number) => self.float(number.as_str(), span),
            DeValue::Datetime(_) => Value::String(self.text.get(range).unwrap_or_default().to_owned()),
            DeValue::Array(items) => {
                let items = items.iter().map(|item| self.node(item.get_ref(), item.span(), depth + 1));
                Value::List(items.collect::<Option<_>>()?)
            }
            DeValue::Table(table) => self.table(table, depth)?,
        };
        Some(Node::new(value, span))
    }

    fn float(&mut self, text: &str, span: Span) -> Value {
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Value::Float(number),
            _ if text.contains("inf") || text.contains("nan") => {
                self.broken(span, format!("`{text}` is not a finite number"))
            }
            _ => self.broken(span, too_large(text)),
        }
    }

    fn broken(&mut self, span: Span, message: String) -> Value {
        self.problems.push(Problem::new("manifest::number", span, message));
        Value::Broken
    }
}
