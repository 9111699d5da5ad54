//! Which tokens of a conversation are learnt: each assistant turn's words and the token that ends the turn,
//! nothing else. Knows the tokenizer and its template; nothing of batches or truncation.
//!
//! The whole conversation is tokenised once. Turn by turn, the template is rendered up to the answer (with the
//! generation prompt) and up to its end; the first text must be a prefix of the second, and the second of the
//! whole, so the border is known in bytes and, by the tokens' offsets, in tokens:
//!
//! ```text
//! <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n…
//! └────────────── prefix, as when generating ──────────┘└─ learnt ──────┘└ not learnt
//! ```

use crate::tokenizer::template::Message;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A tokenised conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervised {
    /// Token ids of the whole conversation.
    pub tokens: Vec<u32>,
    /// For each token, whether the model learns to produce it.
    pub supervised: Vec<bool>,
}

/// An assistant turn within the rendered conversation, in bytes.
struct Turn {
    index: usize,
    start: usize,
    /// Where the words end and the end of turn is looked for.
    content_end: usize,
    end: usize,
}

impl Tokenizer {
    /// Tokenises a conversation and marks what is learnt. Each assistant turn's last learnt token is its
    /// end-of-turn token. A beginning-of-text token is added where the model wants one and the template has
    /// not written it.
    pub fn supervise(&self, messages: &[Message]) -> Result<Supervised, TokenizerError> {
        self.refuse_specials(messages)?;
        let text = self.render(messages, false)?;
        let encoding = self
            .inner
            .encode(text.as_str(), false)
            .map_err(|error| TokenizerError::Encode { cause: error.to_string() })?;
        let ids = encoding.get_ids();
        let offsets = encoding.get_offsets();
        let mut supervised = vec![false; ids.len()];
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let turn = self.turn(messages, index, &text)?;
            let (first, last) = self.learnt_tokens(&turn, ids, offsets, &text)?;
            supervised[first..=last].fill(true);
        }
        if !supervised.contains(&true) {
            return Err(TokenizerError::NothingSupervised);
        }
        let bos = self.bos_before(ids);
        Ok(Supervised {
            tokens: bos.into_iter().chain(ids.iter().copied()).collect(),
            supervised: bos.map(|_| false).into_iter().chain(supervised).collect(),
        })
    }

    fn turn(&self, messages: &[Message], index: usize, text: &str) -> Result<Turn, TokenizerError> {
        if index == 0 {
            return Err(TokenizerError::AssistantFirst { index });
        }
        let prefix = self.render(&messages[..index], true)?;
        let upto = self.render(&messages[..=index], false)?;
        if !upto.starts_with(&prefix) {
            return Err(TokenizerError::NotAPrefix { index, what: "the generation prompt" });
        }
        if !text.starts_with(&upto) {
            return Err(TokenizerError::NotAPrefix { index: index + 1, what: "an earlier answer" });
        }
        let content = messages[index].content.trim();
        let at = upto[prefix.len()..].find(content).ok_or(TokenizerError::ContentAltered { index })?;
        Ok(Turn {
            index,
            start: prefix.len(),
            content_end: prefix.len() + at + content.len(),
            end: upto.len(),
        })
    }

    /// Indices of the first and last token learnt in a turn.
    fn learnt_tokens(
        &self,
        turn: &Turn,
        ids: &[u32],
        offsets: &[(usize, usize)],
        text: &str,
    ) -> Result<(usize, usize), TokenizerError> {
        let index = turn.index;
        let first = offsets.partition_point(|&(start, _)| start < turn.start);
        if first > 0 && offsets[first - 1].1 > turn.start {
            return Err(TokenizerError::Straddles { index });
        }
        for token in first..ids.len() {
            let (start, end) = offsets[token];
            if end > turn.end {
                break;
            }
            let ends_turn = self.is_special(ids[token]) || self.eos == Some(ids[token]);
            if ends_turn && start < turn.content_end {
                let token = text.get(start..end).unwrap_or_default().to_owned();
                return Err(TokenizerError::HeaderInAnswer { index, token });
            }
            if ends_turn {
                return Ok((first, token));
            }
        }
        let written = text.get(turn.content_end..turn.end).unwrap_or_default().to_owned();
        Err(TokenizerError::NoEndOfTurn { index, written })
    }
}
