//! Text generation: prompts in, tokens out, many prompts in one batch. What all prompts of a batch begin with is
//! read once, the rest of each in few passes; then all advance together, a token a pass, and those that have ended
//! drop out. Knows token ids; knows no text, no
//! chat template (the caller says which ids end a turn) and no kernel.
//!
//! A prompt's tokens depend on that prompt alone: sequences do not see each other, and each has its own stream of
//! random numbers. So batching, the batch size and the other prompts change speed and nothing else.
//!
//! ```text
//! prompts ─ sort by length ─► batches ─► prefill ─► extend all ─► pick ─┬─► results in the prompts' order
//!                                                   └──────────────────◄─────┘
//! ```

use std::time::Instant;

use crate::adapter::Adapter;
use crate::model::{KvCache, Model, ModelError, Workspace};

mod sampling;

pub use sampling::{Sampler, Sampling, SamplingOptions, SamplingProblem, argmax};

/// Most prompt tokens of a pass: beyond this a pass gains no speed, only memory.
const PREFILL_TOKENS: usize = 512;
/// A common beginning is read apart where that spares at least so many tokens: about what a pass costs beside
/// its tokens.
const SPARED_TOKENS: usize = 32;

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens of an answer; fewer where the model's positions end.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Any of these ends an answer and is not part of it.
    pub stop_ids: Vec<u32>,
    /// Most prompts that advance together; bounds memory, changes no token.
    pub batch: usize,
    /// The stream of random numbers of each prompt, where its index would not do: a caller that generates only
    /// some of its rows names each by the row, so that a row's answer does not depend on which others are new.
    pub streams: Option<Vec<u64>>,
}

impl GenerateOptions {
    /// Greedy, up to `max_new_tokens` or one of `stop_ids`, sixteen prompts at a time.
    pub fn greedy(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self { max_new_tokens, sampling: Sampling::Greedy, stop_ids, batch: 16, streams: None }
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stopped: StopReason,
    /// Wall time from the start of its batch to its end.
    pub seconds: f64,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model ended its turn.
    EndOfTurn,
    /// The limit was reached first.
    MaxTokens,
}

/// Receives tokens and answers as they come. Prompts are named by index.
pub trait GenerateHooks {
    /// A token of an answer.
    fn token(&mut self, _prompt: usize, _token: u32) {}
    /// An answer is done.
    fn done(&mut self, _prompt: usize, _generation: &Generation) {}
    /// Asked before every pass; true stops.
    fn cancelled(&mut self) -> bool {
        false
    }
}

/// Hears nothing and never cancels.
impl GenerateHooks for () {}

/// Why there are no answers.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A prompt without tokens.
    #[error("prompt {prompt} is empty")]
    EmptyPrompt { prompt: usize },
    /// A prompt that leaves no room for an answer.
    #[error(
        "prompt {prompt} has {tokens} tokens; the model has {positions} positions, and an answer needs some"
    )]
    PromptTooLong { prompt: usize, tokens: usize, positions: usize },
    /// A token that the model does not know.
    #[error("prompt {prompt} has token {token}, beyond the model's vocabulary of {vocabulary}")]
    UnknownToken { prompt: usize, token: u32, vocabulary: usize },
    /// Not one stream a prompt.
    #[error("{streams} random streams are given for {prompts} prompts")]
    Streams { streams: usize, prompts: usize },
    /// An option out of its range.
    #[error(transparent)]
    Sampling(#[from] SamplingProblem),
    /// No logit is a number.
    #[error(
        "the model gives no numbers after {tokens} tokens of prompt {prompt}; its weights or adapter are broken"
    )]
    NotFinite { prompt: usize, tokens: usize },
    /// The caller asked to stop.
    #[error("generation stopped because it was asked to")]
    Cancelled,
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Answers to `prompts`, in their order.
/// Errors: a prompt that cannot be answered, an option out of range, cancellation.
pub fn generate(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    hooks: &mut dyn GenerateHooks,
) -> Result<Vec<Generation>, GenerateError> {
    check(model, prompts, options)?;
    let mut shortest_first: Vec<usize> = (0..prompts.len()).collect();
    shortest_first.sort_by_key(|&prompt| prompts[prompt].len());
    let mut answers: Vec<(usize, Generation)> = Vec::with_capacity(prompts.len());
    let mut workspace = Workspace::default();
    for members in shortest_first.chunks(options.batch.max(1)) {
        let mut batch = Batch::new(model, adapter, prompts, members, options)?;
        batch.prefill(&mut workspace, hooks)?;
        while batch.advance(&mut workspace, hooks)? {}
        answers.extend(batch.answers());
    }
    answers.sort_by_key(|(prompt, _)| *prompt);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

fn check(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<(), GenerateError> {
    let (positions, vocabulary) = (model.config().max_position_embeddings, model.config().vocab_size);
    for (prompt, tokens) in prompts.iter().enumerate() {
        if tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt { prompt });
        }
        if tokens.len() >= positions {
            return Err(GenerateError::PromptTooLong { prompt, tokens: tokens.len(), positions });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(GenerateError::UnknownToken { prompt, token, vocabulary });
        }
    }
    match &options.streams {
        Some(streams) if streams.len() != prompts.len() => {
            Err(GenerateError::Streams { streams: streams.len(), prompts: prompts.len() })
        }
        _ => Ok(()),
    }
}

/// Tokens that all prompts begin with, each keeping one of its own; 0 where reading them once spares too little.
fn shared_beginning(prompts: &[&[u32]]) -> usize {
    let Some((first, others)) = prompts.split_first() else { return 0 };
    let agree = |prompt: &&[u32]| first.iter().zip(*prompt).take_while(|(a, b)| a == b).count();
    let shortest = prompts.iter().map(|prompt| prompt.len()).min().unwrap_or(0);
    let shared = others.iter().map(agree).min().unwrap_or(0).min(shortest.saturating_sub(1));
    if shared * others.len() >= SPARED_TOKENS { shared } else { 0 }
}

/// Prompts that advance together.
struct Batch<'a> {
    model: &'a Model,
    adapter: Option<&'a Adapter>,
    stop_ids: &'a [u32],
    cache: KvCache,
    sequences: Vec<Sequence<'a>>,
    started: Instant,
}

/// One prompt and its answer so far.
struct Sequence<'a> {
    prompt: usize,
    prompt_tokens: &'a [u32],
    sampler: Sampler,
    answer: Vec<u32>,
    /// Most tokens of the answer.
    limit: usize,
    stopped: Option<(StopReason, f64)>,
}

impl<'a> Batch<'a> {
    fn new(
        model: &'a Model,
        adapter: Option<&'a Adapter>,
        prompts: &'a [Vec<u32>],
        members: &[usize],
        options: &'a GenerateOptions,
    ) -> Result<Self, GenerateError> {
        let positions = model.config().max_position_embeddings;
        let sequence = |&prompt: &usize| -> Result<Sequence<'a>, GenerateError> {
            let prompt_tokens = prompts[prompt].as_slice();
            let stream = options.streams.as_ref().map_or(prompt as u64, |streams| streams[prompt]);
            Ok(Sequence {
                prompt,
                prompt_tokens,
                sampler: Sampler::new(options.sampling, stream, prompt_tokens)?,
                answer: Vec::new(),
                limit: options.max_new_tokens.min(positions - prompt_tokens.len()),
                stopped: None,
            })
        };
        let sequences = members.iter().map(sequence).collect::<Result<Vec<_>, _>>()?;
        let longest = sequences.iter().map(|sequence| sequence.prompt_tokens.len() + sequence.limit).max();
        let cache = model.new_cache(sequences.len(), longest.unwrap_or(0));
        Ok(Self { model, adapter, stop_ids: &options.stop_ids, cache, sequences, started: Instant::now() })
    }

    /// Reads the prompts and picks each answer's first token.
    fn prefill(
        &mut self,
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        let (live, silent): (Vec<usize>, Vec<usize>) =
            (0..self.sequences.len()).partition(|&index| self.sequences[index].limit > 0);
        for index in silent {
            self.stop(index, StopReason::MaxTokens, hooks);
        }
        let prompts: Vec<&'a [u32]> = live.iter().map(|&index| self.sequences[index].prompt_tokens).collect();
        let shared = shared_beginning(&prompts);
        if shared > 0 {
            let mut tokens: Vec<&[u32]> = vec![&[]; self.sequences.len()];
            tokens[live[0]] = &prompts[0][..shared];
            self.pass(&tokens, workspace, hooks)?;
            live[1..].iter().for_each(|&index| self.cache.fork(live[0], index));
        }
        let mut rest = live.iter().zip(prompts).map(|(&index, prompt)| (index, &prompt[shared..])).peekable();
        while rest.peek().is_some() {
            let mut tokens: Vec<&[u32]> = vec![&[]; self.sequences.len()];
            let mut room = PREFILL_TOKENS;
            // A prompt longer than a pass is read alone.
            while let Some((index, prompt)) =
                rest.next_if(|(_, prompt)| room == PREFILL_TOKENS || prompt.len() <= room)
            {
                tokens[index] = prompt;
                room = room.saturating_sub(prompt.len());
            }
            self.extend(&tokens, workspace, hooks)?;
        }
        Ok(())
    }

    /// One more token for each answer that has not ended; false if all have.
    fn advance(
        &mut self,
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<bool, GenerateError> {
        let last: Vec<Option<u32>> = self.sequences.iter().map(Sequence::pending).collect();
        let tokens: Vec<&[u32]> = last.iter().map(Option::as_slice).collect();
        if tokens.iter().all(|tokens| tokens.is_empty()) {
            return Ok(false);
        }
        self.extend(&tokens, workspace, hooks)?;
        Ok(true)
    }

    /// Feeds tokens to the sequences that have some, and picks the next token of each of those.
    fn extend(
        &mut self,
        tokens: &[&[u32]],
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        let logits = self.pass(tokens, workspace, hooks)?;
        for (index, logits) in logits.into_iter().enumerate() {
            if let Some(mut logits) = logits {
                self.pick(index, &mut logits, hooks)?;
            }
        }
        Ok(())
    }

    /// Feeds tokens to the sequences that have some; gives the logits after each one's last.
    fn pass(
        &mut self,
        tokens: &[&[u32]],
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<Vec<Option<Vec<f32>>>, GenerateError> {
        if hooks.cancelled() {
            return Err(GenerateError::Cancelled);
        }
        Ok(self.model.extend(self.adapter, &mut self.cache, tokens, workspace)?)
    }

    fn pick(
        &mut self,
        index: usize,
        logits: &mut [f32],
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        let sequence = &mut self.sequences[index];
        let token = sequence.sampler.pick(logits).ok_or(GenerateError::NotFinite {
            prompt: sequence.prompt,
            tokens: sequence.prompt_tokens.len() + sequence.answer.len(),
        })?;
        if self.stop_ids.contains(&token) {
            self.stop(index, StopReason::EndOfTurn, hooks);
            return Ok(());
        }
        sequence.answer.push(token);
        hooks.token(sequence.prompt, token);
        if sequence.answer.len() == sequence.limit {
            self.stop(index, StopReason::MaxTokens, hooks);
        }
        Ok(())
    }

    fn stop(&mut self, index: usize, reason: StopReason, hooks: &mut dyn GenerateHooks) {
        let sequence = &mut self.sequences[index];
        let seconds = self.started.elapsed().as_secs_f64();
        sequence.stopped = Some((reason, seconds));
        let generation =
            Generation { tokens: std::mem::take(&mut sequence.answer), stopped: reason, seconds };
        hooks.done(sequence.prompt, &generation);
        sequence.answer = generation.tokens;
    }

    fn answers(self) -> impl Iterator<Item = (usize, Generation)> {
        self.sequences.into_iter().map(|sequence| {
            let (stopped, seconds) = sequence.stopped.expect("a batch advances until all have ended");
            (sequence.prompt, Generation { tokens: sequence.answer, stopped, seconds })
        })
    }
}

impl Sequence<'_> {
    /// The token that the model has not seen yet; none once the answer has ended.
    fn pending(&self) -> Option<u32> {
        self.answer.last().copied().filter(|_| self.stopped.is_none())
    }
}

#[cfg(test)]
mod tests;
