//! Names what is wrong with an example, row by row and over the whole table, in words its owner can act on.
//! A text is judged only by itself, its question and its evidence; nothing here asks a model. Knows no file
//! and no stage. `garble` judges characters and repetition, `grounding` compares with the evidence.

mod garble;
mod grounding;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Example;
use super::words::{excerpt, normalised, quantities};

/// What can be wrong with an example.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Defect {
    /// The answer is JSON whose only content is nothing, or a file name.
    EmptySummary,
    /// The answer is nothing but the name of a file.
    FileNameAnswer,
    /// The answer starts or stops in the middle of a sentence.
    Fragment,
    /// One question stands over three or more unrelated passages.
    TemplateQuestion,
    /// Broken encoding, raw JSON, repetition, or letters that make no words.
    Gibberish,
    /// The answer says what its evidence does not.
    Ungrounded,
    /// Question or answer has too few words.
    TooShort,
    /// The answer has too many words; a warning, the row stays.
    TooLong,
    /// The answer is in another language than its evidence or question.
    WrongLanguage,
    /// The answer repeats the question, or goes on to ask the next one.
    QuestionInAnswer,
    /// One question has different answers in different groups.
    ConflictingAnswers,
}

impl Defect {
    /// Every defect, in the order of declaration.
    pub(crate) const ALL: [Self; 11] = [
        Self::EmptySummary,
        Self::FileNameAnswer,
        Self::Fragment,
        Self::TemplateQuestion,
        Self::Gibberish,
        Self::Ungrounded,
        Self::TooShort,
        Self::TooLong,
        Self::WrongLanguage,
        Self::QuestionInAnswer,
        Self::ConflictingAnswers,
    ];

    /// Its name in parameters, findings and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::EmptySummary => "empty_summary",
            Self::FileNameAnswer => "file_name_answer",
            Self::Fragment => "fragment",
            Self::TemplateQuestion => "template_question",
            Self::Gibberish => "gibberish",
            Self::Ungrounded => "ungrounded",
            Self::TooShort => "too_short",
            Self::TooLong => "too_long",
            Self::WrongLanguage => "wrong_language",
            Self::QuestionInAnswer => "question_in_answer",
            Self::ConflictingAnswers => "conflicting_answers",
        }
    }

    /// Whether a row with it is dropped or only reported.
    pub(crate) fn severity(self) -> Severity {
        if self == Self::TooLong { Severity::Warning } else { Severity::Error }
    }
}

/// What becomes of a row with a defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// It counts against the table and is dropped.
    Error,
    /// It is reported and stays.
    Warning,
}

/// Thresholds of the checks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Fewest words of an answer.
    pub(crate) min_answer_words: usize,
    /// Most words of an answer.
    pub(crate) max_answer_words: usize,
    /// Smallest share of an answer's content words that stand in its evidence, 0 to 100.
    pub(crate) min_grounded_percent: f64,
    /// Groups from which on a repeated question is a template.
    pub(crate) template_groups: usize,
}

/// One defect of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Flaw {
    /// Which.
    pub(crate) defect: Defect,
    /// Why, in words.
    pub(crate) explanation: String,
    /// The text at fault.
    pub(crate) excerpt: String,
}

impl Flaw {
    fn new(defect: Defect, explanation: impl Into<String>, text: &str) -> Self {
        Self { defect, explanation: explanation.into(), excerpt: excerpt(text, 120) }
    }
}

/// What one row shows by itself. `evidence` is the passage it was made from, with its headings and place.
pub(crate) fn row_flaws(example: &Example, evidence: Option<&str>, limits: &Limits) -> Vec<Flaw> {
    let (question, answer) = (example.asked(), example.answer());
    // A dump or a bare file name has no sentence worth further checks.
    if let Some(flaw) = dumped_json(example, answer).or_else(|| file_name_answer(&question, answer)) {
        return vec![flaw];
    }
    let mut flaws: Vec<Flaw> = length(&question, answer, limits).into_iter().collect();
    let broken = garble::explain(answer)
        .map(|why| Flaw::new(Defect::Gibberish, format!("the answer {why}"), answer))
        .or_else(|| {
            let why = garble::broken_encoding(&question)?;
            Some(Flaw::new(Defect::Gibberish, format!("the question {why}"), &question))
        });
    let is_broken = broken.is_some();
    flaws.extend(broken);
    flaws.extend(fragment(answer));
    flaws.extend(question_in_answer(&question, answer));
    if is_broken {
        return flaws;
    }
    let foreign = grounding::other_language(&question, answer, evidence)
        .map(|why| Flaw::new(Defect::WrongLanguage, why, answer));
    let is_foreign = foreign.is_some();
    flaws.extend(foreign);
    if let Some(evidence) = evidence
        && !is_foreign
        && let Some(why) = grounding::unsupported(answer, evidence, limits.min_grounded_percent)
    {
        flaws.push(Flaw::new(Defect::Ungrounded, why, answer));
    }
    flaws
}

/// What only the whole table shows: for each flaw, the index of its row. In the order of rows.
pub(crate) fn set_flaws(examples: &[Example], limits: &Limits) -> Vec<(usize, Flaw)> {
    let mut by_question: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (row, example) in examples.iter().enumerate() {
        let question = normalised(&example.asked());
        if !question.is_empty() {
            by_question.entry(question).or_default().push(row);
        }
    }
    let mut flaws = Vec::new();
    for rows in by_question.values() {
        let groups: BTreeSet<&str> = rows.iter().map(|row| examples[*row].group.as_str()).collect();
        if groups.len() >= limits.template_groups {
            let why = format!(
                "the same question stands in {} rows over {} unrelated groups",
                rows.len(),
                groups.len()
            );
            let of_row = |row: &usize| {
                (*row, Flaw::new(Defect::TemplateQuestion, why.clone(), examples[*row].question()))
            };
            flaws.extend(rows.iter().map(of_row));
        } else if let Some(other) = conflict(examples, rows) {
            let why = format!("the same question has another answer in row `{}`", examples[other[1]].id);
            flaws.push((other[0], Flaw::new(Defect::ConflictingAnswers, why, examples[other[0]].answer())));
            let why = format!("the same question has another answer in row `{}`", examples[other[0]].id);
            flaws.push((other[1], Flaw::new(Defect::ConflictingAnswers, why, examples[other[1]].answer())));
        }
    }
    flaws.sort_by_key(|(row, flaw)| (*row, flaw.defect));
    flaws
}

/// The first two rows of one question that answer differently and belong to different groups.
fn conflict(examples: &[Example], rows: &[usize]) -> Option<[usize; 2]> {
    let first = rows[0];
    let other = rows.iter().skip(1).find(|row| {
        let (a, b) = (&examples[first], &examples[**row]);
        a.group != b.group && differ(a.answer(), b.answer())
    })?;
    Some([first, *other])
}

/// True if two answers disagree: other numbers, or less than half of their words in common.
fn differ(a: &str, b: &str) -> bool {
    let numbers =
        |text: &str| -> BTreeSet<String> { quantities(text).into_iter().flat_map(|n| n.values).collect() };
    let (one, two) = (normalised(a), normalised(b));
    let (left, right): (BTreeSet<&str>, BTreeSet<&str>) =
        (one.split(' ').collect(), two.split(' ').collect());
    numbers(a) != numbers(b) || left.intersection(&right).count() * 2 < left.union(&right).count()
}

fn length(question: &str, answer: &str, limits: &Limits) -> Option<Flaw> {
    let words = answer.split_whitespace().count();
    if question.trim().is_empty() {
        Some(Flaw::new(Defect::TooShort, "there is no question", answer))
    } else if words < limits.min_answer_words {
        let least = limits.min_answer_words;
        Some(Flaw::new(Defect::TooShort, format!("the answer has {words} words, less than {least}"), answer))
    } else if words > limits.max_answer_words {
        let most = limits.max_answer_words;
        Some(Flaw::new(Defect::TooLong, format!("the answer has {words} words, more than {most}"), answer))
    } else {
        None
    }
}

/// JSON where an answer should be, unless the conversation asks for JSON.
fn dumped_json(example: &Example, answer: &str) -> Option<Flaw> {
    let trimmed = answer.trim();
    if !trimmed.starts_with(['{', '[']) {
        return None;
    }
    let Ok(value) = serde_json::from_str::<Value>(trimmed) else {
        let looks_like_json =
            trimmed.starts_with("{\"") || trimmed.starts_with("[{") || trimmed.starts_with("[\"");
        return (looks_like_json && !asks_for_json(example))
            .then(|| Flaw::new(Defect::Gibberish, "the answer is broken JSON", answer));
    };
    let mut leaves = Vec::new();
    collect_leaves(&value, &mut leaves);
    let content = leaves.iter().find(|leaf| !leaf.trim().is_empty() && !is_file_name(leaf));
    match (content, leaves.iter().find(|leaf| is_file_name(leaf))) {
        (None, Some(name)) => {
            let why = format!("the answer is JSON that holds only the file name `{}`", name.trim());
            Some(Flaw::new(Defect::EmptySummary, why, answer))
        }
        (None, None) => Some(Flaw::new(Defect::EmptySummary, "the answer is JSON without content", answer)),
        (Some(_), _) if is_plain_list(&value) || asks_for_json(example) => None,
        (Some(_), _) => Some(Flaw::new(Defect::Gibberish, "the answer is raw JSON, not a sentence", answer)),
    }
}

fn is_plain_list(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().all(|item| !item.is_object() && !item.is_array()))
}

fn asks_for_json(example: &Example) -> bool {
    let asked = example.messages.iter().filter(|message| message.role != "assistant");
    asked.map(|message| message.content.to_lowercase()).any(|text| text.contains("json"))
}

fn collect_leaves(value: &Value, leaves: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields.values().for_each(|field| collect_leaves(field, leaves)),
        Value::Array(items) => items.iter().for_each(|item| collect_leaves(item, leaves)),
        Value::String(text) => leaves.push(text.clone()),
        Value::Number(number) => leaves.push(number.to_string()),
        Value::Bool(_) | Value::Null => {}
    }
}

static FILE_NAME: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)^[\p{L}\p{N}_ .,()&'/\\#+–-]{1,120}\.(pdf|docx?|pptx?|xlsx?|txt|md|csv|eml|msg|html?|rtf|odt|pages|key)$")
        .expect("the pattern is constant")
});

fn is_file_name(text: &str) -> bool {
    let bare = text.trim().trim_matches(['"', '\'', '`', '*', '.', ' ']);
    bare.split_whitespace().count() <= 12 && FILE_NAME.is_match(bare)
}

fn file_name_answer(question: &str, answer: &str) -> Option<Flaw> {
    let asks_for_file = ["file", "document", "attachment", "called"].iter().any(|word| {
        normalised(question).split(' ').any(|other| other.strip_suffix('s').unwrap_or(other) == *word)
    });
    (is_file_name(answer) && !asks_for_file)
        .then(|| Flaw::new(Defect::FileNameAnswer, "the answer is only the name of a file", answer))
}

/// An answer that starts with a connector, or stops where no sentence can stop.
fn fragment(answer: &str) -> Option<Flaw> {
    const CONNECTORS: [&str; 9] = ["and", "but", "or", "nor", "which", "whose", "whereas", "than", "of"];
    const DANGLING: [&str; 22] = [
        "the", "a", "an", "and", "or", "but", "of", "with", "for", "from", "by", "as", "than", "because",
        "if", "that", "which", "to", "their", "our", "unless", "until",
    ];
    let trimmed = answer.trim();
    let first = trimmed.split_whitespace().next()?;
    let last = trimmed.split_whitespace().next_back()?;
    let several = trimmed.split_whitespace().count() > 1;
    let why = if several
        && (CONNECTORS.contains(&first.trim_end_matches(',')) || first.starts_with([';', ',', ')']))
    {
        format!("the answer starts with `{first}`, in the middle of a sentence")
    } else if several
        && (DANGLING.contains(&last)
            || !last.contains("://") && trimmed.ends_with(['-', '–', ',', ';', '(', '&', '/']))
    {
        format!("the answer stops after `{last}`, in the middle of a sentence")
    } else {
        return None;
    };
    Some(Flaw::new(Defect::Fragment, why, answer))
}

static NEXT_TURN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?im)^\s*(?:#+\s*)?(?:user|human|question|q|instruction|assistant|response)\s*:|<\|[a-z_]+\|>|\[/?INST\]|</s>")
        .expect("the pattern is constant")
});

fn question_in_answer(question: &str, answer: &str) -> Option<Flaw> {
    if let Some(marker) = NEXT_TURN.find(answer) {
        let why = format!("the answer goes on with another turn at `{}`", marker.as_str().trim());
        return Some(Flaw::new(Defect::QuestionInAnswer, why, &answer[marker.start()..]));
    }
    let (asked, said) = (normalised(question), normalised(answer));
    let repeats = asked.split(' ').count() >= 4 && question.contains('?') && said.starts_with(&asked);
    repeats.then(|| Flaw::new(Defect::QuestionInAnswer, "the answer repeats the question", answer))
}

#[cfg(test)]
mod tests;
