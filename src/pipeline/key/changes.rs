//! The difference of two lists of key parts, told down to the parameter, the file and the rows. It looks at
//! nothing but the lists and what they name, so it cannot say anything else than the key.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use crate::digest::Digest;
use crate::stage::OutputFile;

use super::{FileChange, Part, Reason, ReasonKind, RowChange};

/// Changed files listed by name; the rest is counted.
const FILES_LISTED_MAX: usize = 10;

/// Rows are compared in files up to this size.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// Endings of tables: each line is a row.
const ROW_ENDINGS: [&str; 3] = [".jsonl", ".csv", ".tsv"];

/// What [`compare`] has to look up to speak of files, stages and params.
pub trait Context {
    /// The files of a tree, if they are still known.
    fn tree(&self, digest: Digest) -> Option<Vec<OutputFile>>;
    /// The stage that fills an input slot.
    fn stage_of(&self, slot: &str) -> Option<String>;
    /// The content with this digest, if it is still there.
    fn content(&self, digest: Digest) -> Option<Vec<u8>>;
    /// Where the value of the parameter at a dotted path was filled in from: `params.lr`.
    fn origin(&self, path: &str) -> Option<String>;
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
            files: input_files(old, new, context),
            ..Reason::new(ReasonKind::Input, rest)
        }),
        "with" => reasons.push(Reason {
            old: parsed(old),
            new: parsed(new),
            from: context.origin(rest),
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

type Tree = BTreeMap<String, OutputFile>;

fn tree(digest: &str, context: &dyn Context) -> Option<Tree> {
    let files = context.tree(digest.parse().ok()?)?;
    Some(files.into_iter().map(|file| (file.path.clone(), file)).collect())
}

/// Each path at which two trees differ, sorted, with what is there in either.
fn differences<'t>(
    old: &'t Tree,
    new: &'t Tree,
) -> Vec<(&'t str, Option<&'t OutputFile>, Option<&'t OutputFile>)> {
    let mut paths: Vec<&str> = old.keys().chain(new.keys()).map(String::as_str).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
        .into_iter()
        .map(|path| (path, old.get(path), new.get(path)))
        .filter(|(_, was, is)| was.map(|file| file.digest) != is.map(|file| file.digest))
        .collect()
}

/// The files of an input that changed; none if either tree is no longer known.
fn input_files(old: Option<&String>, new: Option<&String>, context: &dyn Context) -> Vec<FileChange> {
    let both = old.zip(new).and_then(|(old, new)| Some((tree(old, context)?, tree(new, context)?)));
    let Some((old, new)) = both else { return Vec::new() };
    differences(&old, &new)
        .into_iter()
        .map(|(path, was, is)| FileChange {
            path: path.to_owned(),
            was: was.is_some(),
            is: is.is_some(),
            rows: was.zip(is).and_then(|(was, is)| row_change(was, is, context)),
        })
        .collect()
}

/// The difference between the files of a source, file by file.
fn explain_files(
    source: &str,
    old: Option<&String>,
    new: Option<&String>,
    context: &dyn Context,
    reasons: &mut Vec<Reason>,
) {
    let files = |digest: Option<&String>| digest.map_or(Some(Tree::new()), |digest| tree(digest, context));
    let (Some(before), Some(now)) = (files(old), files(new)) else {
        reasons.push(Reason::new(ReasonKind::Source, format!("files of source {source} changed")));
        return;
    };
    let value = |file: Option<&OutputFile>| file.map(|file| Value::from(file.digest.hex()));
    let changed = differences(&before, &now);
    let (listed, rest) = changed.split_at(changed.len().min(FILES_LISTED_MAX));
    reasons.extend(listed.iter().map(|(path, was, is)| Reason {
        old: value(*was),
        new: value(*is),
        rows: was.zip(*is).and_then(|(was, is)| row_change(was, is, context)),
        ..Reason::new(ReasonKind::Source, *path)
    }));
    if !rest.is_empty() {
        let count = |was: bool, is: bool| {
            rest.iter().filter(|(_, old, new)| old.is_some() == was && new.is_some() == is).count()
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

/// How the rows of a table changed; `None` for other files, large ones, and content that is gone.
fn row_change(old: &OutputFile, new: &OutputFile, context: &dyn Context) -> Option<RowChange> {
    let has_rows = ROW_ENDINGS.iter().any(|ending| new.path.ends_with(ending));
    if !has_rows || old.bytes.max(new.bytes) > TABLE_BYTES_MAX {
        return None;
    }
    let (old, new) = (context.content(old.digest)?, context.content(new.digest)?);
    let rows = |bytes: &[u8]| -> Vec<blake3::Hash> {
        let rows = bytes.split_inclusive(|byte| *byte == b'\n');
        rows.map(|row| blake3::hash(row.trim_ascii_end())).collect()
    };
    let (old, new) = (rows(&old), rows(&new));
    // How much more often a row stands in the new file than in the old one.
    let mut surplus: HashMap<blake3::Hash, i64> = HashMap::new();
    for row in &new {
        *surplus.entry(*row).or_default() += 1;
    }
    for row in &old {
        *surplus.entry(*row).or_default() -= 1;
    }
    let sum = |sign: i64| -> u64 { surplus.values().map(|n| (n * sign).max(0).cast_unsigned()).sum() };
    let (before, after) = (old.len() as u64, new.len() as u64);
    Some(RowChange { before, after, added: sum(1), removed: sum(-1) })
}
