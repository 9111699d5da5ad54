//! A linear layer: a frozen weight in any encoding, perhaps a bias, perhaps a LoRA pair from the adapter, perhaps
//! DoRA's magnitudes, perhaps dropout on the pair's input. The only place that knows how these combine; they do
//! as in PEFT's `lora/layer.py` and `lora/dora.py`.
//!
//! With x' = dropout(x), z = x' · Wᵀ + scale · x' · Aᵀ · Bᵀ and g = magnitude / ‖W + scale·B·A‖ by row:
//! ```text
//! LoRA   y = x · Wᵀ + bias + scale · x' · Aᵀ · Bᵀ
//! DoRA   y = (x − x') · Wᵀ + g · z + bias               the norm counts as a constant in the backward
//! ```

use std::sync::Arc;

use rayon::prelude::*;

use super::Pass;
use crate::adapter::{Adapter, Gradients};
use crate::backend::{Backend, Lora, Write};
use crate::matrix::Matrix;
use crate::model::noise::Dropout;
use crate::model::workspace::sized;

/// Rows of a weight whose norms are taken at a time.
const NORM_ROWS: usize = 128;

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

/// What a layer's adapter adds to it in one pass.
struct Adapted<'a> {
    lora: Lora<'a>,
    dora: Option<Dora<'a>>,
    dropout: Option<&'a Dropout>,
}

/// (out) each.
struct Dora<'a> {
    magnitude: &'a [f32],
    norms: Arc<[f32]>,
}

impl Dora<'_> {
    /// g (out).
    fn factors(&self) -> Vec<f32> {
        self.magnitude.iter().zip(&*self.norms).map(|(magnitude, norm)| magnitude / norm).collect()
    }
}

impl Linear {
    /// y (T,out) from x (T,in). Saves x' · Aᵀ (T,R) in `h` for the backward, and after it DoRA's z (T,out).
    pub(in crate::model) fn forward(&self, pass: &Pass<'_>, y: &mut Vec<f32>, h: &mut Vec<f32>, x: &[f32]) {
        let tokens = x.len() / self.weight.cols;
        let y = sized(y, tokens * self.weight.rows);
        let Some(adapted) = self.adapted(pass) else {
            pass.backend.linear(y, x, &self.weight, Write::Overwrite);
            return self.add_bias(pass, y);
        };
        if adapted.dora.is_none() && adapted.dropout.is_none() {
            let h = sized(h, tokens * adapted.lora.rank);
            pass.backend.adapted(y, h, x, &self.weight, &adapted.lora);
            return self.add_bias(pass, y);
        }
        pass.backend.linear(y, x, &self.weight, Write::Overwrite);
        let mut dropped = adapted.dropout.map(|dropout| dropout.scratch.borrow_mut());
        let input = match (adapted.dropout, &mut dropped) {
            (Some(dropout), Some(dropped)) => {
                dropout.forward(sized(dropped, x.len()), x, self.index);
                &dropped[..]
            }
            _ => x,
        };
        let (lora, saved) = (&adapted.lora, tokens * adapted.lora.rank);
        match &adapted.dora {
            None => {
                self.add_bias(pass, y);
                pass.backend.lora(y, sized(h, saved), input, lora);
            }
            Some(dora) => {
                let (h, z) = sized(h, saved + y.len()).split_at_mut(saved);
                if adapted.dropout.is_some() {
                    pass.backend.linear(z, input, &self.weight, Write::Overwrite);
                    by_row(y, z, &[], |y, z, _| *y -= z);
                    pass.backend.lora(z, h, input, lora);
                    by_row(y, z, &dora.factors(), |y, z, factor| *y += factor * z);
                } else {
                    z.copy_from_slice(y);
                    pass.backend.lora(z, h, input, lora);
                    by_row(y, z, &dora.factors(), |y, z, factor| *y = factor * z);
                }
                self.add_bias(pass, y);
            }
        }
    }

    /// Adds to the gradients of the pair and of DoRA's magnitudes and, where `dx` (T,in) is given, writes or adds
    /// to it. `scratch` is grown as needed.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        mut dx: Option<(&mut [f32], Write)>,
        scratch: &mut Vec<f32>,
        (dy, x, h): (&[f32], &[f32], &[f32]),
    ) {
        let Some(Adapted { lora, dora, dropout }) = self.adapted(pass) else {
            if let Some((dx, write)) = &mut dx {
                pass.backend.linear_backward(dx, dy, &self.weight, *write);
            }
            return;
        };
        let tokens = x.len() / self.weight.cols;
        let (dropped, scaled) = (dropout.map_or(0, |_| x.len()), dora.as_ref().map_or(0, |_| dy.len()));
        let buffers = sized(scratch, tokens * lora.rank + 2 * dropped + scaled);
        let (dh, buffers) = buffers.split_at_mut(tokens * lora.rank);
        let (input, buffers) = buffers.split_at_mut(dropped);
        let (dinput, dz) = buffers.split_at_mut(dropped);
        let (h, z) = h.split_at(tokens * lora.rank);
        if let Some(dora) = &dora {
            if let Some(gradient) = gradients.magnitude(self.index) {
                magnitude_backward(gradient, dy, z, &dora.norms);
            }
            by_row(dz, dy, &dora.factors(), |dz, dy, factor| *dz = factor * dy);
        }
        let Some(gradient) = gradients.lora(self.index) else { return };
        let Some(dropout) = dropout else {
            let dz = if dora.is_some() { &*dz } else { dy };
            return match dx {
                None => pass.backend.lora_backward(gradient, None, dh, dz, x, h, &lora),
                Some(dx) => pass.backend.adapted_backward(gradient, dx, dh, dz, x, h, &self.weight, &lora),
            };
        };
        dropout.forward(input, x, self.index);
        let Some((dx, write)) = dx else {
            let dz = if dora.is_some() { &*dz } else { dy };
            return pass.backend.lora_backward(gradient, None, dh, dz, input, h, &lora);
        };
        pass.backend.linear_backward(dx, dy, &self.weight, write);
        dinput.fill(0.0);
        if dora.is_some() {
            pass.backend.lora_backward(gradient, Some(dinput), dh, dz, input, h, &lora);
            by_row(dz, dy, &[], |dz, dy, _| *dz -= dy);
            pass.backend.linear_backward(dinput, dz, &self.weight, Write::Add);
        } else {
            pass.backend.lora_backward(gradient, Some(dinput), dh, dy, input, h, &lora);
        }
        dropout.backward(dx, dinput, self.index);
    }

    /// Whether the pass adapts this layer.
    pub(in crate::model) fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        pass.adapter.is_some_and(|adapter| adapter.lora(self.index).is_some())
    }

    /// ‖W + scale·B·A‖ of each row (out); of W alone where the layer is not adapted.
    pub(in crate::model) fn row_norms(&self, backend: &dyn Backend, adapter: &Adapter) -> Vec<f32> {
        let (n, k) = (self.weight.rows, self.weight.cols);
        let lora = adapter.lora(self.index);
        let a = lora.map(|lora| Matrix::from_f32(lora.rank, k, lora.a));
        let mut norms = vec![0.0; n];
        norms.par_chunks_mut(NORM_ROWS).enumerate().for_each(|(chunk, norms)| {
            let (start, mut rows) = (chunk * NORM_ROWS, vec![0.0; norms.len() * k]);
            self.weight.decode(start * k, &mut rows);
            if let Some((lora, a)) = lora.zip(a.as_ref()) {
                let b = &lora.b[start * lora.rank..(start + norms.len()) * lora.rank];
                let b: Vec<f32> = b.iter().map(|value| lora.scale * value).collect();
                // The rows of B·A are what the backward of a layer with weight A makes of the rows of B.
                backend.linear_backward(&mut rows, &b, a, Write::Add);
            }
            for (norm, row) in norms.iter_mut().zip(rows.chunks_exact(k)) {
                *norm = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt() as f32;
            }
        });
        norms
    }

    fn adapted<'a>(&self, pass: &'a Pass<'_>) -> Option<Adapted<'a>> {
        let adapter = pass.adapter?;
        let lora = adapter.lora(self.index)?;
        let norms = || self.row_norms(pass.backend, adapter);
        let dora = adapter.dora(self.index, pass.model, norms);
        let dropout = pass.noise.as_ref().and_then(|noise| noise.dropout.as_ref());
        Some(Adapted { lora, dora: dora.map(|(magnitude, norms)| Dora { magnitude, norms }), dropout })
    }

    fn add_bias(&self, pass: &Pass<'_>, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            pass.backend.add_bias(y, bias);
        }
    }
}

/// Combines each value of `out` with that of `x` (T,N) and the factor of its column (N); without factors, 1.
fn by_row(out: &mut [f32], x: &[f32], factors: &[f32], combine: fn(&mut f32, f32, f32)) {
    assert_eq!(out.len(), x.len(), "BUG: shapes of a linear layer's outputs");
    if factors.is_empty() {
        return out.iter_mut().zip(x).for_each(|(out, &x)| combine(out, x, 1.0));
    }
    let n = factors.len();
    out.par_chunks_exact_mut(n).zip(x.par_chunks_exact(n)).for_each(|(out, x)| {
        for ((out, &x), &factor) in out.iter_mut().zip(x).zip(factors) {
            combine(out, x, factor);
        }
    });
}

/// dmagnitude (out) += Σ dy · z / norm over the rows.
fn magnitude_backward(gradient: &mut [f32], dy: &[f32], z: &[f32], norms: &[f32]) {
    let mut sums = vec![0.0f64; norms.len()];
    for (dy, z) in dy.chunks_exact(norms.len()).zip(z.chunks_exact(norms.len())) {
        for ((sum, &dy), &z) in sums.iter_mut().zip(dy).zip(z) {
            *sum += f64::from(dy) * f64::from(z);
        }
    }
    for ((gradient, sum), &norm) in gradient.iter_mut().zip(sums).zip(norms) {
        *gradient += (sum / f64::from(norm)) as f32;
    }
}
