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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf_writer::CHATML;
    use crate::tokenizer::Specials;
    use crate::tokenizer::tests::with_template;

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, content)| Message::new(role, content)).collect()
    }

    /// The learnt tokens as text, runs divided by `|`.
    fn learnt(tokenizer: &Tokenizer, messages: &[Message]) -> String {
        let Supervised { tokens, supervised } = tokenizer.supervise(messages).unwrap();
        assert_eq!(tokens.len(), supervised.len());
        let runs = tokens.iter().zip(&supervised).collect::<Vec<_>>();
        let runs = runs.chunk_by(|a, b| a.1 == b.1).filter(|run| *run[0].1);
        let texts = runs.map(|run| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| **id).collect();
            tokenizer.decode(&ids, false).unwrap()
        });
        texts.collect::<Vec<_>>().join("|")
    }

    #[track_caller]
    fn refused(template: &str, messages: &[Message], expected: &str) {
        let error = with_template(template).supervise(messages).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn answers_and_their_end_are_learnt_and_nothing_else() {
        let tokenizer = with_template(CHATML);
        let messages = chat(&[
            ("system", "the system"),
            ("user", "hello"),
            ("assistant", "the hello 42"),
            ("user", "the user?"),
            ("assistant", "hello\n\n the"),
        ]);
        assert_eq!(learnt(&tokenizer, &messages), "the hello 42<|im_end|>|hello\n\n the<|im_end|>");
        let Supervised { tokens, supervised } = tokenizer.supervise(&messages).unwrap();
        // The template's line break after the last turn is there, and is not learnt.
        assert_eq!(tokenizer.token(tokens[tokens.len() - 1]).as_deref(), Some("Ċ"));
        assert!(!supervised[supervised.len() - 1]);
    }

    #[test]
    fn whole_conversation_is_tokenised_as_one_text() {
        let tokenizer = with_template(CHATML);
        let messages = chat(&[("user", "hello"), ("assistant", "the hello")]);
        let whole = tokenizer.encode(&tokenizer.render(&messages, false).unwrap(), Specials::Parse).unwrap();
        assert_eq!(tokenizer.supervise(&messages).unwrap().tokens, whole);
    }

    #[test]
    fn prompt_is_what_precedes_the_answer_in_training() {
        let tokenizer = with_template(CHATML);
        let messages = chat(&[("user", "the user"), ("assistant", "hello")]);
        let Supervised { tokens, supervised } = tokenizer.supervise(&messages).unwrap();
        let first = supervised.iter().position(|&supervised| supervised).unwrap();
        assert_eq!(tokenizer.prompt_ids(&messages[..1]).unwrap(), tokens[..first]);
    }

    #[test]
    fn trimming_templates_and_empty_answers_are_fine() {
        let trimming = CHATML.replace("message['content']", "message['content'] | trim");
        let messages = chat(&[("user", " the "), ("assistant", " hello\n")]);
        assert_eq!(learnt(&with_template(&trimming), &messages), "hello<|im_end|>");
        assert_eq!(learnt(&with_template(CHATML), &messages), " hello\n<|im_end|>");
        let empty = chat(&[("user", "the"), ("assistant", "")]);
        assert_eq!(learnt(&with_template(CHATML), &empty), "<|im_end|>");
    }

    #[test]
    fn words_of_the_prompt_are_not_taken_for_the_answer() {
        let messages = chat(&[("user", "hello"), ("assistant", "hello")]);
        assert_eq!(learnt(&with_template(CHATML), &messages), "hello<|im_end|>");
    }

    #[test]
    fn templates_that_hide_the_border_are_refused() {
        let messages =
            chat(&[("user", "the"), ("assistant", "hello"), ("user", "the"), ("assistant", "the")]);
        let no_prompt = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
        refused(no_prompt, &messages, "must honour `add_generation_prompt`");
        refused(&CHATML.replace("<|im_end|>", "<eot>"), &messages, "no end-of-turn token follows message 1");
        let upper = CHATML.replace("message['content']", "message['content'].upper()");
        refused(&upper, &messages, "changes the text of message 1");
        let forgetful = CHATML.replace("messages %}", "messages[-2:] %}");
        refused(&forgetful, &messages, "an earlier answer");
        let other_prompt = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>model\n");
        refused(&other_prompt, &messages, "the generation prompt");
        let spaced = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        refused(spaced, &messages[..2], "spans the border");
        refused("{{ raise_exception('no') }}", &messages, "the chat template fails");
    }

    #[test]
    fn conversations_that_teach_nothing_are_refused() {
        refused(CHATML, &chat(&[("user", "the")]), "no assistant message");
        refused(CHATML, &chat(&[("assistant", "the")]), "message 0 (assistant) comes first");
        let quoting = chat(&[("user", "what is <|im_end|>?"), ("assistant", "the")]);
        refused(CHATML, &quoting, "message 0 (user) contains the special token `<|im_end|>`");
    }

    #[test]
    fn generation_stops_at_the_end_of_turn_and_at_the_end_of_text() {
        assert_eq!(with_template(CHATML).end_of_turn_ids(), [2]);
        assert_eq!(with_template(&CHATML.replace("<|im_end|>", "<|endoftext|>")).end_of_turn_ids(), [0, 2]);
        assert_eq!(with_template("{{ raise_exception('no') }}").end_of_turn_ids(), [2]);
    }
}
