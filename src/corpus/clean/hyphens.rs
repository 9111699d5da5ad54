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
    Regex::new(r"([\p{L}\p{N}'’-]*\p{L})-[ \t]*\n[ \t]*(\p{Ll}[\p{L}'’]*)").expect("a valid pattern")
});
static BROKEN_AT_SPACE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"([\p{L}\p{N}'’-]*\p{L})-\s+(\p{Ll}[\p{L}'’]*)").expect("a valid pattern"));
static TORN_LIGATURE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"([\p{L}]*[\u{FB00}-\u{FB04}]) (\p{Ll}[\p{L}\u{FB00}-\u{FB04}]*)").expect("a valid pattern")
});
static WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\p{L}[\p{L}'’]*(?:-\p{L}[\p{L}'’]*)*-?").expect("a valid pattern"));

/// After these a hyphen was meant to hang: `short- and long-term`.
const HANGING: [&str; 6] = ["and", "or", "to", "und", "oder", "et"];

impl Vocabulary {
    /// Adds the words of `text`, but for those at a break.
    pub(crate) fn add(&mut self, text: &str) {
        let text = text.nfkc().collect::<String>();
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

/// Mends hyphens at breaks. In this order: `left-right` seen elsewhere and `leftright` not: keep the hyphen;
/// `leftright` seen: join; `left` already hyphenated, or both halves words of the document: keep the hyphen;
/// else join.
pub(crate) fn dehyphenate(text: &str, vocabulary: &Vocabulary, breaks: Break) -> String {
    let pattern = if breaks == Break::Line { &BROKEN_AT_LINE } else { &BROKEN_AT_SPACE };
    pattern
        .replace_all(text, |found: &Captures<'_>| {
            let (left, right) = (&found[1], &found[2]);
            if HANGING.contains(&right) {
                return if breaks == Break::Line { format!("{left}- {right}") } else { found[0].to_owned() };
            }
            let joined = format!("{left}{right}");
            let hyphenated = format!("{left}-{right}");
            let keeps = if vocabulary.has(&joined) {
                false
            } else {
                vocabulary.has(&hyphenated)
                    || left.contains('-')
                    || (vocabulary.has(left) && vocabulary.has(right))
            };
            if keeps { hyphenated } else { joined }
        })
        .into_owned()
}

/// Joins a word torn by a space behind its ligature, where the whole is a word of the document or the rest is not.
/// `ﬀ` ends honest words (`staﬀ meeting`), so there only the first reason counts.
pub(crate) fn mend_ligatures(text: &str, vocabulary: &Vocabulary) -> String {
    TORN_LIGATURE
        .replace_all(text, |found: &Captures<'_>| {
            let joined = format!("{}{}", &found[1], &found[2]);
            let plain = joined.nfkc().collect::<String>();
            let whole_is_known = vocabulary.has(&plain);
            let rest_is_unknown = !vocabulary.has(&found[2]) && !found[1].ends_with('\u{FB00}');
            if whole_is_known || rest_is_unknown { joined } else { found[0].to_owned() }
        })
        .into_owned()
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
    }

    #[test]
    fn the_joined_form_wins_when_the_document_has_it() {
        check("it happens sometimes, some more times", "it is some- times so", "it is sometimes so");
    }

    #[test]
    fn two_words_of_the_document_keep_their_hyphen() {
        check("the highest of all, a priority", "the highest- priority needs", "the highest-priority needs");
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
        vocabulary.add("the staff meeting and the effort is done");
        let mended = mend_ligatures(
            "the de\u{FB01} nition, e\u{FB00} ort of sta\u{FB00} meeting, wi\u{FB01} is",
            &vocabulary,
        );
        assert_eq!(mended, "the de\u{FB01}nition, e\u{FB00}ort of sta\u{FB00} meeting, wi\u{FB01} is");
    }
}
