//! Cross-entropy over a large vocabulary: logits of a bounded number of rows at a time, turned into their own
//! gradient in place and multiplied back. Never holds rows x vocabulary for all rows.
//!
//! Logits stand in blocks of the vocabulary, each (rows, tokens of the block) by itself, so that a block is still
//! in a cache when it is looked at again, and its rows do not lie a power of two apart, where they would evict each
//! other:
//! ```text
//! for each block   head's rows ──► logits ──► largest, Σ exp         for each block   logits ──► gradient ──► dhidden
//! ```

use super::{Cpu, LogitMap, Write, linear, rows, scratch};
use crate::matrix::Matrix;

/// Most logits that stand in memory at once (48 MiB).
const LOGITS: usize = 12 << 20;
/// Tokens of the vocabulary in a block: a whole number of sweeps, so that sums over the vocabulary do not depend
/// on it.
const BLOCK: usize = 4 * super::product::SWEEP;
/// Rows that a task looks at.
const TASK_ROWS: usize = 16;

/// Rows of a chunk: as even as the limit allows.
fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    let most = (LOGITS / vocabulary).max(16);
    rows.div_ceil(rows.div_ceil(most))
}

/// nll per row and, if asked, dhidden = scale * d(sum nll)/d(hidden).
pub(super) fn cross_entropy(
    cpu: &Cpu,
    nll: &mut [f64],
    mut gradient: Option<(&mut [f32], f32)>,
    hidden: &[f32],
    targets: &[u32],
    head: &Matrix,
    map: LogitMap,
    scratch: &mut Vec<f32>,
) {
    let (vocabulary, c) = (head.rows, head.cols);
    assert!(hidden.len() == targets.len() * c && nll.len() == targets.len(), "BUG: shape of the hidden rows");
    if targets.is_empty() {
        return;
    }
    let step = chunk_rows(targets.len(), vocabulary);
    if scratch.len() < step * vocabulary {
        scratch.resize(step * vocabulary, 0.0);
    }
    for (chunk, (nll, targets)) in nll.chunks_mut(step).zip(targets.chunks(step)).enumerate() {
        let values = chunk * step * c..(chunk * step + targets.len()) * c;
        let (logits, hidden) = (&mut scratch[..targets.len() * vocabulary], &hidden[values.clone()]);
        let mut sums = vec![RowSum::EMPTY; targets.len()];
        for (first, logits) in blocks(logits, targets.len(), vocabulary) {
            let part = first..first + logits.len() / targets.len();
            linear::forward_part(cpu, logits, hidden, (head, part), Write::Overwrite);
            look(cpu, logits, &mut sums, targets, first, map);
        }
        for (nll, sum) in nll.iter_mut().zip(&sums) {
            *nll = sum.logsumexp() - f64::from(sum.target);
        }
        let Some((dhidden, scale)) = &mut gradient else { continue };
        let dhidden = &mut dhidden[values];
        for (first, logits) in blocks(logits, targets.len(), vocabulary) {
            let part = first..first + logits.len() / targets.len();
            differentiate(cpu, logits, &sums, targets, first, map, *scale);
            let write = if first == 0 { Write::Overwrite } else { Write::Add };
            linear::backward_part(cpu, dhidden, logits, (head, part), write);
        }
    }
}

/// The first token and the logits (rows, tokens) of each block.
fn blocks(logits: &mut [f32], rows: usize, vocabulary: usize) -> impl Iterator<Item = (usize, &mut [f32])> {
    (0..vocabulary).step_by(BLOCK).zip(logits.chunks_mut(rows * BLOCK))
}

/// What is known of a row of logits.
#[derive(Clone, Copy)]
struct RowSum {
    largest: f32,
    /// Sum of exp(logit - largest).
    sum: f64,
    /// The logit of the row's target.
    target: f32,
}

impl RowSum {
    const EMPTY: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0, target: f32::NAN };

    /// Takes more logits in.
    fn add(&mut self, logits: &[f32]) {
        let (largest, sum) = rows::sum_of_exponentials(logits);
        if largest > self.largest {
            self.sum *= f64::from(self.largest - largest).exp();
            self.largest = largest;
            self.sum += sum;
        } else {
            self.sum += sum * f64::from(largest - self.largest).exp();
        }
    }

    fn logsumexp(&self) -> f64 {
        f64::from(self.largest) + self.sum.ln()
    }
}

/// Maps the logits (rows, tokens) of the block that begins with token `first`, and takes them into the rows' sums.
fn look(cpu: &Cpu, logits: &mut [f32], sums: &mut [RowSum], targets: &[u32], first: usize, map: LogitMap) {
    use rayon::prelude::*;
    let width = logits.len() / targets.len();
    let tasks = logits.par_chunks_mut(TASK_ROWS * width).zip(sums.par_chunks_mut(TASK_ROWS));
    cpu.pool.install(|| {
        tasks.zip(targets.par_chunks(TASK_ROWS)).for_each(|((logits, sums), targets)| {
            if map != LogitMap::IDENTITY {
                rows::map_logits(logits, map);
            }
            for ((logits, sum), &target) in logits.chunks_exact(width).zip(sums).zip(targets) {
                sum.add(logits);
                if let Some(logit) = (target as usize).checked_sub(first).and_then(|at| logits.get(at)) {
                    sum.target = *logit;
                }
            }
        });
    });
}

/// The mapped logits (rows, tokens) of the block that begins with token `first` become scale * (softmax - target) *
/// the map's slope.
fn differentiate(
    cpu: &Cpu,
    logits: &mut [f32],
    sums: &[RowSum],
    targets: &[u32],
    first: usize,
    map: LogitMap,
    scale: f32,
) {
    let width = logits.len() / targets.len();
    cpu.run_over(logits, TASK_ROWS * width, |start, logits| {
        let of_rows = sums.iter().zip(targets).skip(start / width);
        for (logits, (sum, &target)) in logits.chunks_exact_mut(width).zip(of_rows) {
            let gradient = |logits: &mut [f32]| {
                rows::probabilities(logits, 1.0, sum.logsumexp() as f32);
                if let Some(logit) = (target as usize).checked_sub(first).and_then(|at| logits.get_mut(at)) {
                    *logit -= 1.0;
                }
            };
            if map.softcap.is_none() {
                gradient(logits);
                rows::scale(logits, scale * map.scale);
                continue;
            }
            scratch::with(width, |mapped| {
                mapped.copy_from_slice(logits);
                gradient(logits);
                rows::map_logits_backward(logits, mapped, 0.0, scale, map);
            });
        }
    });
}
