//! What a training run tells its caller while it runs and when it is done: records of steps and evaluations, the
//! trait that receives them, and the report. Times are in the records for people; nothing is computed from them.

use serde::{Deserialize, Serialize};

use super::memory::MemoryPlan;

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: usize,
    /// The epoch, from 1, that the step is in.
    pub epoch: usize,
    /// Negative log-likelihood of the step's supervised tokens over their number, in nats, before the update.
    pub loss: f64,
    /// The learning rate of the update.
    pub learning_rate: f64,
    /// 2-norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Tokens that the loss counts.
    pub supervised_tokens: usize,
    /// Wall time.
    pub seconds: f64,
}

/// One evaluation on the validation rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: usize,
    /// Sum of the negative log-likelihood over the number of supervised tokens, in nats.
    pub loss: f64,
    /// The same over the training steps since the evaluation before.
    pub train_loss: f64,
    /// Wall time.
    pub seconds: f64,
}

/// What a run is going to do, before its first step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunPlan {
    /// Optimizer steps.
    pub steps: usize,
    /// Linear layers that the adapter sits on, and all there are.
    pub adapted_layers: usize,
    pub linear_layers: usize,
    /// Share of the model's linear weights that an adapter pair sits on, in percent.
    pub adapted_percent: f64,
    /// Trained values.
    pub trainable_parameters: usize,
    /// What it will hold in memory.
    pub memory: MemoryPlan,
}

/// Receives what happens in a training run. All methods but `cancelled` may be left as they are.
pub trait TrainHooks {
    /// The run is about to start, or to go on from a checkpoint.
    fn planned(&mut self, _plan: &RunPlan) {}
    /// A step is done; of `total` in the run.
    fn step(&mut self, _record: &StepRecord, _total: usize) {}
    /// An evaluation is done.
    fn eval(&mut self, _record: &EvalRecord) {}
    /// Something the user should know.
    fn warn(&mut self, _text: &str) {}
    /// Asked before every step; true stops the run after a checkpoint.
    fn cancelled(&mut self) -> bool {
        false
    }
}

/// Hears nothing and never cancels.
impl TrainHooks for () {}

/// What a finished training run has to say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainReport {
    /// Optimizer steps done.
    pub steps: usize,
    /// Optimizer steps planned; more than `steps` if the run stopped early.
    pub planned_steps: usize,
    /// Training loss over the last epoch's worth of steps.
    pub train_loss: f64,
    /// Loss on the validation rows of the adapter that is kept; none without validation rows.
    pub eval_loss: Option<f64>,
    /// Lowest loss of all evaluations.
    pub lowest_eval_loss: Option<f64>,
    /// The step the kept adapter is of.
    pub kept_step: usize,
    /// Every step.
    pub losses: Vec<StepRecord>,
    /// Every evaluation.
    pub evals: Vec<EvalRecord>,
    /// What the user was warned of.
    pub warnings: Vec<String>,
    /// Tokens through the model in training steps.
    pub tokens: u64,
    /// Those of them that the loss counts.
    pub supervised_tokens: u64,
    /// Training tokens a second of step time.
    pub tokens_per_second: f64,
    /// Highest resident memory of this process so far.
    pub peak_rss_bytes: u64,
    /// What was planned.
    pub plan: RunPlan,
    /// Share of the model's linear weights that an adapter pair sits on, in percent.
    pub adapted_percent: f64,
    /// Trained values.
    pub trainable_parameters: usize,
    /// Wall time of all steps and evaluations, those before a resume too.
    pub seconds: f64,
}

/// Mean loss of `steps`, weighted by their supervised tokens; none if they have none.
pub(super) fn mean_loss(steps: &[StepRecord]) -> Option<f64> {
    let supervised: usize = steps.iter().map(|step| step.supervised_tokens).sum();
    let nll: f64 = steps.iter().map(|step| step.loss * step.supervised_tokens as f64).sum();
    (supervised > 0).then(|| nll / supervised as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_loss_weighs_steps_by_supervised_tokens() {
        let step = |loss, supervised_tokens| StepRecord {
            step: 1,
            epoch: 1,
            loss,
            learning_rate: 0.0,
            grad_norm: 0.0,
            tokens: 9,
            supervised_tokens,
            seconds: 0.0,
        };
        assert_eq!(mean_loss(&[step(1.0, 3), step(3.0, 1)]), Some(1.5));
        assert_eq!(mean_loss(&[]), None);
    }
}
