//! What decoding keeps of tokens already seen, so that a step costs one token: keys and values of attention
//! layers, states of Mamba layers. Each sequence has its own stretch of rows or its own state, and its own
//! length; sequences advance independently.
//!
//! A pass that fails leaves the cache as it was: keys beyond a sequence's length are never read, and new states
//! stand beside the old ones until `advance`.

use std::ops::Range;
use std::sync::Arc;

use super::ModelError;
use crate::backend::{Backend, Buffer, Carry, Precision, Span};

/// The past of several sequences, for every layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    backend: Arc<dyn Backend>,
    pub(super) layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    /// The rows of each sequence.
    stretches: Vec<Range<usize>>,
}

/// One layer's share.
#[derive(Debug, Clone)]
pub(super) enum LayerCache {
    Attention(KeysValues),
    Mamba(RecurrentState),
}

/// Keys (after rotation) and values, (rows of all sequences, kv_heads·D) each.
#[derive(Debug, Clone)]
pub(super) struct KeysValues {
    pub(super) k: Buffer,
    pub(super) v: Buffer,
    width: usize,
}

/// The states of a convolution and of a scan.
#[derive(Debug, Clone)]
pub(super) struct RecurrentState {
    conv: Slots,
    scan: Slots,
}

/// One block of values a sequence, as of its length, and as it will be after the pass under way.
#[derive(Debug, Clone)]
struct Slots {
    past: Buffer,
    next: Buffer,
    size: usize,
}

/// What a layer keeps.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kept {
    /// Keys and values of so many channels a token.
    Rows { width: usize },
    /// States of so many values a sequence.
    States { conv: usize, scan: usize },
}

/// Where newly fed tokens go.
pub(super) struct CacheLayout {
    /// Position of each fed token in its sequence.
    pub(super) positions: Vec<usize>,
    /// Row of the cache of each fed token.
    pub(super) rows: Vec<usize>,
    /// Queries: fed rows; keys: rows of the cache. One span a sequence that advances.
    pub(super) spans: Vec<Span>,
    /// The sequence of each span.
    pub(super) slots: Vec<usize>,
}

impl CacheLayout {
    /// The last fed row of each sequence that advances.
    pub(super) fn last_rows(&self) -> Vec<usize> {
        self.spans.iter().map(|span| span.queries.end - 1).collect()
    }
}

impl RecurrentState {
    /// The states of the convolution and of the scan, for spans of the given sequences.
    pub(super) fn carries<'a>(&'a mut self, slots: &'a [usize]) -> (Carry<'a>, Carry<'a>) {
        (self.conv.carry(slots), self.scan.carry(slots))
    }
}

impl Slots {
    fn new(backend: &dyn Backend, sequences: usize, size: usize) -> Self {
        let zeros = || zeros(backend, sequences * size, Precision::Exact);
        Self { past: zeros(), next: zeros(), size }
    }

    fn carry<'a>(&'a mut self, slots: &'a [usize]) -> Carry<'a> {
        Carry { slots, past: &self.past, next: &mut self.next }
    }

    fn commit(&mut self, backend: &dyn Backend, slot: usize) {
        backend.copy_range(&mut self.past, &self.next, slot * self.size..(slot + 1) * self.size);
    }

    fn fork(&mut self, backend: &dyn Backend, from: usize, to: usize) {
        backend.copy_within(&mut self.past, from * self.size..(from + 1) * self.size, to * self.size);
    }

    fn clear(&mut self, backend: &dyn Backend, slot: usize) {
        backend.clear_range(&mut self.past, slot * self.size..(slot + 1) * self.size);
    }
}

fn zeros(backend: &dyn Backend, len: usize, precision: Precision) -> Buffer {
    let mut buffer = Buffer::default();
    backend.clear(backend.size(&mut buffer, len, precision));
    buffer
}

impl KvCache {
    /// One sequence of up to so many tokens for each of `capacities`.
    pub(super) fn new(
        backend: &Arc<dyn Backend>,
        layers: impl Iterator<Item = Kept>,
        capacities: &[usize],
    ) -> Self {
        let mut rows = 0;
        let mut stretch = |capacity: &usize| {
            rows += capacity;
            rows - capacity..rows
        };
        let stretches: Vec<Range<usize>> = capacities.iter().map(&mut stretch).collect();
        let sequences = capacities.len();
        let layer = |kept| match kept {
            Kept::Rows { width } => {
                let values = || zeros(&**backend, rows * width, Precision::Rounded);
                LayerCache::Attention(KeysValues { k: values(), v: values(), width })
            }
            Kept::States { conv, scan } => LayerCache::Mamba(RecurrentState {
                conv: Slots::new(&**backend, sequences, conv),
                scan: Slots::new(&**backend, sequences, scan),
            }),
        };
        let layers = layers.map(layer).collect();
        Self { backend: backend.clone(), layers, lengths: vec![0; sequences], stretches }
    }

    /// Number of tokens each sequence holds.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Most tokens each sequence can hold.
    pub fn capacities(&self) -> impl Iterator<Item = usize> {
        self.stretches.iter().map(Range::len)
    }

    /// Forgets all but the first `len` tokens of a sequence. A sequence with Mamba layers can only be forgotten
    /// as a whole, for their state does not remember its way back.
    ///
    /// # Errors
    /// [`ModelError::CacheKeepsNoPast`] where only some tokens of such a sequence should go.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), ModelError> {
        if len >= self.lengths[sequence] {
            return Ok(());
        }
        let states = self.layers.iter_mut().filter_map(|layer| match layer {
            LayerCache::Attention(_) => None,
            LayerCache::Mamba(state) => Some(state),
        });
        for state in states {
            if len > 0 {
                return Err(ModelError::CacheKeepsNoPast { sequence, len });
            }
            state.conv.clear(&*self.backend, sequence);
            state.scan.clear(&*self.backend, sequence);
        }
        self.lengths[sequence] = len;
        Ok(())
    }

    /// Makes sequence `to`, which has room for it, hold what sequence `from` holds.
    pub fn fork(&mut self, from: usize, to: usize) {
        let (rows, source) = (self.lengths[from], self.stretches[from].start);
        assert!(rows <= self.stretches[to].len(), "BUG: a sequence forked into too little room");
        for layer in &mut self.layers {
            match layer {
                LayerCache::Attention(KeysValues { k, v, width }) => {
                    let target = self.stretches[to].start * *width;
                    for values in [k, v] {
                        let source = source * *width..(source + rows) * *width;
                        self.backend.copy_within(values, source, target);
                    }
                }
                LayerCache::Mamba(state) => {
                    state.conv.fork(&*self.backend, from, to);
                    state.scan.fork(&*self.backend, from, to);
                }
            }
        }
        self.lengths[to] = rows;
    }

    pub(super) fn layout(&self, tokens: &[&[u32]]) -> Result<CacheLayout, ModelError> {
        if tokens.len() != self.lengths.len() {
            return Err(ModelError::CacheSequences { expected: self.lengths.len(), got: tokens.len() });
        }
        let mut layout =
            CacheLayout { positions: Vec::new(), rows: Vec::new(), spans: Vec::new(), slots: Vec::new() };
        for (sequence, (fed, &past)) in tokens.iter().zip(&self.lengths).enumerate() {
            let tokens = past + fed.len();
            let Range { start: base, end } = self.stretches[sequence];
            if tokens > end - base {
                return Err(ModelError::CacheFull { sequence, tokens, capacity: end - base });
            }
            if fed.is_empty() {
                continue;
            }
            let first = layout.rows.len();
            layout.positions.extend(past..tokens);
            layout.rows.extend(base + past..base + tokens);
            layout.spans.push(Span {
                queries: first..first + fed.len(),
                keys: base..base + tokens,
                prefix: 0..0,
            });
            layout.slots.push(sequence);
        }
        Ok(layout)
    }

    pub(super) fn advance(&mut self, tokens: &[&[u32]]) {
        for (length, fed) in self.lengths.iter_mut().zip(tokens) {
            *length += fed.len();
        }
        for layer in &mut self.layers {
            let LayerCache::Mamba(state) = layer else { continue };
            for (slot, _) in tokens.iter().enumerate().filter(|(_, fed)| !fed.is_empty()) {
                state.conv.commit(&*self.backend, slot);
                state.scan.commit(&*self.backend, slot);
            }
        }
    }
}
