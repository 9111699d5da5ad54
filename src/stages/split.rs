//! `uses: split` divides examples into train, validation and test without separating a group, and proves that
//! no test question was trained on.
//!
//! Reads `examples.jsonl` (and, where given, held-out questions as `test`); writes `train.jsonl`,
//! `validation.jsonl`, `test.jsonl` and `leaks.json`. How groups are divided stands in `corpus::split`.
//! Bump `VERSION` when that changes.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_pipeline::stage::{
    Arity, Artifact, InputSlot, ParamProblem, StageContext, StageError, StageKind,
};

use crate::corpus::split::{Closeness, GroupBy, NEAR, Shares, Side, closeness, divide};
use crate::corpus::words::normalised;
use crate::corpus::{Example, read_table, write_table};

const VERSION: u32 = 2;

/// Leaks named in the error; the file has all.
const LEAKS_SHOWN: usize = 10;

/// The kind `split`.
pub(crate) struct Split;

/// Parameters of `split`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Share of the rows that is watched while training, 0 to 1.
    #[serde(default = "default_share")]
    #[schemars(range(min = 0.0, max = 0.9))]
    validation: f64,
    /// Share of the rows that is asked at the end; 0 when the input `test` is given, else 0.1.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    test: Option<f64>,
    /// What is never separated: examples on one fact, from one document, or only equal questions.
    #[serde(default)]
    group: GroupBy,
    /// Another seed is another division.
    #[serde(default)]
    seed: u64,
    /// What to do with a test question that is a training question word for word.
    #[serde(default)]
    on_leak: OnLeak,
}

fn default_share() -> f64 {
    0.1
}

/// What to do with a leak.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum OnLeak {
    /// The stage fails and names the rows.
    #[default]
    Fail,
    /// The training (and validation) rows are left out, so that the test stays what it was.
    Drop,
}

/// `leaks.json`.
#[derive(Default, Serialize)]
struct Leaks {
    exact: Vec<Leak>,
    near: Vec<Leak>,
    max_similarity: f64,
}

#[derive(Serialize)]
struct Leak {
    test: String,
    train: String,
    similarity: f64,
    question: String,
    trained_question: String,
}

impl StageKind for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Divides examples into train, validation and test. Paraphrases of one fact, and equal questions, never end on two \
         sides, and a test question that was trained on is an error."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[
            InputSlot { name: "examples", doc: "examples, `examples.jsonl`", arity: Arity::One },
            InputSlot {
                name: "test",
                doc: "held-out questions, `examples.jsonl`; all of them become `test.jsonl`",
                arity: Arity::Optional,
            },
        ]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("train.jsonl", "what is learnt"),
            ("validation.jsonl", "what is watched while learning"),
            ("test.jsonl", "what is asked at the end"),
            ("leaks.json", "test questions equal or close to training questions"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let Ok(params) = serde_json::from_value::<Params>(with.clone()) else { return Vec::new() };
        let sum = params.validation + params.test.unwrap_or(0.0);
        if sum < 1.0 {
            return Vec::new();
        }
        vec![ParamProblem {
            path: "validation".to_owned(),
            message: format!("`validation` and `test` together are {sum}, which leaves nothing to train on"),
            hint: Some("shares are fractions: 0.1 is 10 %".to_owned()),
        }]
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let examples = read_rows(context.input("examples")?)?;
        let held_out = match context.optional_input("test") {
            Some(artifact) => read_rows(artifact)?,
            None => Vec::new(),
        };
        let default_test = if context.optional_input("test").is_some() { 0.0 } else { default_share() };
        let shares = Shares {
            validation: params.validation,
            test: params.test.unwrap_or(default_test),
            seed: params.seed,
        };
        let division = divide(&examples, params.group, shares).map_err(|error| {
            StageError::new("split::too_few", error.to_string())
                .hint("make more examples, set the share to 0, or choose a finer `group` (`fact`, `none`)")
        })?;
        let side = |wanted: Side| -> Vec<&Example> {
            examples
                .iter()
                .zip(&division.sides)
                .filter(|(_, side)| **side == wanted)
                .map(|(row, _)| row)
                .collect()
        };
        let (mut train, mut validation, mut test) =
            (side(Side::Train), side(Side::Validation), side(Side::Test));
        test.extend(&held_out);
        let leaks = leaks(&train, &validation, &test);
        if !leaks.exact.is_empty() {
            if params.on_leak == OnLeak::Fail {
                return Err(leaked(&leaks));
            }
            let leaked: BTreeSet<String> =
                leaks.exact.iter().map(|leak| normalised(&leak.question)).collect();
            let stays = |row: &&Example| !leaked.contains(&normalised(&row.asked()));
            train.retain(stays);
            validation.retain(stays);
        }
        if train.is_empty() {
            return Err(StageError::new(
                "split::no_train",
                "no row is left to train on: every one is in the test",
            )
            .hint("hold other questions out"));
        }
        for leak in leaks.near.iter().take(3) {
            context.warn(&format!(
                "test question \"{}\" is close to the training question \"{}\" ({:.2})",
                leak.question, leak.trained_question, leak.similarity
            ));
        }
        context.metric("train", train.len());
        context.metric("validation", validation.len());
        context.metric("test", test.len());
        context.metric("groups", division.groups);
        context.metric("leaks_exact", leaks.exact.len());
        context.metric("leaks_near", leaks.near.len());
        context.metric("max_similarity", leaks.max_similarity);
        write_table(&context.out.join("train.jsonl"), &train)?;
        write_table(&context.out.join("validation.jsonl"), &validation)?;
        write_table(&context.out.join("test.jsonl"), &test)?;
        let text = serde_json::to_string_pretty(&leaks).map_err(std::io::Error::from)?;
        fs_err::write(context.out.join("leaks.json"), text + "\n")?;
        Ok(())
    }
}

/// Examples without the passage and the prompt they were made from; their place stays. So a note edited without
/// any effect on its answers trains nothing anew.
fn read_rows(artifact: &Artifact) -> Result<Vec<Example>, StageError> {
    let mut rows: Vec<Example> = read_table(&artifact.file("examples.jsonl")?)?;
    for Example { provenance, .. } in &mut rows {
        provenance.evidence = None;
        provenance.prompt.clear();
    }
    Ok(rows)
}

/// Holds every test question against all others. Rows of validation choose the model, so they leak too, but
/// only when equal.
fn leaks(train: &[&Example], validation: &[&Example], test: &[&Example]) -> Leaks {
    let mut leaks = Leaks::default();
    let watched = closeness(validation, test);
    for ((row, close), watched) in test.iter().zip(closeness(train, test)).zip(watched) {
        let leak = |other: &Example, similarity: f64| Leak {
            test: row.id.clone(),
            train: other.id.clone(),
            similarity,
            question: row.asked(),
            trained_question: other.asked(),
        };
        let Closeness { equal, nearest } = close;
        let similarity = nearest.map_or(0.0, |(_, similarity)| (similarity * 1e4).round() / 1e4);
        if let Some(other) = equal.map(|other| train[other]).or(watched.equal.map(|other| validation[other]))
        {
            leaks.exact.push(leak(other, 1.0));
            leaks.max_similarity = 1.0;
        } else if let Some((other, _)) = nearest {
            leaks.max_similarity = leaks.max_similarity.max(similarity);
            if similarity >= NEAR {
                leaks.near.push(leak(train[other], similarity));
            }
        }
    }
    leaks
}

fn leaked(leaks: &Leaks) -> StageError {
    let mut lines = vec![format!("{} test questions are also trained on", leaks.exact.len())];
    let shown = leaks.exact.iter().take(LEAKS_SHOWN);
    lines.extend(
        shown.map(|leak| format!("  `{}` is `{}`: \"{}\"", leak.test, leak.train, leak.trained_question)),
    );
    if leaks.exact.len() > LEAKS_SHOWN {
        lines.push(format!("  and {} more", leaks.exact.len() - LEAKS_SHOWN));
    }
    StageError::new("split::leak", lines.join("\n"))
        .hint("hold other questions out, or set `on_leak: drop` to train without those rows")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::corpus::{Message, Provenance};
    use crate::stages::harness::{Bench, Outcome};

    fn example(id: &str, group: &str, question: &str) -> Example {
        Example {
            id: id.to_owned(),
            messages: vec![
                Message { role: "user".to_owned(), content: question.to_owned() },
                Message { role: "assistant".to_owned(), content: "An answer.".to_owned() },
            ],
            group: group.to_owned(),
            tags: Vec::new(),
            key_facts: Vec::new(),
            provenance: Provenance::default(),
        }
    }

    fn table() -> Vec<Example> {
        (0..100)
            .map(|n| {
                example(
                    &format!("e{n}"),
                    &format!("fact-{}", n / 4),
                    &format!("Question {n} about {}?", n / 4),
                )
            })
            .collect()
    }

    fn ids(outcome: &Outcome, file: &str) -> Vec<String> {
        outcome.table::<Example>(file).into_iter().map(|row| row.id).collect()
    }

    #[test]
    fn sides_have_their_shares_and_whole_facts() {
        let outcome =
            Bench::new().table("examples", "examples.jsonl", &table()).run(&Split, json!({})).unwrap();
        assert_eq!((outcome.count("train"), outcome.count("groups")), (76, 25));
        assert_eq!((outcome.count("validation"), outcome.count("test")), (12, 12));
        for file in ["train.jsonl", "validation.jsonl", "test.jsonl"] {
            assert_eq!(ids(&outcome, file).len() % 4, 0, "{file} holds part of a fact");
        }
        assert_eq!(outcome.count("leaks_exact"), 0);
    }

    #[test]
    fn another_passage_behind_the_same_answers_changes_no_byte() {
        let rows_of = |passage: &str| {
            let mut rows = table();
            for row in &mut rows {
                row.provenance.evidence = Some(passage.to_owned());
                row.provenance.prompt = format!("digest of {passage}");
                row.provenance.places = vec!["notes/a.md § Plan".to_owned()];
            }
            rows
        };
        let run = |passage| {
            Bench::new()
                .table("examples", "examples.jsonl", &rows_of(passage))
                .run(&Split, json!({}))
                .unwrap()
        };
        let (before, after) = (run("Monday at nine."), run("Monday at ten."));
        for file in ["train.jsonl", "validation.jsonl", "test.jsonl"] {
            assert_eq!(before.text(file), after.text(file));
        }
        assert!(before.text("train.jsonl").contains("notes/a.md § Plan"));
    }

    #[test]
    fn held_out_questions_are_the_test() {
        let mut bench = Bench::new();
        bench.table("examples", "examples.jsonl", &table());
        let held_out = [
            example("q1", "fact-1", "Tell me fact one, please."),
            example("q2", "fact-2", "What do we know about question 8 about 2?"),
        ];
        let outcome =
            bench.table("test", "examples.jsonl", &held_out).run(&Split, json!({ "seed": 3 })).unwrap();
        assert_eq!(ids(&outcome, "test.jsonl"), ["q1", "q2"]);
        assert_eq!(outcome.count("train") + outcome.count("validation"), 100);
        let similarity = outcome.metrics["max_similarity"].as_f64().unwrap();
        assert!(similarity > 0.2 && similarity < 0.7, "{similarity}");
    }

    #[test]
    fn a_trained_test_question_is_an_error_or_leaves_training() {
        let mut bench = Bench::new();
        bench.table("examples", "examples.jsonl", &table());
        bench.table("test", "examples.jsonl", &[example("q1", "x", "question 8, about 2")]);
        let error = bench.run(&Split, json!({ "validation": 0 })).err().unwrap();
        assert_eq!(
            error.message,
            "1 test questions are also trained on\n  `q1` is `e8`: \"Question 8 about 2?\""
        );
        let outcome = bench.run(&Split, json!({ "validation": 0, "on_leak": "drop" })).unwrap();
        assert_eq!((outcome.count("train"), outcome.count("test"), outcome.count("leaks_exact")), (99, 1, 1));
        assert!(!ids(&outcome, "train.jsonl").contains(&"e8".to_owned()));
    }

    #[test]
    fn a_nearly_trained_question_is_listed() {
        let mut bench = Bench::new();
        let mut rows = table();
        rows.push(example("near", "n", "On what day of the week is the operating review held in Leeds?"));
        bench.table("examples", "examples.jsonl", &rows);
        bench.table(
            "test",
            "examples.jsonl",
            &[example("q", "n", "On what day of the week is the operating review held?")],
        );
        let outcome = bench.run(&Split, json!({ "validation": 0 })).unwrap();
        assert_eq!(outcome.count("leaks_near"), 1);
        assert!(outcome.messages[0].contains("held in Leeds"));
        let leaks: Value = serde_json::from_str(&outcome.text("leaks.json")).unwrap();
        assert_eq!(leaks["near"][0]["train"], "near");
    }

    #[test]
    fn impossible_shares_are_refused() {
        let mut bench = Bench::new();
        bench.table("examples", "examples.jsonl", &table()[..3]);
        assert_eq!(bench.run(&Split, json!({})).err().unwrap().code, "split::too_few");
        let error = bench.run(&Split, json!({ "validation": 0.5, "test": 0.5 })).err().unwrap();
        assert!(error.message.contains("nothing to train on"), "{}", error.message);
        assert_eq!(bench.run(&Split, json!({ "validation": 0, "test": 0 })).unwrap().count("train"), 3);
    }
}
