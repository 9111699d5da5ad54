//! Why a stage runs, as a value and as one line for people: `params.lr 2e-4 → 1e-4`. Knows nothing of how
//! the reason was found.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Characters of a value shown in a line for people.
const VALUE_SHOWN_MAX: usize = 60;

/// Characters shown on either side of the part in which two texts differ.
const AROUND: usize = 12;

/// Files of an input named in a line for people.
const FILES_SHOWN_MAX: usize = 3;

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
    /// For a parameter whose value was filled in: where from, `params.lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// For an input: its files that changed, as far as they are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileChange>,
    /// For a source file that is a table: how its rows changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowChange>,
}

/// A file of an input that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Path inside the artifact.
    pub path: String,
    /// Whether it was there before.
    pub was: bool,
    /// Whether it is there now.
    pub is: bool,
    /// How its rows changed, if it is a table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowChange>,
}

/// How the rows of a table changed. Order does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowChange {
    /// Rows before.
    pub before: u64,
    /// Rows now.
    pub after: u64,
    /// Rows that were not there before.
    pub added: u64,
    /// Rows that are no longer there.
    pub removed: u64,
}

impl Reason {
    /// A reason with nothing to compare.
    pub fn new(kind: ReasonKind, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { kind, what, old: None, new: None, stage: None, from: None, files: Vec::new(), rows: None }
    }

    fn param(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let change = change(self.old.as_ref(), self.new.as_ref());
        match &self.from {
            None => write!(f, "{} {change}", self.what),
            Some(from) if last(from) == last(&self.what) => write!(f, "{from} {change}"),
            Some(from) => write!(f, "{from} {change} ({})", self.what),
        }
    }

    fn input(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = self.stage.as_ref().map_or_else(String::new, |stage| format!(" (stage {stage})"));
        let verb = match (&self.old, &self.new) {
            (Some(_), Some(_)) => "changed",
            (None, Some(_)) => "added",
            (Some(_), None) if self.stage.is_none() => "removed",
            _ => "is made first",
        };
        write!(f, "input {}{stage} {verb}", self.what)?;
        for (position, file) in self.files.iter().take(FILES_SHOWN_MAX).enumerate() {
            write!(f, "{} {file}", if position == 0 { ":" } else { "," })?;
        }
        match self.files.len().saturating_sub(FILES_SHOWN_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.what;
        match self.kind {
            ReasonKind::FirstRun => f.write_str("first run"),
            ReasonKind::Forced => f.write_str("forced"),
            ReasonKind::Param => self.param(f),
            ReasonKind::Version | ReasonKind::Numerics => {
                write!(f, "{what} {}", change(self.old.as_ref(), self.new.as_ref()))
            }
            ReasonKind::OutputMissing => write!(f, "output {what} is missing or damaged"),
            ReasonKind::Input => self.input(f),
            ReasonKind::Source => match (&self.old, &self.new, self.rows) {
                (None, None, _) => f.write_str(what),
                (Some(_), Some(_), Some(rows)) => write!(f, "{what} changed, {rows}"),
                (Some(_), Some(_), None) => write!(f, "{what} changed"),
                (None, Some(_), _) => write!(f, "{what} added"),
                (Some(_), None, _) => write!(f, "{what} removed"),
            },
        }
    }
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        match (self.was, self.is, self.rows) {
            (false, _, _) => f.write_str(" added"),
            (_, false, _) => f.write_str(" removed"),
            (_, _, Some(rows)) => write!(f, " {rows}"),
            (_, _, None) => Ok(()),
        }
    }
}

impl fmt::Display for RowChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { before, after, added, removed } = self;
        match (added, removed) {
            (0, 0) => write!(f, "{after} rows in another order"),
            _ => write!(f, "{before} → {after} rows (+{added} -{removed})"),
        }
    }
}

/// `16 → 32`; of two long texts only the part in which they differ.
fn change(old: Option<&Value>, new: Option<&Value>) -> String {
    if let (Some(Value::String(old)), Some(Value::String(new))) = (old, new)
        && old.chars().count().max(new.chars().count()) > VALUE_SHOWN_MAX
    {
        let (old, new) = differing(old, new);
        return format!("{} → {}", shown(&Value::from(old)), shown(&Value::from(new)));
    }
    let text = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), shown);
    format!("{} → {}", text(old), text(new))
}

/// What is left of two texts without what they begin and end with alike, and a little of that.
fn differing(old: &str, new: &str) -> (String, String) {
    let (old, new): (Vec<char>, Vec<char>) = (old.chars().collect(), new.chars().collect());
    let start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let most = old.len().min(new.len()) - start;
    let end = old.iter().rev().zip(new.iter().rev()).take(most).take_while(|(a, b)| a == b).count();
    let cut = |text: &[char]| -> String {
        let (from, to) = (start.saturating_sub(AROUND), text.len() - end.saturating_sub(AROUND));
        let dots = |cut: bool| if cut { "…" } else { "" };
        let middle: String = text[from..to].iter().collect();
        format!("{}{middle}{}", dots(from > 0), dots(to < text.len()))
    };
    (cut(&old), cut(&new))
}

/// A value as people write it: `2e-4`, not `0.0002`; long ones are cut.
fn shown(value: &Value) -> String {
    const SMALL: f64 = 1e-3;
    let text = match value.as_f64() {
        Some(number) if value.is_f64() && number != 0.0 && number.abs() < SMALL => format!("{number:e}"),
        _ => value.to_string(),
    };
    if text.chars().count() <= VALUE_SHOWN_MAX {
        return text;
    }
    text.chars().take(VALUE_SHOWN_MAX).chain(['…']).collect()
}
