//! Tests of keys and explanations.

use expect_test::{Expect, expect};
use serde_json::json;

use super::*;
use crate::stage::{InputSlot, OutputFile, StageContext, StageError};

struct Plain;

impl StageKind for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }
    fn version(&self) -> u32 {
        3
    }
    fn doc(&self) -> &'static str {
        "A kind for tests."
    }
    fn inputs(&self) -> &'static [InputSlot] {
        &[]
    }
    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
    fn schema(&self) -> schemars::Schema {
        true.into()
    }
    fn numerics(&self, with: &Value) -> Option<String> {
        with.get("path").map(ToString::to_string)
    }
    fn run(&self, _context: &StageContext<'_>) -> Result<(), StageError> {
        Ok(())
    }
}

/// The trees that are still known; the path `rank` is filled in from `params.lora.rank`.
struct Trees(Vec<Vec<OutputFile>>);

impl Context for Trees {
    fn tree(&self, digest: Digest) -> Option<Vec<OutputFile>> {
        self.0.iter().find(|files| crate::store::tree_digest(files) == digest).cloned()
    }
    fn stage_of(&self, slot: &str) -> Option<String> {
        (slot == "data").then(|| "split".to_owned())
    }
    fn content(&self, digest: Digest) -> Option<Vec<u8>> {
        let texts = ["a\nb\nc\n", "a\nc\nd\ne\n", "c\nb\na\n"];
        texts.iter().find(|text| Digest::of(text.as_bytes()) == digest).map(|text| text.as_bytes().to_vec())
    }
    fn origin(&self, path: &str) -> Option<String> {
        match path {
            "rate" => Some("params.lr".to_owned()),
            "rank" => Some("params.lora.rank".to_owned()),
            _ => None,
        }
    }
}

fn parts(with: &Value) -> Vec<Part> {
    walk(&Plain, with, Inputs { inputs: &[], sources: &[] })
}

fn key_of(with: &Value) -> Digest {
    digest(&parts(with))
}

fn check(old: &[Part], new: &[Part], trees: Vec<Vec<OutputFile>>, expect: &Expect) {
    let lines: Vec<String> =
        compare(old, new, &Trees(trees)).iter().map(|reason| format!("{reason}\n")).collect();
    expect.assert_eq(&lines.concat());
}

#[test]
fn spelling_of_a_value_does_not_count() {
    let yaml = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(key_of(&yaml(r#"{"a": 0.20, "b": 1e3}"#)), key_of(&yaml(r#"{"b": 1000, "a": 0.2}"#)));
    assert_eq!(key_of(&yaml(r#"{"a": 2.0}"#)), key_of(&yaml(r#"{"a": 2}"#)));
    assert_eq!(key_of(&yaml(r#"{"a": -0.0}"#)), key_of(&yaml(r#"{"a": 0}"#)));
}

#[test]
fn different_parameters_never_share_a_key() {
    let different = [
        json!({}),
        json!({"a": null}),
        json!({"a": {}}),
        json!({"a": []}),
        json!({"a": ""}),
        json!({"a": [1]}),
        json!({"a": {"0": 1}}),
        json!({"a.0": 1}),
        json!({"\"a\"": {"0": 1}}),
        json!({"a": "1"}),
        json!({"a": 1}),
        json!({"a": true}),
        json!({"a": 1.5}),
        json!({"a": [1, 2]}),
        json!({"a": [2, 1]}),
        json!({"a": 9_007_199_254_740_993_u64}),
        json!({"a": 9_007_199_254_740_992_u64}),
    ];
    for (position, one) in different.iter().enumerate() {
        for other in &different[..position] {
            assert_ne!(key_of(one), key_of(other), "{one} and {other}");
        }
    }
}

#[test]
fn a_name_cannot_flow_into_its_value() {
    let part = |name: &str, value: &str| Part { name: name.to_owned(), value: value.to_owned() };
    assert_ne!(digest(&[part("ab", "c")]), digest(&[part("a", "bc")]));
    assert_ne!(digest(&[part("a", ""), part("b", "")]), digest(&[part("a", "b"), part("", "")]));
}

#[test]
fn parameter_changes_are_told_with_both_values() {
    let old = parts(&json!({"rank": 16, "gone": "x", "targets": ["q", "v"], "path": "avx2"}));
    let new = parts(&json!({"rank": 32, "targets": ["q", "o"], "path": "amx", "added": {"deep": [true]}}));
    check(
        &old,
        &new,
        vec![],
        &expect![[r#"
            with.added.deep.0 unset → true
            with.path "avx2" → "amx"
            params.lora.rank 16 → 32
            with.targets.1 "v" → "o"
            numerics "\"avx2\"" → "\"amx\""
            with.gone "x" → unset
        "#]],
    );
    assert!(compare(&old, &old, &Trees(vec![])).is_empty());
}

#[test]
fn a_value_is_told_as_people_write_it() {
    let line = |old: Value, new: Value| {
        let [old, new] = [old, new].map(|value| parts(&json!({ "rate": value })));
        compare(&old, &new, &Trees(vec![]))[0].to_string()
    };
    assert_eq!(line(json!(2e-4), json!(1e-4)), "params.lr 2e-4 → 1e-4 (with.rate)");
    assert_eq!(line(json!(0.20), json!(0.5)), "params.lr 0.2 → 0.5 (with.rate)");
    let text = |word: &str| format!("{}{word}{}", "before ".repeat(9), " after".repeat(9)).into();
    assert_eq!(
        line(text("one"), text("two")),
        r#"params.lr "…fore before one after after…" → "…fore before two after after…" (with.rate)"#
    );
}

#[test]
fn input_changes_are_told_by_file_and_rows() {
    let tree = |texts: &[(&str, &str)]| -> Vec<OutputFile> {
        let file = |(path, text): &(&str, &str)| OutputFile {
            path: (*path).to_owned(),
            digest: Digest::of(text.as_bytes()),
            bytes: text.len() as u64,
        };
        texts.iter().map(file).collect()
    };
    let list = |files: &[OutputFile]| {
        let inputs = [("data", Some(crate::store::tree_digest(files)))];
        walk(&Plain, &json!({}), Inputs { inputs: &inputs, sources: &[] })
    };
    let old = tree(&[("big.bin", "1"), ("gone", "x"), ("t.jsonl", "a\nb\nc\n"), ("u.jsonl", "a\nb\nc\n")]);
    let new = tree(&[("big.bin", "2"), ("t.jsonl", "a\nc\nd\ne\n"), ("u.jsonl", "c\nb\na\n")]);
    check(
        &list(&old),
        &list(&new),
        vec![old, new],
        &expect![[r#"
            input data (stage split) changed: big.bin, gone removed, t.jsonl 3 → 4 rows (+2 -1) and 1 more
        "#]],
    );
}

#[test]
fn input_changes_name_the_stage() {
    let list =
        |data: Option<Digest>| walk(&Plain, &json!({}), Inputs { inputs: &[("data", data)], sources: &[] });
    let (a, b) = (Some(Digest::of(b"a")), Some(Digest::of(b"b")));
    check(
        &list(a),
        &list(b),
        vec![],
        &expect![[r#"
        input data (stage split) changed
    "#]],
    );
    check(
        &list(a),
        &list(None),
        vec![],
        &expect![[r#"
        input data (stage split) is made first
    "#]],
    );
}

#[test]
fn source_changes_are_told_by_file() {
    let tree = |files: &[(&str, &str)]| -> Vec<OutputFile> {
        files
            .iter()
            .map(|(path, text)| OutputFile {
                path: (*path).to_owned(),
                digest: Digest::of(text.as_bytes()),
                bytes: text.len() as u64,
            })
            .collect()
    };
    let list = |files: &[OutputFile]| {
        let sources = [("paths", crate::store::tree_digest(files))];
        walk(&Plain, &json!({}), Inputs { inputs: &[], sources: &sources })
    };
    let old = tree(&[("notes/a.md", "1"), ("notes/b.md", "2"), ("notes/c.md", "3")]);
    let new = tree(&[("notes/a.md", "1+"), ("notes/b.md", "2"), ("notes/d.md", "4")]);
    check(
        &list(&old),
        &list(&new),
        vec![old.clone(), new.clone()],
        &expect![[r#"
        notes/a.md changed
        notes/c.md removed
        notes/d.md added
    "#]],
    );
    check(
        &list(&old),
        &list(&new),
        vec![new],
        &expect![[r#"
        files of source paths changed
    "#]],
    );

    let names: Vec<String> = (10..40).map(|n| format!("{n}.md")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x")).collect();
    let many = tree(&many);
    let reasons = compare(&list(&[]), &list(&many), &Trees(vec![vec![], many]));
    assert_eq!(reasons.len(), 11);
    assert_eq!(reasons[10].to_string(), "and 20 more files: 0 changed, 20 added, 0 removed");
}
