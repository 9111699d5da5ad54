//! Which rows see which: the sequences that attention, convolutions and scans run over.

use std::ops::Range;

/// Rows of queries and the rows of keys they look back on: first those of `prefix`, then `keys`, of which the
/// queries are the last positions. Several spans may have the same prefix; its rows' own span has none.
///
/// ```text
/// rows      0 ─ prefix ─ P ─── a ─── A ──── b ──── B
/// span a    ▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ████████                       ▒ seen by all its queries
/// span b    ▒▒▒▒▒▒▒▒▒▒▒▒▒▒           ███████████████      █ seen by those not before it
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of q, of the output and of its saved log-sum-exp.
    pub queries: Range<usize>,
    /// Rows of k and v.
    pub keys: Range<usize>,
    /// Rows of k and v that precede `keys`; empty where the sequence stands whole.
    pub prefix: Range<usize>,
}

impl Span {
    /// A sequence that stands whole in `rows`.
    pub fn whole(rows: Range<usize>) -> Self {
        Self { queries: rows.clone(), keys: rows, prefix: 0..0 }
    }

    /// How many keys all queries see together, a window's at most each.
    pub fn pairs(&self, window: Option<usize>) -> usize {
        let seen = |query: usize| (self.past() + query + 1).min(window.unwrap_or(usize::MAX));
        (0..self.queries.len()).map(seen).sum()
    }

    /// Positions before that of the first query.
    pub(super) fn past(&self) -> usize {
        self.prefix.len() + self.keys.len() - self.queries.len()
    }

    /// The row of the key at a position.
    pub(super) fn key_row(&self, position: usize) -> usize {
        match position.checked_sub(self.prefix.len()) {
            None => self.prefix.start + position,
            Some(own) => self.keys.start + own,
        }
    }
}

/// Heads of an attention operation and the sequences it runs over.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    /// H: heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// D
    pub head_dim: usize,
    /// Factor of the scores; mostly 1 / sqrt(D).
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)` before they are masked.
    pub softcap: Option<f32>,
    /// A query sees this many keys at most, itself among them.
    pub window: Option<usize>,
    /// One span a sequence; nothing is seen across spans.
    pub spans: &'a [Span],
}

impl AttentionShape<'_> {
    /// The keys that a query sees of which `end` keys are not in its future.
    pub(super) fn seen(&self, end: usize) -> Range<usize> {
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}
