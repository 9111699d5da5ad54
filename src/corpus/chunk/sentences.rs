//! Where sentences end. A full stop, question or exclamation mark, with closing quotes behind it, ends one if a
//! space follows and the next word does not start in lower case, unless the stop belongs to an abbreviation, an
//! initial or a list number. Full-width stops end one anywhere. Good for European languages, Chinese and Japanese.

use std::ops::Range;

const ABBREVIATIONS: [&str; 44] = [
    "mr", "mrs", "ms", "dr", "prof", "rev", "gen", "col", "sgt", "capt", "sen", "rep", "gov", "st", "jr",
    "sr", "vs", "e.g", "i.e", "cf", "al", "approx", "dept", "est", "fig", "figs", "no", "nos", "vol", "pp",
    "p", "ch", "sec", "art", "para", "inc", "ltd", "co", "corp", "z.b", "d.h", "bzw", "nr", "ca",
];

/// The sentences of `text`, without the spaces between them. They cover everything but those spaces.
pub(crate) fn split(text: &str) -> Vec<Range<usize>> {
    let mut sentences = Vec::new();
    let mut start = 0;
    for (index, char) in text.char_indices() {
        let end = index + char.len_utf8();
        let ends = match char {
            '.' | '!' | '?' | '…' => ends_here(text, start, index, end),
            '。' | '！' | '？' => Some(closing_end(text, end)),
            '\n' => Some(index),
            _ => None,
        };
        if let Some(end) = ends
            && end > start
        {
            push(text, start..end, &mut sentences);
            start = end;
        }
    }
    push(text, start..text.len(), &mut sentences);
    sentences
}

fn push(text: &str, range: Range<usize>, sentences: &mut Vec<Range<usize>>) {
    let sentence = &text[range.clone()];
    let start = range.start + sentence.len() - sentence.trim_start().len();
    let end = start + sentence.trim().len();
    if end > start {
        sentences.push(start..end);
    }
}

/// Where the sentence ends that has its mark at `mark..end`, if it ends there.
fn ends_here(text: &str, start: usize, mark: usize, end: usize) -> Option<usize> {
    let end = closing_end(text, end);
    let rest = &text[end..];
    let next = rest.trim_start().chars().next()?;
    let parted = rest.starts_with(char::is_whitespace);
    let goes_on = next.is_lowercase() || matches!(next, '.' | '!' | '?' | ',' | ';' | ':');
    let is_stop = text[mark..].starts_with('.');
    (parted && !goes_on && !(is_stop && is_abbreviation(&text[start..mark]))).then_some(end)
}

/// Behind the quotes and brackets that close with the sentence.
fn closing_end(text: &str, end: usize) -> usize {
    let closers = ['"', '\'', '”', '’', '»', ')', ']', '」', '』', '）'];
    end + text[end..].chars().take_while(|char| closers.contains(char)).map(char::len_utf8).sum::<usize>()
}

/// True if a full stop behind `text` marks an abbreviation (`e.g`), an initial (`J`) or a list number (`12`).
fn is_abbreviation(text: &str) -> bool {
    let word = text.rsplit(|char: char| char.is_whitespace() || "([\"“‘".contains(char)).next().unwrap_or("");
    let is_initial = word.chars().count() == 1 && word.chars().all(char::is_uppercase) && word != "I";
    let is_number = text.trim() == word && !word.is_empty() && word.chars().all(|char| char.is_ascii_digit());
    is_initial || is_number || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[&str]) {
        assert_eq!(split(text).into_iter().map(|range| &text[range]).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn sentences_end_at_their_marks() {
        check("One. Two! Three?  Four", &["One.", "Two!", "Three?", "Four"]);
        check(
            "He said “Go.” Then we went. (So it was.) Yes",
            &["He said “Go.”", "Then we went.", "(So it was.)", "Yes"],
        );
    }

    #[test]
    fn abbreviations_initials_and_numbers_end_none() {
        check("Dr. J. Lee met Mr. Ito, e.g. Monday.", &["Dr. J. Lee met Mr. Ito, e.g. Monday."]);
        check("1. First point. 2.5 percent, see p. 4.", &["1. First point.", "2.5 percent, see p. 4."]);
        check(
            "Use tools (e.g. Slack) and so on. etc. it goes",
            &["Use tools (e.g. Slack) and so on. etc. it goes"],
        );
        check("It was me and I. You know.", &["It was me and I.", "You know."]);
    }

    #[test]
    fn full_width_stops_need_no_space() {
        check("今天开会。讨论预算。", &["今天开会。", "讨论预算。"]);
    }

    #[test]
    fn lines_end_sentences() {
        check("- a point\n- another", &["- a point", "- another"]);
    }
}
