//! What Python writes: `str()` and `repr()` of values, `json.dumps`, and the calendar. Templates were written for
//! Jinja in Python, where `{{ true }}` is `True` and `{{ 1e5 }}` is `100000.0`. Knows values; nothing of templates.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use crate::tokenizer::template::bounds::{VALUE_BYTES_MAX, too_large};

const DEPTH_MAX: usize = 128;

/// `str(value)`.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => Ok(text.to_owned()),
        (None, ValueKind::Undefined) => Ok(String::new()),
        _ => {
            let mut out = String::new();
            repr(value, 0, &mut out)?;
            Ok(out)
        }
    }
}

/// `repr(value)`.
fn repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEPTH_MAX || out.len() > VALUE_BYTES_MAX {
        return Err(too_large());
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for member in value.try_iter()? {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(&member, depth + 1, out)?;
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                if at > 0 {
                    out.push_str(", ");
                }
                repr(&key, depth + 1, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

fn number(value: &Value, out: &mut String) {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => out.push_str(&float_repr(float)),
        _ => _ = write!(out, "{value}"),
    }
}

/// Python's shortest text that reads back as the same float; an exponent from 1e16 and below 1e-4.
fn float_repr(float: f64) -> String {
    if !float.is_finite() {
        return if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => {
            let plain = format!("{float}");
            if plain.contains('.') { plain } else { format!("{plain}.0") }
        }
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
    }
}

/// A string literal: single quotes, unless only double ones need no escape.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == mark => out.extend(['\\', mark]),
            '\0'..' ' | '\u{7f}'..='\u{a0}' | '\u{ad}' => _ = write!(out, "\\x{:02x}", u32::from(character)),
            _ => out.push(character),
        }
    }
    out.push(mark);
}

/// `json.dumps` with the options Hugging Face's filter has.
#[allow(clippy::needless_pass_by_value, reason = "minijinja hands filters their keyword arguments by value")]
pub(super) fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = arguments.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let separators: Option<Value> = arguments.get("separators")?;
    let (between, after_key) = match separators.filter(|separators| !separators.is_none()) {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => (text(&pair.get_item_by_index(0)?)?, text(&pair.get_item_by_index(1)?)?),
    };
    let mut dump = Dump {
        indent,
        between,
        after_key,
        ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        out: String::new(),
    };
    arguments.assert_all_used()?;
    dump.value(value, 0)?;
    Ok(dump.out)
}

struct Dump {
    indent: Option<String>,
    between: String,
    after_key: String,
    ascii: bool,
    sorted: bool,
    out: String,
}

impl Dump {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX || self.out.len() > VALUE_BYTES_MAX {
            return Err(too_large());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(float) if float.is_nan() => self.out.push_str("NaN"),
                Ok(float) if float.is_infinite() => {
                    self.out.push_str(if float > 0.0 { "Infinity" } else { "-Infinity" });
                }
                _ => number(value, &mut self.out),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let members: Vec<Value> = value.try_iter()?.collect();
                self.members("[]", members.iter(), depth, |dump, member| dump.value(member, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.members("{}", keys.iter(), depth, |dump, key| {
                    match key.kind() {
                        ValueKind::String => dump.string(key.as_str().unwrap_or_default()),
                        _ => {
                            dump.out.push('"');
                            dump.value(key, depth + 1)?;
                            dump.out.push('"');
                        }
                    }
                    dump.out.push_str(&dump.after_key);
                    dump.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                let detail = format!("a value of type {kind} has no JSON form");
                return Err(Error::new(ErrorKind::BadSerialization, detail));
            }
        }
        Ok(())
    }

    fn members<'value>(
        &mut self,
        brackets: &str,
        members: impl ExactSizeIterator<Item = &'value Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if members.len() == 0 {
            self.out.push_str(brackets);
            return Ok(());
        }
        self.out.push_str(&brackets[..1]);
        for (at, member) in members.enumerate() {
            if at > 0 {
                self.out.push_str(&self.between);
            }
            self.line(depth + 1);
            write(self, member)?;
        }
        self.line(depth);
        self.out.push_str(&brackets[1..]);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..' ' => _ = write!(self.out, "\\u{:04x}", u32::from(character)),
                '\u{7f}'.. if self.ascii => {
                    let mut units = [0; 2];
                    for unit in character.encode_utf16(&mut units) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }
}

/// `strftime` of the 26th of July 2024, a Friday, at midnight.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        out.push_str(match characters.next() {
            Some('d') => "26",
            Some('m') => "07",
            Some('Y') => "2024",
            Some('y') => "24",
            Some('b') => "Jul",
            Some('B') => "July",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('F') => "2024-07-26",
            Some('T') => "00:00:00",
            Some('j') => "208",
            Some('H' | 'M' | 'S') => "00",
            Some('%') => "%",
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let detail = format!("strftime_now does not know `%{code}`");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let check = |value: Value, expected: &str| assert_eq!(text(&value).unwrap(), expected);
        check(Value::from(true), "True");
        check(Value::from(()), "None");
        check(Value::UNDEFINED, "");
        check(Value::from("it's"), "it's");
        // repr([1.0, 1e5, 1e16, 1.5e-7, 0.0001, 123456789012345680.0])
        let floats = Value::from(vec![1.0, 1e5, 1e16, 1.5e-7, 0.0001, 123_456_789_012_345_680.0]);
        check(floats, "[1.0, 100000.0, 1e+16, 1.5e-07, 0.0001, 1.2345678901234568e+17]");
        check(
            Value::from(vec!["it's", "say \"it's\"", "a\n\\\u{7f}é"]),
            r#"["it's", 'say "it\'s"', 'a\n\\\x7fé']"#,
        );
        check(Value::from_pairs([("k", Value::from(vec![Value::from(false)]))]), "{'k': [False]}");
    }

    #[test]
    fn dates_do_not_depend_on_the_day() {
        assert_eq!(strftime_now("%d %b %Y, %A").unwrap(), "26 Jul 2024, Friday");
        assert!(strftime_now("%Q").unwrap_err().to_string().contains("`%Q`"));
    }
}
