//! What a run will hold in memory, before it runs: from the shapes of the model's linear layers, the adapter and the
//! largest pass. And how many layers' activations to compute twice instead of keeping, where a budget asks for it.
//! Knows names and shapes only, so it speaks of every family; what it leaves out (norms, thread stacks) is small.
//!
//! ```text
//! program + weights + adapter + gradients + moments + kept layers + one layer at work + head  =  the peak
//! ```

use serde::Serialize;

use crate::adapter::{Adapter, LinearName};
use crate::model::{Model, ModelConfig, linears};
use crate::optimizer::AdamW;
use crate::process::memory_before;

use super::options::{TrainError, TrainOptions};

/// Most logits that stand in memory at once, on the CPU.
const LOGITS_MAX: usize = 12 << 20;
/// Fewest rows whose logits stand in memory at once.
const LOGIT_ROWS_MIN: usize = 16;
/// The same two on a device.
const DEVICE_LOGITS_MAX: usize = 1 << 26;
const DEVICE_LOGIT_ROWS_MIN: usize = 128;
/// What a thread works with: a decoded block of weights and the packed operands of a product.
const THREAD_BYTES: u64 = 2 << 20;

/// The memory of a run, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// The base model's weights.
    pub weights: u64,
    /// The adapter, and the copy of the best one if that is kept.
    pub adapter: u64,
    /// Its gradients.
    pub gradients: u64,
    /// AdamW's moments.
    pub optimizer: u64,
    /// What the layers keep from the forward for the backward pass.
    pub activations: u64,
    /// What the layer at work needs beside that, and what all threads work with.
    pub buffers: u64,
    /// Rows and logits at the output layer.
    pub head: u64,
    /// The program, the rows and all else that was there before the run.
    pub program: u64,
    /// Tokens of the largest pass, for which this holds.
    pub pass_tokens: usize,
    /// Layers whose activations are computed twice instead of kept.
    pub recomputed_layers: usize,
    /// All layers.
    pub layers: usize,
}

impl MemoryPlan {
    /// The peak.
    pub fn total(&self) -> u64 {
        self.program
            + self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.activations
            + self.buffers
            + self.head
    }
}

/// Values a token that a layer keeps, and that it needs at work.
#[derive(Debug, Clone, Copy, Default)]
struct LayerWidth {
    kept: usize,
    work: usize,
}

/// What of a model a plan depends on.
struct Subject<'a> {
    config: &'a ModelConfig,
    linears: Vec<LinearName>,
    /// Bytes of all weight matrices.
    weights: u64,
    /// Values of the largest weight.
    largest: u64,
    place: Place,
}

/// Where a run's memory is.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// In the process, beside what is there before the run.
    Host { threads: usize, program: u64 },
    /// On a device with so much free; AdamW and the adapter's own values stay with the host.
    Device { free: u64 },
}

impl Place {
    /// Bytes of an activation.
    fn value(self) -> u64 {
        match self {
            Self::Host { .. } => 4,
            Self::Device { .. } => 2,
        }
    }
}

/// Plans a run on `model` whose largest training pass has `pass_tokens` and whose largest evaluation `eval_tokens`;
/// `supervised` is the share of tokens that reach the output layer.
/// Errors: it does not fit the options' budget even with every layer recomputed.
pub(super) fn plan(
    model: &Model,
    adapter: &Adapter,
    optimizer_bytes: usize,
    passes: (usize, usize),
    supervised: f64,
    options: &TrainOptions,
) -> Result<MemoryPlan, TrainError> {
    let (weights, mapped) = model.weight_bytes();
    let subject = Subject {
        config: model.config(),
        linears: model.linear_names(),
        weights,
        largest: largest(&model.linear_names()),
        place: match model.device_memory() {
            Some(memory) => Place::Device { free: memory.free },
            None => {
                let program = memory_before(mapped).saturating_sub(weights - mapped);
                Place::Host { threads: model.threads(), program }
            }
        },
    };
    subject.plan(adapter, optimizer_bytes, passes, supervised, options)
}

impl MemoryPlan {
    /// About what a run would hold on a model that is not open, with passes of `pass_tokens` tokens of which every
    /// other one counts; `weights` are the bytes of its weight matrices as they will rest in memory.
    ///
    /// # Errors
    /// The description makes no sense, the adapter does not fit it, or the run does not fit the options' budget.
    pub fn estimate(
        config: &ModelConfig,
        weights: u64,
        threads: usize,
        pass_tokens: usize,
        options: &TrainOptions,
    ) -> Result<Self, TrainError> {
        let place = Place::Host { threads, program: memory_before(0) };
        let linears = linears(config)?;
        let largest = largest(&linears);
        let adapter = Adapter::for_linears(linears.clone(), &options.lora)?;
        let optimizer = AdamW::new(options.adamw, adapter.parameters().map(|(_, values)| values.len()));
        let subject = Subject { config, linears, weights, largest, place };
        subject.plan(&adapter, optimizer.state_bytes(), (pass_tokens, pass_tokens), 0.5, options)
    }
}

impl Subject<'_> {
    fn plan(
        &self,
        adapter: &Adapter,
        optimizer_bytes: usize,
        (pass_tokens, eval_tokens): (usize, usize),
        supervised: f64,
        options: &TrainOptions,
    ) -> Result<MemoryPlan, TrainError> {
        let (c, vocabulary) = (self.config.hidden_size as u64, self.config.vocab_size);
        let layers = self.widths(adapter, options);
        let bytes = |values: u64| self.place.value() * values * pass_tokens as u64;
        let adapter_bytes = 4 * adapter.parameter_count() as u64;
        let head = |tokens: usize| {
            let rows = (tokens as f64 * supervised).ceil() as usize;
            // A device has logits in f32 and their gradients beside them.
            let (most, fewest, logit) = match self.place {
                Place::Host { .. } => (LOGITS_MAX, LOGIT_ROWS_MIN, 4),
                Place::Device { .. } => (DEVICE_LOGITS_MAX, DEVICE_LOGIT_ROWS_MIN, 6),
            };
            let logits = rows.min((most / vocabulary).max(fewest)) * vocabulary;
            self.place.value() * 4 * c * rows as u64 + logit * logits as u64
        };
        let work = layers.iter().map(|layer| layer.work as u64).max().unwrap_or(0);
        // An evaluation keeps one layer; its passes may be larger than those of small steps.
        let one = layers.iter().map(|layer| layer.kept as u64).max().unwrap_or(0);
        let evaluation = self.place.value() * (5 * c + work + one) * eval_tokens as u64 + head(eval_tokens);
        let mut plan = MemoryPlan {
            weights: self.weights,
            adapter: match self.place {
                Place::Host { .. } if options.keep == super::Keep::Best => 2 * adapter_bytes,
                Place::Host { .. } => adapter_bytes,
                Place::Device { .. } => adapter_bytes / 2,
            },
            gradients: adapter_bytes,
            optimizer: match self.place {
                Place::Host { .. } => optimizer_bytes as u64,
                Place::Device { .. } => 0,
            },
            head: head(pass_tokens),
            program: match self.place {
                Place::Host { program, .. } => program,
                Place::Device { .. } => 0,
            },
            pass_tokens,
            layers: layers.len(),
            ..MemoryPlan::default()
        };
        let budget = match self.place {
            Place::Host { .. } => options.memory_budget,
            // The weights are there already.
            Place::Device { free } => Some(options.memory_budget.unwrap_or(free + self.weights)),
        };
        // The lowest layers are recomputed: which ones makes no difference to the peak.
        for recomputed in 0..=layers.len() {
            let (twice, once) = layers.split_at(recomputed);
            let at_work = twice.iter().map(|layer| layer.kept as u64).max().unwrap_or(0);
            let kept: u64 = once.iter().map(|layer| layer.kept as u64).sum();
            plan.activations = bytes(kept + at_work + c * layers.len() as u64);
            let own = match self.place {
                Place::Host { threads, .. } => THREAD_BYTES * threads as u64,
                // The weight that was decoded last.
                Place::Device { .. } => 2 * self.largest,
            };
            let work = bytes(4 * c + work);
            plan.buffers = own + work.max(evaluation.saturating_sub(plan.activations + plan.head));
            plan.recomputed_layers = recomputed;
            if budget.is_none_or(|budget| plan.total() <= budget) {
                return Ok(plan);
            }
        }
        let budget = budget.unwrap_or(u64::MAX);
        Err(TrainError::Memory { needed: plan.total(), budget, pass_tokens })
    }

    /// The widths of each layer, from its linear layers: outputs are kept, but for those that go into the stream, of
    /// which the input is; a Mamba mixer keeps its projection before and after the convolution.
    fn widths(&self, adapter: &Adapter, options: &TrainOptions) -> Vec<LayerWidth> {
        let (dora, noisy) = (options.lora.dora, options.lora.dropout > 0.0);
        let (c, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let mut layers: Vec<(String, LayerWidth, usize)> = Vec::new();
        for (index, (name, out, input)) in self.linears.iter().enumerate() {
            let (out, input) = (*out, *input);
            let layer = name.split('.').take(3).collect::<Vec<_>>().join(".");
            if layers.last().is_none_or(|(known, ..)| *known != layer) {
                // The stream between mixer and MLP, and the attention's normalisers.
                layers.push((layer, LayerWidth { kept: c + heads, work: 0 }, 0));
            }
            let Some((_, width, noise)) = layers.last_mut() else { continue };
            let rank = adapter.lora(index).map(|lora| lora.rank);
            width.kept += rank.map_or(0, |rank| rank + if dora { out } else { 0 });
            let leaf = name.rsplit('.').next().unwrap_or(name);
            match leaf {
                "o_proj" => (width.kept, width.work) = (width.kept + input, width.work + 3 * input),
                "down_proj" => width.work += 2 * input,
                // Gate and up are joined again on the way back.
                "output_linear" => width.work += 3 * input,
                "out_proj" => width.work += 4 * input,
                "in_proj" => (width.kept, width.work) = (width.kept + 2 * out, width.work + 3 * out),
                "q_proj" | "k_proj" | "v_proj" => {
                    (width.kept, width.work) = (width.kept + out, width.work + out);
                }
                _ => width.kept += out,
            }
            // A pair's own buffers: its inner values, a copy of its input without what was dropped, and its outputs.
            let own =
                rank.map_or(0, |rank| rank + if noisy { 3 * input } else { 0 } + if dora { out } else { 0 });
            *noise = own.max(*noise);
        }
        let width =
            |(_, width, noise): (String, LayerWidth, usize)| LayerWidth { work: width.work + noise, ..width };
        layers.into_iter().map(width).collect()
    }
}

/// Values of the largest linear weight.
fn largest(linears: &[LinearName]) -> u64 {
    linears.iter().map(|(_, out, input)| (out * input) as u64).max().unwrap_or(0)
}

/// Bytes as people read them.
pub fn readable(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes < 1024.0 { format!("{mebibytes:.0} MiB") } else { format!("{:.2} GiB", mebibytes / 1024.0) }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            ("weights", self.weights),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("buffers", self.buffers),
            ("head", self.head),
            ("program", self.program),
        ];
        let parts: Vec<String> =
            parts.into_iter().map(|(name, bytes)| format!("{name} {}", readable(bytes))).collect();
        write!(
            f,
            "{} ({}; passes of up to {} tokens",
            readable(self.total()),
            parts.join(", "),
            self.pass_tokens
        )?;
        match self.recomputed_layers {
            0 => write!(f, ")"),
            layers => write!(f, "; {layers} of {} layers computed twice to fit)", self.layers),
        }
    }
}
