//! How long a text is in tokens.

use tunesmith_engine::tokenizer::{Specials, Tokenizer};

/// What counts tokens.
pub(crate) enum TokenCounter {
    /// A rule that needs no model: a run of letters or digits is one token for every six characters begun; every
    /// other character but a space, and every Chinese, Japanese or Korean one, is a token of its own. A
    /// guess, good enough for a budget; only a model's own tokenizer is exact.
    Approximate,
    /// The tokenizer of the model that will be trained. A text it refuses is counted by the approximate rule.
    Model(Box<Tokenizer>),
}

/// Characters of a word in one token of the approximate rule.
const CHARS_PER_PIECE: usize = 6;

impl TokenCounter {
    /// The tokens of `text`.
    pub(crate) fn count(&self, text: &str) -> usize {
        match self {
            Self::Approximate => approximate(text),
            Self::Model(tokenizer) => {
                tokenizer.encode(text, Specials::AsText).map_or_else(|_| approximate(text), |ids| ids.len())
            }
        }
    }
}

fn approximate(text: &str) -> usize {
    let mut tokens = 0;
    let mut run = 0;
    for char in text.chars() {
        if char.is_alphanumeric() && !is_ideograph(char) {
            if run % CHARS_PER_PIECE == 0 {
                tokens += 1;
            }
            run += 1;
        } else {
            run = 0;
            tokens += usize::from(!char.is_whitespace());
        }
    }
    tokens
}

fn is_ideograph(char: char) -> bool {
    matches!(char, '\u{3040}'..='\u{30FF}' | '\u{3400}'..='\u{9FFF}' | '\u{AC00}'..='\u{D7AF}' | '\u{F900}'..='\u{FAFF}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_punctuation_and_long_words_count() {
        let count = |text: &str| TokenCounter::Approximate.count(text);
        assert_eq!(count(""), 0);
        assert_eq!(count("The cat, again."), 5);
        assert_eq!(count("management"), 2);
        assert_eq!(count("会议 a1"), 3);
    }
}
