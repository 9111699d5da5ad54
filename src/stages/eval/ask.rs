//! Asks one arm: the same model with or without the adapter and with one system message or another. Knows the
//! engine; knows nothing of scores.

use std::time::Instant;

use tunesmith_engine::adapter::Adapter;
use tunesmith_engine::generate::{
    GenerateError, GenerateHooks, GenerateOptions, Generation, Reference, Request, StopReason, answer,
};
use tunesmith_engine::model::{Model, SequenceLoss};
use tunesmith_engine::tokenizer::{Tokenizer, TokenizerError};
use tunesmith_pipeline::stage::{StageContext, StageError};

use super::Params;
use crate::corpus::Message;
use crate::stages::device::open_model;
use crate::stages::train::{open_tokenizer, turns};

/// One way of asking the model.
pub(super) struct Arm {
    /// `base`, `prompted` or `tuned`.
    pub(super) name: &'static str,
    /// The system message, if it gets one.
    pub(super) system: Option<String>,
    /// Whether the adapter is on.
    pub(super) tuned: bool,
}

impl Arm {
    /// The conversation as this arm sees it: its own system message in place of any other.
    pub(super) fn conversation(&self, messages: &[Message]) -> Vec<Message> {
        let system =
            self.system.iter().map(|text| Message { role: "system".to_owned(), content: text.clone() });
        system.chain(messages.iter().filter(|message| message.role != "system").cloned()).collect()
    }
}

/// An answer.
pub(super) struct Asked {
    /// The text.
    pub(super) text: String,
    /// Tokens generated.
    pub(super) tokens: usize,
    /// Whether it ended by itself.
    pub(super) stopped: bool,
    /// The loss of the answer that the conversation ends with, if it ends with one.
    pub(super) reference: Option<SequenceLoss>,
}

/// The model and its adapter, ready to be asked.
pub(super) struct Asker<'a, 'b> {
    context: &'a StageContext<'b>,
    tokenizer: Tokenizer,
    model: Model,
    adapter: Adapter,
    batch: usize,
}

impl<'a, 'b> Asker<'a, 'b> {
    /// Opens model and adapter.
    pub(super) fn open(context: &'a StageContext<'b>, params: &Params) -> Result<Self, StageError> {
        let base = &context.input("base")?.folder;
        let tokenizer = open_tokenizer(base)?;
        let model = open_model(base, context.threads)?;
        let adapter = Adapter::load_peft(&context.input("adapter")?.folder, &model).map_err(|error| {
            StageError::new("eval::adapter", error.to_string())
                .hint("`adapter` must be trained on this `base`")
        })?;
        Ok(Self { context, tokenizer, model, adapter, batch: params.batch })
    }

    fn adapter(&self, arm: &Arm) -> Option<&Adapter> {
        arm.tuned.then_some(&self.adapter)
    }

    /// Greedy answers to conversations whose last turn is the user's, each of at most so many tokens. Where an
    /// assistant turn ends the conversation, it is the reference: not shown to the model, but its loss is taken.
    pub(super) fn answers(
        &self,
        arm: &Arm,
        conversations: &[(Vec<Message>, usize)],
    ) -> Result<Vec<Asked>, StageError> {
        let template = |error: TokenizerError| StageError::new("eval::template", error.to_string());
        let mut prepared = Vec::with_capacity(conversations.len());
        for (messages, limit) in conversations {
            let answered = messages.last().is_some_and(|message| message.role == "assistant");
            let asked = &messages[..messages.len() - usize::from(answered)];
            let prompt = self.tokenizer.prompt_ids(&turns(asked)).map_err(template)?;
            let reference =
                answered.then(|| self.tokenizer.supervise(&turns(messages)).map_err(template)).transpose()?;
            prepared.push((prompt, reference, *limit));
        }
        let requests: Vec<Request<'_>> = prepared
            .iter()
            .map(|(prompt, reference, limit)| Request {
                prompt,
                max_new_tokens: *limit,
                reference: reference
                    .as_ref()
                    .map(|text| Reference { tokens: &text.tokens, supervised: &text.supervised }),
            })
            .collect();
        self.generate(arm, &requests)?
            .into_iter()
            .map(|generation| {
                let text = self
                    .tokenizer
                    .decode(&generation.tokens, true)
                    .map_err(|error| StageError::new("eval::decode", error.to_string()))?;
                Ok(Asked {
                    text: text.trim().to_owned(),
                    tokens: generation.tokens.len(),
                    stopped: generation.stopped == StopReason::EndOfTurn,
                    reference: generation.reference,
                })
            })
            .collect()
    }

    /// Median seconds of an answer when questions come one at a time; none without samples.
    pub(super) fn latency(
        &self,
        arm: &Arm,
        questions: impl Iterator<Item = (Vec<Message>, usize)>,
    ) -> Result<Option<f64>, StageError> {
        let mut seconds = Vec::new();
        for (mut messages, limit) in questions {
            messages.pop_if(|message| message.role == "assistant");
            let started = Instant::now();
            self.answers(arm, &[(messages, limit)])?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds.get(seconds.len() / 2).copied())
    }

    fn generate(&self, arm: &Arm, requests: &[Request<'_>]) -> Result<Vec<Generation>, StageError> {
        let stop_ids = [self.tokenizer.end_of_turn_ids(), &self.model.config().eos_token_ids].concat();
        let options = GenerateOptions { batch: self.batch, ..GenerateOptions::greedy(usize::MAX, stop_ids) };
        let mut hooks = Hooks { asker: self, arm, done: 0, total: requests.len() };
        answer(&self.model, self.adapter(arm), requests, &options, &mut hooks).map_err(|error| match error {
            GenerateError::Cancelled => StageError::cancelled(),
            error => StageError::new("eval::generate", error.to_string()),
        })
    }

    fn say(&self, arm: &Arm, done: usize, total: usize, unit: &str) {
        self.context.services.progress(done as u64, total as u64, unit, arm.name);
    }
}

struct Hooks<'h, 'a, 'b> {
    asker: &'h Asker<'a, 'b>,
    arm: &'h Arm,
    done: usize,
    total: usize,
}

impl GenerateHooks for Hooks<'_, '_, '_> {
    fn done(&mut self, _prompt: usize, _generation: &Generation) {
        self.done += 1;
        self.asker.say(self.arm, self.done, self.total, "answers");
    }

    fn cancelled(&mut self) -> bool {
        self.asker.context.services.cancelled()
    }
}
