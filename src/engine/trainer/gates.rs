//! The judgement over a run's losses: overfitting, the gap between training and validation, early stop, the best
//! evaluation, modules that did not move. Pure functions of the records so far, so a resumed run judges as an uninterrupted one. Knows no
//! model; what only a model can show (that it changes and that it stops) is in `probes`.

use super::events::{EvalRecord, StepRecord};
use crate::adapter::Adapter;

/// What a failed check does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The run fails.
    Error,
    /// The user is told.
    Warning,
}

/// Thresholds of the checks during training. Losses are in nats a supervised token.
#[derive(Debug, Clone, PartialEq)]
pub struct Gates {
    /// A training loss below this while the validation loss rises is memorisation.
    pub loss_floor: f64,
    /// How many evaluations in a row must have risen.
    pub rising_evals: usize,
    /// What overfitting does to the run.
    pub overfit: Severity,
    /// A validation loss this far above the training loss is worth a warning.
    pub gap: f64,
    /// Stop after this many evaluations without a new lowest loss; none to go on.
    pub patience: Option<usize>,
    /// How much lower than the lowest so far a loss must be for patience to start anew.
    pub min_delta: f64,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            loss_floor: 0.05,
            rising_evals: 2,
            overfit: Severity::Error,
            gap: 1.0,
            patience: None,
            min_delta: 0.0,
        }
    }
}

impl Gates {
    /// True if the last evaluations show memorisation.
    pub fn overfits(&self, evals: &[EvalRecord]) -> bool {
        let rises = evals.windows(2).rev().take_while(|pair| pair[1].loss > pair[0].loss).count();
        evals.last().is_some_and(|last| last.train_loss < self.loss_floor) && rises >= self.rising_evals
    }

    /// True if the run has gone `patience` evaluations without a new lowest loss.
    pub fn out_of_patience(&self, evals: &[EvalRecord]) -> bool {
        let (mut lowest, mut since) = (f64::INFINITY, 0);
        for eval in evals {
            since = if eval.loss < lowest - self.min_delta { 0 } else { since + 1 };
            if since == 0 {
                lowest = eval.loss;
            }
        }
        self.patience.is_some_and(|patience| since >= patience.max(1))
    }

    /// Validation loss minus training loss of the last evaluation, if that is too far.
    pub fn wide_gap(&self, evals: &[EvalRecord]) -> Option<f64> {
        evals.last().map(|last| last.loss - last.train_loss).filter(|gap| *gap > self.gap)
    }
}

/// Index of the evaluation with the lowest loss; the first of equals.
pub(super) fn best(evals: &[EvalRecord]) -> Option<usize> {
    (0..evals.len()).min_by(|&left, &right| evals[left].loss.total_cmp(&evals[right].loss))
}

/// What there is to say of adapted modules that have not moved: after a step, B differs from the zeros it began as
/// wherever a gradient arrives. Other tools let such a no-op pass in silence.
pub(super) fn unmoved(adapter: &Adapter, steps: &[StepRecord]) -> Option<String> {
    const NAMED: usize = 3;
    let stepped = steps.iter().any(|step| step.learning_rate > 0.0 && step.grad_norm > 0.0);
    let idle: Vec<&str> = adapter
        .modules()
        .iter()
        .filter(|module| stepped && module.b.iter().all(|&value| value == 0.0))
        .map(|module| module.name.as_str())
        .collect();
    let named = idle.iter().take(NAMED).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let more = if idle.len() > NAMED { ", …" } else { "" };
    (!idle.is_empty()).then(|| {
        let all = adapter.modules().len();
        format!("{} of {all} adapted layers have not moved: no gradient reaches {named}{more}", idle.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;

    #[test]
    fn modules_that_did_not_move_are_named() {
        let linears = (0..2).map(|layer| (format!("model.layers.{layer}.mlp.up_proj"), 8, 8)).collect();
        let config = LoraConfig { rank: 2, ..LoraConfig::default() };
        let mut adapter = Adapter::for_linears(linears, &config).unwrap();
        adapter.parameters_mut().nth(1).unwrap().1.fill(0.5);
        let step = |learning_rate| StepRecord {
            step: 1,
            epoch: 1,
            loss: 1.0,
            learning_rate,
            grad_norm: 1.0,
            tokens: 1,
            supervised_tokens: 1,
            seconds: 0.0,
        };
        let said = unmoved(&adapter, &[step(1e-4)]).unwrap();
        assert_eq!(
            said,
            "1 of 2 adapted layers have not moved: no gradient reaches `model.layers.1.mlp.up_proj`"
        );
        assert_eq!(unmoved(&adapter, &[step(0.0)]), None, "nothing moves in a warmup of one step");
    }

    fn evals(losses: &[(f64, f64)]) -> Vec<EvalRecord> {
        let record = |(index, &(train_loss, loss)): (usize, &(f64, f64))| EvalRecord {
            step: 10 * (index + 1),
            loss,
            train_loss,
            seconds: 0.0,
        };
        losses.iter().enumerate().map(record).collect()
    }

    #[test]
    fn low_training_loss_with_two_rises_is_overfitting() {
        let gates = Gates::default();
        assert!(gates.overfits(&evals(&[(0.5, 1.0), (0.1, 1.1), (0.02, 1.2)])));
        assert!(!gates.overfits(&evals(&[(0.1, 1.1), (0.02, 1.2)])), "one rise is not two");
        assert!(!gates.overfits(&evals(&[(0.5, 1.0), (0.2, 1.1), (0.1, 1.2)])), "above the floor");
        assert!(!gates.overfits(&evals(&[(0.5, 1.0), (0.1, 1.1), (0.02, 1.05)])), "the last one fell");
        assert!(!gates.overfits(&[]));
    }

    #[test]
    fn patience_counts_from_the_lowest_loss() {
        let gates = Gates { patience: Some(2), ..Gates::default() };
        assert!(!gates.out_of_patience(&evals(&[(1.0, 2.0), (1.0, 1.5), (1.0, 1.6)])));
        assert!(gates.out_of_patience(&evals(&[(1.0, 2.0), (1.0, 1.5), (1.0, 1.6), (1.0, 1.5)])));
        assert!(!Gates::default().out_of_patience(&evals(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)])));
    }

    #[test]
    fn small_gains_do_not_restore_patience() {
        let gates = Gates { patience: Some(2), min_delta: 0.1, ..Gates::default() };
        assert!(gates.out_of_patience(&evals(&[(1.0, 2.0), (1.0, 1.95), (1.0, 1.92)])));
        // Small gains add up: both together are one.
        assert!(!gates.out_of_patience(&evals(&[(1.0, 2.0), (1.0, 1.95), (1.0, 1.85)])));
        assert!(!gates.out_of_patience(&evals(&[(1.0, 2.0), (1.0, 2.5), (1.0, 1.85), (1.0, 1.8)])));
    }

    #[test]
    fn gap_is_measured_on_the_last_evaluation() {
        let gates = Gates::default();
        assert_eq!(gates.wide_gap(&evals(&[(0.5, 2.0)])), Some(1.5));
        assert_eq!(gates.wide_gap(&evals(&[(0.5, 2.0), (0.5, 1.0)])), None);
    }

    #[test]
    fn first_of_equal_evaluations_is_the_best() {
        assert_eq!(best(&evals(&[(1.0, 2.0), (1.0, 1.0), (1.0, 1.0)])), Some(1));
        assert_eq!(best(&[]), None);
    }
}
