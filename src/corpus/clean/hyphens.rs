//! Words broken at a line end: `manage-` + `ment` is one word, `long-` + `term` keeps its hyphen, and
//! `short- and` was never broken. The document itself is the dictionary, so this works in any language.
//! Also heals words torn after a ligature (`deﬁ nition`), which some PDF writers produce.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::{Captures, Regex};
use unicode_normalization::UnicodeNormalization;

/// The words of a document in lower case, hyphenated ones whole; words torn by a break are left out.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary(BTreeSet<String>);

/// Which break between the two halves counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Break {
    /// Only a line end: the text still has its lines.
    Line,
    /// Any space: the lines were joined by an extractor before.
    Space,
}

static BROKEN_AT_LINE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"([\p{L}\p{N}'’-]*\p{L})-[ \t]*\n[ \t]*(\p{Ll}[\p{L}'’]*(?:-\p{L}+)*)")
        .expect("a valid pattern")
});
static BROKEN_AT_SPACE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"([\p{L}\p{N}'’-]*\p{L})-\s+(\p{Ll}[\p{L}'’]*(?:-\p{L}+)*)").expect("a valid pattern")
});
static TORN_LIGATURE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"([\p{L}-]*(?:\u{FB00}[il]?|[\u{FB01}-\u{FB04}]|f[fil])) {1,2}(\p{Ll}[\p{L}\u{FB00}-\u{FB04}]*)",
    )
    .expect("a valid pattern")
});
static WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\p{L}[\p{L}'’]*(?:-\p{L}[\p{L}'’]*)*-?").expect("a valid pattern"));

/// After these a hyphen was meant to hang: `short- and long-term`.
const HANGING: [&str; 6] = ["and", "or", "to", "und", "oder", "et"];

impl Vocabulary {
    /// Adds the words of `text`, but for those at a break or torn behind a ligature.
    pub(crate) fn add(&mut self, text: &str) {
        let text = TORN_LIGATURE.replace_all(text, " ").nfkc().collect::<String>();
        let mut after_break = false;
        for word in WORD.find_iter(&text) {
            let word = word.as_str();
            let at_break = word.ends_with('-');
            if !at_break && !after_break {
                self.0.insert(word.to_lowercase());
                self.0.extend(word.split('-').map(str::to_lowercase));
            }
            after_break = at_break;
        }
    }

    fn has(&self, word: &str) -> bool {
        self.0.contains(&word.to_lowercase())
    }
}

/// Halves at least this long look like words of a compound, not like the first syllables of one word.
const COMPOUND_CHARS_MIN: usize = 6;

/// Mends hyphens at breaks. `leftright` is a word of the document: join. Otherwise the hyphen stays if `left-right`
/// is a word of the document, if one of the halves has a hyphen already (`off-the-` + `shelf`), or if `right` is a
/// word and `left` is one or is long (`highest-` + `priority`). Else join.
pub(crate) fn dehyphenate(text: &str, vocabulary: &Vocabulary, breaks: Break) -> String {
    let pattern = if breaks == Break::Line { &BROKEN_AT_LINE } else { &BROKEN_AT_SPACE };
    let mend = |found: &Captures<'_>| {
        let (left, right) = (&found[1], &found[2]);
        if HANGING.contains(&right) {
            return format!("{left}- {right}");
        }
        let joined = format!("{left}{right}");
        let hyphenated = format!("{left}-{right}");
        let is_compound = || {
            let left_is_word = vocabulary.has(left) || left.chars().count() >= COMPOUND_CHARS_MIN;
            hyphenated.matches('-').count() > 1
                || vocabulary.has(&hyphenated)
                || (left_is_word && vocabulary.has(right))
        };
        if !vocabulary.has(&joined) && is_compound() { hyphenated } else { joined }
    };
    pattern.replace_all(text, mend).into_owned()
}

/// Words that do end in `ﬁ`.
const WHOLE: [&str; 4] = ["wifi", "hifi", "sci-fi", "hi-fi"];

/// Beginnings in `ﬀ` that are no words, unlike `staff` and `off`.
const BEGINNINGS: [&str; 8] = ["aff", "buff", "coff", "diff", "eff", "ineff", "suff", "traff"];

/// Joins a word torn by a space behind its ligature. `ﬁ`, `ﬂ`, `ﬃ` and `ﬄ` end hardly any word, so there it was
/// torn; behind `ﬀ`, or behind the mere letters, the whole must be a word of the document, or the beginning none.
pub(crate) fn mend_ligatures(text: &str, vocabulary: &Vocabulary) -> String {
    let mend = |found: &Captures<'_>| {
        let joined = format!("{}{}", &found[1], &found[2]);
        let start = found[1].nfkc().collect::<String>().to_lowercase();
        let never_ends = ["\u{FB01}", "\u{FB02}", "\u{FB03}", "\u{FB04}", "\u{FB00}i", "\u{FB00}l"]
            .iter()
            .any(|ligature| found[1].ends_with(ligature));
        let is_torn = if never_ends {
            !WHOLE.contains(&start.as_str())
        } else {
            BEGINNINGS.contains(&start.as_str())
                || (start == "off" && found[2].starts_with("er"))
                || vocabulary.has(&joined.nfkc().collect::<String>())
        };
        if is_torn { joined } else { found[0].to_owned() }
    };
    TORN_LIGATURE.replace_all(text, mend).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(document: &str, text: &str, expect: &str) {
        let mut vocabulary = Vocabulary::default();
        vocabulary.add(document);
        vocabulary.add(text);
        assert_eq!(dehyphenate(text, &vocabulary, Break::Space), expect);
    }

    #[test]
    fn a_broken_word_is_joined() {
        check("", "good manage-\nment is", "good management is");
        check("", "in agen- cies th", "in agencies th");
    }

    #[test]
    fn a_compound_seen_elsewhere_keeps_its_hyphen() {
        check("a long-term plan", "our long-\nterm goals", "our long-term goals");
        check("off-the-shelf", "off-the- shelf goods", "off-the-shelf goods");
        check("", "the day- to-day work", "the day-to-day work");
    }

    #[test]
    fn the_joined_form_wins_when_the_document_has_it() {
        check("it happens sometimes, some more times", "it is some- times so", "it is sometimes so");
    }

    #[test]
    fn two_words_of_the_document_keep_their_hyphen() {
        check("the best of all, a case", "the best- case plan", "the best-case plan");
        check("a priority", "the highest- priority needs", "the highest-priority needs");
    }

    #[test]
    fn a_hanging_hyphen_is_left_alone() {
        check("", "short- and long-term", "short- and long-term");
    }

    #[test]
    fn dashes_between_words_are_left_alone() {
        check("", "one - two, 5- to 6, A- B", "one - two, 5- to 6, A- B");
    }

    #[test]
    fn in_text_with_lines_only_line_ends_count() {
        let vocabulary = Vocabulary::default();
        assert_eq!(
            dehyphenate("pre- existing con-\n  dition", &vocabulary, Break::Line),
            "pre- existing condition"
        );
    }

    #[test]
    fn words_torn_behind_a_ligature_are_mended() {
        let mut vocabulary = Vocabulary::default();
        vocabulary.add("the staff meeting and the effort is done within five days, de\u{FB01} nition");
        let mended = mend_ligatures(
            "the de\u{FB01} nition, e\u{FB00} ort of sta\u{FB00} meeting, wi\u{FB01} is, fi ve, O\u{FB03}  ce, o\u{FB00} er",
            &vocabulary,
        );
        assert_eq!(
            mended,
            "the de\u{FB01}nition, e\u{FB00}ort of sta\u{FB00} meeting, wi\u{FB01} is, five, O\u{FB03}ce, o\u{FB00}er"
        );
    }
}
