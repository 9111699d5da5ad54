//! The garbage real generators wrote must be named, and good concise answers left alone.

use super::*;
use crate::corpus::{Message, Provenance};

const LIMITS: Limits =
    Limits { min_answer_words: 2, max_answer_words: 400, min_grounded_percent: 50.0, template_groups: 3 };

fn example(id: &str, group: &str, question: &str, answer: &str) -> Example {
    let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    Example {
        id: id.to_owned(),
        messages: vec![message("user", question), message("assistant", answer)],
        group: group.to_owned(),
        tags: Vec::new(),
        key_facts: Vec::new(),
        provenance: Provenance::default(),
    }
}

fn check(question: &str, answer: &str, expected: &[Defect]) {
    let found = row_flaws(&example("x", "g", question, answer), None, &LIMITS);
    assert_eq!(found.iter().map(|flaw| flaw.defect).collect::<Vec<_>>(), expected, "{answer}: {found:?}");
}

#[test]
fn a_summary_of_only_a_file_name_is_empty() {
    let answer = r#"{"summary":"FY21 - Leadership Team.pdf","bullets":[]}"#;
    check("What is the main insight?", answer, &[Defect::EmptySummary]);
    check("What is the main insight?", r#"{"summary":"","bullets":[]}"#, &[Defect::EmptySummary]);
    check("Give the result as JSON.", r#"{"summary":"FY21 - Leadership Team.pdf"}"#, &[Defect::EmptySummary]);
    let why = &row_flaws(&example("x", "g", "What?", answer), None, &LIMITS)[0].explanation;
    assert_eq!(why, "the answer is JSON that holds only the file name `FY21 - Leadership Team.pdf`");
}

#[test]
fn json_is_an_answer_only_where_json_was_asked_for() {
    check("What happened?", r#"{"summary":"Sales grew","bullets":["x"]}"#, &[Defect::Gibberish]);
    check("What happened?", r#"{"summary":"Sales grew","bul"#, &[Defect::Gibberish]);
    check("Which roles are there?", r#"["driver", "dispatcher"]"#, &[]);
    check("Answer as JSON: what happened?", r#"{"summary":"Sales grew"}"#, &[]);
}

#[test]
fn a_file_name_is_no_answer() {
    check("What did the team decide?", "FY21 - Leadership Team.pdf", &[Defect::FileNameAnswer]);
    check("Which file holds the plan?", "FY21 - Leadership Team.pdf", &[]);
    check("What did the team decide?", "To read plan.pdf before the meeting.", &[]);
}

#[test]
fn fragments_start_or_stop_in_the_middle() {
    check("What are the action items?", "and then the", &[Defect::Fragment]);
    check("What are the action items?", "follow up w/ - ", &[Defect::Fragment]);
    check("What was agreed?", "The team will meet with", &[Defect::Fragment]);
    check("What are the next steps?", "; same five unless", &[Defect::Fragment]);
    check("Why?", "Because Gannet has not paid yet.", &[]);
    check("Who leads it?", "Callum Reid", &[]);
    check("Where is it?", "It is at https://example.org/plan/", &[]);
}

#[test]
fn short_long_and_empty_texts_are_named() {
    check("Did Lena hand over the call?", "Yes.", &[Defect::TooShort]);
    check("Did Lena hand over the call?", "", &[Defect::TooShort]);
    check("", "Lena handed over the call.", &[Defect::TooShort]);
    let long: String = (0..401).map(|n| format!("word{n} ")).collect();
    check("Tell me all.", &long, &[Defect::TooLong]);
    assert_eq!(Defect::TooLong.severity(), Severity::Warning);
}

#[test]
fn broken_encodings_are_gibberish() {
    let answer = "Quarterly visit in KÃ¸benhavn by me or Marcus â€“ in person Â§ï¿½ï¿½ MalmÃ¶";
    check("What did we promise Astrid outside the contract?", answer, &[Defect::Gibberish]);
}

#[test]
fn the_model_must_not_ask_itself() {
    check("Who leads it?", "Callum does.\nUser: And who pays?", &[Defect::QuestionInAnswer]);
    check("Who leads the backlog?", "Who leads the backlog? Callum does.", &[Defect::QuestionInAnswer]);
    check("Who leads the backlog?", "Callum leads the backlog; ask the user: Lena.", &[]);
}

#[test]
fn ungrounded_needs_evidence() {
    let row = example("x", "g", "How much?", "Bexley paid £3.7m for radar hardware.");
    assert!(row_flaws(&row, None, &LIMITS).is_empty());
    let evidence = "Berth for 14 quays, five years. Liquidated damages capped at 10 % of the annual fee.";
    let found = row_flaws(&row, Some(evidence), &LIMITS);
    assert_eq!(found[0].defect, Defect::Ungrounded);
    assert_eq!(found[0].explanation, "the passage does not hold `3.7m`");
}

#[test]
fn one_question_over_many_passages_is_a_template() {
    let rows: Vec<Example> = (0..3)
        .map(|n| {
            example(&n.to_string(), &format!("g{n}"), "What is the main insight?", &format!("Insight {n}."))
        })
        .collect();
    let found = set_flaws(&rows, &LIMITS);
    assert_eq!(
        found.iter().map(|(row, flaw)| (*row, flaw.defect)).collect::<Vec<_>>(),
        [(0, Defect::TemplateQuestion), (1, Defect::TemplateQuestion), (2, Defect::TemplateQuestion),]
    );
    let same_group: Vec<Example> =
        (0..5).map(|n| example(&n.to_string(), "g", "Who leads?", "Callum.")).collect();
    assert!(set_flaws(&same_group, &LIMITS).is_empty());
}

#[test]
fn one_question_with_two_truths_is_a_conflict() {
    let rows = [
        example("a", "fact-1", "How old is the dog?", "The dog is 4 years old."),
        example("b", "fact-2", "How old is the dog", "The dog is 11 years old."),
        example("c", "fact-3", "Who leads it?", "Callum leads it."),
        example("d", "fact-4", "Who leads it?", "Callum leads it!"),
    ];
    let found = set_flaws(&rows, &LIMITS);
    assert_eq!(
        found.iter().map(|(row, flaw)| (*row, flaw.defect)).collect::<Vec<_>>(),
        [(0, Defect::ConflictingAnswers), (1, Defect::ConflictingAnswers),]
    );
    assert_eq!(found[0].1.explanation, "the same question has another answer in row `b`");
}

#[test]
fn every_defect_has_one_name_everywhere() {
    for defect in Defect::ALL {
        assert_eq!(serde_json::to_value(defect).unwrap(), defect.name());
    }
}
