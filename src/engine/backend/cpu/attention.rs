//! Causal attention with grouped heads over spans. A task is one (span, head, block of queries) forward and
//! one (span, head) backward; scores of a block of queries against all keys it sees stand in scratch. Where
//! these begin in a prefix, the block's keys and values are copied together first. The backward writes keys' and
//! values' gradients per query head and span and then adds those of each row in order.

use super::product::{Operand, Output, Shared, rounded_product};
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
}

/// A block of queries of one span, and the keys that any of them sees.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
    /// Keys of the span up to and with the first row's own.
    visible: usize,
    /// The position of the first key seen.
    key_start: usize,
    /// The prefix's keys that are seen: their number, and the first one's row.
    prefix_keys: usize,
    prefix_first: usize,
    /// The row of the first other key seen.
    key_first: usize,
}

impl Block {
    fn of(span: &Span, index: usize, shape: &AttentionShape<'_>) -> Self {
        let start = index * BLOCK;
        let rows = BLOCK.min(span.queries.len() - start);
        let visible = span.past() + start + 1;
        let key_start = shape.seen(visible).start;
        Self {
            first: span.queries.start + start,
            rows,
            visible,
            key_start,
            prefix_keys: span.prefix.len().saturating_sub(key_start),
            prefix_first: span.prefix.start + key_start,
            key_first: span.key_row(key_start.max(span.prefix.len())),
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

    /// Values to lend to [`Block::rows_of`].
    fn joined_len(&self, head_dim: usize) -> usize {
        if self.prefix_keys == 0 { 0 } else { self.keys() * head_dim }
    }

    /// The rows (keys, D) of one head of k or v that the block sees; `joined` holds them where they do not follow
    /// each other.
    fn rows_of<'a>(
        &self,
        values: &'a [f32],
        key: HeadAt,
        joined: &'a mut [f32],
        head_dim: usize,
    ) -> Operand<'a> {
        if self.prefix_keys == 0 {
            return key.rows(values, self.key_first);
        }
        let own = self.keys() - self.prefix_keys;
        let prefix = self.prefix_first..self.prefix_first + self.prefix_keys;
        let rows = prefix.chain(self.key_first..self.key_first + own);
        for (row, joined) in rows.zip(joined.chunks_exact_mut(head_dim)) {
            joined.copy_from_slice(&values[key.row(row)..key.row(row) + head_dim]);
        }
        Operand::rows(joined, head_dim)
    }
}

/// The rows of an operand as columns.
fn transposed(operand: Operand<'_>) -> Operand<'_> {
    Operand { row: operand.col, col: operand.row, ..operand }
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
        let (size, joined) = (block.rows * block.keys(), block.joined_len(shape.head_dim));
        scratch::with(size + 2 * joined, |lent| {
            let (scores, lent) = lent.split_at_mut(size);
            let (k_joined, v_joined) = lent.split_at_mut(joined);
            let k = block.rows_of(k, key, k_joined, shape.head_dim);
            let v = block.rows_of(v, key, v_joined, shape.head_dim);
            scores_of(cpu, scores, &block, query.rows(q, block.first), k, shape.head_dim);
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
            rounded_product(cpu.kernel, &mut out, block.keys(), Write::Overwrite, scores, v);
        });
    });
}

/// scores (rows, keys) = q · kᵀ of a block.
fn scores_of(cpu: &Cpu, scores: &mut [f32], block: &Block, q: Operand<'_>, k: Operand<'_>, head_dim: usize) {
    let mut out = Output::of(scores, block.rows, block.keys());
    rounded_product(cpu.kernel, &mut out, head_dim, Write::Overwrite, q, transposed(k));
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
    let places = Places::new(shape, saved.k.len() / kv_width);
    let size = shape.heads * places.len * dim;
    if scratch.len() < 2 * size {
        scratch.resize(2 * size, 0.0);
    }
    let (dk_heads, dv_heads) = scratch[..2 * size].split_at_mut(size);
    let (dk_shared, dv_shared) = (Shared::new(dk_heads), Shared::new(dv_heads));
    let dq = Shared::new(gradient.dq);
    cpu.run(shape.spans.len() * shape.heads, |task| {
        let (span, head) = (&shape.spans[task / shape.heads], task % shape.heads);
        assert_eq!(span.queries, span.keys, "BUG: backward over cached keys");
        let first = head * places.len + places.of_span[task / shape.heads];
        let keys = first * dim..(first + span.prefix.len() + span.keys.len()) * dim;
        // SAFETY: one task per span and head, and each writes only its own places of its own head.
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
                for place in places.of_row(row, shape) {
                    for head in kv_head * group..(kv_head + 1) * group {
                        let at = (head * places.len + place) * dim;
                        rows::add(value, &heads[at..at + dim]);
                    }
                }
            }
        });
    }
}

/// Where each span's share of its keys' gradients lies before the shares of a row are added.
struct Places {
    /// The place of the first key, the prefix's among them, of each span.
    of_span: Vec<usize>,
    /// The place of each row's share of its own span.
    own: Vec<usize>,
    /// All places.
    len: usize,
}

impl Places {
    fn new(shape: &AttentionShape<'_>, tokens: usize) -> Self {
        let mut places =
            Self { of_span: Vec::with_capacity(shape.spans.len()), own: vec![0; tokens], len: 0 };
        for span in shape.spans {
            places.of_span.push(places.len);
            places.len += span.prefix.len();
            for row in span.keys.clone() {
                places.own[row] = places.len;
                places.len += 1;
            }
        }
        places
    }

    /// The places of a row's shares: its own span's, then those of the spans whose prefix it is in.
    fn of_row(&self, row: usize, shape: &AttentionShape<'_>) -> impl Iterator<Item = usize> {
        let spans = shape.spans.iter().zip(&self.of_span);
        let seen = spans.filter(move |(span, _)| span.prefix.contains(&row));
        std::iter::once(self.own[row]).chain(seen.map(move |(span, first)| first + row - span.prefix.start))
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
    let (size, joined) = (block.rows * keys, block.joined_len(dim));
    scratch::with(2 * size + 2 * joined, |lent| {
        let (lent, joined_rows) = lent.split_at_mut(2 * size);
        let (probability, dscore) = lent.split_at_mut(size);
        let (k_joined, v_joined) = joined_rows.split_at_mut(joined);
        let k = block.rows_of(saved.k, key, k_joined, dim);
        let v = block.rows_of(saved.v, key, v_joined, dim);
        scores_of(cpu, probability, block, query.rows(saved.q, block.first), k, dim);
        scores_of(cpu, dscore, block, query.rows(dout, block.first), v, dim);
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
        rounded_product(cpu.kernel, dq, keys, Write::Overwrite, dscore_rows, k);
        let q = query.rows(saved.q, block.first);
        rounded_product(
            cpu.kernel,
            &mut Output::of(dk, keys, dim),
            block.rows,
            Write::Add,
            dscore_columns,
            q,
        );
        let (probability, dout) = (Operand::columns(probability, keys), query.rows(dout, block.first));
        rounded_product(
            cpu.kernel,
            &mut Output::of(dv, keys, dim),
            block.rows,
            Write::Add,
            probability,
            dout,
        );
    });
}
