//! What a training run is told, and why it may refuse or fail. Knows the ranges of options; the loop is in
//! `trainer`.

use std::path::PathBuf;

use crate::adapter::{AdapterError, LoraConfig};
use crate::model::ModelError;
use crate::optimizer::AdamWOptions;

use super::batches::{Batch, Order};
use super::checkpoint::CheckpointFolder;
use super::gates::Gates;
use super::memory::readable;
use super::schedule::Decay;

/// A training run.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// The adapter: rank, targets, initialisation.
    pub lora: LoraConfig,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How often each row is seen.
    pub epochs: usize,
    /// B's learning rate (and that of DoRA's magnitudes) as a multiple of A's: LoRA+. 1 for plain LoRA.
    pub loraplus_ratio: f64,
    /// NEFTune's alpha: noise on the embeddings of training passes, in ±alpha / sqrt(tokens · channels) for each
    /// row; 0 for none.
    pub neftune_alpha: f32,
    /// What goes into one optimizer step. Its loss is a mean over all of its supervised tokens.
    pub batch: Batch,
    /// The order of rows.
    pub order: Order,
    /// Most tokens of one pass through the model; bounds memory. A step's rows are packed into passes of this
    /// size, and its loss is a mean over the whole step, so that only rounding depends on it.
    pub pack_tokens: usize,
    /// How the learning rate falls.
    pub decay: Decay,
    /// Share of all steps during which the learning rate rises, 0 to 1.
    pub warmup_ratio: f64,
    /// Share of all steps during which it falls, with [`Decay::Wsd`], 0 to 1.
    pub decay_ratio: f64,
    /// The optimizer.
    pub adamw: AdamWOptions,
    /// Gradients of a larger 2-norm are scaled down to it; none to leave them.
    pub clip_norm: Option<f64>,
    /// Orders the rows and names the streams of dropout and noise. The adapter's own seed is in `lora`.
    pub seed: u64,
    /// Steps between evaluations; 0 for one at the end of each epoch. There is always one at the end.
    pub eval_every: usize,
    /// Which adapter is the result.
    pub keep: Keep,
    /// Most memory the run may take, in bytes: layers are computed twice instead of kept as far as that needs.
    /// Changes no result.
    pub memory_budget: Option<u64>,
    /// Checks on the losses.
    pub gates: Gates,
    /// Where the run's state is kept; none to start anew whenever it is interrupted.
    pub checkpoints: Option<CheckpointFolder>,
}

/// Which adapter of a run is its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The one after the last step.
    #[default]
    Last,
    /// The one with the lowest validation loss; the last one without validation rows.
    Best,
}

impl TrainOptions {
    /// One epoch at a learning rate of 2e-4, eight rows a step, clipped at norm 1.
    pub fn new(lora: LoraConfig) -> Self {
        Self {
            lora,
            learning_rate: 2e-4,
            epochs: 1,
            loraplus_ratio: 1.0,
            neftune_alpha: 0.0,
            batch: Batch::Rows(8),
            order: Order::Shuffled,
            pack_tokens: 2048,
            decay: Decay::Cosine,
            warmup_ratio: 0.03,
            decay_ratio: 0.2,
            adamw: AdamWOptions::default(),
            clip_norm: Some(1.0),
            seed: 0,
            eval_every: 0,
            keep: Keep::Last,
            memory_budget: None,
            gates: Gates::default(),
            checkpoints: None,
        }
    }

    /// An error that names the first option outside its range.
    pub(super) fn check(&self) -> Result<(), TrainError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let adamw = &self.adamw;
        let below_one = "at least 0 and below 1";
        let (neftune, dropout) = (f64::from(self.neftune_alpha), f64::from(self.lora.dropout));
        let min_delta = self.gates.min_delta;
        let (batch_name, batch) = match self.batch {
            Batch::Rows(rows) => ("batch_examples", rows),
            Batch::Tokens(tokens) => ("batch_tokens", tokens),
        };
        let checks = [
            ("learning_rate", self.learning_rate, positive(self.learning_rate), "above 0"),
            ("epochs", self.epochs as f64, self.epochs > 0, "at least 1"),
            ("loraplus_ratio", self.loraplus_ratio, positive(self.loraplus_ratio), "above 0"),
            ("neftune_alpha", neftune, neftune.is_finite() && neftune >= 0.0, "at least 0"),
            ("dropout", dropout, (0.0..=0.99).contains(&dropout), "at least 0 and at most 0.99"),
            (batch_name, batch as f64, batch > 0, "at least 1"),
            ("pack_tokens", self.pack_tokens as f64, self.pack_tokens > 0, "at least 1"),
            ("warmup_ratio", self.warmup_ratio, (0.0..=1.0).contains(&self.warmup_ratio), "between 0 and 1"),
            ("decay_ratio", self.decay_ratio, (0.0..=1.0).contains(&self.decay_ratio), "between 0 and 1"),
            ("min_delta", min_delta, min_delta.is_finite() && min_delta >= 0.0, "at least 0"),
            ("beta1", adamw.beta1, (0.0..1.0).contains(&adamw.beta1), below_one),
            ("beta2", adamw.beta2, (0.0..1.0).contains(&adamw.beta2), below_one),
            ("epsilon", adamw.epsilon, positive(adamw.epsilon), "above 0"),
            (
                "weight_decay",
                adamw.weight_decay,
                (0.0..=1.0).contains(&adamw.weight_decay),
                "between 0 and 1",
            ),
            ("clip_norm", self.clip_norm.unwrap_or(1.0), self.clip_norm.is_none_or(positive), "above 0"),
        ];
        match checks.into_iter().find(|(_, _, holds, _)| !holds) {
            Some((name, value, _, range)) => Err(TrainError::Option { name, value, range }),
            None => Ok(()),
        }
    }
}

/// Why a training run ended without an adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// An option outside its range.
    #[error("training option `{name}` is {value}; it must be {range}")]
    Option { name: &'static str, value: f64, range: &'static str },
    /// Nothing to train on.
    #[error("there are no training rows")]
    NoRows,
    /// A row that cannot be trained or evaluated on.
    #[error("row `{id}` {reason}")]
    Row { id: String, reason: RowReason },
    /// A number that is not finite. Training on would destroy the adapter.
    #[error("{what} is not finite{}; lower the learning rate or look at the rows", circumstances(*.step, .rows))]
    NotFinite {
        what: String,
        /// The step, from 1; 0 for an evaluation outside of training.
        step: usize,
        /// The rows that were computed with; none if it is the adapter that was found so.
        rows: Vec<String>,
    },
    /// The training rows are being memorised.
    #[error(
        "training loss is {train_loss:.4} while validation loss rose to {eval_loss:.4} (lowest {lowest:.4} at step \
         {lowest_step}): the adapter memorises its rows at step {step}; use fewer epochs, a lower learning rate or \
         more varied rows"
    )]
    Overfit { step: usize, train_loss: f64, eval_loss: f64, lowest: f64, lowest_step: usize },
    /// The run does not fit the memory budget.
    #[error(
        "the run needs {} of memory with every layer computed twice, and `memory_budget` is {}; passes have up to \
         {pass_tokens} tokens: lower `pack_tokens` and `max_length`", readable(*.needed), readable(*.budget)
    )]
    Memory { needed: u64, budget: u64, pass_tokens: usize },
    /// The caller asked to stop.
    #[error("training stopped after step {step} because it was asked to")]
    Cancelled { step: usize },
    /// A checkpoint could not be written, or the folder not read.
    #[error("checkpoint folder `{}` cannot be used", .dir.display())]
    Checkpoint {
        dir: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The adapter could not be made.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TrainError {
    /// A stable word for what happened: `not_finite`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Option { .. } => "option",
            Self::NoRows => "no_rows",
            Self::Row { .. } => "row",
            Self::NotFinite { .. } => "not_finite",
            Self::Overfit { .. } => "overfit",
            Self::Memory { .. } => "memory",
            Self::Cancelled { .. } => "cancelled",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Adapter(_) => "adapter",
            Self::Model(_) => "model",
        }
    }
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowReason {
    /// No token counts, so its loss would be 0 / 0.
    #[error("has no supervised token")]
    NothingSupervised,
    /// It does not fit into one pass.
    #[error("has {tokens} tokens, more than a pack of {limit}; raise `pack_tokens` or leave it out")]
    TooLong { tokens: usize, limit: usize },
    /// It is longer than the model's positions.
    #[error("has {tokens} tokens, more than the {limit} positions of the model")]
    BeyondPositions { tokens: usize, limit: usize },
    /// It has a token that the model does not know.
    #[error(
        "has token {token}, beyond the model's vocabulary of {vocabulary}; the tokenizer is of another model"
    )]
    UnknownToken { token: u32, vocabulary: usize },
    /// Its two lists differ in length.
    #[error("has {tokens} tokens and {marks} marks of supervision")]
    MarksMissing { tokens: usize, marks: usize },
}

fn circumstances(step: usize, rows: &[String]) -> String {
    let step = if step == 0 { String::new() } else { format!(" in step {step}") };
    if rows.is_empty() { step } else { format!("{step}, rows {}", quoted(rows)) }
}

fn quoted(rows: &[String]) -> String {
    const SHOWN: usize = 8;
    let names = rows.iter().take(SHOWN).map(|row| format!("`{row}`")).collect::<Vec<_>>().join(", ");
    if rows.len() > SHOWN { format!("{names} and {} more", rows.len() - SHOWN) } else { names }
}
