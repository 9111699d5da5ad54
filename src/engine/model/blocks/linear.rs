//! A linear layer: a frozen weight in any encoding, perhaps a bias, perhaps a LoRA pair from the adapter.

use super::Pass;
use crate::adapter::Gradients;
use crate::backend::Write;
use crate::matrix::Matrix;
use crate::model::workspace::sized;

/// y = x · Wᵀ + bias + scale * (x · Aᵀ) · Bᵀ.
pub(in crate::model) struct Linear {
    /// `model.layers.0.self_attn.q_proj`
    pub(in crate::model) name: String,
    /// Place among the model's linear layers: what the adapter knows it by.
    pub(in crate::model) index: usize,
    /// (out, in)
    pub(in crate::model) weight: Matrix,
    /// (out)
    pub(in crate::model) bias: Option<Vec<f32>>,
}

impl Linear {
    /// y (T,out) from x (T,in). Saves x · Aᵀ (T,R) in `h` for the backward.
    pub(in crate::model) fn forward(&self, pass: &Pass<'_>, y: &mut Vec<f32>, h: &mut Vec<f32>, x: &[f32]) {
        let tokens = x.len() / self.weight.cols;
        let y = sized(y, tokens * self.weight.rows);
        pass.backend.linear(y, x, &self.weight, Write::Overwrite);
        if let Some(bias) = &self.bias {
            pass.backend.add_bias(y, bias);
        }
        if let Some(lora) = self.lora(pass) {
            pass.backend.lora(y, sized(h, tokens * lora.rank), x, &lora);
        }
    }

    /// Adds to the pair's gradients and, where `dx` (T,in) is given, writes or adds to it.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        mut dx: Option<(&mut [f32], Write)>,
        dh: &mut Vec<f32>,
        (dy, x, h): (&[f32], &[f32], &[f32]),
    ) {
        if let Some((dx, write)) = &mut dx {
            pass.backend.linear_backward(dx, dy, &self.weight, *write);
        }
        if let Some((lora, gradient)) = self.lora(pass).zip(gradients.lora(self.index)) {
            let dx = dx.map(|(dx, _)| dx);
            pass.backend.lora_backward(gradient, dx, sized(dh, h.len()), dy, x, h, &lora);
        }
    }

    /// Whether the pass adapts this layer.
    pub(in crate::model) fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        self.lora(pass).is_some()
    }

    fn lora<'a>(&self, pass: &Pass<'a>) -> Option<crate::backend::Lora<'a>> {
        pass.adapter?.lora(self.index)
    }
}
