//! Tells text from garbage by its characters: broken encodings, letters that make no words (a PDF whose font
//! maps glyphs wrongly), repetition. Knows no example, only a text.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

use crate::corpus::words::normalised;

static MOJIBAKE: LazyLock<Regex> = LazyLock::new(|| {
    // UTF-8 read as Windows-1252: a lead byte's letter followed by a continuation byte's sign.
    Regex::new("[ÃÂ][\u{80}-\u{bf}\u{152}\u{153}\u{160}\u{161}\u{178}\u{17d}\u{17e}\u{192}\u{2c6}\u{2dc}\u{2013}-\u{2122}]|â€|ï¿½|\u{fffd}")
        .expect("the pattern is constant")
});

static CODE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?s)```.*?(?:```|$)|`[^`\n]*`").expect("the pattern is constant"));

/// Why the text reads like a broken encoding, as `holds ...`.
pub(super) fn broken_encoding(text: &str) -> Option<String> {
    if let Some(found) = MOJIBAKE.find(text) {
        return Some(format!("holds `{}`, text in a broken encoding", found.as_str()));
    }
    let odd = text.chars().find(|character| {
        (character.is_control() && !matches!(character, '\n' | '\t' | '\r'))
            || matches!(character, '\u{e000}'..='\u{f8ff}')
    })?;
    Some(format!("holds the character U+{:04X}, which no text has", u32::from(odd)))
}

/// Why the text is garbage, as `holds ...` or `repeats ...`. Code between backticks is left alone.
pub(super) fn explain(text: &str) -> Option<String> {
    let prose = CODE.replace_all(text, " ");
    broken_encoding(text)
        .or_else(|| repetition(&prose))
        .or_else(|| few_letters(&prose))
        .or_else(|| no_words(&prose))
}

/// The same characters, word or phrase over and over.
fn repetition(text: &str) -> Option<String> {
    let mut run = (None, 0usize);
    for character in text.chars() {
        run = if run.0 == Some(character) { (run.0, run.1 + 1) } else { (Some(character), 1) };
        if run.1 >= 8 && character.is_alphanumeric() && character != '0' {
            return Some(format!("repeats `{character}` {} times", run.1));
        }
    }
    let text = normalised(text);
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let mut same = 1;
    for pair in words.windows(2) {
        same = if pair[0] == pair[1] { same + 1 } else { 1 };
        if same >= 5 {
            return Some(format!("repeats the word `{}`", pair[0]));
        }
    }
    let mut counts: BTreeMap<&[&str], usize> = BTreeMap::new();
    for phrase in words.windows(3) {
        *counts.entry(phrase).or_default() += 1;
    }
    let (phrase, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (count >= 4 && count * 10 > words.len())
        .then(|| format!("repeats the phrase `{}` {count} times", phrase.join(" ")))
}

/// Mostly signs.
fn few_letters(text: &str) -> Option<String> {
    let (mut all, mut usual) = (0usize, 0usize);
    for character in text.chars() {
        all += 1;
        usual += usize::from(
            character.is_alphanumeric()
                || character.is_whitespace()
                || ".,;:!?'\"’“”()%€$£/-–".contains(character),
        );
    }
    (all >= 12 && usual * 10 < all * 7)
        .then(|| format!("holds only {} % letters, digits and usual signs", usual * 100 / all))
}

/// Latin letters with too few vowels, or consonants in a row that no language has.
fn no_words(text: &str) -> Option<String> {
    let letters = text.chars().filter(|character| character.is_alphabetic()).count();
    let latin = text.chars().filter(char::is_ascii_alphabetic).count();
    let vowels = text.chars().filter(|character| is_vowel(*character)).count();
    if latin >= 20 && latin * 10 > letters * 9 && vowels * 5 < latin {
        return Some(format!("holds letters that make no words: only {} % are vowels", vowels * 100 / latin));
    }
    let (mut judged, mut bad) = (0usize, Vec::new());
    for word in text.split(|character: char| !character.is_alphanumeric()) {
        let letters = word.chars().filter(char::is_ascii_alphabetic).count();
        let is_acronym = word.chars().all(|c| c.is_uppercase() || c.is_ascii_digit()) && letters <= 5;
        if letters < 4 || !word.is_ascii() || is_acronym {
            continue;
        }
        judged += 1;
        if is_unpronounceable(word) {
            bad.push(word);
        }
    }
    (bad.len() >= 2 && bad.len() * 10 > judged * 3)
        .then(|| format!("holds letters that make no words: `{}`", bad[..bad.len().min(3)].join(" ")))
}

fn is_vowel(character: char) -> bool {
    "aeiouyAEIOUY".contains(character)
}

fn is_unpronounceable(word: &str) -> bool {
    let vowels = word.chars().filter(|character| is_vowel(*character)).count();
    let (mut run, mut longest) = (0, 0);
    for character in word.chars() {
        run = if character.is_ascii_alphabetic() && !is_vowel(character) { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    let digit_inside = word
        .as_bytes()
        .windows(3)
        .any(|part| part[0].is_ascii_lowercase() && part[1].is_ascii_digit() && part[2].is_ascii_lowercase());
    vowels == 0 || longest >= 6 || digit_inside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_encodings_are_named() {
        for text in [
            "Quarterly visit in KÃ¸benhavn",
            "in person â€“ at once",
            "a \u{fffd} b",
            "a\u{0}b",
            "it\u{f0b7}s",
        ] {
            assert!(broken_encoding(text).is_some(), "{text}");
        }
        for text in ["Ângela e João não vão", "L’été à Malmö – 40 %", "naïve café “quoted”", "Â"]
        {
            assert_eq!(broken_encoding(text), None, "{text}");
        }
    }

    #[test]
    fn a_shifted_font_makes_no_words() {
        for text in [
            "WKH UHSRUW VKRZV JURZWK LQ DOO PDUNHWV",
            "xkcdq qwrtzp lkjhgf asdfgh",
            ")0  '(9(/23,1*/($'(56 [[{{}}]] ~~^^ ||",
            "the the the the the team",
            "go on go on go on go on go on go on go on now",
            "aaaaaaaaaaaaaaaa",
        ] {
            assert!(explain(text).is_some(), "{text}");
        }
    }

    #[test]
    fn real_sentences_are_left_alone() {
        for text in [
            "The Leeds contract ends on 31 March 2024, and we do not renew whatever happens.",
            "Use HTTP over TLS; the JSON API returns HTTP 429.",
            "No more than 40 % of engineering may work on Keel in any quarter.",
            "```sh\nfor f in *.md; do cat \"$f\" | wc -l; done\n```",
            "Rhythm and strengths matter in Knightsbridge, says Schmidt.",
            "Here it is: ```\n2x1=2 | 3x1=3 | 4x1=4 | 5x1=5\n0 0 0 0 0 0\n```",
            "1. Reduce\n2. Reuse\n3. Recycle\n4. Repair",
            "It cost £1,000,000,000 in 2021.",
            "東京は日本の首都です。",
            "x = 4 + 2 * 3",
        ] {
            assert_eq!(explain(text), None, "{text}");
        }
    }
}
