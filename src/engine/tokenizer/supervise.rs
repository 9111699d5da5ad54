//! Which tokens of a conversation are learnt: each assistant turn's words and the token that ends the turn,
//! nothing else. Knows the tokenizer and its template; nothing of batches or truncation.
//!
//! The whole conversation is tokenised once. Turn by turn, the template is rendered up to the answer (with the
//! generation prompt) and up to its end; the first text must be a prefix of the second, and the second of the
//! whole up to the end of its turn, so the border is known in bytes and, by the tokens' offsets, in tokens:
//!
//! ```text
//! <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n…
//! └────────────── prefix, as when generating ──────────┘└─ learnt ──────┘└ not learnt
//! ```

use crate::tokenizer::template::Message;
use crate::tokenizer::{Tokenizer, TokenizerError, guarded};

/// A tokenised conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervised {
    /// Token ids of the whole conversation.
    pub tokens: Vec<u32>,
    /// For each token, whether the model learns to produce it.
    pub supervised: Vec<bool>,
}

/// A token of a conversation, to be shown: the texts of all pieces together are the rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Piece {
    /// The token.
    pub id: u32,
    /// What it stands for; empty where an earlier token began the same letter.
    pub text: String,
    /// Whether the model learns to produce it.
    pub supervised: bool,
    /// Whether it is a marker, not text.
    pub special: bool,
}

/// A conversation as one text, its tokens, where each is in the text, and whether it is learnt.
struct Marked {
    text: String,
    encoding: tokenizers::Encoding,
    supervised: Vec<bool>,
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
        let Marked { encoding, supervised, .. } = self.mark(messages)?;
        let ids = encoding.get_ids();
        let bos = self.bos_before(ids);
        Ok(Supervised {
            tokens: bos.into_iter().chain(ids.iter().copied()).collect(),
            supervised: bos.map(|_| false).into_iter().chain(supervised).collect(),
        })
    }

    /// The tokens of [`Tokenizer::supervise`], each with its text.
    ///
    /// # Errors
    /// As [`Tokenizer::supervise`].
    pub fn pieces(&self, messages: &[Message]) -> Result<Vec<Piece>, TokenizerError> {
        let Marked { text, encoding, supervised } = self.mark(messages)?;
        let ids = encoding.get_ids();
        let bos = self.bos_before(ids).map(|id| Piece {
            id,
            text: self.token(id).unwrap_or_default(),
            supervised: false,
            special: true,
        });
        let mut shown = 0;
        let pieces =
            ids.iter().zip(encoding.get_offsets()).zip(supervised).map(|((&id, &(_, end)), supervised)| {
                // Tokens of one letter share its place; what no token covers goes with the next one.
                let piece = text.get(shown..end).unwrap_or_default().to_owned();
                shown = shown.max(end);
                Piece {
                    id,
                    text: piece,
                    supervised,
                    special: self.is_special(id) || self.added_ids.contains(&id),
                }
            });
        Ok(bos.into_iter().chain(pieces).collect())
    }

    fn mark(&self, messages: &[Message]) -> Result<Marked, TokenizerError> {
        self.refuse_specials(messages)?;
        let text = self.render(messages, false)?;
        let encoding = guarded(|| self.inner.encode(text.as_str(), false))
            .map_err(|cause| TokenizerError::Encode { cause })?;
        let (ids, offsets) = (encoding.get_ids(), encoding.get_offsets());
        let mut supervised = vec![false; ids.len()];
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let turn = self.turn(messages, index, &text)?;
            let (first, last) = self.learnt_tokens(&turn, ids, offsets, &text)?;
            supervised[first..=last].fill(true);
        }
        if !supervised.contains(&true) {
            return Err(TokenizerError::NothingSupervised);
        }
        Ok(Marked { text, encoding, supervised })
    }

    fn turn(&self, messages: &[Message], index: usize, text: &str) -> Result<Turn, TokenizerError> {
        if index == 0 {
            return Err(TokenizerError::AssistantFirst { index });
        }
        let prefix = self.render(&messages[..index], true)?;
        let upto = self.render(&messages[..=index], false)?;
        let shared = common(&prefix, &upto);
        if shared < prefix.len() {
            let excerpt = |text: &str| text[shared..].chars().take(24).collect();
            let (prompt, written) = (excerpt(&prefix), excerpt(&upto));
            return Err(TokenizerError::OtherPrompt { index, prompt, written });
        }
        let content = messages[index].content.trim();
        let at = upto[prefix.len()..].find(content).ok_or(TokenizerError::ContentAltered { index })?;
        let content_end = prefix.len() + at + content.len();
        // What follows the answer may differ (some templates end the last turn with the end of text, too), as
        // long as the words and the end of the turn are the same.
        let end = common(&upto, text);
        if end < content_end || end == content_end && end < upto.len() {
            return Err(TokenizerError::HistoryRewritten { index });
        }
        Ok(Turn { index, start: prefix.len(), content_end, end })
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
        let mut marker = None;
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
            // Some files do not call their end-of-turn token special.
            if start >= turn.content_end && marker.is_none() && self.added_ids.contains(&ids[token]) {
                marker = Some(token);
            }
        }
        if let Some(last) = marker {
            return Ok((first, last));
        }
        let written = text.get(turn.content_end..turn.end).unwrap_or_default().to_owned();
        Err(TokenizerError::NoEndOfTurn { index, written })
    }
}

/// Bytes of the longest common beginning, at a character's border.
fn common(a: &str, b: &str) -> usize {
    let bytes = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    a.floor_char_boundary(bytes)
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
    fn pieces_are_the_tokens_with_the_text_they_stand_for() {
        let tokenizer = with_template(CHATML);
        let messages = chat(&[("user", "the café 🦀"), ("assistant", "hello ☕")]);
        let pieces = tokenizer.pieces(&messages).unwrap();
        let Supervised { tokens, supervised } = tokenizer.supervise(&messages).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.id).collect::<Vec<_>>(), tokens);
        assert_eq!(pieces.iter().map(|piece| piece.supervised).collect::<Vec<_>>(), supervised);
        let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(text, tokenizer.render(&messages, false).unwrap());
        assert_eq!(pieces[0], Piece { special: true, text: "<|im_start|>".into(), ..pieces[0].clone() });
        let learnt: String =
            pieces.iter().filter(|piece| piece.supervised).map(|piece| piece.text.as_str()).collect();
        assert_eq!(learnt, "hello ☕<|im_end|>");
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
        refused(&forgetful, &messages, "rewrites the answer in message 1");
        let rewriting = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('' if m.role == 'user' or loop.last else 'ok ') + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        refused(rewriting, &messages, "rewrites the answer in message 1");
        let other_prompt = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>model\n");
        refused(
            &other_prompt,
            &messages,
            "(`model\\n`), is not how the answer in message 1 begins (`assistant\\nhello",
        );
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

    mod real_templates {
        use super::*;
        use crate::format::gguf::Value;
        use crate::format::gguf_writer::{F32, tiny_llama};
        use crate::tokenizer::tests::open;

        const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/templates");

        /// The tiny vocabulary with every special token the template names, of which `bos` comes first.
        fn tokenizer(name: &str, bos: Option<&str>) -> Tokenizer {
            let source = std::fs::read_to_string(format!("{FOLDER}/{name}.jinja")).unwrap();
            let markers = regex::Regex::new(
                r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>|<BOS_TOKEN>|<bos>|<s>|\[gMASK\]|<sop>",
            )
            .unwrap();
            let mut file = tiny_llama(F32);
            let Some(Value::List(mut tokens)) = file.get("tokenizer.ggml.tokens").cloned() else { panic!() };
            let Some(Value::List(mut types)) = file.get("tokenizer.ggml.token_type").cloned() else {
                panic!()
            };
            let found = markers.find_iter(&source).map(|found| found.as_str());
            for marker in found.chain(bos).chain(["</s>"]) {
                let marker = Value::Text(marker.to_owned());
                if !tokens.contains(&marker) {
                    tokens.push(marker);
                    types.push(Value::Signed(3));
                }
            }
            let bos =
                bos.map(|bos| tokens.iter().position(|token| *token == Value::Text(bos.to_owned())).unwrap());
            let eos = tokens.iter().position(|token| *token == Value::Text("</s>".to_owned())).unwrap();
            file.set("tokenizer.ggml.tokens", Value::List(tokens));
            file.set("tokenizer.ggml.token_type", Value::List(types));
            file.unsigned("tokenizer.ggml.eos_token_id", eos);
            match bos {
                Some(bos) => file
                    .unsigned("tokenizer.ggml.bos_token_id", bos)
                    .set("tokenizer.ggml.add_bos_token", Value::Bool(true)),
                None => file.remove("tokenizer.ggml.bos_token_id"),
            };
            open(file.text("tokenizer.chat_template", &source)).unwrap()
        }

        const IM_END: &str = "<|im_end|>";
        const EOT: &str = "<|eot_id|>";
        const GEMMA: &str = "<end_of_turn>";
        const PHI: &str = "<|end|>";
        const COHERE: &str = "<|END_OF_TURN_TOKEN|>";
        /// Template, its beginning of text, and what ends a turn.
        const LEARNT: [(&str, Option<&str>, &str); 16] = [
            ("smollm2", None, IM_END),
            ("chatml", None, IM_END),
            ("qwen2_5", None, IM_END),
            ("qwen2_5_training", None, IM_END),
            ("qwen3_instruct_2507", None, IM_END),
            ("lfm2", Some("<|startoftext|>"), IM_END),
            ("llama3", Some("<|begin_of_text|>"), EOT),
            ("llama3_training", Some("<|begin_of_text|>"), EOT),
            ("llama3_1", Some("<|begin_of_text|>"), EOT),
            ("llama3_2", Some("<|begin_of_text|>"), EOT),
            ("gemma", Some("<bos>"), GEMMA),
            ("gemma3", Some("<bos>"), GEMMA),
            ("gemma3_training", Some("<bos>"), GEMMA),
            ("phi3", Some("<s>"), PHI),
            ("phi3_5", Some("<s>"), PHI),
            ("cohere", Some("<BOS_TOKEN>"), COHERE),
        ];

        fn turns() -> Vec<Message> {
            chat(&[
                ("user", "What is 6 times 7?"),
                ("assistant", "It is 42."),
                ("user", "And 7 times 8?"),
                ("assistant", "56, naturally."),
                ("user", "Thanks!"),
            ])
        }

        #[test]
        fn answers_and_their_end_are_learnt() {
            for (name, bos, end) in LEARNT {
                let tokenizer = tokenizer(name, bos);
                let turns = turns();
                assert_eq!(learnt(&tokenizer, &turns[..2]), format!("It is 42.{end}"), "{name}");
                let both = format!("It is 42.{end}|56, naturally.{end}");
                assert_eq!(learnt(&tokenizer, &turns[..4]), both, "{name}");
                assert_eq!(learnt(&tokenizer, &turns), both, "{name}");
                assert!(tokenizer.end_of_turn_ids().contains(&tokenizer.id(end).unwrap()), "{name}");
            }
        }

        #[test]
        fn text_begins_with_one_beginning_of_text() {
            let thinking =
                [("qwen3", None, ""), ("deepseek_r1_distill", Some("<｜begin▁of▁sentence｜>"), "")];
            for (name, bos, _) in LEARNT.into_iter().chain(thinking) {
                let tokenizer = tokenizer(name, bos);
                let begins = |ids: &[u32]| {
                    let at = |id: &u32| Some(*id) == tokenizer.bos_id();
                    (ids.first().is_some_and(at), ids.iter().filter(|id| at(id)).count())
                };
                let expected = (bos.is_some(), usize::from(bos.is_some()));
                let turns = turns();
                assert_eq!(begins(&tokenizer.prompt_ids(&turns).unwrap()), expected, "{name}");
                if let Ok(supervised) = tokenizer.supervise(&turns[..4]) {
                    assert_eq!(begins(&supervised.tokens), expected, "{name}");
                }
            }
        }

        #[test]
        fn templates_that_think_are_learnt_or_refused_with_the_reason() {
            let turns = turns();
            let qwen3 = tokenizer("qwen3", None);
            assert_eq!(learnt(&qwen3, &turns[..2]), "<think>\n\n</think>\n\nIt is 42.<|im_end|>");
            let error = qwen3.supervise(&turns[..4]).unwrap_err().to_string();
            assert!(
                error.contains("rewrites the answer in message 1") && error.contains("of its own"),
                "{error}"
            );
            let patched = learnt(&tokenizer("qwen3_training", None), &turns[..4]);
            assert!(
                patched.contains("It is 42.<|im_end|>|") && patched.ends_with("56, naturally.<|im_end|>"),
                "{patched}"
            );
            let refused = |name: &str, part: &str| {
                let error = tokenizer(name, None).supervise(&turns[..2]).unwrap_err().to_string();
                assert!(error.contains(part), "{name}: {error}");
            };
            refused("deepseek_r1_distill", "(`<think>\\n`), is not how the answer in message 1 begins");
            refused("gptoss", "special token `<|channel|>` between the prompt and the answer");
            refused("glm4moe", "no end-of-turn token follows message 1");
        }
    }
}
