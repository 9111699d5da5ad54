//! The backward of attention. A task is one span and query head: it takes the keys chunk by chunk, packs each chunk
//! once, and lets all queries that see any of it pass by, block by block. Scores are computed again; of a block of
//! queries and a chunk of keys they stay in the second-level cache, with what is packed of both. Keys' and values'
//! gradients are written per query head and span; then those of each row are added in order.

use super::*;

/// Keys of a chunk.
const KEYS: usize = 192;

/// dq, dk, dv; see [`crate::backend::Backend::attention_backward`].
pub(in super::super) fn backward(
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
        let pass = HeadPass { cpu, shape, saved, dout, span, head };
        pass.run(&dq, dk, dv);
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

/// The backward of one query head over one span.
#[derive(Clone, Copy)]
struct HeadPass<'a> {
    cpu: &'a Cpu,
    shape: &'a AttentionShape<'a>,
    saved: &'a AttentionSaved<'a>,
    dout: &'a [f32],
    span: &'a Span,
    head: usize,
}

/// A chunk of keys (keys, D), as right factors.
struct Chunk<'a> {
    positions: Range<usize>,
    k: Packed<'a>,
    k_transposed: Packed<'a>,
    v_transposed: Packed<'a>,
}

/// What stands in scratch of a block of queries and a chunk of keys, rows `stride(KEYS)` apart, and the packed
/// rows (queries, D) of q and dout.
struct BlockScratch<'a> {
    probability: &'a mut [f32],
    dscore: &'a mut [f32],
    q: &'a mut [f32],
    dout: &'a mut [f32],
}

impl HeadPass<'_> {
    /// Overwrites dq of its rows and head; adds to dk and dv (keys, D).
    fn run(&self, dq: &Shared<'_>, dk: &mut [f32], dv: &mut [f32]) {
        let (dim, span) = (self.shape.head_dim, self.span);
        let query = HeadAt::query(self.shape, self.head);
        for row in span.queries.clone() {
            // SAFETY: one task per span and head.
            unsafe { dq.slice(query.row(row)..query.row(row) + dim) }.fill(0.0);
        }
        let all = span.prefix.len() + span.keys.len();
        let sizes = [
            panel::size(dim, KEYS),
            panel::size(KEYS, dim),
            panel::size(KEYS, dim),
            BLOCK * stride(KEYS),
            BLOCK * stride(KEYS),
            panel::size(dim, BLOCK),
            panel::size(dim, BLOCK),
            KEYS * dim,
            KEYS * dim,
        ];
        scratch::with(sizes.iter().sum(), |mut lent| {
            let [k, k_transposed, v_transposed, probability, dscore, q, dout, k_joined, v_joined] =
                sizes.map(|size| lent.split_off_mut(..size).expect("the sizes were summed"));
            for start in (0..all).step_by(KEYS) {
                let positions = start..all.min(start + KEYS);
                let (kernel, len) = (self.cpu.kernel, positions.len());
                let key = HeadAt::key(self.shape, self.head);
                let rows = |values, joined| key_rows(values, key, span, positions.clone(), joined, dim);
                let (k_rows, v_rows) =
                    (rows(self.saved.k, &mut *k_joined), rows(self.saved.v, &mut *v_joined));
                let chunk = Chunk {
                    positions: positions.clone(),
                    k: Packed::new(kernel, k_rows, (dim, len), 0, k),
                    k_transposed: Packed::new(kernel, transposed(k_rows), (len, dim), 0, k_transposed),
                    v_transposed: Packed::new(kernel, transposed(v_rows), (len, dim), 0, v_transposed),
                };
                let gradients = start * dim..positions.end * dim;
                let (dk, dv) = (&mut dk[gradients.clone()], &mut dv[gradients]);
                let queries = self.queries_of(&positions);
                for first in queries.clone().step_by(BLOCK) {
                    let block = first..queries.end.min(first + BLOCK);
                    let scratch = BlockScratch {
                        probability: &mut *probability,
                        dscore: &mut *dscore,
                        q: &mut *q,
                        dout: &mut *dout,
                    };
                    self.block(dq, dk, dv, &chunk, block, scratch);
                }
            }
        });
    }

    /// The span's queries, counted from its first, that see any key at these positions.
    fn queries_of(&self, positions: &Range<usize>) -> Range<usize> {
        let (past, rows) = (self.span.past(), self.span.queries.len());
        let beyond = |window: usize| (positions.end + window - 1).saturating_sub(past);
        let end = self.shape.window.map_or(rows, beyond).min(rows);
        positions.start.saturating_sub(past).min(end)..end
    }

    /// What a block of queries and a chunk of keys give each other.
    fn block(
        &self,
        dq: &Shared<'_>,
        dk: &mut [f32],
        dv: &mut [f32],
        chunk: &Chunk<'_>,
        block: Range<usize>,
        scratch: BlockScratch<'_>,
    ) {
        let (kernel, dim) = (self.cpu.kernel, self.shape.head_dim);
        let (query, stride) = (HeadAt::query(self.shape, self.head), stride(KEYS));
        let BlockScratch { probability, dscore, q, dout } = scratch;
        for start in block.clone().step_by(STRIP) {
            let strip = start..block.end.min(start + STRIP);
            let at = (start - block.start) * stride;
            self.strip(dq, chunk, strip, &mut probability[at..], &mut dscore[at..]);
        }
        let first = self.span.queries.start + block.start;
        let q = Packed::new(kernel, query.rows(self.saved.q, first), (dim, block.len()), 0, q);
        let dout = Packed::new(kernel, query.rows(self.dout, first), (dim, block.len()), 0, dout);
        for start in (0..chunk.positions.len()).step_by(STRIP) {
            let end = chunk.positions.len().min(start + STRIP);
            let seen_by = self.queries_of(&(chunk.positions.start + start..chunk.positions.start + end));
            let seen_by = seen_by.start.max(block.start)..seen_by.end.min(block.end);
            if seen_by.is_empty() {
                continue;
            }
            let steps = seen_by.start - block.start..seen_by.end - block.start;
            for (gradient, scores, right) in [(&mut *dk, &*dscore, &q), (&mut *dv, &*probability, &dout)] {
                let mut gradient = Output::of(&mut gradient[start * dim..], end - start, dim);
                let scores = Operand::columns(&scores[steps.start * stride + start..], stride);
                right.multiply(kernel, &mut gradient, (0, steps.clone()), 1.0, Write::Add, scores);
            }
        }
    }

    /// The probabilities and the gradients of the scores of a strip of queries, 0 where a key is not seen, and
    /// what the strip's dq gets from the chunk.
    fn strip(
        &self,
        dq: &Shared<'_>,
        chunk: &Chunk<'_>,
        strip: Range<usize>,
        probability: &mut [f32],
        dscore: &mut [f32],
    ) {
        let Self { shape, saved, span, head, .. } = *self;
        let (kernel, dim, keys) = (self.cpu.kernel, shape.head_dim, chunk.positions.len());
        let (query, stride) = (HeadAt::query(shape, head), stride(KEYS));
        let seen = |query: usize| {
            let seen = shape.seen(span.past() + query + 1);
            let in_chunk = |position: usize| position.saturating_sub(chunk.positions.start).min(keys);
            in_chunk(seen.start)..in_chunk(seen.end)
        };
        let any = seen(strip.start).start..seen(strip.end - 1).end;
        let from = any.start / panel::WIDTH * panel::WIDTH;
        let width = (any.end - from).next_multiple_of(panel::WIDTH);
        let first = span.queries.start + strip.start;
        let all = (from, 0..dim);
        let factors = [
            (&mut *probability, &**saved.q, &chunk.k_transposed),
            (&mut *dscore, self.dout, &chunk.v_transposed),
        ];
        for (scores, left, right) in factors {
            let mut scores = Output::strided(&mut scores[from..], strip.len(), width, stride);
            right.multiply(kernel, &mut scores, all.clone(), 1.0, Write::Overwrite, query.rows(left, first));
        }
        let rows = probability.chunks_mut(stride).zip(dscore.chunks_mut(stride));
        for (index, (probability, dscore)) in strip.clone().zip(rows) {
            let (row, seen) = (span.queries.start + index, seen(index));
            let at = query.row(row);
            let delta = rows::dot(&self.dout[at..at + dim], &saved.out[at..at + dim]);
            let logsumexp = saved.logsumexp[row * shape.heads + head];
            for scores in [&mut *probability, &mut *dscore] {
                scores[..seen.start].fill(0.0);
                scores[seen.end..keys].fill(0.0);
            }
            let (probability, dscore) = (&mut probability[seen.clone()], &mut dscore[seen]);
            let scale = cap_scores(probability, shape);
            match capped(shape) {
                None => {
                    rows::probabilities(probability, scale, logsumexp);
                    rows::score_gradient(dscore, probability, delta, scale);
                }
                Some(map) => {
                    rows::map_logits_backward(dscore, probability, delta, 1.0, map);
                    rows::probabilities(probability, scale, logsumexp);
                    rows::multiply(dscore, probability);
                }
            }
        }
        // SAFETY: one task per span and head.
        let mut dq = unsafe { dq.block(query.row(first), strip.len(), dim, query.stride) };
        let dscore = Operand::rows(&dscore[from..], stride);
        chunk.k.multiply(kernel, &mut dq, (0, from..any.end), 1.0, Write::Add, dscore);
    }
}
