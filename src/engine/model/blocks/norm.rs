//! RMS normalisation with a weight a channel.

use super::Pass;
use crate::backend::{Backend, Buffer, Precision};

/// y = x / sqrt(mean(x²) + epsilon) * weight.
pub(in crate::model) struct Norm {
    /// (C)
    pub(in crate::model) weight: Buffer,
    /// Channels a mean is taken over; divides C.
    pub(in crate::model) group: usize,
    pub(in crate::model) epsilon: f32,
}

impl Norm {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        backend.place(&mut self.weight, Precision::Exact);
    }

    /// y (T,C) from x (T,C); overwrites y. Where x is heads of C channels, T counts all heads of all rows.
    pub(in crate::model) fn forward(&self, pass: &Pass<'_>, y: &mut Buffer, x: &Buffer) {
        pass.backend.rms_norm(pass.sized(y, x.len()), x, &self.weight, self.group, self.epsilon);
    }

    /// dx (T,C) += the gradient through the norm of dy (T,C).
    pub(in crate::model) fn backward(&self, pass: &Pass<'_>, dx: &mut Buffer, dy: &Buffer, x: &Buffer) {
        pass.backend.rms_norm_backward(dx, dy, x, &self.weight, self.group, self.epsilon);
    }
}
