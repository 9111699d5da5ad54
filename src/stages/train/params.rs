//! The parameters of `train`, and how they become the engine's options.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_engine::adapter::{LoraConfig, Targets};
use tunesmith_engine::optimizer::{AdamWOptions, MomentFormat};
use tunesmith_engine::trainer::{
    Batch, CheckpointFolder, Decay, Gates, Keep, Order, ProbeOptions, Severity, TrainOptions,
};
use tunesmith_pipeline::stage::ParamProblem;

use super::mlflow::Tracking;

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
    /// Which linear layers are adapted: `auto` (all the family has), `all-linear`, a list of module names, or a regular expression over full module names. What matches nothing is an error.
    #[serde(default)]
    targets: TargetsParam,
    /// Other ranks for some modules, as PEFT's `rank_pattern`: a module name's end, or a regular expression for it, to its rank.
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    /// Other alphas for some modules, keyed as `rank_pattern` is.
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f32>,
    /// Train the length of each weight row apart from its direction (DoRA): better at low ranks, slower.
    #[serde(default)]
    dora: bool,
    /// Train the constants of Mamba layers (A_log, D, dt_bias) along with the adapter, without weight decay. A model without Mamba layers is refused.
    #[serde(default)]
    train_ssm: bool,
    /// Share of the inputs of each LoRA pair that is dropped while training.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f32,
    /// NEFTune: noise on the embeddings while training, in ±alpha / sqrt(tokens · channels); 5 is usual, 0 is none.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    neftune_alpha: f32,
    /// Scale by alpha / sqrt(rank) instead (rsLoRA).
    #[serde(default)]
    rslora: bool,
    /// Peak learning rate.
    #[serde(default = "default_learning_rate")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    learning_rate: f64,
    /// LoRA+: the learning rate of the B matrices as a multiple of that of the A matrices; 16 is usual with a lower `learning_rate`.
    #[serde(default = "default_ratio")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    loraplus_ratio: f64,
    /// How the optimizer's moments rest between steps: `f32`, or `8bit`, a quarter of the memory.
    #[serde(default)]
    optimizer_state: StateParam,
    /// Passes over the training rows.
    #[serde(default = "default_epochs")]
    #[schemars(range(min = 1, max = 10_000))]
    epochs: usize,
    /// Rows of one optimizer step [default: 8]; they go through the model in as few passes as `pack_tokens` allows, and the step's loss is a mean over all of them.
    #[schemars(range(min = 1, max = 65_536))]
    batch_examples: Option<usize>,
    /// Most tokens of one optimizer step, instead of a number of rows.
    #[schemars(range(min = 1))]
    batch_tokens: Option<usize>,
    /// The order of the rows: `shuffled`, or `by_length`, with rows of like length in one step.
    #[serde(default)]
    order: OrderParam,
    /// Most tokens of one pass through the model; bounds memory, changes no result but rounding.
    #[serde(default = "default_pack")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pack_tokens: usize,
    /// Most tokens of one row; a longer row would lose its answer and is refused.
    #[serde(default = "default_length")]
    #[schemars(range(min = 8, max = 1_048_576))]
    max_length: usize,
    /// How the learning rate falls after the warmup: `cosine`, `linear`, `constant`, or `wsd` (constant, then a fall at the end).
    #[serde(default)]
    schedule: ScheduleParam,
    /// Share of the steps in which the learning rate rises.
    #[serde(default = "default_warmup")]
    #[schemars(range(min = 0.0, max = 1.0))]
    warmup_ratio: f64,
    /// Share of the steps in which it falls, with `schedule: wsd`.
    #[serde(default = "default_decay")]
    #[schemars(range(min = 0.0, max = 1.0))]
    decay_ratio: f64,
    /// Decoupled weight decay of the adapter.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    weight_decay: f64,
    /// Gradients with a larger 2-norm are scaled down to it.
    #[serde(default = "default_clip")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    clip_norm: f64,
    /// Seed of the initial adapter, of the order of rows, of dropout and of noise.
    #[serde(default)]
    pub(super) seed: u64,
    /// Steps between evaluations on the validation rows; 0 for one after each epoch.
    #[serde(default)]
    eval_every: usize,
    /// Steps between checkpoints; 0 for none.
    #[serde(default = "default_checkpoint")]
    checkpoint_every: usize,
    /// Which adapter is the result: `last`, or `best`, the one with the lowest validation loss.
    #[serde(default)]
    keep: KeepParam,
    /// Most memory of the run in MiB: as many layers as that needs are computed twice instead of kept. Changes no result, only time.
    #[schemars(range(min = 1))]
    memory_budget_mib: Option<u64>,
    /// Write the curves as a TensorBoard event file too, in `tensorboard/`.
    #[serde(default)]
    pub(super) tensorboard: bool,
    /// Write the run as an offline run of Weights & Biases too, in `wandb/`, for the project of this name. Nothing is sent; `wandb sync` uploads the folder.
    #[schemars(length(min = 1))]
    pub(super) wandb: Option<String>,
    /// Tell an MLflow server of the finished run: its parameters, losses and learning rates, never its rows. Without this nothing leaves the machine.
    pub(super) mlflow: Option<Tracking>,
    /// Stop after so many evaluations without a lower validation loss.
    #[schemars(range(min = 1))]
    patience: Option<usize>,
    /// How much lower than the lowest so far a validation loss must be to count for `patience`.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    min_delta: f64,
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
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum ScheduleParam {
    /// Half a cosine down to zero.
    #[default]
    Cosine,
    /// A straight line down to zero.
    Linear,
    /// Not at all.
    Constant,
    /// Not at all until the last steps (`decay_ratio`), then half a cosine down to zero.
    Wsd,
}

/// How the optimizer's moments rest between steps.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
enum StateParam {
    /// 8 bytes a trained value.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// About 2 bytes a trained value (bitsandbytes' block-wise 8-bit AdamW).
    #[serde(rename = "8bit")]
    Blockwise8,
}

/// The order of the rows.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum OrderParam {
    /// At random, another one each epoch.
    #[default]
    Shuffled,
    /// At random, with rows of like length in one step.
    ByLength,
}

/// Which adapter is the result.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum KeepParam {
    /// The one after the last step.
    #[default]
    Last,
    /// The one with the lowest validation loss.
    Best,
}

/// What a gate does when it is not passed.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
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

fn default_ratio() -> f64 {
    1.0
}

fn default_decay() -> f64 {
    0.2
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

/// What the schema cannot say: relations between parameters.
pub(super) fn check(with: &Value) -> Vec<ParamProblem> {
    let given = |name: &str| with.get(name).is_some_and(|value| !value.is_null());
    let number = |name: &str| with.get(name).and_then(Value::as_f64);
    let mut problems = Vec::new();
    let mut refuse = |path: &str, message: &str, hint: &str| {
        problems.push(ParamProblem { path: path.into(), message: message.into(), hint: Some(hint.into()) });
    };
    if given("batch_examples") && given("batch_tokens") {
        refuse(
            "batch_tokens",
            "a step is measured in rows or in tokens, not both",
            "remove `batch_examples`",
        );
    }
    if given("decay_ratio") && with.get("schedule").and_then(Value::as_str) != Some("wsd") {
        refuse("decay_ratio", "`decay_ratio` has no effect on this schedule", "set `schedule: wsd`");
    }
    if number("min_delta").is_some_and(|delta| delta > 0.0) && !given("patience") {
        refuse("min_delta", "`min_delta` has no effect without `patience`", "set `patience`, in evaluations");
    }
    problems
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
            dora: self.dora,
            dropout: self.dropout,
            train_ssm: self.train_ssm,
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
        };
        TrainOptions {
            learning_rate: self.learning_rate,
            epochs: self.epochs,
            loraplus_ratio: self.loraplus_ratio,
            neftune_alpha: self.neftune_alpha,
            batch: match self.batch_tokens {
                Some(tokens) => Batch::Tokens(tokens),
                None => Batch::Rows(self.batch_examples.unwrap_or(8)),
            },
            order: match self.order {
                OrderParam::Shuffled => Order::Shuffled,
                OrderParam::ByLength => Order::ByLength,
            },
            pack_tokens: self.pack_tokens,
            decay: match self.schedule {
                ScheduleParam::Cosine => Decay::Cosine,
                ScheduleParam::Linear => Decay::Linear,
                ScheduleParam::Constant => Decay::Constant,
                ScheduleParam::Wsd => Decay::Wsd,
            },
            warmup_ratio: self.warmup_ratio,
            decay_ratio: self.decay_ratio,
            adamw: AdamWOptions {
                weight_decay: self.weight_decay,
                state: match self.optimizer_state {
                    StateParam::F32 => MomentFormat::F32,
                    StateParam::Blockwise8 => MomentFormat::Blockwise8,
                },
                ..AdamWOptions::default()
            },
            clip_norm: Some(self.clip_norm),
            seed: self.seed,
            eval_every: self.eval_every,
            keep: match self.keep {
                KeepParam::Last => Keep::Last,
                KeepParam::Best => Keep::Best,
            },
            memory_budget: self.memory_budget_mib.map(|mebibytes| mebibytes << 20),
            gates: Gates {
                overfit: self.overfit.into(),
                patience: self.patience,
                min_delta: self.min_delta,
                ..Gates::default()
            },
            checkpoints: (self.checkpoint_every > 0).then(|| CheckpointFolder {
                dir: checkpoints.to_owned(),
                every: self.checkpoint_every,
                identity,
            }),
            ..TrainOptions::new(lora)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn options(with: Value) -> TrainOptions {
        let params: Params = serde_json::from_value(with).unwrap();
        params.options(std::path::Path::new("checkpoints"), "base".into())
    }

    #[test]
    fn every_training_option_is_reachable_from_the_manifest() {
        let options = options(json!({
            "rank": 8, "train_ssm": true, "rank_pattern": { "q_proj": 4 }, "alpha_pattern": { "v_proj": 3.5 }, "dora": true,
            "dropout": 0.1, "neftune_alpha": 5, "loraplus_ratio": 16, "optimizer_state": "8bit",
            "batch_tokens": 2000, "order": "by_length", "schedule": "wsd", "decay_ratio": 0.3,
            "patience": 3, "min_delta": 0.01, "memory_budget_mib": 2048, "targets": ["q_proj", "v_proj"],
        }));
        assert_eq!(options.lora.rank_pattern["q_proj"], 4);
        assert_eq!(options.lora.alpha_pattern["v_proj"], 3.5);
        assert!(options.lora.dora && options.lora.dropout == 0.1 && options.neftune_alpha == 5.0);
        assert!(options.lora.train_ssm);
        assert_eq!((options.loraplus_ratio, options.decay_ratio), (16.0, 0.3));
        assert_eq!(options.adamw.state, MomentFormat::Blockwise8);
        assert_eq!((options.batch, options.order), (Batch::Tokens(2000), Order::ByLength));
        assert_eq!(options.decay, Decay::Wsd);
        assert_eq!((options.gates.patience, options.gates.min_delta), (Some(3), 0.01));
        assert_eq!(options.memory_budget, Some(2 << 30));
        assert_eq!(options.lora.targets, Targets::Names(vec!["q_proj".into(), "v_proj".into()]));
    }

    #[test]
    fn options_without_effect_or_against_each_other_are_refused() {
        let refused =
            |with: Value| check(&with).iter().map(|problem| problem.path.clone()).collect::<Vec<_>>();
        assert_eq!(refused(json!({ "batch_examples": 4, "batch_tokens": 100 })), ["batch_tokens"]);
        assert_eq!(refused(json!({ "decay_ratio": 0.1 })), ["decay_ratio"]);
        assert_eq!(refused(json!({ "min_delta": 0.1 })), ["min_delta"]);
        assert!(
            refused(json!({ "decay_ratio": 0.1, "schedule": "wsd", "min_delta": 0.1, "patience": 2 }))
                .is_empty()
        );
    }
}
