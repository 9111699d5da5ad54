//! Causal attention with grouped heads over spans. Forward, a task is a block of queries of one span with the heads
//! that share its keys and values, which are packed once for all of them; the scores of a strip of queries against
//! all keys it sees stand in scratch. Sums over keys are cut at multiples of the same number of positions, so that a
//! query's result is the same however queries are blocked. Backward: see `backward`.

use std::ops::Range;

use super::product::{Operand, Output, Packed, SWEEP, Shared};
use super::{
    AttentionGradient, AttentionSaved, AttentionShape, Cpu, LogitMap, TASK_ROWS, Write, panel, rows, scratch,
};
use crate::backend::Span;

mod backward;

pub(super) use backward::backward;

/// Queries of a block.
const BLOCK: usize = 96;
/// Queries whose scores are computed together, up to the last key that any of them sees.
const STRIP: usize = 24;

/// Values from one row of scores to the next: an odd number of cache lines, so that rows do not evict each other.
fn stride(keys: usize) -> usize {
    keys.next_multiple_of(32) + 16
}

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
}

impl Block {
    fn of(span: &Span, index: usize, shape: &AttentionShape<'_>) -> Self {
        let start = index * BLOCK;
        let rows = BLOCK.min(span.queries.len() - start);
        let visible = span.past() + start + 1;
        Self { first: span.queries.start + start, rows, visible, key_start: shape.seen(visible).start }
    }

    /// Positions of the keys.
    fn keys(&self) -> Range<usize> {
        self.key_start..self.visible + self.rows - 1
    }

    /// The keys that row `i` sees, counted from the block's first.
    fn seen(&self, i: usize, shape: &AttentionShape<'_>) -> Range<usize> {
        let seen = shape.seen(self.visible + i);
        seen.start - self.key_start..seen.end - self.key_start
    }
}

/// The rows (keys, D) at these positions of a span of one head of k or v; `joined` holds them where they do not
/// follow each other.
fn key_rows<'a>(
    values: &'a [f32],
    key: HeadAt,
    span: &Span,
    positions: Range<usize>,
    joined: &'a mut [f32],
    head_dim: usize,
) -> Operand<'a> {
    if !crosses(span, &positions) {
        return key.rows(values, span.key_row(positions.start));
    }
    for (position, joined) in positions.zip(joined.chunks_exact_mut(head_dim)) {
        let at = key.row(span.key_row(position));
        joined.copy_from_slice(&values[at..at + head_dim]);
    }
    Operand::rows(joined, head_dim)
}

/// Whether keys at these positions lie both in the prefix and behind it.
fn crosses(span: &Span, positions: &Range<usize>) -> bool {
    positions.start < span.prefix.len() && span.prefix.len() < positions.end
}

/// The rows of an operand as columns.
fn transposed(operand: Operand<'_>) -> Operand<'_> {
    Operand { row: operand.col, col: operand.row, ..operand }
}

/// The map of scores, where it is more than a factor.
fn capped(shape: &AttentionShape<'_>) -> Option<LogitMap> {
    shape.softcap.map(|cap| LogitMap { scale: shape.scale, softcap: Some(cap) })
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
    let blocks = |span: &Span| (0..span.queries.len().div_ceil(BLOCK)).rev();
    let tasks: Vec<(usize, &Span, Block)> = shape
        .spans
        .iter()
        .flat_map(|span| blocks(span).map(move |index| (span, Block::of(span, index, shape))))
        .flat_map(|(span, block)| (0..shape.kv_heads).map(move |kv_head| (kv_head, span, block)))
        .collect();
    let (out, logsumexp) = (Shared::new(out), Shared::new(logsumexp));
    let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    cpu.run(tasks.len(), |task| {
        let (kv_head, span, block) = tasks[task];
        let (positions, key) = (block.keys(), HeadAt::key(shape, kv_head * group));
        let keys = positions.len();
        let joined = if crosses(span, &positions) { keys * dim } else { 0 };
        let sizes = [panel::size(keys, dim), panel::size(dim, keys), STRIP * stride(keys), 2 * joined];
        scratch::with(sizes.iter().sum(), |lent| {
            let (k_panels, lent) = lent.split_at_mut(sizes[0]);
            let (v_panels, lent) = lent.split_at_mut(sizes[1]);
            let (scores, lent) = lent.split_at_mut(sizes[2]);
            let (k_joined, v_joined) = lent.split_at_mut(joined);
            let k = transposed(key_rows(k, key, span, positions.clone(), k_joined, dim));
            let v = key_rows(v, key, span, positions.clone(), v_joined, dim);
            let k = Packed::new(cpu.kernel, k, (keys, dim), 0, k_panels);
            let v = Packed::new(cpu.kernel, v, (dim, keys), positions.start % SWEEP, v_panels);
            for head in kv_head * group..(kv_head + 1) * group {
                for start in (0..block.rows).step_by(STRIP) {
                    let strip = start..block.rows.min(start + STRIP);
                    let query = HeadAt::query(shape, head);
                    let at = query.row(block.first + strip.start);
                    // SAFETY: one task per block of rows and head.
                    let mut out = unsafe { out.block(at, strip.len(), dim, query.stride) };
                    let q = Operand::rows(&q[at..], query.stride);
                    let save = |row: usize, sum| {
                        let at = (block.first + row) * shape.heads + head;
                        // SAFETY: as above.
                        unsafe { logsumexp.slice(at..at + 1) }.fill(sum);
                    };
                    forward_strip(cpu, &mut out, save, (q, &k, &v), scores, (block, strip), shape);
                }
            }
        });
    });
}

/// out (rows,D) of one strip of a block, and the log-sum-exp of each row.
fn forward_strip(
    cpu: &Cpu,
    out: &mut Output<'_>,
    mut save: impl FnMut(usize, f32),
    (q, k, v): (Operand<'_>, &Packed<'_>, &Packed<'_>),
    scores: &mut [f32],
    (block, strip): (Block, Range<usize>),
    shape: &AttentionShape<'_>,
) {
    let seen = block.seen(strip.start, shape).start..block.seen(strip.end - 1, shape).end;
    // Whole panels are written at once; what is beyond the keys is overwritten by zeros.
    let from = seen.start / panel::WIDTH * panel::WIDTH;
    let (width, stride) = ((seen.end - from).next_multiple_of(panel::WIDTH), stride(block.keys().len()));
    let mut product = Output::strided(scores, strip.len(), width, stride);
    k.multiply(cpu.kernel, &mut product, (from, 0..shape.head_dim), 1.0, Write::Overwrite, q);
    for (row, scores) in strip.clone().zip(scores.chunks_mut(stride)) {
        let (scores, seen) = (&mut scores[..seen.end - from], block.seen(row, shape));
        let scale = cap_scores(scores, shape);
        save(row, rows::softmax(scores, seen.start - from, seen.end - from, scale));
    }
    let scores = Operand::rows(scores, stride);
    v.multiply(cpu.kernel, out, (0, from..seen.end), 1.0, Write::Overwrite, scores);
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
