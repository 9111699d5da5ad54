//! Measures the engine on a real model: training steps and generation, in tokens a second. Knows the engine's
//! public face; nothing of manifests, stages or the terminal.
//!
//! ```text
//! train, generate ──► a model whole        kernels ──► its operations, one by one
//! ```
//! A figure is the median of the measured steps; `spread` is (slowest − fastest) / median of their times, so that a
//! reader sees how quiet the machine was.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use tunesmith_engine::adapter::{Adapter, AdapterError, Gradients, LoraConfig, Targets};
use tunesmith_engine::backend::{BackendError, BackendKind, Compute, Cpu, DeviceError};
use tunesmith_engine::base::{self, BaseError, Quantize};
use tunesmith_engine::model::{Model, ModelError, Pack, Workspace};
use tunesmith_engine::optimizer::{AdamW, AdamWOptions, clip_factor};
use tunesmith_engine::process::{cpu_seconds, peak_rss_bytes};
use tunesmith_engine::tokenizer::{Specials, Tokenizer, TokenizerError};

mod kernels;

mod selftest;

pub(crate) use kernels::{KernelFigure, KernelFigures, Kernels, kernels};
pub(crate) use selftest::{Checked, SelfTest, selftest};

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// Operations gave other values than plain loops.
    #[error(
        "{wrong} of {operations} operations are wrong on this machine; `--device cpu`, or another `TUNESMITH_CPU`, may be right"
    )]
    Wrong { wrong: usize, operations: usize },
    /// The device gave up.
    #[error(transparent)]
    Device(DeviceError),
    #[error("model `{}` cannot be used: {source}", path.display())]
    Base { path: PathBuf, source: BaseError },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("`{}` has no line with a text to go on with", path.display())]
    NoTexts { path: PathBuf },
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("`{}` holds {got} tokens, but {needed} are needed for {steps} steps", path.display())]
    Tokens { path: PathBuf, got: usize, needed: usize, steps: usize },
}

/// The model that is measured.
/// A base model to measure.
pub(crate) struct Base {
    path: PathBuf,
    compute: Compute,
    /// Where `path` is, if it was made for this; it goes when this does.
    _folder: Option<tempfile::TempDir>,
}

impl Base {
    /// Reads `path`, a GGUF file or a Hugging Face folder, and makes the base of it that the `model` stage makes.
    /// Without `quantize` the source is used as it is, block formats as the f32 values they stand for.
    pub(crate) fn new(path: &Path, quantize: Option<Quantize>, compute: Compute) -> Result<Self, BenchError> {
        let path = path.to_owned();
        let Some(quantize) = quantize else { return Ok(Self { path, compute, _folder: None }) };
        let folder = tempfile::tempdir()?;
        base::build_base(&path, folder.path(), quantize, &mut |_, _| {})
            .map_err(|source| BenchError::Base { path, source })?;
        Ok(Self { path: folder.path().to_owned(), compute, _folder: Some(folder) })
    }

    fn open(&self) -> Result<Model, BenchError> {
        Ok(Model::open(&self.path, &self.compute)?)
    }
}

/// What training is measured on.
pub(crate) struct Training {
    /// Rows of a step, and tokens of a row.
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    pub(crate) rank: usize,
    pub(crate) targets: Targets,
    /// Steps that are measured, after `warmup` that are not.
    pub(crate) steps: usize,
    pub(crate) warmup: usize,
    pub(crate) learning_rate: f64,
    pub(crate) clip: f64,
    /// A PEFT adapter to begin with.
    pub(crate) adapter_init: Option<PathBuf>,
    /// Token ids, little-endian i32; else drawn from a fixed sequence.
    pub(crate) tokens: Option<PathBuf>,
    /// Compute every layer twice instead of keeping what it computed.
    pub(crate) recompute: bool,
}

/// What was measured of training.
#[derive(Debug, Serialize)]
pub(crate) struct TrainingFigures {
    /// Tokens a second of the median step.
    pub(crate) tok_s: f64,
    pub(crate) step_ms: f64,
    pub(crate) spread: f64,
    /// Time of the median step on all cores together: what to compare where the machine is shared.
    pub(crate) cpu_ms: f64,
    /// Floating-point operations of a step, a multiply-add as two; see `Model::training_flops`.
    pub(crate) flops: f64,
    /// Billions of floating-point operations a second that so many threads do at most, as measured before; not
    /// measured on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_gflop_s: Option<f64>,
    /// How much of that the median step reaches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_percent: Option<f64>,
    pub(crate) peak_rss_bytes: u64,
    /// What its buffers took of a GPU's memory at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_device_bytes: Option<u64>,
    /// Mean loss of each step, warmup too.
    pub(crate) losses: Vec<f64>,
    pub(crate) numerics: String,
}

/// Trains for a few steps, each row supervised whole.
pub(crate) fn train(base: &Base, training: &Training) -> Result<TrainingFigures, BenchError> {
    let model = base.open()?;
    let mut adapter = match &training.adapter_init {
        Some(folder) => Adapter::load_peft(folder, &model)?,
        None => {
            let (rank, targets) = (training.rank, training.targets.clone());
            let alpha = 2.0 * rank as f32;
            Adapter::new(&model, &LoraConfig { rank, alpha, targets, ..LoraConfig::default() })?
        }
    };
    let steps = training.warmup + training.steps;
    let per_step = training.batch * training.seq;
    let tokens = match &training.tokens {
        Some(path) => read_tokens(path, steps * per_step, steps)?,
        None => drawn_tokens(steps * per_step, model.config().vocab_size),
    };
    let mut optimizer =
        AdamW::new(AdamWOptions::default(), adapter.parameters().map(|(_, values)| values.len()));
    let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
    if training.recompute {
        workspace.recompute_layers(model.config().num_hidden_layers());
    }
    // Before and after the steps: a busy moment would lower the peak and flatter them.
    let on_cpu = base.compute.kind == BackendKind::Cpu;
    let cpu = on_cpu.then(|| Cpu::new(base.compute.threads)).transpose().map_err(BackendError::from)?;
    let peak_before = cpu.as_ref().map(kernels::peak_gflop_s);
    let marks = vec![true; training.seq];
    let (mut seconds, mut busy, mut losses, mut flops) = (Vec::new(), Vec::new(), Vec::new(), 0.0);
    for step in tokens.chunks_exact(per_step) {
        let rows: Vec<_> = step.chunks_exact(training.seq).map(|row| (row, &marks[..])).collect();
        let (start, busy_before) = (Instant::now(), cpu_seconds());
        let pack = Pack::new(&rows);
        let scale = 1.0 / pack.supervised() as f32;
        gradients.zero();
        let loss = model.loss_and_gradients(&adapter, &pack, scale, &mut gradients, &mut workspace)?;
        gradients.scale(clip_factor(gradients.norm(), training.clip));
        let tensors = adapter.parameters_mut().zip(gradients.tensors());
        optimizer.step(tensors.map(|((_, values), (_, slope))| (training.learning_rate, values, slope)));
        seconds.push(start.elapsed().as_secs_f64());
        busy.push(cpu_seconds() - busy_before);
        losses.push(loss.nll / loss.supervised as f64);
        flops = model.training_flops(&adapter, &pack);
    }
    let peak_after = cpu.as_ref().map(kernels::peak_gflop_s);
    let peak_gflop_s = peak_before.zip(peak_after).map(|(before, after)| before.max(after));
    let (median, spread) = median_and_spread(&seconds[training.warmup..]);
    Ok(TrainingFigures {
        tok_s: per_step as f64 / median,
        step_ms: median * 1e3,
        spread,
        cpu_ms: median_and_spread(&busy[training.warmup..]).0 * 1e3,
        flops,
        peak_gflop_s,
        peak_percent: peak_gflop_s.map(|peak| 100.0 * flops / median / (peak * 1e9)),
        peak_rss_bytes: peak_rss_bytes(),
        peak_device_bytes: model.device_memory().map(|memory| memory.peak),
        losses,
        numerics: model.numerics(),
    })
}

/// What generation is measured on.
pub(crate) struct Generation {
    /// Tokens of each prompt, and tokens generated after it.
    pub(crate) prompt: usize,
    pub(crate) tokens: usize,
    /// Sequences generated together.
    pub(crate) batch: usize,
    /// Times the whole is done.
    pub(crate) rounds: usize,
}

/// What was measured of generation.
#[derive(Debug, Serialize)]
pub(crate) struct GenerationFigures {
    /// Prompt tokens a second, all sequences together.
    pub(crate) prefill_tok_s: f64,
    /// Generated tokens a second, all sequences together.
    pub(crate) decode_tok_s: f64,
    /// Of decoding.
    pub(crate) spread: f64,
    pub(crate) peak_rss_bytes: u64,
    pub(crate) numerics: String,
}

/// Reads prompts and decodes greedily, without ever stopping early.
pub(crate) fn generate(base: &Base, generation: &Generation) -> Result<GenerationFigures, BenchError> {
    let model = base.open()?;
    let (prompt, batch) = (generation.prompt, generation.batch);
    let drawn = drawn_tokens(prompt * batch, model.config().vocab_size);
    let prompts: Vec<&[u32]> = drawn.chunks_exact(prompt).collect();
    let mut workspace = Workspace::default();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    // The first round warms up and is not counted.
    for round in 0..=generation.rounds {
        let mut cache = model.new_cache(batch, prompt + generation.tokens);
        let start = Instant::now();
        let mut logits = model.extend(None, &mut cache, &prompts, &mut workspace)?;
        let read = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for _ in 0..generation.tokens {
            let next: Vec<[u32; 1]> = logits.iter().flatten().map(|logits| [greedy(logits)]).collect();
            let fed: Vec<&[u32]> = next.iter().map(|token| &token[..]).collect();
            logits = model.extend(None, &mut cache, &fed, &mut workspace)?;
        }
        if round > 0 {
            prefill.push(read);
            decode.push(start.elapsed().as_secs_f64());
        }
    }
    let (decode, spread) = median_and_spread(&decode);
    Ok(GenerationFigures {
        prefill_tok_s: (prompt * batch) as f64 / median_and_spread(&prefill).0,
        decode_tok_s: (generation.tokens * batch) as f64 / decode,
        spread,
        peak_rss_bytes: peak_rss_bytes(),
        numerics: model.numerics(),
    })
}

fn greedy(logits: &[f32]) -> u32 {
    best_two(logits)[0].0
}

/// The likeliest tokens and their logits, the likelier first.
fn best_two(logits: &[f32]) -> [(u32, f32); 2] {
    let mut best = [(0, f32::NEG_INFINITY); 2];
    for (token, &logit) in (0..).zip(logits) {
        if logit > best[0].1 {
            best = [(token, logit), best[0]];
        } else if logit > best[1].1 {
            best[1] = (token, logit);
        }
    }
    best
}

/// A text that was gone on with.
#[derive(Debug, Serialize)]
pub(crate) struct Continued {
    pub(crate) prompt: String,
    pub(crate) text: String,
    pub(crate) steps: Vec<Step>,
}

/// A token and the one that came second.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) token: String,
    pub(crate) runner_up: String,
    /// By how much the token's logit is the larger.
    pub(crate) gap: f32,
}

/// Goes on greedily with each line of `file` as it stands, for `tokens` tokens.
pub(crate) fn go_on(base: &Base, file: &Path, tokens: usize) -> Result<Vec<Continued>, BenchError> {
    let texts = fs_err::read_to_string(file)?;
    let (model, tokenizer) = (base.open()?, Tokenizer::open(&base.path)?);
    let mut workspace = Workspace::default();
    let mut all = Vec::new();
    for prompt in texts.lines().filter(|line| !line.is_empty()) {
        let mut fed: Vec<u32> = tokenizer.bos_id().filter(|_| tokenizer.adds_bos()).into_iter().collect();
        fed.extend(tokenizer.encode(prompt, Specials::AsText)?);
        let mut cache = model.new_cache(1, fed.len() + tokens);
        let (mut ids, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..tokens {
            let logits = model.extend(None, &mut cache, &[&fed], &mut workspace)?;
            let [(first, high), (second, low)] = best_two(logits[0].as_deref().unwrap_or_default());
            let name = |id| tokenizer.decode(&[id], false);
            steps.push(Step { token: name(first)?, runner_up: name(second)?, gap: high - low });
            ids.push(first);
            fed = vec![first];
        }
        all.push(Continued { prompt: prompt.to_owned(), text: tokenizer.decode(&ids, false)?, steps });
    }
    if all.is_empty() { Err(BenchError::NoTexts { path: file.to_owned() }) } else { Ok(all) }
}

/// A fixed sequence of tokens in which small ids are the likelier, as in a text.
fn drawn_tokens(count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut unit = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1_u64 << 24) as f64
    };
    // Uniform in the logarithm: Zipf's law with exponent 1.
    (0..count).map(|_| ((vocabulary as f64).powf(unit()) as u32).min(vocabulary as u32) - 1).collect()
}

fn read_tokens(path: &Path, needed: usize, steps: usize) -> Result<Vec<u32>, BenchError> {
    let bytes = fs_err::read(path)?;
    let got = bytes.len() / 4;
    if got < needed {
        return Err(BenchError::Tokens { path: path.to_owned(), got, needed, steps });
    }
    let id = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(bytes.chunks_exact(4).take(needed).map(id).collect())
}

fn median_and_spread(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    (median, (sorted[sorted.len() - 1] - sorted[0]) / median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_number_lies_between_the_two_in_the_middle() {
        let (median, spread) = median_and_spread(&[4.0, 1.0, 2.0, 3.0]);
        assert!((median - 2.5).abs() < 1e-12 && (spread - 1.2).abs() < 1e-12);
    }

    #[test]
    fn drawn_tokens_lie_in_the_vocabulary_and_lean_to_small_ids() {
        let tokens = drawn_tokens(10_000, 1000);
        assert!(tokens.iter().all(|token| *token < 1000));
        let small = tokens.iter().filter(|token| **token < 31).count();
        assert!((4500..5500).contains(&small), "{small} of 10000 are below the root of the vocabulary");
    }

    #[test]
    fn too_few_tokens_say_how_many_are_needed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.i32");
        fs_err::write(&path, [7_i32, 8].map(i32::to_le_bytes).concat()).unwrap();
        assert_eq!(read_tokens(&path, 2, 1).unwrap(), [7, 8]);
        let error = read_tokens(&path, 3, 1).unwrap_err().to_string();
        assert!(error.ends_with("holds 2 tokens, but 3 are needed for 1 steps"), "{error}");
    }
}
