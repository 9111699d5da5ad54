//! Keys and values of tokens already seen, so that decoding costs one token a step. Each sequence has its own
//! stretch of `capacity` rows and its own length; sequences advance independently.

use super::ModelError;
use crate::backend::Span;

/// Keys (after rotation) and values of several sequences, for every layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    capacity: usize,
}

/// One layer's (sequences · capacity, kv_heads·D) keys and values.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// Where newly fed tokens go.
pub(super) struct CacheLayout {
    /// Position of each fed token in its sequence.
    pub(super) positions: Vec<usize>,
    /// Row of the cache of each fed token.
    pub(super) rows: Vec<usize>,
    /// Queries: fed rows; keys: rows of the cache. One span a sequence that advances.
    pub(super) spans: Vec<Span>,
}

impl CacheLayout {
    /// The last fed row of each sequence that advances.
    pub(super) fn last_rows(&self) -> Vec<usize> {
        self.spans.iter().map(|span| span.queries.end - 1).collect()
    }
}

impl KvCache {
    pub(super) fn new(layers: usize, width: usize, sequences: usize, capacity: usize) -> Self {
        let size = sequences * capacity * width;
        let layer = || LayerCache { k: vec![0.0; size], v: vec![0.0; size] };
        Self { layers: (0..layers).map(|_| layer()).collect(), lengths: vec![0; sequences], capacity }
    }

    /// Number of tokens each sequence holds.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Most tokens a sequence can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `len` tokens of a sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        self.lengths[sequence] = self.lengths[sequence].min(len);
    }

    /// Makes sequence `to` hold what sequence `from` holds.
    pub fn fork(&mut self, from: usize, to: usize) {
        let rows = self.lengths[from];
        for layer in &mut self.layers {
            for values in [&mut layer.k, &mut layer.v] {
                let stretch = values.len() / self.lengths.len();
                let start = from * stretch;
                values.copy_within(start..start + stretch / self.capacity.max(1) * rows, to * stretch);
            }
        }
        self.lengths[to] = rows;
    }

    pub(super) fn layout(&self, tokens: &[&[u32]]) -> Result<CacheLayout, ModelError> {
        if tokens.len() != self.lengths.len() {
            return Err(ModelError::CacheSequences { expected: self.lengths.len(), got: tokens.len() });
        }
        let mut layout = CacheLayout { positions: Vec::new(), rows: Vec::new(), spans: Vec::new() };
        for (sequence, (fed, &past)) in tokens.iter().zip(&self.lengths).enumerate() {
            let tokens = past + fed.len();
            if tokens > self.capacity {
                return Err(ModelError::CacheFull { sequence, tokens, capacity: self.capacity });
            }
            if fed.is_empty() {
                continue;
            }
            let (first, base) = (layout.rows.len(), sequence * self.capacity);
            layout.positions.extend(past..tokens);
            layout.rows.extend(base + past..base + tokens);
            layout.spans.push(Span { queries: first..first + fed.len(), keys: base..base + tokens });
        }
        Ok(layout)
    }

    pub(super) fn advance(&mut self, tokens: &[&[u32]]) {
        for (length, fed) in self.lengths.iter_mut().zip(tokens) {
            *length += fed.len();
        }
    }
}
