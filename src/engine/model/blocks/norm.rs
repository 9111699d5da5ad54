//! RMS normalisation with a weight a channel.

use super::Pass;
use crate::model::workspace::sized;

/// y = x / sqrt(mean(x²) + epsilon) * weight.
pub(in crate::model) struct Norm {
    /// (C)
    pub(in crate::model) weight: Vec<f32>,
    /// Channels a mean is taken over; divides C.
    pub(in crate::model) group: usize,
    pub(in crate::model) epsilon: f32,
}

impl Norm {
    /// y (T,C) from x (T,C); overwrites y. Where x is heads of C channels, T counts all heads of all rows.
    pub(in crate::model) fn forward(&self, pass: &Pass<'_>, y: &mut Vec<f32>, x: &[f32]) {
        pass.backend.rms_norm(sized(y, x.len()), x, &self.weight, self.group, self.epsilon);
    }

    /// dx (T,C) += the gradient through the norm of dy (T,C).
    pub(in crate::model) fn backward(&self, pass: &Pass<'_>, dx: &mut [f32], dy: &[f32], x: &[f32]) {
        pass.backend.rms_norm_backward(dx, dy, x, &self.weight, self.group, self.epsilon);
    }
}
