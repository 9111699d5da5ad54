//! Text that a PDF font turned into nonsense: each glyph's number shifted (`1RYHPEHU` for `November`), symbols
//! inside words, replacement characters. A score from 0 to 1; the caller decides what is too much.

/// Above this share of strange words a page is not worth reading.
pub(crate) const GARBLED_SCORE: f64 = 0.3;

/// Fewer words than this are no evidence.
const WORDS_MIN: usize = 4;

/// How far the commonest broken encoding shifts: glyph numbers of a TrueType font start at 3 for the space (32).
const GLYPH_SHIFT: u8 = 29;

const COMMON: [&str; 12] = ["the", "and", "of", "to", "in", "for", "is", "that", "with", "on", "are", "by"];

/// The share of words that no language writes, 0 to 1; 0 where there are too few words to tell.
pub(crate) fn score(text: &str) -> f64 {
    let words = text
        .split(|char: char| char.is_whitespace() || char.is_control())
        .filter(|word| word.chars().count() >= 2 && !is_leader(word))
        .collect::<Vec<_>>();
    if words.len() < WORDS_MIN {
        return 0.0;
    }
    let strange = words.iter().filter(|word| is_strange(word)).count();
    let shifted = words.iter().filter(|word| COMMON.contains(&unshift(word).as_str())).count();
    let honest = words.iter().filter(|word| COMMON.contains(&word.to_lowercase().as_str())).count();
    let share = strange as f64 / words.len() as f64;
    // Shifted small words look like acronyms (`WKH` is `the`); seeing them and not the real ones settles it.
    if shifted >= 3 && shifted > 2 * honest { share.max(0.9) } else { share }
}

/// Dots or dashes that lead the eye to a page number.
fn is_leader(word: &str) -> bool {
    word.chars().all(|char| matches!(char, '.' | '-' | '_' | '–' | '—' | '*' | '=' | '·' | '…'))
}

fn unshift(word: &str) -> String {
    word.bytes().map(|byte| char::from(byte.saturating_add(GLYPH_SHIFT))).collect::<String>().to_lowercase()
}

fn is_strange(word: &str) -> bool {
    if word.chars().any(|char| char == '\u{FFFD}' || ('\u{E000}'..='\u{F8FF}').contains(&char)) {
        return true;
    }
    let core = word.trim_matches(|char: char| !char.is_alphanumeric());
    let chars = core.chars().collect::<Vec<_>>();
    let letters = chars.iter().filter(|char| char.is_alphabetic()).count();
    let digits = chars.iter().filter(|char| char.is_numeric()).count();
    let symbols = word.chars().count() - letters - digits;
    if core.is_empty() {
        return word.chars().count() >= 4;
    }
    if core.contains("://") || core.contains('@') || core.starts_with("www.") || core.contains(".gov") {
        return false;
    }
    if letters == 0 {
        // A number, a date, an amount; more symbols than digits is none of them.
        return symbols > digits + 2;
    }
    if digits > 0 && has_digit_before_capitals(&chars) {
        return true;
    }
    if symbols * 10 > word.chars().count() * 4 && symbols >= 3 {
        return true;
    }
    let latin = chars.iter().all(|char| char.is_ascii_alphabetic());
    let capitals = chars.iter().all(|char| char.is_uppercase());
    latin
        && chars.len() >= 4
        && !(capitals && chars.len() <= 6)
        && !chars.iter().any(|char| "aeiouyAEIOUY".contains(*char))
}

/// `1RYHPEHU`: a digit followed by four capitals or more.
fn has_digit_before_capitals(chars: &[char]) -> bool {
    chars
        .windows(5)
        .any(|window| window[0].is_ascii_digit() && window[1..].iter().all(char::is_ascii_uppercase))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glyph_shifted_text_scores_high() {
        assert!(score(")0 '(9(/23,1*/($'(56 1RYHPEHU 6WDWHV $UP\\") > GARBLED_SCORE);
        assert!(score("WKH SURGXFW RZQHU DQG WKH WHDP RI WKH DJHQF\\") > GARBLED_SCORE);
    }

    #[test]
    fn replacement_characters_score_high() {
        assert!(score("\u{FFFD}\u{FFFD}a b\u{FFFD}c \u{FFFD}\u{FFFD} word \u{FFFD}x") > GARBLED_SCORE);
    }

    #[test]
    fn honest_text_scores_low() {
        for text in [
            "The COR approves 18F's invoices (see FAR 11.104) for $6M in FY2018, e.g. by e-mail.",
            "Introduction ........ 6 About the editors ........ 7 Structure of this handbook .... 8",
            "Total 1,200 3,400 12.5% (4.2) -17 2020-11-03 10:45",
            "Größe und Übermut führen über schwierige Straßen nach Zürich",
            "会议记录 今天 讨论了 预算 和 人员",
        ] {
            assert!(score(text) < 0.15, "{text}: {}", score(text));
        }
    }
}
