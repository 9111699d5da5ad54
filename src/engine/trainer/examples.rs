//! Training rows as tokens, and the checks that a conversation must pass to become one. A row that would lose
//! its answer, teach nothing or never learn to stop is named with the reason; none is dropped in silence.
//! Knows the tokenizer; knows no model.

use crate::tokenizer::{Message, Tokenizer, TokenizerError};

/// One row: a conversation as tokens, with a mark on each token that the loss counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedExample {
    /// The row's name in messages.
    pub id: String,
    /// Token ids (T).
    pub tokens: Vec<u32>,
    /// Whether token t is predicted from the tokens before it and counted (T). The first one never is.
    pub supervised: Vec<bool>,
}

impl TokenizedExample {
    /// How many tokens the loss counts.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().skip(1).filter(|supervised| **supervised).count()
    }

    /// The tokens before the first one that counts.
    pub fn prompt(&self) -> &[u32] {
        let answer = (1..self.tokens.len()).find(|&index| self.supervised[index]);
        &self.tokens[..answer.unwrap_or(self.tokens.len())]
    }
}

/// A conversation that cannot be trained on, and why.
#[derive(Debug, thiserror::Error)]
#[error("row `{id}` {reason}")]
pub struct PrepareProblem {
    /// The row.
    pub id: String,
    /// What is wrong with it.
    pub reason: PrepareReason,
}

/// What is wrong with a conversation.
#[derive(Debug, thiserror::Error)]
pub enum PrepareReason {
    /// A limit on its length would cut off the end of the answer.
    #[error(
        "has {tokens} tokens, and a limit of {max_length} would cut its answer; raise `max_length` or shorten it"
    )]
    AnswerCut { tokens: usize, max_length: usize },
    /// No token of it would be counted.
    #[error("has no supervised token; it needs an assistant message that is not empty")]
    NothingSupervised,
    /// An answer does not end in the token that ends a turn: the model would never learn to stop.
    #[error(
        "has an answer that ends in token {last} instead of an end-of-turn token; check the chat template"
    )]
    EndOfTurnMissing { last: u32 },
    /// The chat template refused it.
    #[error("cannot be written in the chat template: {0}")]
    Template(#[source] TokenizerError),
}

/// Tokenizes conversations, each with its row's name, and checks them all. `max_length` is in tokens.
/// Errors name every row that cannot be trained on.
pub fn prepare(
    tokenizer: &Tokenizer,
    conversations: &[(String, Vec<Message>)],
    max_length: usize,
) -> Result<Vec<TokenizedExample>, Vec<PrepareProblem>> {
    let end_of_turn = tokenizer.end_of_turn_ids();
    let (mut examples, mut problems) = (Vec::new(), Vec::new());
    for (id, messages) in conversations {
        let tokenized = tokenizer.supervise(messages).map_err(PrepareReason::Template);
        let checked = tokenized.and_then(|supervised| {
            let example = TokenizedExample {
                id: id.clone(),
                tokens: supervised.tokens,
                supervised: supervised.supervised,
            };
            check(&example, end_of_turn, max_length).map(|()| example)
        });
        match checked {
            Ok(example) => examples.push(example),
            Err(reason) => problems.push(PrepareProblem { id: id.clone(), reason }),
        }
    }
    if problems.is_empty() { Ok(examples) } else { Err(problems) }
}

fn check(example: &TokenizedExample, end_of_turn: &[u32], max_length: usize) -> Result<(), PrepareReason> {
    if example.tokens.len() > max_length {
        return Err(PrepareReason::AnswerCut { tokens: example.tokens.len(), max_length });
    }
    if example.supervised_tokens() == 0 {
        return Err(PrepareReason::NothingSupervised);
    }
    let mut last_of_answers = (0..example.tokens.len()).filter(|&index| {
        example.supervised[index] && !example.supervised.get(index + 1).copied().unwrap_or(false)
    });
    match last_of_answers.find(|&index| !end_of_turn.contains(&example.tokens[index])) {
        Some(index) => Err(PrepareReason::EndOfTurnMissing { last: example.tokens[index] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 9;

    /// Tokens with a mark on each supervised one: `(token, supervised)`.
    fn example(marked: &[(u32, bool)]) -> TokenizedExample {
        let (tokens, supervised) = marked.iter().copied().unzip();
        TokenizedExample { id: "row".into(), tokens, supervised }
    }

    fn reason(marked: &[(u32, bool)], max_length: usize) -> Option<String> {
        check(&example(marked), &[END], max_length).err().map(|reason| reason.to_string())
    }

    #[test]
    fn a_row_whose_answers_end_their_turns_passes() {
        assert_eq!(
            reason(&[(1, false), (2, true), (END, true), (3, false), (4, true), (END, true)], 6),
            None
        );
    }

    #[test]
    fn a_limit_that_cuts_the_answer_is_named() {
        let reason = reason(&[(1, false), (2, true), (END, true)], 2).unwrap();
        assert_eq!(
            reason,
            "has 3 tokens, and a limit of 2 would cut its answer; raise `max_length` or shorten it"
        );
    }

    #[test]
    fn a_row_without_supervised_tokens_is_named() {
        assert!(reason(&[(1, false), (2, false)], 9).unwrap().starts_with("has no supervised token"));
        // The first token is predicted from nothing, so it does not count.
        assert!(reason(&[(END, true), (2, false)], 9).unwrap().starts_with("has no supervised token"));
    }

    #[test]
    fn every_answer_must_end_its_turn() {
        let missing =
            "has an answer that ends in token 4 instead of an end-of-turn token; check the chat template";
        assert_eq!(reason(&[(1, false), (END, true), (3, false), (4, true)], 9).unwrap(), missing);
        assert_eq!(reason(&[(1, false), (4, true), (3, false), (END, true)], 9).unwrap(), missing);
    }

    #[test]
    fn prompt_is_what_comes_before_the_first_answer() {
        let example = example(&[(1, false), (2, false), (3, true), (4, false)]);
        assert_eq!((example.prompt(), example.supervised_tokens()), (&[1, 2][..], 1));
    }
}
