//! The parameters of `train`, and how they become the engine's options.

use schemars::JsonSchema;
use serde::Deserialize;
use tunesmith_engine::adapter::{LoraConfig, Targets};
use tunesmith_engine::optimizer::AdamWOptions;
use tunesmith_engine::trainer::{CheckpointFolder, Decay, Gates, Keep, ProbeOptions, Severity, TrainOptions};

/// Parameters of `train`. Names follow PEFT and the Hugging Face trainer where they have one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// Rank of the LoRA matrices.
    #[serde(default = "default_rank")]
    #[schemars(range(min = 1, max = 1024))]
    rank: usize,
    /// LoRA alpha; the update is scaled by alpha / rank [default: twice the rank].
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    alpha: Option<f32>,
    /// Which linear layers are adapted.
    #[serde(default)]
    targets: TargetsParam,
    /// Scale by alpha / sqrt(rank) instead (rsLoRA).
    #[serde(default)]
    rslora: bool,
    /// Peak learning rate.
    #[serde(default = "default_learning_rate")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    learning_rate: f64,
    /// Passes over the training rows.
    #[serde(default = "default_epochs")]
    #[schemars(range(min = 1, max = 10_000))]
    epochs: usize,
    /// Rows of one optimizer step.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = 65_536))]
    batch_examples: usize,
    /// Most tokens of one pass through the model; bounds memory, changes no result but rounding.
    #[serde(default = "default_pack")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pack_tokens: usize,
    /// Most tokens of one row; a longer row would lose its answer and is refused.
    #[serde(default = "default_length")]
    #[schemars(range(min = 8, max = 1_048_576))]
    max_length: usize,
    /// How the learning rate falls after the warmup.
    #[serde(default)]
    schedule: ScheduleParam,
    /// Share of the steps in which the learning rate rises.
    #[serde(default = "default_warmup")]
    #[schemars(range(min = 0.0, max = 1.0))]
    warmup_ratio: f64,
    /// Decoupled weight decay of the adapter.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    weight_decay: f64,
    /// Gradients with a larger 2-norm are scaled down to it.
    #[serde(default = "default_clip")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    clip_norm: f64,
    /// Seed of the initial adapter and of the order of rows.
    #[serde(default)]
    pub(super) seed: u64,
    /// Steps between evaluations on the validation rows; 0 for one after each epoch.
    #[serde(default)]
    eval_every: usize,
    /// Steps between checkpoints; 0 for none.
    #[serde(default = "default_checkpoint")]
    checkpoint_every: usize,
    /// Which adapter is the result.
    #[serde(default)]
    keep: KeepParam,
    /// Stop after so many evaluations without a lower validation loss.
    #[schemars(range(min = 1))]
    patience: Option<usize>,
    /// What to do when training loss nears zero while validation loss rises.
    #[serde(default)]
    overfit: GateParam,
    /// What to do when the tuned model does not end its answers.
    #[serde(default)]
    stop_probe: GateParam,
}

/// Which linear layers are adapted.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(untagged)]
enum TargetsParam {
    /// All linear layers the family has (`auto` or `all-linear`), or a regular expression over full module names.
    Word(String),
    /// Module names, matched as a suffix: `q_proj`.
    Names(Vec<String>),
    #[default]
    #[serde(skip)]
    Auto,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum ScheduleParam {
    /// Half a cosine down to zero.
    #[default]
    Cosine,
    /// A straight line down to zero.
    Linear,
    /// Not at all.
    Constant,
}

/// Which adapter is the result.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum KeepParam {
    /// The one after the last step.
    #[default]
    Last,
    /// The one with the lowest validation loss.
    Best,
}

/// What a gate does when it is not passed.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum GateParam {
    /// The stage fails.
    #[default]
    Fail,
    /// The user is told.
    Warn,
}

impl From<GateParam> for Severity {
    fn from(gate: GateParam) -> Self {
        match gate {
            GateParam::Fail => Self::Error,
            GateParam::Warn => Self::Warning,
        }
    }
}

fn default_rank() -> usize {
    16
}

fn default_learning_rate() -> f64 {
    2e-4
}

fn default_epochs() -> usize {
    2
}

fn default_batch() -> usize {
    8
}

fn default_pack() -> usize {
    512
}

fn default_length() -> usize {
    512
}

fn default_warmup() -> f64 {
    0.05
}

fn default_clip() -> f64 {
    1.0
}

fn default_checkpoint() -> usize {
    20
}

impl Params {
    /// Most tokens of one row: it must also fit into one pass.
    pub(super) fn max_length(&self) -> usize {
        self.max_length.min(self.pack_tokens)
    }

    /// How the finished adapter is probed.
    pub(super) fn probes(&self) -> ProbeOptions {
        ProbeOptions {
            max_new_tokens: self.max_length().min(128),
            never_stops: self.stop_probe.into(),
            ..ProbeOptions::default()
        }
    }

    /// The engine's options, with checkpoints below `checkpoints` that belong to `identity` alone.
    pub(super) fn options(&self, checkpoints: &std::path::Path, identity: String) -> TrainOptions {
        let targets = match &self.targets {
            TargetsParam::Auto => Targets::Auto,
            TargetsParam::Word(word) if word == "auto" => Targets::Auto,
            TargetsParam::Word(word) if word == "all-linear" => Targets::AllLinear,
            TargetsParam::Word(pattern) => Targets::Regex(pattern.clone()),
            TargetsParam::Names(names) => Targets::Names(names.clone()),
        };
        let lora = LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f32),
            targets,
            rslora: self.rslora,
            seed: self.seed,
        };
        TrainOptions {
            learning_rate: self.learning_rate,
            epochs: self.epochs,
            batch_examples: self.batch_examples,
            pack_tokens: self.pack_tokens,
            decay: match self.schedule {
                ScheduleParam::Cosine => Decay::Cosine,
                ScheduleParam::Linear => Decay::Linear,
                ScheduleParam::Constant => Decay::Constant,
            },
            warmup_ratio: self.warmup_ratio,
            adamw: AdamWOptions { weight_decay: self.weight_decay, ..AdamWOptions::default() },
            clip_norm: Some(self.clip_norm),
            seed: self.seed,
            eval_every: self.eval_every,
            keep: match self.keep {
                KeepParam::Last => Keep::Last,
                KeepParam::Best => Keep::Best,
            },
            gates: Gates { overfit: self.overfit.into(), patience: self.patience, ..Gates::default() },
            checkpoints: (self.checkpoint_every > 0).then(|| CheckpointFolder {
                dir: checkpoints.to_owned(),
                every: self.checkpoint_every,
                identity,
            }),
            ..TrainOptions::new(lora)
        }
    }
}
