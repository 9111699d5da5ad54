//! Cross-entropy over a large vocabulary: logits of a bounded number of rows at a time, turned into their own
//! gradient in place and multiplied back. Never holds rows x vocabulary for all rows.

use super::product::Shared;
use super::{Backend, Cpu, LogitMap, Write, linear, rows, scratch};
use crate::matrix::Matrix;

/// Most logits that stand in memory at once (48 MiB).
const LOGITS: usize = 12 << 20;

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
        let first = chunk * step;
        let values = first * c..(first + targets.len()) * c;
        let logits = &mut scratch[..targets.len() * vocabulary];
        linear::forward(cpu, logits, &hidden[values.clone()], head, Write::Overwrite);
        cpu.map_logits(logits, map);
        let scale = gradient.as_ref().map(|(_, scale)| *scale);
        loss_rows(cpu, logits, nll, targets, map, scale);
        if let Some((dhidden, _)) = &mut gradient {
            linear::backward(cpu, &mut dhidden[values], logits, head, Write::Overwrite);
        }
    }
}

/// nll per row of mapped `logits` (rows, V); with `scale`, they become scale * (softmax - target) * map's slope.
fn loss_rows(
    cpu: &Cpu,
    logits: &mut [f32],
    nll: &mut [f64],
    targets: &[u32],
    map: LogitMap,
    scale: Option<f32>,
) {
    use rayon::prelude::*;
    let vocabulary = logits.len() / targets.len();
    let logits = Shared::new(logits);
    cpu.pool.install(|| {
        nll.par_iter_mut().zip(targets).with_max_len(1).enumerate().for_each(|(row, (nll, &target))| {
            // SAFETY: one task per row.
            let logits = unsafe { logits.slice(row * vocabulary..(row + 1) * vocabulary) };
            let sum = rows::logsumexp(logits);
            *nll = sum - f64::from(logits[target as usize]);
            let Some(scale) = scale else { return };
            let gradient = |logits: &mut [f32]| {
                rows::probabilities(logits, 0, vocabulary, 1.0, sum as f32);
                logits[target as usize] -= 1.0;
            };
            if map.softcap.is_none() {
                gradient(logits);
                return rows::scale(logits, scale * map.scale);
            }
            scratch::with(vocabulary, |mapped| {
                mapped.copy_from_slice(logits);
                gradient(logits);
                rows::map_logits_backward(logits, mapped, 0.0, scale, map);
            });
        });
    });
}
