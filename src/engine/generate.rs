//! Text generation: prompts in, tokens out, many prompts in one batch. What all prompts of a batch begin with is
//! read once, the rest of each in few passes; then all advance together, a token a pass, and those that have ended
//! drop out. A prompt may come with a reference, whose loss is taken on top of the prompt as it was read. Knows
//! token ids; knows no text, no chat template (the caller says which ids end a turn) and no kernel.
//!
//! A prompt's tokens depend on that prompt alone: sequences do not see each other, and each has its own stream of
//! random numbers. So batching, the batch size and the other prompts change speed and nothing else.
//!
//! ```text
//! prompts ─ sort by length ─► batches ─► prefill ─► score ─► extend all ─► pick ─┬─► results in the prompts' order
//!                                                            └───────────◄────────┘
//! ```

use std::time::Instant;

use crate::adapter::Adapter;
use crate::model::{KvCache, Model, ModelError, SequenceLoss, Workspace};

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

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request<'a> {
    /// The prompt's tokens.
    pub prompt: &'a [u32],
    /// Most tokens of its answer, where that is less than the options'.
    pub max_new_tokens: usize,
    /// A text whose loss is wanted too.
    pub reference: Option<Reference<'a>>,
}

/// A text whose loss is wanted: as a rule the prompt with the right answer behind it. Whatever the two begin
/// with is read once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reference<'a> {
    /// Tokens of the whole text.
    pub tokens: &'a [u32],
    /// For each token, whether it counts.
    pub supervised: &'a [bool],
}

impl Reference<'_> {
    /// Tokens that it and `prompt` begin with, before the first that counts has to be foretold.
    fn shared_with(&self, prompt: &[u32]) -> usize {
        let counts = self.supervised.iter().position(|&counts| counts).unwrap_or(self.tokens.len());
        let agree = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        agree.min(counts.saturating_sub(1)).min(prompt.len() - 1)
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
    /// The loss of the request's reference, if it has one.
    pub reference: Option<SequenceLoss>,
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
    let request = |prompt| Request { prompt, max_new_tokens: options.max_new_tokens, reference: None };
    let requests: Vec<Request<'_>> = prompts.iter().map(|prompt| request(prompt)).collect();
    answer(model, adapter, &requests, options, hooks)
}

/// What is asked for, in the requests' order.
/// Errors: as [`generate`].
pub fn answer(
    model: &Model,
    adapter: Option<&Adapter>,
    requests: &[Request<'_>],
    options: &GenerateOptions,
    hooks: &mut dyn GenerateHooks,
) -> Result<Vec<Generation>, GenerateError> {
    check(model, requests, options)?;
    let mut shortest_first: Vec<usize> = (0..requests.len()).collect();
    shortest_first.sort_by_key(|&index| requests[index].prompt.len());
    let mut answers: Vec<(usize, Generation)> = Vec::with_capacity(requests.len());
    let mut workspace = Workspace::default();
    for members in shortest_first.chunks(options.batch.max(1)) {
        let mut batch = Batch::new(model, adapter, requests, members, options)?;
        batch.prefill(&mut workspace, hooks)?;
        while batch.advance(&mut workspace, hooks)? {}
        answers.extend(batch.answers());
    }
    answers.sort_by_key(|(prompt, _)| *prompt);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

fn check(model: &Model, requests: &[Request<'_>], options: &GenerateOptions) -> Result<(), GenerateError> {
    let (positions, vocabulary) = (model.config().max_position_embeddings, model.config().vocab_size);
    for (prompt, Request { prompt: tokens, .. }) in requests.iter().enumerate() {
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
        Some(streams) if streams.len() != requests.len() => {
            Err(GenerateError::Streams { streams: streams.len(), prompts: requests.len() })
        }
        _ => Ok(()),
    }
}

fn go_on(hooks: &mut dyn GenerateHooks) -> Result<(), GenerateError> {
    if hooks.cancelled() { Err(GenerateError::Cancelled) } else { Ok(()) }
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
    reference: Option<Reference<'a>>,
    reference_loss: Option<SequenceLoss>,
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
        requests: &[Request<'a>],
        members: &[usize],
        options: &'a GenerateOptions,
    ) -> Result<Self, GenerateError> {
        let positions = model.config().max_position_embeddings;
        let sequence = |&prompt: &usize| -> Result<Sequence<'a>, GenerateError> {
            let Request { prompt: prompt_tokens, max_new_tokens, reference } = requests[prompt];
            let stream = options.streams.as_ref().map_or(prompt as u64, |streams| streams[prompt]);
            Ok(Sequence {
                prompt,
                prompt_tokens,
                reference,
                reference_loss: None,
                sampler: Sampler::new(options.sampling, stream, prompt_tokens)?,
                answer: Vec::new(),
                limit: max_new_tokens.min(options.max_new_tokens).min(positions - prompt_tokens.len()),
                stopped: None,
            })
        };
        let sequences = members.iter().map(sequence).collect::<Result<Vec<_>, _>>()?;
        let room: Vec<usize> = sequences.iter().map(Sequence::most_tokens).collect();
        let cache = model.new_cache_of(&room);
        Ok(Self { model, adapter, stop_ids: &options.stop_ids, cache, sequences, started: Instant::now() })
    }

    /// Reads the prompts, takes the references' losses on the way, and picks each answer's first token.
    fn prefill(
        &mut self,
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        let those = |wanted: fn(&Sequence<'_>) -> bool| -> Vec<usize> {
            (0..self.sequences.len()).filter(|&index| wanted(&self.sequences[index])).collect()
        };
        let read = those(|sequence| sequence.limit > 0 || sequence.reference.is_some());
        let (scored, silent) = (those(|one| one.reference.is_some()), those(|one| one.limit == 0));
        let live = those(|sequence| sequence.limit > 0);
        let beginnings: Vec<&'a [u32]> =
            read.iter().map(|&index| self.sequences[index].beginning()).collect();
        let shared = shared_beginning(&beginnings);
        if shared > 0 {
            self.feed(&[(read[0], &beginnings[0][..shared])], workspace, hooks)?;
            read[1..].iter().for_each(|&index| self.cache.fork(read[0], index));
        }
        let rest = |index: &usize| (*index, &self.sequences[*index].beginning()[shared..]);
        self.feed(&scored.iter().map(rest).collect::<Vec<_>>(), workspace, hooks)?;
        self.score(&scored, workspace, hooks)?;
        silent.into_iter().for_each(|index| self.stop(index, StopReason::MaxTokens, hooks));
        let rest =
            |&index: &usize| (index, &self.sequences[index].prompt_tokens[self.cache.lengths()[index]..]);
        for tokens in self.passes(&live.iter().map(rest).collect::<Vec<_>>()) {
            self.extend(&tokens, workspace, hooks)?;
        }
        Ok(())
    }

    /// The losses of the references of these sequences, which hold what each begins with.
    fn score(
        &mut self,
        scored: &[usize],
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        let left = |&index: &usize| {
            let skipped = self.cache.lengths()[index];
            self.sequences[index].reference.map(|reference| (index, &reference.tokens[skipped..]))
        };
        for tokens in self.passes(&scored.iter().filter_map(left).collect::<Vec<_>>()) {
            let continuation = |(index, tokens): (usize, &&'a [u32])| -> (&'a [u32], &'a [bool]) {
                let supervised =
                    self.sequences[index].reference.map_or(&[][..], |reference| reference.supervised);
                (tokens, if tokens.is_empty() { &[] } else { &supervised[supervised.len() - tokens.len()..] })
            };
            let continuations: Vec<_> = tokens.iter().enumerate().map(continuation).collect();
            go_on(hooks)?;
            let losses = self.model.loss_after(self.adapter, &mut self.cache, &continuations, workspace)?;
            for (index, loss) in
                losses.into_iter().enumerate().filter(|(index, _)| !tokens[*index].is_empty())
            {
                self.sequences[index].reference_loss = Some(loss);
            }
        }
        Ok(())
    }

    /// Tables of tokens, one entry a sequence, that hold these in few passes. What is longer than a pass has
    /// one of its own.
    fn passes(&self, fed: &[(usize, &'a [u32])]) -> Vec<Vec<&'a [u32]>> {
        let mut fed = fed.iter().filter(|(_, tokens)| !tokens.is_empty()).peekable();
        let mut passes = Vec::new();
        while fed.peek().is_some() {
            let mut pass: Vec<&[u32]> = vec![&[]; self.sequences.len()];
            let mut room = PREFILL_TOKENS;
            while let Some((index, tokens)) =
                fed.next_if(|(_, tokens)| room == PREFILL_TOKENS || tokens.len() <= room)
            {
                pass[*index] = tokens;
                room = room.saturating_sub(tokens.len());
            }
            passes.push(pass);
        }
        passes
    }

    /// Reads tokens whose logits nobody wants.
    fn feed(
        &mut self,
        fed: &[(usize, &'a [u32])],
        workspace: &mut Workspace,
        hooks: &mut dyn GenerateHooks,
    ) -> Result<(), GenerateError> {
        for tokens in self.passes(fed) {
            go_on(hooks)?;
            self.model.feed(self.adapter, &mut self.cache, &tokens, workspace)?;
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
        go_on(hooks)?;
        let model = self.model;
        let logits = model.extend_in_place(self.adapter, &mut self.cache, tokens, workspace)?;
        let fed = (0..tokens.len()).filter(|&index| !tokens[index].is_empty());
        for (index, logits) in fed.zip(logits.chunks_exact_mut(model.config().vocab_size)) {
            self.pick(index, logits, hooks)?;
        }
        Ok(())
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
        let seconds = self.started.elapsed().as_secs_f64();
        let sequence = &mut self.sequences[index];
        sequence.stopped = Some((reason, seconds));
        let reference = sequence.reference_loss;
        let generation =
            Generation { tokens: std::mem::take(&mut sequence.answer), stopped: reason, seconds, reference };
        hooks.done(sequence.prompt, &generation);
        sequence.answer = generation.tokens;
    }

    fn answers(self) -> impl Iterator<Item = (usize, Generation)> {
        self.sequences.into_iter().map(|sequence| {
            let (stopped, seconds) = sequence.stopped.expect("a batch advances until all have ended");
            let reference = sequence.reference_loss;
            (sequence.prompt, Generation { tokens: sequence.answer, stopped, seconds, reference })
        })
    }
}

impl<'a> Sequence<'a> {
    /// The prompt as far as its reference begins with it too.
    fn beginning(&self) -> &'a [u32] {
        let end = self.reference.map(|reference| reference.shared_with(self.prompt_tokens));
        &self.prompt_tokens[..end.unwrap_or(self.prompt_tokens.len())]
    }

    /// Tokens that the cache must have room for.
    fn most_tokens(&self) -> usize {
        let reference = self.reference.map_or(0, |reference| reference.tokens.len());
        reference.max(self.prompt_tokens.len() + self.limit)
    }

    /// The token that the model has not seen yet; none once the answer has ended.
    fn pending(&self) -> Option<u32> {
        self.answer.last().copied().filter(|_| self.stopped.is_none())
    }
}

#[cfg(test)]
mod tests;
