//! `uses: validate` names each defect of each example and fails the run when there are too many.
//!
//! Reads `examples.jsonl` (and, where given, `chunks.jsonl` for the evidence's headings and place); writes
//! `examples.jsonl` (the good ones), `findings.jsonl` and `summary.json`. Checks of one row are memo rows, keyed
//! by the row, its evidence and the thresholds; checks over the table run each time. What a defect is stands in
//! `corpus::quality`. Bump `VERSION` when a check there changes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tunesmith_pipeline::stage::{Arity, InputSlot, StageContext, StageError, StageKind};

use crate::corpus::quality::{Defect, Flaw, Limits, Severity, row_flaws, set_flaws};
use crate::corpus::{Chunk, Example, read_table, write_table};

const VERSION: u32 = 1;

/// Rows shown for each defect when the stage fails.
const ROWS_SHOWN: usize = 2;

/// The kind `validate`.
pub(crate) struct Validate;

/// Parameters of `validate`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Share of rows with a defect above which the stage fails, 0 to 100.
    #[serde(default = "default_max_defect_percent")]
    #[schemars(range(min = 0.0, max = 100.0))]
    max_defect_percent: f64,
    /// Whether rows with a defect are left out of `examples.jsonl`; they are reported either way.
    #[serde(default = "default_drop")]
    drop: bool,
    /// Checks not to make.
    #[serde(default)]
    ignore: Vec<Defect>,
    /// Fewest words of an answer; 1 for data whose answers are labels.
    #[serde(default = "default_min_answer_words")]
    #[schemars(range(min = 1))]
    min_answer_words: usize,
    /// Most words of an answer; longer ones get a warning and stay.
    #[serde(default = "default_max_answer_words")]
    max_answer_words: usize,
    /// Smallest share of an answer's content words that stand in its evidence, 0 to 100.
    #[serde(default = "default_min_grounded_percent")]
    #[schemars(range(min = 0.0, max = 100.0))]
    min_grounded_percent: f64,
    /// Groups over which one question must stand to be a template.
    #[serde(default = "default_template_groups")]
    #[schemars(range(min = 2))]
    template_groups: usize,
}

fn default_max_defect_percent() -> f64 {
    20.0
}

fn default_drop() -> bool {
    true
}

fn default_min_answer_words() -> usize {
    2
}

fn default_max_answer_words() -> usize {
    400
}

fn default_min_grounded_percent() -> f64 {
    50.0
}

fn default_template_groups() -> usize {
    3
}

/// A row of `findings.jsonl`.
#[derive(Serialize)]
struct Finding<'a> {
    id: &'a str,
    defect: Defect,
    severity: Severity,
    explanation: &'a str,
    excerpt: &'a str,
    place: String,
}

/// `summary.json`.
#[derive(Serialize)]
struct Summary<'a> {
    rows: usize,
    kept: usize,
    dropped: usize,
    defective: usize,
    defect_percent: f64,
    /// Rows with each defect.
    defects: &'a BTreeMap<&'static str, usize>,
}

impl StageKind for Validate {
    fn name(&self) -> &'static str {
        "validate"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Names each defect of each example (empty summaries, file names, fragments, template questions, gibberish, \
         ungrounded answers and more), drops those rows, and fails the run above a threshold."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[
            InputSlot { name: "examples", doc: "examples, `examples.jsonl`", arity: Arity::One },
            InputSlot {
                name: "chunks",
                doc: "the passages they were made from, `chunks.jsonl`; adds evidence where examples carry none",
                arity: Arity::Optional,
            },
        ]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("examples.jsonl", "the examples without a defect"),
            ("findings.jsonl", "each defect: row, why, the text at fault, and the place in the notes"),
            ("summary.json", "counts"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let examples: Vec<Example> = read_table(&context.input("examples")?.file("examples.jsonl")?)?;
        if examples.is_empty() {
            return Err(StageError::new("validate::empty", "there are no examples to check")
                .hint("look at the stage before: it made none"));
        }
        let chunks: Vec<Chunk> = match context.optional_input("chunks") {
            Some(chunks) => read_table(&chunks.file("chunks.jsonl")?)?,
            None => Vec::new(),
        };
        let flaws = flaws(context, &params, &examples, &chunks)?;
        let is_bad = |row: usize| flaws[row].iter().any(|flaw| flaw.defect.severity() == Severity::Error);
        let bad: Vec<usize> = (0..examples.len()).filter(|row| is_bad(*row)).collect();
        let mut defects: BTreeMap<&'static str, usize> = BTreeMap::new();
        for flaw in flaws.iter().flatten() {
            *defects.entry(flaw.defect.name()).or_default() += 1;
        }
        let defect_percent = 100.0 * bad.len() as f64 / examples.len() as f64;
        let dropped = if params.drop { bad.len() } else { 0 };
        for defect in Defect::ALL {
            context.metric(defect.name(), defects.get(defect.name()).copied().unwrap_or(0));
        }
        context.metric("rows", examples.len());
        context.metric("kept", examples.len() - dropped);
        context.metric("dropped", dropped);
        context.metric("defect_percent", rounded(defect_percent));
        if defect_percent > params.max_defect_percent || dropped == examples.len() {
            return Err(too_many(&params, &examples, &flaws, &bad, &defects));
        }
        let kept: Vec<&Example> = examples
            .iter()
            .enumerate()
            .filter(|(row, _)| !params.drop || bad.binary_search(row).is_err())
            .map(|(_, example)| example)
            .collect();
        write_table(&context.out.join("examples.jsonl"), &kept)?;
        write_table(&context.out.join("findings.jsonl"), &findings(&examples, &flaws))?;
        let summary = Summary {
            rows: examples.len(),
            kept: kept.len(),
            dropped,
            defective: bad.len(),
            defect_percent: rounded(defect_percent),
            defects: &defects,
        };
        let text = serde_json::to_string_pretty(&summary).map_err(std::io::Error::from)?;
        fs_err::write(context.out.join("summary.json"), text + "\n")?;
        Ok(())
    }
}

fn rounded(percent: f64) -> f64 {
    (percent * 100.0).round() / 100.0
}

/// The flaws of each row.
fn flaws(
    context: &StageContext<'_>,
    params: &Params,
    examples: &[Example],
    chunks: &[Chunk],
) -> Result<Vec<Vec<Flaw>>, StageError> {
    let limits = Limits {
        min_answer_words: params.min_answer_words,
        max_answer_words: params.max_answer_words,
        min_grounded_percent: params.min_grounded_percent,
        template_groups: params.template_groups,
    };
    let thresholds =
        json!([limits.min_answer_words, limits.max_answer_words, limits.min_grounded_percent]).to_string();
    let by_id: BTreeMap<&str, &Chunk> = chunks.iter().map(|chunk| (chunk.id.as_str(), chunk)).collect();
    let mut flaws: Vec<Vec<Flaw>> = Vec::with_capacity(examples.len());
    for (row, example) in examples.iter().enumerate() {
        if row % 256 == 0 {
            context.check_cancelled()?;
            context.progress(row as u64, examples.len() as u64, "rows");
        }
        let evidence = evidence(example, &by_id);
        let content = json!([example.messages, evidence]).to_string();
        flaws.push(context.memo(&[content.as_bytes(), thresholds.as_bytes()], || {
            Ok(row_flaws(example, evidence.as_deref(), &limits))
        })?);
    }
    for (row, flaw) in set_flaws(examples, &limits) {
        flaws[row].push(flaw);
    }
    for row in &mut flaws {
        row.retain(|flaw| !params.ignore.contains(&flaw.defect));
    }
    Ok(flaws)
}

/// What the answer may draw on: the passage, and what stands over it (headings, the note's name and date).
fn evidence(example: &Example, chunks: &BTreeMap<&str, &Chunk>) -> Option<String> {
    let provenance = &example.provenance;
    let mut parts: Vec<String> = provenance.evidence.iter().cloned().collect();
    for chunk in provenance.chunks.iter().filter_map(|id| chunks.get(id.as_str())) {
        parts.push(chunk.headings.join("\n"));
        if provenance.evidence.is_none() {
            parts.push(chunk.text.clone());
        }
    }
    if parts.iter().all(|part| part.trim().is_empty()) {
        return None;
    }
    parts.extend(provenance.places.iter().cloned());
    Some(parts.join("\n"))
}

fn findings<'a>(examples: &'a [Example], flaws: &'a [Vec<Flaw>]) -> Vec<Finding<'a>> {
    let of_row = |(example, flaws): (&'a Example, &'a Vec<Flaw>)| {
        flaws.iter().map(move |flaw| Finding {
            id: &example.id,
            defect: flaw.defect,
            severity: flaw.defect.severity(),
            explanation: &flaw.explanation,
            excerpt: &flaw.excerpt,
            place: example.provenance.places.join(", "),
        })
    };
    examples.iter().zip(flaws).flat_map(of_row).collect()
}

/// The error that shows what is wrong without a file to open: counts, and the first rows of each defect.
fn too_many(
    params: &Params,
    examples: &[Example],
    flaws: &[Vec<Flaw>],
    bad: &[usize],
    defects: &BTreeMap<&'static str, usize>,
) -> StageError {
    let mut lines = vec![format!(
        "{} of {} rows have a defect ({:.1} %, allowed {} %)",
        bad.len(),
        examples.len(),
        100.0 * bad.len() as f64 / examples.len() as f64,
        params.max_defect_percent
    )];
    let mut by_count: Vec<(&str, usize)> = defects.iter().map(|(name, count)| (*name, *count)).collect();
    by_count.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (name, count) in by_count {
        lines.push(format!("  {name}: {count} rows"));
        let rows = bad.iter().filter_map(|row| {
            flaws[*row].iter().find(|flaw| flaw.defect.name() == name).map(|flaw| (&examples[*row], flaw))
        });
        for (example, flaw) in rows.take(ROWS_SHOWN) {
            let place =
                example.provenance.places.first().map_or_else(String::new, |place| format!(", {place}"));
            lines.push(format!("    `{}`{place}: {}: \"{}\"", example.id, flaw.explanation, flaw.excerpt));
        }
    }
    StageError::new("validate::too_many_defects", lines.join("\n")).hint(
        "mend what makes the examples (prompt, model, recording); to look at every finding, run once with \
         `max_defect_percent: 100` and `drop: false` and open `findings.jsonl`; `ignore: [defect]` leaves a check out",
    )
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::corpus::{Message, Provenance, Source};
    use crate::stages::harness::Bench;

    fn example(id: usize, question: &str, answer: &str) -> Example {
        Example {
            id: format!("row-{id}"),
            messages: vec![
                Message { role: "user".to_owned(), content: question.to_owned() },
                Message { role: "assistant".to_owned(), content: answer.to_owned() },
            ],
            group: format!("g{id}"),
            tags: Vec::new(),
            key_facts: Vec::new(),
            provenance: Provenance {
                chunks: vec![format!("n.md@{id}")],
                places: vec!["notes/2021/n.md".to_owned()],
                ..Provenance::default()
            },
        }
    }

    fn table() -> Vec<Example> {
        let mut rows: Vec<Example> = (0..9)
            .map(|id| example(id, &format!("What is number {id}?"), &format!("It is number {id}.")))
            .collect();
        rows.push(example(
            9,
            "What is the main insight?",
            r#"{"summary":"FY21 - Leadership Team.pdf","bullets":[]}"#,
        ));
        rows
    }

    #[test]
    fn bad_rows_are_dropped_and_named() {
        let mut bench = Bench::new();
        let outcome = bench.table("examples", "examples.jsonl", &table()).run(&Validate, json!({})).unwrap();
        assert_eq!(outcome.table::<Example>("examples.jsonl"), table()[..9]);
        let findings: Vec<Value> = outcome.table("findings.jsonl");
        assert_eq!(findings.len(), 1);
        for (field, value) in [
            ("id", "row-9"),
            ("defect", "empty_summary"),
            ("severity", "error"),
            ("place", "notes/2021/n.md"),
        ] {
            assert_eq!(findings[0][field], value);
        }
        let summary: Value = serde_json::from_str(&outcome.text("summary.json")).unwrap();
        assert_eq!((summary["dropped"].as_u64(), summary["defect_percent"].as_f64()), (Some(1), Some(10.0)));
        assert_eq!(outcome.count("empty_summary"), 1);
        assert_eq!(outcome.count("fragment"), 0);
    }

    #[test]
    fn above_the_threshold_the_stage_fails_with_rows_and_counts() {
        let mut bench = Bench::new();
        bench.table("examples", "examples.jsonl", &table());
        let error = bench.run(&Validate, json!({ "max_defect_percent": 5 })).err().unwrap();
        assert!(error.message.starts_with("1 of 10 rows have a defect (10.0 %, allowed 5 %)\n  empty_summary: 1 rows\n    `row-9`, notes/2021/n.md: the answer is JSON"), "{}", error.message);
        assert!(error.hint.unwrap().contains("`max_defect_percent: 100`"));
        let outcome = bench.run(&Validate, json!({ "max_defect_percent": 100, "drop": false })).unwrap();
        assert_eq!(outcome.count("kept"), 10);
        assert_eq!(outcome.table::<Value>("findings.jsonl").len(), 1);
        let outcome =
            bench.run(&Validate, json!({ "max_defect_percent": 0, "ignore": ["empty_summary"] })).unwrap();
        assert_eq!(outcome.count("dropped"), 0);
    }

    #[test]
    fn only_an_edited_row_is_checked_again() {
        let mut bench = Bench::new();
        let mut rows = table();
        bench.table("examples", "examples.jsonl", &rows).run(&Validate, json!({})).unwrap();
        rows[3].messages[1].content = "It is the number 3.".to_owned();
        let outcome = bench.table("examples", "examples.jsonl", &rows).run(&Validate, json!({})).unwrap();
        assert_eq!((outcome.rows.new, outcome.rows.remembered), (1, 9));
        let outcome = bench.run(&Validate, json!({ "max_answer_words": 50 })).unwrap();
        assert_eq!(outcome.rows.new, 10);
    }

    #[test]
    fn chunks_bring_the_evidence() {
        let rows = [
            example(1, "Who leads?", "Callum leads since 2021."),
            example(2, "Who pays?", "Gannet pays 44 pounds."),
        ];
        let chunk = |id: &str, text: &str| Chunk {
            id: id.to_owned(),
            document: "n.md".to_owned(),
            source: Source { path: "n.md".to_owned(), page: None, digest: String::new() },
            headings: vec!["Who leads".to_owned()],
            span: [0, 1],
            text: text.to_owned(),
            tokens: 1,
        };
        let mut bench = Bench::new();
        bench.table("examples", "examples.jsonl", &rows);
        assert_eq!(bench.run(&Validate, json!({})).unwrap().count("ungrounded"), 0);
        bench.table(
            "chunks",
            "chunks.jsonl",
            &[chunk("n.md@1", "Callum is lead."), chunk("n.md@2", "Gannet pays.")],
        );
        let outcome = bench.run(&Validate, json!({ "max_defect_percent": 60 })).unwrap();
        assert_eq!(outcome.count("ungrounded"), 1, "2021 stands in the note's path");
        assert!(outcome.text("findings.jsonl").contains("does not hold `44`"));
    }

    #[test]
    fn nothing_to_check_or_nothing_left_is_an_error() {
        let mut bench = Bench::new();
        let error = bench
            .table::<Example>("examples", "examples.jsonl", &[])
            .run(&Validate, json!({}))
            .err()
            .unwrap();
        assert_eq!(error.code, "validate::empty");
        bench.table("examples", "examples.jsonl", &table()[9..]);
        let error = bench.run(&Validate, json!({ "max_defect_percent": 100 })).err().unwrap();
        assert_eq!(error.code, "validate::too_many_defects");
    }
}
