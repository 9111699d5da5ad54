//! `uses: dedupe` drops examples that repeat an earlier one.
//!
//! Reads `examples.jsonl`; writes `examples.jsonl` (what stays, in order) and `duplicates.jsonl` (what went, and
//! what it repeated). The rule is `corpus::near_duplicates`: paraphrases of one fact stay.
//! Bump `VERSION` when that rule changes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tunesmith_pipeline::stage::{Arity, InputSlot, StageContext, StageError, StageKind};

use crate::corpus::near_duplicates::{Likeness, duplicates};
use crate::corpus::{Example, read_table, write_table};

const VERSION: u32 = 1;

/// The kind `dedupe`.
pub(crate) struct Dedupe;

/// Parameters of `dedupe`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Jaccard index of two questions' character 5-grams from which on the later example is a near duplicate, if
    /// the answers are alike too and both hold the same numbers. 1 keeps all but equal questions.
    #[serde(default = "default_threshold")]
    #[schemars(range(min = 0.3, max = 1.0))]
    threshold: f64,
    /// Whether examples equal but for case and punctuation are duplicates.
    #[serde(default = "default_exact")]
    exact: bool,
}

fn default_threshold() -> f64 {
    0.85
}

fn default_exact() -> bool {
    true
}

/// A row of `duplicates.jsonl`.
#[derive(Serialize)]
struct DuplicateRow<'a> {
    id: &'a str,
    kept: &'a str,
    similarity: f64,
    kind: Likeness,
}

impl StageKind for Dedupe {
    fn name(&self) -> &'static str {
        "dedupe"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Drops examples that repeat an earlier one, word for word or nearly. Differently worded questions on one fact stay."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[InputSlot { name: "examples", doc: "examples, `examples.jsonl`", arity: Arity::One }]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("examples.jsonl", "the first of each set of duplicates, and all that have none"),
            ("duplicates.jsonl", "what was dropped, what it repeats and how closely"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let examples: Vec<Example> = read_table(&context.input("examples")?.file("examples.jsonl")?)?;
        let found = duplicates(&examples, params.threshold, params.exact);
        let dropped: std::collections::BTreeSet<usize> =
            found.iter().map(|duplicate| duplicate.row).collect();
        let rows: Vec<DuplicateRow<'_>> = found
            .iter()
            .map(|duplicate| DuplicateRow {
                id: &examples[duplicate.row].id,
                kept: &examples[duplicate.kept].id,
                similarity: (duplicate.similarity * 1e4).round() / 1e4,
                kind: duplicate.kind,
            })
            .collect();
        let kept: Vec<&Example> = examples
            .iter()
            .enumerate()
            .filter(|(row, _)| !dropped.contains(row))
            .map(|(_, row)| row)
            .collect();
        let exact = rows.iter().filter(|row| row.kind == Likeness::Exact).count();
        context.metric("rows", examples.len());
        context.metric("kept", kept.len());
        context.metric("exact", exact);
        context.metric("near", rows.len() - exact);
        write_table(&context.out.join("examples.jsonl"), &kept)?;
        write_table(&context.out.join("duplicates.jsonl"), &rows)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::corpus::{Message, Provenance};
    use crate::stages::harness::Bench;

    #[test]
    fn the_first_stays_and_the_repeat_is_listed() {
        let rows: Vec<Example> = ["Who leads the backlog?", "When does it end?", "who leads the backlog"]
            .iter()
            .enumerate()
            .map(|(row, question)| Example {
                id: format!("row-{row}"),
                messages: vec![
                    Message { role: "user".to_owned(), content: (*question).to_owned() },
                    Message { role: "assistant".to_owned(), content: "Callum Reid does.".to_owned() },
                ],
                group: "g".to_owned(),
                tags: Vec::new(),
                key_facts: Vec::new(),
                provenance: Provenance::default(),
            })
            .collect();
        let mut bench = Bench::new();
        let outcome = bench.table("examples", "examples.jsonl", &rows).run(&Dedupe, json!({})).unwrap();
        assert_eq!(outcome.table::<Example>("examples.jsonl"), rows[..2]);
        let dropped: Vec<Value> = outcome.table("duplicates.jsonl");
        assert_eq!(dropped, [json!({ "id": "row-2", "kept": "row-0", "similarity": 1.0, "kind": "exact" })]);
        assert_eq!((outcome.count("kept"), outcome.count("exact"), outcome.count("near")), (2, 1, 0));
        assert!(bench.run(&Dedupe, json!({ "threshold": 2 })).is_err());
        assert_eq!(bench.run(&Dedupe, json!({ "exact": false })).unwrap().count("near"), 1);
    }
}
