//! Causal attention with grouped heads over spans. A task is one (span, head, block of queries) forward and
//! one (span, head) backward; scores of a block of queries against all keys it sees stand in scratch. The
//! backward writes keys' and values' gradients per query head and then adds the heads of a group in order.

use super::product::{Operand, Output, Shared, product};
use std::ops::Range;

use super::{
    AttentionGradient, AttentionSaved, AttentionShape, Cpu, LogitMap, TASK_ROWS, Write, rows, scratch,
};
use crate::backend::Span;

/// Queries whose scores are in scratch at once.
const BLOCK: usize = 64;

/// Where the rows of one head begin and how far apart they lie.
#[derive(Clone, Copy)]
struct HeadAt {
    offset: usize,
    stride: usize,
}

impl HeadAt {
    fn query(shape: &AttentionShape<'_>, head: usize) -> Self {
        Self { offset: head * shape.head_dim, stride: shape.heads * shape.head_dim }
    }

    fn key(shape: &AttentionShape<'_>, head: usize) -> Self {
        let group = shape.heads / shape.kv_heads;
        Self { offset: head / group * shape.head_dim, stride: shape.kv_heads * shape.head_dim }
    }

    fn row(&self, row: usize) -> usize {
        row * self.stride + self.offset
    }

    fn rows<'a>(&self, values: &'a [f32], first: usize) -> Operand<'a> {
        Operand::rows(&values[self.row(first)..], self.stride)
    }

    fn columns<'a>(&self, values: &'a [f32], first: usize) -> Operand<'a> {
        Operand::columns(&values[self.row(first)..], self.stride)
    }
}

/// A block of queries of one span, and the keys that any of them sees.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
    /// Keys of the span up to and with the first row's own.
    visible: usize,
    /// The first key seen: its place in the span, and its row.
    key_start: usize,
    key_first: usize,
}

impl Block {
    fn of(span: &Span, index: usize, shape: &AttentionShape<'_>) -> Self {
        let past = span.keys.len() - span.queries.len();
        let start = index * BLOCK;
        let rows = BLOCK.min(span.queries.len() - start);
        let visible = past + start + 1;
        let key_start = shape.seen(visible).start;
        Self {
            first: span.queries.start + start,
            rows,
            visible,
            key_start,
            key_first: span.keys.start + key_start,
        }
    }

    fn keys(&self) -> usize {
        self.visible + self.rows - 1 - self.key_start
    }

    /// The keys that row `i` sees, counted from the block's first.
    fn seen(&self, i: usize, shape: &AttentionShape<'_>) -> Range<usize> {
        let seen = shape.seen(self.visible + i);
        seen.start - self.key_start..seen.end - self.key_start
    }
}

/// The map of scores, where it is more than a factor.
fn capped(shape: &AttentionShape<'_>) -> Option<LogitMap> {
    shape.softcap.map(|cap| LogitMap { scale: shape.scale, softcap: Some(cap) })
}

fn blocks(span: &Span) -> usize {
    span.queries.len().div_ceil(BLOCK)
}

/// out = softmax(q kᵀ * scale, causal) v; saves log-sum-exp.
pub(super) fn forward(
    cpu: &Cpu,
    out: &mut [f32],
    logsumexp: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    shape: &AttentionShape<'_>,
) {
    let tasks: Vec<(usize, Block)> = shape
        .spans
        .iter()
        .flat_map(|span| (0..blocks(span)).rev().map(move |index| Block::of(span, index, shape)))
        .flat_map(|block| (0..shape.heads).map(move |head| (head, block)))
        .collect();
    let (out, logsumexp) = (Shared::new(out), Shared::new(logsumexp));
    cpu.run(tasks.len(), |task| {
        let (head, block) = tasks[task];
        let (query, key) = (HeadAt::query(shape, head), HeadAt::key(shape, head));
        scratch::with(block.rows * block.keys(), |scores| {
            scores_of(cpu, scores, &block, q, k, query, key, shape.head_dim);
            let scale = cap_scores(scores, shape);
            for (i, row) in scores.chunks_exact_mut(block.keys()).enumerate() {
                let seen = block.seen(i, shape);
                let sum = rows::softmax(row, seen.start, seen.end, scale);
                let at = (block.first + i) * shape.heads + head;
                // SAFETY: one task per row and head.
                let saved = unsafe { logsumexp.slice(at..at + 1) };
                saved[0] = sum;
            }
            let at = query.row(block.first);
            // SAFETY: one task per block of rows and head.
            let mut out = unsafe { out.block(at, block.rows, shape.head_dim, query.stride) };
            let scores = Operand::rows(scores, block.keys());
            product(
                cpu.kernel,
                &mut out,
                block.keys(),
                1.0,
                Write::Overwrite,
                scores,
                key.rows(v, block.key_first),
            );
        });
    });
}

/// scores (rows, keys) = q · kᵀ of a block.
fn scores_of(
    cpu: &Cpu,
    scores: &mut [f32],
    block: &Block,
    q: &[f32],
    k: &[f32],
    query: HeadAt,
    key: HeadAt,
    head_dim: usize,
) {
    let mut out = Output::of(scores, block.rows, block.keys());
    let (q, k) = (query.rows(q, block.first), key.columns(k, block.key_first));
    product(cpu.kernel, &mut out, head_dim, 1.0, Write::Overwrite, q, k);
}

/// Caps scores that are to be capped; gives the factor that is still to be applied.
fn cap_scores(scores: &mut [f32], shape: &AttentionShape<'_>) -> f32 {
    match capped(shape) {
        None => shape.scale,
        Some(map) => {
            rows::map_logits(scores, map);
            1.0
        }
    }
}

/// dq, dk, dv; see [`crate::backend::Backend::attention_backward`].
pub(super) fn backward(
    cpu: &Cpu,
    gradient: AttentionGradient<'_>,
    dout: &[f32],
    saved: &AttentionSaved<'_>,
    shape: &AttentionShape<'_>,
    scratch: &mut Vec<f32>,
) {
    let (dim, kv_width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    let tokens = saved.k.len() / kv_width;
    let size = shape.heads * tokens * dim;
    if scratch.len() < 2 * size {
        scratch.resize(2 * size, 0.0);
    }
    let (dk_heads, dv_heads) = scratch[..2 * size].split_at_mut(size);
    let (dk_shared, dv_shared) = (Shared::new(dk_heads), Shared::new(dv_heads));
    let dq = Shared::new(gradient.dq);
    cpu.run(shape.spans.len() * shape.heads, |task| {
        let (span, head) = (&shape.spans[task / shape.heads], task % shape.heads);
        assert_eq!(span.queries, span.keys, "BUG: backward over cached keys");
        let keys = (head * tokens + span.keys.start) * dim..(head * tokens + span.keys.end) * dim;
        // SAFETY: one task per span and head, and each writes only its own rows of its own head.
        let (dk, dv) = unsafe { (dk_shared.slice(keys.clone()), dv_shared.slice(keys)) };
        dk.fill(0.0);
        dv.fill(0.0);
        for index in 0..blocks(span) {
            let block = Block::of(span, index, shape);
            let at = HeadAt::query(shape, head).row(block.first);
            // SAFETY: as above.
            let mut dq = unsafe { dq.block(at, block.rows, dim, shape.heads * dim) };
            let keys = block.key_start * dim..;
            let (dk, dv) = (&mut dk[keys.clone()], &mut dv[keys]);
            block_backward(cpu, &mut dq, dk, dv, dout, saved, shape, head, &block);
        }
    });
    let group = shape.heads / shape.kv_heads;
    for (target, heads) in [(gradient.dk, &*dk_heads), (gradient.dv, &*dv_heads)] {
        cpu.run_over(target, TASK_ROWS * kv_width, |start, rows| {
            for (i, value) in rows.chunks_exact_mut(dim).enumerate() {
                let (row, kv_head) = (start / kv_width + i / shape.kv_heads, i % shape.kv_heads);
                value.fill(0.0);
                for head in kv_head * group..(kv_head + 1) * group {
                    let at = (head * tokens + row) * dim;
                    rows::add(value, &heads[at..at + dim]);
                }
            }
        });
    }
}

/// dq (rows,D) of a block; adds to dk and dv of its head, which begin at the block's first key.
fn block_backward(
    cpu: &Cpu,
    dq: &mut Output<'_>,
    dk: &mut [f32],
    dv: &mut [f32],
    dout: &[f32],
    saved: &AttentionSaved<'_>,
    shape: &AttentionShape<'_>,
    head: usize,
    block: &Block,
) {
    let (dim, keys) = (shape.head_dim, block.keys());
    let (query, key) = (HeadAt::query(shape, head), HeadAt::key(shape, head));
    scratch::with(2 * block.rows * keys, |both| {
        let (probability, dscore) = both.split_at_mut(block.rows * keys);
        scores_of(cpu, probability, block, saved.q, saved.k, query, key, dim);
        scores_of(cpu, dscore, block, dout, saved.v, query, key, dim);
        let scale = cap_scores(probability, shape);
        for i in 0..block.rows {
            let row = block.first + i;
            let at = query.row(row);
            let delta = rows::dot(&dout[at..at + dim], &saved.out[at..at + dim]);
            let logsumexp = saved.logsumexp[row * shape.heads + head];
            let probability = &mut probability[i * keys..(i + 1) * keys];
            let dscore = &mut dscore[i * keys..(i + 1) * keys];
            let seen = block.seen(i, shape);
            match capped(shape) {
                None => {
                    rows::probabilities(probability, seen.start, seen.end, scale, logsumexp);
                    rows::score_gradient(dscore, probability, delta, scale);
                }
                Some(map) => {
                    rows::map_logits_backward(dscore, probability, delta, 1.0, map);
                    rows::probabilities(probability, seen.start, seen.end, scale, logsumexp);
                    rows::multiply(dscore, probability);
                }
            }
        }
        let (dscore_rows, dscore_columns) = (Operand::rows(dscore, keys), Operand::columns(dscore, keys));
        product(cpu.kernel, dq, keys, 1.0, Write::Overwrite, dscore_rows, key.rows(saved.k, block.key_first));
        let q = query.rows(saved.q, block.first);
        product(cpu.kernel, &mut Output::of(dk, keys, dim), block.rows, 1.0, Write::Add, dscore_columns, q);
        let (probability, dout) = (Operand::columns(probability, keys), query.rows(dout, block.first));
        product(cpu.kernel, &mut Output::of(dv, keys, dim), block.rows, 1.0, Write::Add, probability, dout);
    });
}
