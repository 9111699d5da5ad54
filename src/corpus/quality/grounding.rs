//! Holds an answer against the passage it was made from: its numbers must all be there, and most of its words.
//! Also tells when an answer is in another language. Knows no example, only texts.

use std::collections::BTreeSet;

use crate::corpus::words::{is_stop_word, normalised, quantities, stem, supported_numbers};

/// Letters in which two long words must agree to be forms of one (`present`, `presentation`).
const BEGINNING: usize = 6;
/// A language shows in far less text than a chunk.
const LANGUAGE_CHARACTERS: usize = 800;

/// Why the evidence does not support the answer. Numbers are compared by value (`1,130` is `1130`, `310k` is
/// `310,000`, `twelve` supports `12`), words by stem; `min_percent` is the smallest share of content words.
pub(super) fn unsupported(answer: &str, evidence: &str, min_percent: f64) -> Option<String> {
    let support = supported_numbers(evidence);
    let missing: Vec<String> = quantities(answer)
        .into_iter()
        .filter(|quantity| !quantity.values.iter().any(|value| support.contains(value)))
        .map(|quantity| format!("`{}`", quantity.written.trim()))
        .collect();
    if !missing.is_empty() {
        return Some(format!("the passage does not hold {}", missing.join(", ")));
    }
    let evidence = normalised(evidence);
    let known: BTreeSet<&str> = evidence.split(' ').map(stem).collect();
    let answer = normalised(answer);
    let words: BTreeSet<&str> = answer
        .split(' ')
        .filter(|word| {
            word.chars().count() >= 3 && !is_stop_word(word) && !word.starts_with(|c: char| c.is_numeric())
        })
        .map(stem)
        .collect();
    let is_known = |word: &str| {
        let beginning = word.char_indices().nth(BEGINNING).map_or(word, |(end, _)| &word[..end]);
        known.contains(word)
            || beginning.len() < word.len()
                && known.range(beginning..).next().is_some_and(|k| k.starts_with(beginning))
    };
    let found = words.iter().filter(|word| is_known(word)).count();
    let percent = 100.0 * found as f64 / words.len().max(1) as f64;
    let strange: Vec<&str> = words.iter().filter(|word| !is_known(word)).take(5).copied().collect();
    (words.len() >= 2 && percent < min_percent).then(|| {
        format!(
            "only {found} of {} content words stand in the passage; not `{}`",
            words.len(),
            strange.join("`, `")
        )
    })
}

/// Why the answer is in another language than the evidence, or without evidence than the question. Silent where
/// either text is too short to be sure, or where the question asks for a translation.
pub(super) fn other_language(question: &str, answer: &str, evidence: Option<&str>) -> Option<String> {
    const LANGUAGES: [&str; 16] = [
        "english",
        "french",
        "german",
        "spanish",
        "italian",
        "portuguese",
        "dutch",
        "polish",
        "latin",
        "russian",
        "japanese",
        "chinese",
        "swedish",
        "danish",
        "arabic",
        "language",
    ];
    let asked = normalised(question);
    let wants_language =
        asked.split(' ').any(|word| word.starts_with("translat") || LANGUAGES.contains(&word));
    if wants_language {
        return None;
    }
    let spoken = reliable_language(answer)?;
    let expected = reliable_language(evidence.unwrap_or(question))?;
    (spoken != expected)
        .then(|| format!("the answer is in {}, its source in {}", spoken.eng_name(), expected.eng_name()))
}

fn reliable_language(text: &str) -> Option<whatlang::Lang> {
    if text.split_whitespace().count() < 6 {
        return None;
    }
    let end = text.char_indices().nth(LANGUAGE_CHARACTERS).map_or(text.len(), |(end, _)| end);
    whatlang::detect(&text[..end])
        .filter(|found| found.is_reliable() && found.confidence() > 0.95)
        .map(|found| found.lang())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSAGE: &str = "1. Support backlog under 400 open tickets. It stood at 1,130 on Friday.\n\
        3. A weekly operating review, Tuesdays at 09:30, forty-five minutes, numbers first, no slides. ARR: $310k.";

    #[test]
    fn concise_answers_from_the_passage_are_grounded() {
        for answer in [
            "The support backlog stood at 1130 open tickets, and the target was under 400.",
            "The weekly operating review runs on Tuesdays at 9:30 for 45 minutes, numbers first, no slides.",
            "$310,000 of ARR.",
            "On Tuesdays.",
        ] {
            assert_eq!(unsupported(answer, PASSAGE, 50.0), None, "{answer}");
        }
    }

    #[test]
    fn invented_numbers_and_words_are_named() {
        let why = unsupported("The backlog stood at 1,230 open tickets.", PASSAGE, 50.0).unwrap();
        assert_eq!(why, "the passage does not hold `1,230`");
        let why =
            unsupported("Communication is important for the team and the customer.", PASSAGE, 50.0).unwrap();
        assert!(why.starts_with("only 0 of 4 content words"), "{why}");
    }

    #[test]
    fn german_over_english_is_another_language() {
        let german = "Owen behält den Vertrieb und berichtet weiterhin direkt an Marcus, nicht an Dana.";
        let why = other_language("Who keeps the sales team?", german, Some(PASSAGE)).unwrap();
        assert_eq!(why, "the answer is in German, its source in English");
        assert_eq!(other_language("Translate this to German, please.", german, None), None);
        assert_eq!(other_language("Who keeps the sales team?", "Owen, of course.", Some(PASSAGE)), None);
    }
}
