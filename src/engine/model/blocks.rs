//! The parts a decoder layer is built from. Each block has a forward and a backward over the rows of a pass,
//! says what it saves, and knows only the backend's operations and the adapter's pairs.

use super::noise::RowNoise;
use crate::adapter::Adapter;
use crate::backend::{Backend, Buffer, Precision, Span};

pub(super) mod attention;
pub(super) mod linear;
pub(super) mod mamba;
pub(super) mod mlp;
pub(super) mod norm;
pub(super) mod residual;
pub(super) mod rope;

/// What every block of one pass shares.
pub(super) struct Pass<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) adapter: Option<&'a Adapter>,
    /// Position of each row in its sequence.
    pub(super) positions: &'a [usize],
    /// One a sequence.
    pub(super) spans: &'a [Span],
    /// What is disturbed on purpose; none in an exact pass.
    pub(super) noise: Option<RowNoise>,
    /// The model's number: what is remembered of its weights is remembered by this.
    pub(super) model: u64,
}

impl Pass<'_> {
    /// Gives a buffer of activations the length `len`; contents are left over.
    pub(super) fn sized<'b>(&self, buffer: &'b mut Buffer, len: usize) -> &'b mut Buffer {
        self.backend.size(buffer, len, Precision::Rounded)
    }

    /// As [`Pass::sized`], for statistics and sums.
    pub(super) fn exact<'b>(&self, buffer: &'b mut Buffer, len: usize) -> &'b mut Buffer {
        self.backend.size(buffer, len, Precision::Exact)
    }
}
