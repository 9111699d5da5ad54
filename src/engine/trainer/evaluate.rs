//! The loss of a model, with or without an adapter, on rows it does not train on: the sum of the negative
//! log-likelihood over the number of supervised tokens, so that long answers weigh by their tokens and packing
//! changes nothing. Used during training and by whoever compares a tuned model with its base.

use crate::adapter::Adapter;
use crate::model::{Model, ModelError, Pack, SequenceLoss, Workspace};

use super::batches::pack;
use super::examples::TokenizedExample;
use super::options::{RowReason, TrainError};

/// Rows whose loss is to be taken, packed once.
pub struct Evaluation {
    packs: Vec<(Pack, Vec<usize>)>,
    ids: Vec<String>,
}

impl Evaluation {
    /// Packs `rows` into passes of at most `pack_tokens` tokens.
    /// Errors name a row that `model` cannot be evaluated on.
    pub fn new(model: &Model, rows: &[TokenizedExample], pack_tokens: usize) -> Result<Self, TrainError> {
        check_rows(model, rows, pack_tokens)?;
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        let packs = pack(&lengths, pack_tokens).into_iter().map(|members| {
            let sequences: Vec<&TokenizedExample> = members.iter().map(|&row| &rows[row]).collect();
            (model.pack(&marked(&sequences)), members)
        });
        Ok(Self { packs: packs.collect(), ids: rows.iter().map(|row| row.id.clone()).collect() })
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The loss of each row, in the rows' order.
    pub fn row_losses(
        &self,
        model: &Model,
        adapter: Option<&Adapter>,
        workspace: &mut Workspace,
    ) -> Result<Vec<SequenceLoss>, TrainError> {
        let mut losses = vec![SequenceLoss { nll: 0.0, supervised: 0 }; self.ids.len()];
        for (pack, members) in &self.packs {
            let rows = || members.iter().map(|&row| self.ids[row].clone()).collect();
            let packed = model
                .loss(adapter, pack, workspace)
                .map_err(|error| TrainError::of_model(error, 0, rows()))?;
            for (&row, loss) in members.iter().zip(packed) {
                losses[row] = loss;
            }
        }
        match losses.iter().position(|loss| !loss.nll.is_finite()) {
            Some(row) => Err(TrainError::NotFinite {
                what: "the loss of an evaluation".to_owned(),
                step: 0,
                rows: vec![self.ids[row].clone()],
            }),
            None => Ok(losses),
        }
    }

    /// The mean loss over all supervised tokens of all rows, in nats. There must be rows.
    pub fn mean_loss(
        &self,
        model: &Model,
        adapter: Option<&Adapter>,
        workspace: &mut Workspace,
    ) -> Result<f64, TrainError> {
        let losses = self.row_losses(model, adapter, workspace)?;
        let supervised: usize = losses.iter().map(|loss| loss.supervised).sum();
        assert!(supervised > 0, "BUG: an evaluation without rows has no mean");
        Ok(losses.iter().map(|loss| loss.nll).sum::<f64>() / supervised as f64)
    }
}

impl TrainError {
    /// The error of `model` while it computed `rows` in step `step`.
    pub(super) fn of_model(error: ModelError, step: usize, rows: Vec<String>) -> Self {
        match error {
            ModelError::NotFinite { name } => Self::NotFinite { what: format!("`{name}`"), step, rows },
            other => Self::Model(other),
        }
    }

    /// The same error, placed at step `step` of a run.
    pub(super) fn at_step(self, step: usize) -> Self {
        match self {
            Self::NotFinite { what, rows, .. } => Self::NotFinite { what, step, rows },
            other => other,
        }
    }
}

/// The tokens of each row, and which of them are supervised.
pub(super) fn marked<'a>(rows: &[&'a TokenizedExample]) -> Vec<(&'a [u32], &'a [bool])> {
    rows.iter().map(|row| (row.tokens.as_slice(), row.supervised.as_slice())).collect()
}

/// An error that names the first row that `model` cannot take.
pub(super) fn check_rows(
    model: &Model,
    rows: &[TokenizedExample],
    pack_tokens: usize,
) -> Result<(), TrainError> {
    let config = model.config();
    for row in rows {
        check_row(row, config.vocab_size, config.max_position_embeddings, pack_tokens)
            .map_err(|reason| TrainError::Row { id: row.id.clone(), reason })?;
    }
    Ok(())
}

fn check_row(
    row: &TokenizedExample,
    vocabulary: usize,
    positions: usize,
    pack_tokens: usize,
) -> Result<(), RowReason> {
    let tokens = row.tokens.len();
    let unknown = row.tokens.iter().find(|&&token| token as usize >= vocabulary);
    if row.supervised.len() != tokens {
        Err(RowReason::MarksMissing { tokens, marks: row.supervised.len() })
    } else if row.supervised_tokens() == 0 {
        Err(RowReason::NothingSupervised)
    } else if tokens > pack_tokens {
        Err(RowReason::TooLong { tokens, limit: pack_tokens })
    } else if tokens > positions {
        Err(RowReason::BeyondPositions { tokens, limit: positions })
    } else if let Some(&token) = unknown {
        Err(RowReason::UnknownToken { token, vocabulary })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(tokens: &[u32], supervised: &[bool]) -> Option<RowReason> {
        let row =
            TokenizedExample { id: "a".into(), tokens: tokens.to_vec(), supervised: supervised.to_vec() };
        check_row(&row, 50, 4, 5).err()
    }

    #[test]
    fn rows_that_no_model_can_take_are_refused() {
        assert_eq!(reason(&[1, 2], &[false, true]), None);
        assert_eq!(reason(&[1, 2], &[false]), Some(RowReason::MarksMissing { tokens: 2, marks: 1 }));
        assert_eq!(reason(&[1, 2], &[true, false]), Some(RowReason::NothingSupervised));
        assert_eq!(
            reason(&[1, 50], &[false, true]),
            Some(RowReason::UnknownToken { token: 50, vocabulary: 50 })
        );
        assert_eq!(reason(&[1; 6], &[true; 6]), Some(RowReason::TooLong { tokens: 6, limit: 5 }));
        assert_eq!(reason(&[1; 5], &[true; 5]), Some(RowReason::BeyondPositions { tokens: 5, limit: 4 }));
        assert_eq!(reason(&[], &[]), Some(RowReason::NothingSupervised));
    }
}
