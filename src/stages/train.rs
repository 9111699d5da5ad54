//! `uses: train`: trains a LoRA adapter on the base model.
//!
//! Reads: a split (`train.jsonl`, `validation.jsonl`) and a base folder. Writes: the adapter in PEFT's format
//! and `training.json`, the loss curves. Throughput and memory are metrics, never bytes of the artifact.
//! Bump `VERSION` when the written bytes change.

mod mlflow;
mod params;
pub(crate) mod preview;
mod protobuf;
mod tensorboard;
mod wandb;

use std::path::Path;

use serde_json::{Value, json};
use tunesmith_engine::generate::GenerateHooks;
use tunesmith_engine::tokenizer::{Message as Turn, Tokenizer};
use tunesmith_engine::trainer::{
    self, EvalRecord, ProbeReport, RunPlan, StepRecord, TokenizedExample, TrainError, TrainHooks,
    TrainReport, Trained, readable,
};
use tunesmith_pipeline::stage::{Arity, Cost, InputSlot, ParamProblem, StageContext, StageError, StageKind};

use super::device::{numerics, open_model};
use crate::corpus::{Example, Message, read_table};
use params::Params;
use tensorboard::Scalar;

const VERSION: u32 = 3;
/// Rows named in one error message.
const ROWS_NAMED_MAX: usize = 5;

/// The `train` kind.
pub(crate) struct Train;

impl StageKind for Train {
    fn name(&self) -> &'static str {
        "train"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Trains a LoRA adapter on the base model; the loss counts the assistant's tokens and the end of its turns."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[
            InputSlot {
                name: "data",
                doc: "a split with `train.jsonl` and `validation.jsonl`",
                arity: Arity::One,
            },
            InputSlot { name: "base", doc: "the base model", arity: Arity::One },
        ]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("adapter_model.safetensors", "the adapter's weights, as PEFT names them"),
            ("adapter_config.json", "the adapter's description, as PEFT reads it"),
            (
                "training.json",
                "loss, learning rate and gradient norm of every step; every evaluation; the probes",
            ),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        params::check(with)
    }

    fn numerics(&self, _with: &Value) -> Option<String> {
        Some(numerics())
    }

    fn cost(&self) -> Cost {
        Cost::Heavy
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let (data, base) = (context.input("data")?, context.input("base")?);
        let tokenizer = open_tokenizer(&base.folder)?;
        let train = prepare(&tokenizer, &data.file("train.jsonl")?, params.max_length())?;
        let validation = prepare(&tokenizer, &data.file("validation.jsonl")?, params.max_length())?;
        let supervised: usize = train.iter().map(TokenizedExample::supervised_tokens).sum();
        let tokens: usize = train.iter().map(|row| row.tokens.len()).sum();
        let least = train.iter().min_by_key(|row| row.supervised_tokens());
        let least = least.map(|row| (row.supervised_tokens(), row.id.as_str())).unwrap_or_default();
        context.info(&format!(
            "{} rows, {tokens} tokens, {supervised} of them supervised, at least {} in a row (`{}`)",
            train.len(),
            least.0,
            least.1
        ));
        let model = open_model(&base.folder, context.threads)?;
        tokenizer
            .check_fits(model.config())
            .map_err(|error| StageError::new("train::tokenizer", error.to_string()))?;
        let options = params.options(context.checkpoints, base.digest.hex());
        let mut hooks = Hooks { context };
        let trained =
            trainer::train(&model, &train, &validation, &options, &mut hooks).map_err(train_error)?;
        let probes =
            trainer::probe(&model, &trained.adapter, &tokenizer, &train, &params.probes(), &mut hooks)
                .map_err(probe_error)?;
        for warning in &probes.warnings {
            context.warn(warning);
        }
        write(context, &trained, &probes)?;
        share(context, &params, &trained.report)?;
        report(context, &trained.report);
        Ok(())
    }
}

/// Opens the tokenizer of a base folder.
pub(crate) fn open_tokenizer(base: &Path) -> Result<Tokenizer, StageError> {
    Tokenizer::open(base).map_err(|error| {
        StageError::new("engine::tokenizer", error.to_string())
            .hint("`base` must be a `model` stage with a chat model")
    })
}

/// The engine's form of a conversation.
pub(super) fn turns(messages: &[Message]) -> Vec<Turn> {
    messages
        .iter()
        .map(|message| Turn { role: message.role.clone(), content: message.content.clone() })
        .collect()
}

/// Reads a table and tokenises it; every row that cannot be trained on is named.
fn prepare(
    tokenizer: &Tokenizer,
    table: &Path,
    max_length: usize,
) -> Result<Vec<TokenizedExample>, StageError> {
    let examples: Vec<Example> = read_table(table)?;
    let rows: Vec<(String, Vec<Turn>)> =
        examples.iter().map(|example| (example.id.clone(), turns(&example.messages))).collect();
    trainer::prepare(tokenizer, &rows, max_length).map_err(|problems| {
        let named: Vec<String> = problems
            .iter()
            .take(ROWS_NAMED_MAX)
            .map(|problem| {
                let question =
                    examples.iter().find(|example| example.id == problem.id).map_or("", Example::question);
                format!("{problem} (question: `{question}`)")
            })
            .collect();
        let more = problems.len().saturating_sub(ROWS_NAMED_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let table = table.file_name().unwrap_or_default().to_string_lossy();
        let count = if problems.len() == 1 { "1 row".to_owned() } else { format!("{} rows", problems.len()) };
        StageError::new(
            "train::rows",
            format!("{count} of {table} cannot be trained on: {}{more}", named.join("; ")),
        )
        .hint("raise `max_length` (and `pack_tokens`), or take these rows out")
    })
}

/// Passes the trainer's words on to the runner.
struct Hooks<'a, 'b> {
    context: &'a StageContext<'b>,
}

impl TrainHooks for Hooks<'_, '_> {
    fn planned(&mut self, plan: &RunPlan) {
        self.context.info(&format!(
            "{} steps; adapter on {} of {} linear layers, {:.1} % of linear weights, {} trained values",
            plan.steps,
            plan.adapted_layers,
            plan.linear_layers,
            plan.adapted_percent,
            plan.trainable_parameters
        ));
        self.context.info(&format!("memory: {}", plan.memory));
    }

    fn step(&mut self, record: &StepRecord, total: usize) {
        let detail = format!(
            "loss {:.3}, {:.0} tokens/s, {:.2} s a step",
            record.loss,
            record.tokens as f64 / record.seconds.max(1e-9),
            record.seconds
        );
        self.context.services.progress(record.step as u64, total as u64, "steps", &detail);
    }

    fn eval(&mut self, record: &EvalRecord) {
        self.context.info(&format!(
            "step {}: training loss {:.3}, validation loss {:.3}",
            record.step, record.train_loss, record.loss
        ));
    }

    fn warn(&mut self, text: &str) {
        self.context.warn(text);
    }

    fn cancelled(&mut self) -> bool {
        self.context.services.cancelled()
    }
}

impl GenerateHooks for Hooks<'_, '_> {
    fn cancelled(&mut self) -> bool {
        self.context.services.cancelled()
    }
}

fn train_error(error: TrainError) -> StageError {
    let stage = match &error {
        TrainError::Cancelled { step } => {
            return StageError::new("run::cancelled", format!("stopped after step {step}"))
                .hint("run again to go on from there");
        }
        TrainError::NotFinite { .. } => StageError::new("train::not_finite", error.to_string())
            .hint("lower `learning_rate`, or look at the named rows"),
        TrainError::Overfit { .. } => StageError::new("train::overfit", error.to_string())
            .hint("fewer `epochs`, a lower `learning_rate`, more varied data; or `overfit: warn` if that is what you want"),
        TrainError::Memory { .. } => StageError::new("train::memory", error.to_string())
            .hint("raise `memory_budget_mib`, or lower `pack_tokens` and `max_length`"),
        TrainError::Adapter(_) => StageError::new("train::adapter", error.to_string()),
        TrainError::Row { .. } => StageError::new("train::rows", error.to_string()),
        _ => StageError::new("train::failed", error.to_string()),
    };
    stage.caused_by(error)
}

fn probe_error(error: trainer::ProbeError) -> StageError {
    let stage = match error.code() {
        "cancelled" => return StageError::cancelled(),
        "never_stops" => StageError::new("train::never_stops", error.to_string())
            .hint("train longer; or `stop_probe: warn` to keep the adapter all the same"),
        "adapter_changes_nothing" => StageError::new("train::adapter_changes_nothing", error.to_string()),
        _ => StageError::new("train::probe", error.to_string()),
    };
    stage.caused_by(error)
}

/// Writes the adapter and the training log. The log holds nothing that differs between equal runs.
fn write(context: &StageContext<'_>, trained: &Trained, probes: &ProbeReport) -> Result<(), StageError> {
    let base = context.input("base")?;
    trained
        .adapter
        .save_peft(context.out, &base.stage)
        .map_err(|error| StageError::new("train::save", error.to_string()).caused_by(error))?;
    let report = &trained.report;
    let steps: Vec<_> = report
        .losses
        .iter()
        .map(|step| {
            json!({
                "step": step.step, "epoch": step.epoch, "loss": step.loss, "learning_rate": step.learning_rate,
                "grad_norm": step.grad_norm, "tokens": step.tokens, "supervised_tokens": step.supervised_tokens
            })
        })
        .collect();
    let evals: Vec<_> = report
        .evals
        .iter()
        .map(|eval| json!({ "step": eval.step, "loss": eval.loss, "train_loss": eval.train_loss }))
        .collect();
    let warnings: Vec<&String> = report.warnings.iter().chain(&probes.warnings).collect();
    let facts = json!({
        "numerics": numerics(),
        "trainable_parameters": report.trainable_parameters,
        "adapted_percent": report.adapted_percent,
        "supervised_tokens": report.supervised_tokens,
        "adapted_layers": format!("{} of {}", report.plan.adapted_layers, report.plan.linear_layers),
        "tokens": report.tokens,
        "kept_step": report.kept_step,
        "canary_logit_delta": probes.canary_logit_delta,
        "answers_that_stop": format!("{} of {}", probes.stopped, probes.asked),
    });
    let log = json!({ "steps": steps, "evals": evals, "warnings": warnings, "facts": facts });
    let mut text = serde_json::to_string_pretty(&log).map_err(std::io::Error::from)?;
    text.push('\n');
    fs_err::write(context.out.join("training.json"), text)?;
    Ok(())
}

/// Writes the logs of other tools and tells the tracking server, where they are asked for. A server that does not
/// answer is a warning: the adapter is there.
fn share(context: &StageContext<'_>, params: &Params, report: &TrainReport) -> Result<(), StageError> {
    let mut scalars: Vec<Scalar> = Vec::new();
    for step in &report.losses {
        let mut add = |tag, value| scalars.push(Scalar { tag, step: step.step, value });
        add("train/loss", step.loss);
        add("train/learning_rate", step.learning_rate);
        add("train/grad_norm", step.grad_norm);
    }
    scalars.extend(report.evals.iter().map(|eval| Scalar {
        tag: "eval/loss",
        step: eval.step,
        value: eval.loss,
    }));
    // Where a run is told of is not what it was run with.
    let mut config = context.with.as_object().cloned().unwrap_or_default();
    ["mlflow", "tensorboard", "wandb"].iter().for_each(|name| drop(config.shift_remove(*name)));
    if params.tensorboard {
        let folder = context.out.join("tensorboard");
        fs_err::create_dir_all(&folder)?;
        fs_err::write(folder.join("events.out.tfevents.0.tunesmith"), tensorboard::event_file(&scalars))?;
    }
    if let Some(project) = &params.wandb {
        let summary = [
            ("loss", json!(report.train_loss)),
            ("eval_loss", json!(report.eval_loss)),
            ("steps", json!(report.steps)),
            ("supervised_tokens", json!(report.supervised_tokens)),
            ("adapted_percent", json!(report.adapted_percent)),
            ("trainable_parameters", json!(report.trainable_parameters)),
        ];
        let summary = summary.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
        let name = context.stage;
        let record = wandb::Record { project, name, config: &config, scalars: &scalars, summary: &summary };
        for (path, bytes) in wandb::offline_run(&record) {
            let path = context.out.join(path);
            fs_err::create_dir_all(path.parent().unwrap_or(context.out))?;
            fs_err::write(path, bytes)?;
        }
    }
    if let Some(tracking) = &params.mlflow {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let params = config.iter().map(|(name, value)| (name.clone(), text(value))).collect();
        let record = mlflow::Record { run_name: context.stage, params, scalars: &scalars };
        if let Err(error) = tracking.log(&record) {
            context.warn(&error.to_string());
        }
    }
    Ok(())
}

fn report(context: &StageContext<'_>, report: &TrainReport) {
    let step_seconds =
        report.losses.iter().map(|step| step.seconds).sum::<f64>() / report.steps.max(1) as f64;
    context.metric("loss", report.train_loss);
    context.metric("eval_loss", report.eval_loss.map_or(Value::Null, Value::from));
    context.metric("steps", report.steps);
    context.metric("supervised_tokens", report.supervised_tokens);
    context.metric("tokens", report.tokens);
    context.metric("tokens_per_second", report.tokens_per_second);
    context.metric("step_seconds", step_seconds);
    context.metric("peak_rss_bytes", report.peak_rss_bytes);
    context.metric("planned_memory_bytes", report.plan.memory.total());
    context.metric("recomputed_layers", report.plan.memory.recomputed_layers);
    context.metric("adapted_percent", report.adapted_percent);
    context.metric("trainable_parameters", report.trainable_parameters);
    context.info(&format!(
        "{} steps of {step_seconds:.2} s, loss {:.3}, {:.0} tokens/s, peak memory {} (planned {})",
        report.steps,
        report.train_loss,
        report.tokens_per_second,
        readable(report.peak_rss_bytes),
        readable(report.plan.memory.total())
    ));
}
