//! Asks one arm: the same model with or without the adapter and with one system message or another. Knows the
//! engine; knows nothing of scores.

use std::time::Instant;

use tunesmith_engine::adapter::Adapter;
use tunesmith_engine::generate::{
    GenerateError, GenerateHooks, GenerateOptions, Generation, StopReason, generate,
};
use tunesmith_engine::model::{Model, Pack, SequenceLoss, Workspace};
use tunesmith_engine::tokenizer::Tokenizer;
use tunesmith_pipeline::stage::{StageContext, StageError};

use super::Params;
use crate::corpus::Message;
use crate::stages::train::{open_model, open_tokenizer, turns};

/// Tokens of one pass when losses are computed.
const PACK_TOKENS: usize = 512;

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
}

/// The model and its adapter, ready to be asked.
pub(super) struct Asker<'a, 'b> {
    context: &'a StageContext<'b>,
    tokenizer: Tokenizer,
    model: Model,
    adapter: Adapter,
    batch: usize,
    supervised_tokens: Vec<usize>,
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
        Ok(Self { context, tokenizer, model, adapter, batch: params.batch, supervised_tokens: Vec::new() })
    }

    fn adapter(&self, arm: &Arm) -> Option<&Adapter> {
        arm.tuned.then_some(&self.adapter)
    }

    /// Supervised tokens of each reference answer, the same for every arm.
    pub(super) fn supervised_tokens(&self) -> &[usize] {
        &self.supervised_tokens
    }

    /// Summed loss of each conversation's assistant tokens.
    pub(super) fn losses(
        &mut self,
        arm: &Arm,
        conversations: &[Vec<Message>],
    ) -> Result<Vec<SequenceLoss>, StageError> {
        let rows = conversations
            .iter()
            .map(|messages| {
                self.tokenizer
                    .supervise(&turns(messages))
                    .map_err(|error| StageError::new("eval::template", error.to_string()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut losses = Vec::with_capacity(rows.len());
        let mut workspace = Workspace::default();
        let mut start = 0;
        while start < rows.len() {
            self.context.check_cancelled()?;
            let mut end = start + 1;
            let mut tokens = rows[start].tokens.len();
            while end < rows.len() && tokens + rows[end].tokens.len() <= PACK_TOKENS {
                tokens += rows[end].tokens.len();
                end += 1;
            }
            let sequences: Vec<(&[u32], &[bool])> = rows[start..end]
                .iter()
                .map(|row| (row.tokens.as_slice(), row.supervised.as_slice()))
                .collect();
            let pack = Pack::new(&sequences);
            losses.extend(
                self.model
                    .loss(self.adapter(arm), &pack, &mut workspace)
                    .map_err(|error| StageError::new("eval::model", error.to_string()))?,
            );
            start = end;
            self.say(arm, losses.len(), rows.len(), "losses");
        }
        self.supervised_tokens = losses.iter().map(|loss| loss.supervised).collect();
        Ok(losses)
    }

    /// Greedy answers to conversations whose last turn is the user's; an assistant turn at the end is left off.
    pub(super) fn answers(
        &self,
        arm: &Arm,
        conversations: &[Vec<Message>],
        max_tokens: usize,
    ) -> Result<Vec<Asked>, StageError> {
        let prompts = conversations
            .iter()
            .map(|messages| {
                let answered = messages.last().is_some_and(|message| message.role == "assistant");
                let asked = &messages[..messages.len() - usize::from(answered)];
                self.tokenizer
                    .prompt_ids(&turns(asked))
                    .map_err(|error| StageError::new("eval::template", error.to_string()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut hooks = Hooks { asker: self, arm, done: 0, total: prompts.len() };
        let generated = self.generate(arm, &prompts, max_tokens, &mut hooks)?;
        generated
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
                })
            })
            .collect()
    }

    /// Median seconds of an answer when questions come one at a time; none without samples.
    pub(super) fn latency(
        &self,
        arm: &Arm,
        conversations: &[Vec<Message>],
        params: &Params,
    ) -> Result<Option<f64>, StageError> {
        let mut seconds = Vec::new();
        for conversation in conversations.iter().take(params.latency_samples) {
            let started = Instant::now();
            self.answers(arm, std::slice::from_ref(conversation), params.max_answer_tokens)?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds.get(seconds.len() / 2).copied())
    }

    fn generate(
        &self,
        arm: &Arm,
        prompts: &[Vec<u32>],
        max_tokens: usize,
        hooks: &mut Hooks<'_, '_, '_>,
    ) -> Result<Vec<Generation>, StageError> {
        let stop_ids = [self.tokenizer.end_of_turn_ids(), &self.model.config().eos_token_ids].concat();
        let options = GenerateOptions { batch: self.batch, ..GenerateOptions::greedy(max_tokens, stop_ids) };
        generate(&self.model, self.adapter(arm), prompts, &options, hooks).map_err(|error| match error {
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
