//! RMS normalisation with a weight a channel.

use super::Pass;
use crate::model::workspace::sized;

/// y = x / sqrt(mean(x²) + epsilon) * weight.
pub(in crate::model) struct Norm {
    /// (C)
    pub(in crate::model) weight: Vec<f32>,
    pub(in crate::model) epsilon: f32,
}

impl Norm {
    /// y (T,C) from x (T,C); overwrites y.
    pub(in crate::model) fn forward(&self, pass: &Pass<'_>, y: &mut Vec<f32>, x: &[f32]) {
        pass.backend.rms_norm(sized(y, x.len()), x, &self.weight, self.epsilon);
    }

    /// dx (T,C) += the gradient through the norm of dy (T,C).
    pub(in crate::model) fn backward(&self, pass: &Pass<'_>, dx: &mut [f32], dy: &[f32], x: &[f32]) {
        pass.backend.rms_norm_backward(dx, dy, x, &self.weight, self.epsilon);
    }
}
