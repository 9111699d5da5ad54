//! What the checks of examples read in a text: normalised words, stems, shingles and numbers.
//! Knows no example and no threshold; the same text always gives the same answer.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

/// Lower-case words with single spaces: compatibility forms folded, apostrophes dropped, every other mark a gap.
pub(crate) fn normalised(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.nfkc().flat_map(char::to_lowercase) {
        if character.is_alphanumeric() {
            out.push(character);
        } else if !matches!(character, '\'' | '’') && !out.is_empty() && !out.ends_with(' ') {
            out.push(' ');
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// Every run of white space as one space, none at the ends; nothing else changes.
pub(crate) fn single_spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// At most `limit` characters of the text on one line, with `…` where it was cut.
pub(crate) fn excerpt(text: &str, limit: usize) -> String {
    let line = single_spaced(text);
    match line.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", line[..end].trim_end()),
        None => line,
    }
}

/// The word without its commonest English endings: `signed`, `signs` and `signing` all give `sign`.
pub(crate) fn stem(word: &str) -> &str {
    let mut stem = word;
    for ending in ["ings", "ing", "ies", "edly", "ed", "es", "ly", "s"] {
        if let Some(rest) = word.strip_suffix(ending)
            && rest.chars().count() >= 3
            && !(ending == "s" && rest.ends_with('s'))
        {
            stem = rest;
            break;
        }
    }
    // `stopp` is `stop`, `agre` is `agr`: what is left must be the same for every form of a word.
    let mut back = stem.chars().rev();
    if let (Some(last), Some(before)) = (back.next(), back.next())
        && stem.len() > 3
        && last == before
    {
        stem = &stem[..stem.len() - last.len_utf8()];
    }
    let short = stem.trim_end_matches(['e', 'y']);
    if short.len() >= 3 { short } else { stem }
}

/// True for words too common to say what a text is about.
pub(crate) fn is_stop_word(word: &str) -> bool {
    const STOP_WORDS: &str = " a about after all also am an and any are as at be because been before being both but by \
        can could did do does during each for from had has have he her his how i if in into is it its may might more \
        most must my no nor not of on only or other our out over own shall she should so some such than that the \
        their them then there these they this those through to too under until up us very was we were what when \
        where which while who whom whose why will with would yes you your ";
    STOP_WORDS.contains(&format!(" {word} "))
}

/// Hashes of the text's overlapping runs of `length` characters, sorted, without repeats. A text shorter than
/// that is one shingle; an empty text has none.
pub(crate) fn character_shingles(text: &str, length: usize) -> Vec<u64> {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let count = starts.len() - 1;
    let shingles = match count {
        0 => Vec::new(),
        _ if count <= length => vec![hash(text.as_bytes())],
        _ => (0..=count - length).map(|at| hash(&text.as_bytes()[starts[at]..starts[at + length]])).collect(),
    };
    sorted_set(shingles)
}

/// Hashes of the overlapping runs of `length` words of a normalised text, sorted, without repeats.
pub(crate) fn word_shingles(text: &str, length: usize) -> Vec<u64> {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let shingles = match words.len() {
        0 => Vec::new(),
        count if count <= length => vec![hash(words.join(" ").as_bytes())],
        _ => words.windows(length).map(|run| hash(run.join(" ").as_bytes())).collect(),
    };
    sorted_set(shingles)
}

/// Shared shingles over all shingles of two sorted sets: 0 to 1; two empty sets are equal.
pub(crate) fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut at, mut other, mut shared) = (0, 0, 0usize);
    while at < a.len() && other < b.len() {
        match a[at].cmp(&b[other]) {
            std::cmp::Ordering::Less => at += 1,
            std::cmp::Ordering::Greater => other += 1,
            std::cmp::Ordering::Equal => {
                shared += 1;
                at += 1;
                other += 1;
            }
        }
    }
    let all = a.len() + b.len() - shared;
    if all == 0 { 1.0 } else { shared as f64 / all as f64 }
}

fn sorted_set(mut values: Vec<u64>) -> Vec<u64> {
    values.sort_unstable();
    values.dedup();
    values
}

/// FNV-1a and a final mix: fast, and the same on every machine.
fn hash(bytes: &[u8]) -> u64 {
    let folded = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |state: u64, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mixed(folded)
}

/// The SplitMix64 finaliser: every input bit reaches every output bit.
pub(crate) fn mixed(value: u64) -> u64 {
    let mut state = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// A number as it stands in a text, and what it may mean: `310k` is 310 and 310000.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Quantity {
    /// As written.
    pub(crate) written: String,
    /// Plain decimal notations of its possible values.
    pub(crate) values: Vec<String>,
}

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?i)\b(\d{1,3}(?:[,\u{a0}\u{202f}]\d{3})+|\d+)(\.\d+)?(?:[ \u{a0}]?(k|m|bn|thousand|million|billion)\b)?",
    )
    .expect("the pattern is constant")
});
static DIGITS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\d+").expect("the pattern is constant"));

/// The numbers written in digits. Digits glued to a letter before them (`Q2`, `FY21`) are names, not numbers.
pub(crate) fn quantities(text: &str) -> Vec<Quantity> {
    NUMBER
        .captures_iter(text)
        .map(|found| {
            let whole: String = found[1].chars().filter(char::is_ascii_digit).collect();
            let fraction = found.get(2).map_or("", |part| part.as_str());
            let plain = plain_number(&format!("{whole}{fraction}"));
            let scale = found.get(3).map_or(1.0, |unit| match unit.as_str().to_lowercase().as_str() {
                "k" | "thousand" => 1e3,
                "m" | "million" => 1e6,
                _ => 1e9,
            });
            let mut values = vec![plain.clone()];
            if scale > 1.0
                && let Ok(value) = plain.parse::<f64>()
            {
                values.push(format!("{:.0}", value * scale));
            }
            Quantity { written: found[0].to_owned(), values }
        })
        .collect()
}

/// Every number a text supports: those in digits in any reading, and those in words (`three hundred`).
pub(crate) fn supported_numbers(text: &str) -> BTreeSet<String> {
    let mut values: BTreeSet<String> =
        quantities(text).into_iter().flat_map(|quantity| quantity.values).collect();
    values.extend(DIGITS.find_iter(text).map(|digits| plain_number(digits.as_str())));
    let (mut total, mut current, mut inside) = (0u64, 0u64, false);
    for word in normalised(text).split(' ') {
        match number_word(word) {
            Some(100) => current = current.max(1) * 100,
            Some(scale) if scale >= 1000 => {
                total = total.saturating_add(current.max(1).saturating_mul(scale));
                current = 0;
            }
            Some(unit) => {
                values.insert(unit.to_string());
                current = if inside && (current % 100 == 0 || (current % 10 == 0 && unit < 10)) {
                    current.saturating_add(unit)
                } else {
                    total = 0;
                    unit
                };
            }
            None if inside && word == "and" => continue,
            None => {
                (total, current, inside) = (0, 0, false);
                continue;
            }
        }
        inside = true;
        values.insert(total.saturating_add(current).to_string());
    }
    values
}

fn plain_number(digits: &str) -> String {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole = whole.trim_start_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    match fraction.trim_end_matches('0') {
        "" => whole.to_owned(),
        fraction => format!("{whole}.{fraction}"),
    }
}

fn number_word(word: &str) -> Option<u64> {
    const UNITS: [&str; 21] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
    ];
    const TENS: [&str; 7] = ["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    const ORDINALS: [&str; 10] =
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"];
    let place = |list: &[&str]| list.iter().position(|entry| *entry == word).map(|at| at as u64);
    place(&UNITS)
        .or_else(|| place(&TENS).map(|at| (at + 3) * 10))
        .or_else(|| place(&ORDINALS).map(|at| at + 1))
        .or(match word {
            "once" => Some(1),
            "twice" => Some(2),
            "dozen" => Some(12),
            "hundred" => Some(100),
            "thousand" => Some(1000),
            "million" => Some(1_000_000),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_punctuation_and_width_do_not_matter() {
        assert_eq!(normalised("  When's the “Weekly” ﬁle—due?\n"), "whens the weekly file due");
        assert_eq!(normalised("?!"), "");
    }

    #[test]
    fn endings_fall_off() {
        for word in ["sign", "signed", "signs", "signing"] {
            assert_eq!(stem(word), "sign");
        }
        assert_eq!(stem("stopped"), stem("stop"));
        assert_eq!(stem("dates"), stem("date"));
        assert_eq!(stem("parties"), stem("party"));
        assert_eq!(stem("process"), stem("processes"));
        assert_eq!(stem("calls"), stem("call"));
        assert_eq!(stem("agreed"), stem("agree"));
        assert_eq!(stem("café"), "café");
    }

    #[test]
    fn numbers_are_read_in_every_notation() {
        let values =
            |text: &str| quantities(text).into_iter().map(|quantity| quantity.values).collect::<Vec<_>>();
        assert_eq!(values("1,130 tickets at 09:30"), [vec!["1130"], vec!["9"], vec!["30"]]);
        assert_eq!(values("$310k and £3.70m in Q2"), [vec!["310", "310000"], vec!["3.7", "3700000"]]);
        let support =
            supported_numbers("three hundred and twenty-one people, FY21, a dozen desks, 2 thousand");
        for number in ["321", "21", "12", "2000"] {
            assert!(support.contains(number), "{number} in {support:?}");
        }
        assert!(!support.contains("13"));
    }

    #[test]
    fn shingles_of_short_and_long_texts() {
        assert_eq!(character_shingles("", 5).len(), 0);
        assert_eq!(character_shingles("äöü", 5).len(), 1);
        assert_eq!(character_shingles("abcdefg", 5).len(), 3);
        assert_eq!(word_shingles("one two three four", 3).len(), 2);
        let (a, b) = (character_shingles("abcdefg", 5), character_shingles("bcdefgh", 5));
        assert!((jaccard(&a, &b) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn excerpts_are_cut_between_characters() {
        assert_eq!(excerpt("a\n b  c", 10), "a b c");
        assert_eq!(excerpt("ééééé", 3), "ééé…");
    }
}
