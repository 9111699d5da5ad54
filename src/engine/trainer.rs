//! Trains a LoRA adapter: shuffles and packs rows, accumulates gradients over an optimizer step, steps AdamW,
//! evaluates, checkpoints, and judges what it sees. Knows tokens and losses; knows no tokenizer (see `prepare`
//! and `probe`), no kernel and no manifest.
//!
//! The state of a run is the step, the adapter and AdamW's moments. All else (data position, learning rate) is a
//! function of the step, and every judgement a function of the recorded losses. So a run that goes on from a
//! checkpoint computes the same bits as one that was never stopped.
//!
//! ```text
//! rows ─ plan ─► packs ─ model ─► gradients ─ clip ─ AdamW ─► adapter ─► evaluation ─ gates ─► next step
//!                                                               └─► checkpoint
//! ```

use std::time::Instant;

use crate::adapter::{Adapter, Gradients, StateSpace};
use crate::model::{Model, Noise, Pack, Workspace};
use crate::optimizer::{AdamW, clip_factor};
use crate::process::peak_rss_bytes;
use crate::random::Random;

mod batches;
mod checkpoint;
mod evaluate;
mod events;
mod examples;
mod gates;
mod memory;
mod options;
mod probes;
mod resume;
mod schedule;

pub use batches::{Batch, Order};
pub use checkpoint::CheckpointFolder;
pub use evaluate::Evaluation;
pub use events::{EvalRecord, RunPlan, StepRecord, TrainHooks, TrainReport};
pub use examples::{PrepareProblem, PrepareReason, TokenizedExample, prepare};
pub use gates::{Gates, Severity};
pub use memory::{MemoryPlan, readable};
pub use options::{Keep, RowReason, TrainError, TrainOptions};
pub use probes::{ProbeError, ProbeOptions, ProbeReport, probe};
pub use schedule::{Decay, Schedule};

use batches::{Plan, pack};
use evaluate::{check_rows, marked};
use events::mean_loss;
use resume::{set_values, values};

/// What a run gives.
pub struct Trained {
    /// The trained adapter.
    pub adapter: Adapter,
    /// How it went.
    pub report: TrainReport,
}

/// Trains an adapter on `train`, watching `validation` (which may be empty). Goes on from a checkpoint if the
/// options name a folder that holds one of this very run.
/// Errors: an option or row that cannot be trained on, a number that is not finite, memorisation, cancellation.
pub fn train(
    model: &Model,
    train: &[TokenizedExample],
    validation: &[TokenizedExample],
    options: &TrainOptions,
    hooks: &mut dyn TrainHooks,
) -> Result<Trained, TrainError> {
    options.check()?;
    if train.is_empty() {
        return Err(TrainError::NoRows);
    }
    check_rows(model, train, options.pack_tokens)?;
    let mut run = Run::new(model, train, validation, options)?;
    hooks.planned(&run.outlook);
    run.resume(hooks)?;
    while !run.is_over() {
        if hooks.cancelled() {
            run.save()?;
            return Err(TrainError::Cancelled { step: run.step });
        }
        run.advance(hooks)?;
        if run.eval_is_due() {
            run.evaluate(hooks)?;
        }
        if run.save_is_due() {
            run.save()?;
        }
    }
    run.finish(hooks)
}

/// Names the streams of dropout and embedding noise, so that no other use of the seed shares them.
const DISTURB: u64 = 0x0044_4953_5455_5242;

fn ids(rows: &[&TokenizedExample]) -> Vec<String> {
    rows.iter().map(|row| row.id.clone()).collect()
}

/// A run between two steps.
struct Run<'a> {
    model: &'a Model,
    train: &'a [TokenizedExample],
    validation: &'a [TokenizedExample],
    validation_packs: Evaluation,
    options: &'a TrainOptions,
    plan: Plan,
    schedule: Schedule,
    outlook: RunPlan,
    adapter: Adapter,
    gradients: Gradients,
    workspace: Workspace,
    optimizer: AdamW,
    /// Steps done.
    step: usize,
    losses: Vec<StepRecord>,
    evals: Vec<EvalRecord>,
    warnings: Vec<String>,
    /// The values of the best adapter so far, where that one is wanted.
    best: Option<Vec<f32>>,
}

impl<'a> Run<'a> {
    fn new(
        model: &'a Model,
        train: &'a [TokenizedExample],
        validation: &'a [TokenizedExample],
        options: &'a TrainOptions,
    ) -> Result<Self, TrainError> {
        let lengths = train.iter().map(|row| row.tokens.len()).collect();
        let plan = Plan::new(lengths, options.batch, options.order, options.epochs, options.seed);
        let ratios = (options.warmup_ratio, options.decay_ratio);
        let schedule = Schedule::new(options.learning_rate, options.decay, ratios, plan.total_steps());
        let adapter = Adapter::new(model, &options.lora)?;
        let validation_packs = Evaluation::new(model, validation, options.pack_tokens)?;
        let gradients = Gradients::new(&adapter);
        let mut optimizer = AdamW::new(options.adamw, adapter.parameters().map(|(_, values)| values.len()));
        // Zero means nothing to the constants of a scan, so they are not drawn there.
        optimizer.decay_first(adapter.parameters().filter(|(name, _)| !StateSpace::is_key(name)).count());
        let watched: usize = validation.iter().map(|row| row.tokens.len()).sum();
        let passes = (plan.largest_pass(options.pack_tokens), watched.min(options.pack_tokens));
        let (mut tokens, mut supervised) = (0, 0);
        for row in train {
            (tokens, supervised) = (tokens + row.tokens.len(), supervised + row.supervised_tokens());
        }
        let share = supervised as f64 / tokens.max(1) as f64;
        let memory = memory::plan(model, &adapter, optimizer.state_bytes(), passes, share, options)?;
        let mut workspace = Workspace::default();
        workspace.recompute_layers(memory.recomputed_layers);
        let outlook = RunPlan {
            steps: plan.total_steps(),
            adapted_layers: adapter.modules().len(),
            linear_layers: model.linear_names().len(),
            adapted_percent: adapter.adapted_percent(),
            trainable_parameters: adapter.parameter_count(),
            memory,
        };
        Ok(Self {
            model,
            train,
            validation,
            validation_packs,
            options,
            plan,
            schedule,
            outlook,
            adapter,
            gradients,
            workspace,
            optimizer,
            step: 0,
            losses: Vec::new(),
            evals: Vec::new(),
            warnings: Vec::new(),
            best: None,
        })
    }

    fn is_over(&self) -> bool {
        self.step == self.plan.total_steps() || self.options.gates.out_of_patience(&self.evals)
    }

    fn eval_is_due(&self) -> bool {
        let regular = match self.options.eval_every {
            0 => self.plan.ends_epoch(self.step),
            every => self.step.is_multiple_of(every),
        };
        !self.validation.is_empty() && (regular || self.step == self.plan.total_steps())
    }

    fn save_is_due(&self) -> bool {
        let every = self.options.checkpoints.as_ref().map_or(0, |folder| folder.every);
        self.is_over() || (every > 0 && self.step.is_multiple_of(every))
    }

    /// One optimizer step.
    fn advance(&mut self, hooks: &mut dyn TrainHooks) -> Result<(), TrainError> {
        let started = Instant::now();
        let train = self.train;
        let indices = self.plan.rows_of(self.step).to_vec();
        let rows: Vec<&TokenizedExample> = indices.iter().map(|&row| &train[row]).collect();
        let supervised_tokens = rows.iter().map(|row| row.supervised_tokens()).sum();
        let nll = self.accumulate(&indices, supervised_tokens)?;
        let grad_norm = self.gradients.norm();
        if !grad_norm.is_finite() {
            let tensor = self.gradients.first_not_finite();
            let what =
                tensor.map_or("the gradient norm".to_owned(), |name| format!("the gradient of `{name}`"));
            return Err(TrainError::NotFinite { what, step: self.step + 1, rows: ids(&rows) });
        }
        if let Some(norm_max) = self.options.clip_norm {
            self.gradients.scale(clip_factor(grad_norm, norm_max));
        }
        let learning_rate = self.schedule.at(self.step);
        let raised = learning_rate * self.options.loraplus_ratio;
        let tensors = self.adapter.parameters_mut().zip(self.gradients.tensors());
        self.optimizer.step(tensors.map(|((name, values), (_, gradient))| {
            // LoRA+ raises B and DoRA's magnitudes, as PEFT's `create_loraplus_optimizer` does.
            let plain = name.ends_with("lora_A.weight") || StateSpace::is_key(&name);
            let rate = if plain { learning_rate } else { raised };
            (rate, values, gradient)
        }));
        let record = StepRecord {
            step: self.step + 1,
            epoch: self.plan.epoch_of(self.step) + 1,
            loss: nll / supervised_tokens as f64,
            learning_rate,
            grad_norm,
            tokens: rows.iter().map(|row| row.tokens.len()).sum(),
            supervised_tokens,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.step += 1;
        hooks.step(&record, self.plan.total_steps());
        self.losses.push(record);
        Ok(())
    }

    /// Gradients of the step's mean loss over `supervised_tokens`, pack by pack; returns the summed loss.
    fn accumulate(&mut self, indices: &[usize], supervised_tokens: usize) -> Result<f64, TrainError> {
        let train = self.train;
        let lengths: Vec<usize> = indices.iter().map(|&row| train[row].tokens.len()).collect();
        let scale = 1.0 / supervised_tokens as f32;
        let (mut nll, mut counted) = (0.0, 0);
        self.gradients.zero();
        for pack in pack(&lengths, self.options.pack_tokens) {
            let indices: Vec<usize> = pack.iter().map(|&row| indices[row]).collect();
            let rows: Vec<&TokenizedExample> = indices.iter().map(|&row| &train[row]).collect();
            let packed = match self.noise(&indices) {
                None => self.model.pack(&marked(&rows)),
                noise => Pack { noise, ..Pack::new(&marked(&rows)) },
            };
            let loss = self
                .model
                .loss_and_gradients(&self.adapter, &packed, scale, &mut self.gradients, &mut self.workspace)
                .map_err(|error| TrainError::of_model(error, self.step + 1, ids(&rows)))?;
            if !loss.nll.is_finite() {
                let what = "the loss".to_owned();
                return Err(TrainError::NotFinite { what, step: self.step + 1, rows: ids(&rows) });
            }
            nll += loss.nll;
            counted += loss.supervised;
        }
        assert_eq!(counted, supervised_tokens, "BUG: model and trainer count supervised tokens differently");
        Ok(nll)
    }

    /// What this step disturbs in the given rows: for each a stream of its own, so that neither the rows beside it
    /// nor the pass it is in matter.
    fn noise(&self, rows: &[usize]) -> Option<Noise> {
        let (dropout, neftune_alpha) = (self.options.lora.dropout, self.options.neftune_alpha);
        (dropout > 0.0 || neftune_alpha > 0.0).then(|| {
            let stream =
                |&row| Random::new(&[DISTURB, self.options.seed, self.step as u64, row as u64]).next_u64();
            Noise { dropout, neftune_alpha, streams: rows.iter().map(stream).collect() }
        })
    }

    fn evaluate(&mut self, hooks: &mut dyn TrainHooks) -> Result<(), TrainError> {
        let started = Instant::now();
        let loss = self
            .validation_packs
            .mean_loss(self.model, Some(&self.adapter), &mut self.workspace)
            .map_err(|error| error.at_step(self.step))?;
        let since = self.evals.last().map_or(0, |eval| eval.step);
        let train_loss = mean_loss(&self.losses[since..]).expect("every step has supervised tokens");
        let record =
            EvalRecord { step: self.step, loss, train_loss, seconds: started.elapsed().as_secs_f64() };
        hooks.eval(&record);
        self.evals.push(record);
        if self.options.keep == Keep::Best && gates::best(&self.evals) == Some(self.evals.len() - 1) {
            self.best = Some(values(&self.adapter));
        }
        self.judge(hooks)
    }

    /// Holds the evaluations so far against the gates.
    fn judge(&mut self, hooks: &mut dyn TrainHooks) -> Result<(), TrainError> {
        let gates = &self.options.gates;
        let before = &self.evals[..self.evals.len() - 1];
        let (overfit_before, wide_before) = (gates.overfits(before), gates.wide_gap(before).is_some());
        if let Some(gap) = gates.wide_gap(&self.evals).filter(|_| !wide_before) {
            self.warn(
                hooks,
                format!("validation loss is {gap:.2} above training loss at step {}", self.step),
            );
        }
        if gates.overfits(&self.evals) && !overfit_before {
            let overfit = self.overfit();
            match gates.overfit {
                Severity::Error => return Err(overfit),
                Severity::Warning => self.warn(hooks, overfit.to_string()),
            }
        }
        Ok(())
    }

    fn overfit(&self) -> TrainError {
        let last = &self.evals[self.evals.len() - 1];
        let lowest = gates::best(&self.evals).map_or(last, |best| &self.evals[best]);
        TrainError::Overfit {
            step: self.step,
            train_loss: last.train_loss,
            eval_loss: last.loss,
            lowest: lowest.loss,
            lowest_step: lowest.step,
        }
    }

    fn finish(mut self, hooks: &mut dyn TrainHooks) -> Result<Trained, TrainError> {
        let last_epoch = self.step.saturating_sub(self.plan.steps_around(self.step.saturating_sub(1)));
        let train_loss = mean_loss(&self.losses[last_epoch..]).expect("every step has supervised tokens");
        if self.validation.is_empty() && train_loss < self.options.gates.loss_floor {
            self.warn(
                hooks,
                format!("training loss fell to {train_loss:.4} with no validation rows to judge it by"),
            );
        }
        let mut kept = self.evals.last().filter(|eval| eval.step == self.step);
        if let Some(best) = self.best.take() {
            kept = gates::best(&self.evals).map(|index| &self.evals[index]);
            set_values(&mut self.adapter, &best);
        }
        let (kept_step, eval_loss) = (kept.map_or(self.step, |eval| eval.step), kept.map(|eval| eval.loss));
        if let Some((name, _)) =
            self.adapter.parameters().find(|(_, values)| !values.iter().all(|v| v.is_finite()))
        {
            return Err(TrainError::NotFinite {
                what: format!("tensor `{name}`"),
                step: self.step,
                rows: Vec::new(),
            });
        }
        if let Some(text) = gates::unmoved(&self.adapter, &self.losses) {
            self.warn(hooks, text);
        }
        let tokens: u64 = self.losses.iter().map(|step| step.tokens as u64).sum();
        let step_seconds: f64 = self.losses.iter().map(|step| step.seconds).sum();
        let report = TrainReport {
            steps: self.step,
            planned_steps: self.plan.total_steps(),
            train_loss,
            eval_loss,
            lowest_eval_loss: gates::best(&self.evals).map(|index| self.evals[index].loss),
            kept_step,
            tokens,
            supervised_tokens: self.losses.iter().map(|step| step.supervised_tokens as u64).sum(),
            tokens_per_second: tokens as f64 / step_seconds.max(1e-9),
            peak_rss_bytes: peak_rss_bytes(),
            plan: self.outlook,
            adapted_percent: self.adapter.adapted_percent(),
            trainable_parameters: self.adapter.parameter_count(),
            seconds: step_seconds + self.evals.iter().map(|eval| eval.seconds).sum::<f64>(),
            losses: self.losses,
            evals: self.evals,
            warnings: self.warnings,
        };
        Ok(Trained { adapter: self.adapter, report })
    }

    fn warn(&mut self, hooks: &mut dyn TrainHooks, text: String) {
        hooks.warn(&text);
        self.warnings.push(text);
    }
}

#[cfg(test)]
mod tests;
