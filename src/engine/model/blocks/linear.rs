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
use crate::backend::{Backend, Buffer, Lora, Precision, Write};
use crate::matrix::Matrix;
use crate::model::noise::Dropout;

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
    pub(in crate::model) bias: Option<Buffer>,
}

/// What a layer's adapter adds to it in one pass.
struct Adapted<'a> {
    lora: Lora<'a>,
    dora: Option<Dora<'a>>,
    dropout: Option<&'a Dropout>,
}

/// (out) each.
struct Dora<'a> {
    magnitude: &'a Buffer,
    norms: Arc<[f32]>,
}

impl Dora<'_> {
    /// g (out).
    fn factors(&self, pass: &Pass<'_>) -> Buffer {
        let magnitude = self.magnitude.host();
        let mut factors =
            magnitude.iter().zip(&*self.norms).map(|(magnitude, norm)| magnitude / norm).collect();
        pass.backend.place(&mut factors, Precision::Exact);
        factors
    }
}

/// What the backward of an adapted layer needs of its forward.
#[derive(Debug, Default)]
pub(in crate::model) struct PairActivations {
    /// x' · Aᵀ (T,R)
    h: Buffer,
    /// DoRA's z (T,out).
    z: Buffer,
}

/// Buffers of one backward at a time.
#[derive(Debug, Default)]
pub(in crate::model) struct PairScratch {
    /// The gradient of x' · Aᵀ (T,R).
    dh: Buffer,
    /// x' (T,in) and its gradient.
    input: Buffer,
    dinput: Buffer,
    /// The gradient of DoRA's z (T,out).
    dz: Buffer,
}

impl Linear {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        backend.place_matrix(&mut self.weight);
        self.bias.iter_mut().for_each(|bias| backend.place(bias, Precision::Exact));
    }

    /// y (T,out) from x (T,in).
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        y: &mut Buffer,
        saved: &mut PairActivations,
        x: &Buffer,
    ) {
        let tokens = x.len() / self.weight.cols;
        let y = pass.sized(y, tokens * self.weight.rows);
        let Some(adapted) = self.adapted(pass) else {
            pass.backend.linear(y, x, &self.weight, Write::Overwrite);
            return self.add_bias(pass, y);
        };
        let lora = &adapted.lora;
        let h = pass.sized(&mut saved.h, tokens * lora.rank);
        if adapted.dora.is_none() && adapted.dropout.is_none() {
            pass.backend.adapted(y, h, x, &self.weight, lora);
            return self.add_bias(pass, y);
        }
        pass.backend.linear(y, x, &self.weight, Write::Overwrite);
        let mut dropped = adapted.dropout.map(|dropout| dropout.scratch.borrow_mut());
        let input = match (adapted.dropout, &mut dropped) {
            (Some(dropout), Some(dropped)) => {
                let dropped = pass.sized(dropped, x.len());
                pass.backend.dropout(dropped, x, &dropout.of(self.index), Write::Overwrite);
                &*dropped
            }
            _ => x,
        };
        match &adapted.dora {
            None => {
                self.add_bias(pass, y);
                pass.backend.lora(y, h, input, lora);
            }
            Some(dora) => {
                let (z, factors) = (pass.sized(&mut saved.z, y.len()), dora.factors(pass));
                let write = match adapted.dropout {
                    Some(_) => {
                        pass.backend.linear(z, input, &self.weight, Write::Overwrite);
                        pass.backend.add_columns(y, z, None, -1.0, Write::Add);
                        Write::Add
                    }
                    None => {
                        pass.backend.copy(z, y);
                        Write::Overwrite
                    }
                };
                pass.backend.lora(z, h, input, lora);
                pass.backend.add_columns(y, z, Some(&factors), 1.0, write);
                self.add_bias(pass, y);
            }
        }
    }

    /// Adds to the gradients of the pair and of DoRA's magnitudes and, where `dx` (T,in) is given, writes or adds
    /// to it.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        mut dx: Option<(&mut Buffer, Write)>,
        scratch: &mut PairScratch,
        (dy, x, saved): (&Buffer, &Buffer, &PairActivations),
    ) {
        let Some(Adapted { lora, dora, dropout }) = self.adapted(pass) else {
            if let Some((dx, write)) = &mut dx {
                pass.backend.linear_backward(dx, dy, &self.weight, *write);
            }
            return;
        };
        let (h, tokens) = (&saved.h, x.len() / self.weight.cols);
        let PairScratch { dh, input, dinput, dz } = scratch;
        let dh = pass.sized(dh, tokens * lora.rank);
        if let Some(dora) = &dora {
            if let Some(gradient) = gradients.magnitude(self.index) {
                pass.backend.column_dots(gradient, dy, &saved.z, &dora.norms);
            }
            let dz = pass.sized(dz, dy.len());
            pass.backend.add_columns(dz, dy, Some(&dora.factors(pass)), 1.0, Write::Overwrite);
        }
        let Some(gradient) = gradients.lora(self.index) else { return };
        let pair_dy = if dora.is_some() { &*dz } else { dy };
        let Some(dropout) = dropout else {
            return match dx {
                None => pass.backend.lora_backward(gradient, None, dh, pair_dy, x, h, &lora),
                Some(dx) => {
                    pass.backend.adapted_backward(gradient, dx, dh, pair_dy, x, h, &self.weight, &lora);
                }
            };
        };
        let dropped = dropout.of(self.index);
        let input = pass.sized(input, x.len());
        pass.backend.dropout(input, x, &dropped, Write::Overwrite);
        let Some((dx, write)) = dx else {
            return pass.backend.lora_backward(gradient, None, dh, pair_dy, input, h, &lora);
        };
        pass.backend.linear_backward(dx, dy, &self.weight, write);
        let dinput = pass.sized(dinput, x.len());
        pass.backend.clear(dinput);
        pass.backend.lora_backward(gradient, Some(dinput), dh, pair_dy, input, h, &lora);
        if dora.is_some() {
            pass.backend.add_columns(dz, dy, None, -1.0, Write::Add);
            pass.backend.linear_backward(dinput, dz, &self.weight, Write::Add);
        }
        pass.backend.dropout(dx, dinput, &dropped, Write::Add);
    }

    /// Whether the pass adapts this layer.
    pub(in crate::model) fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        pass.adapter.is_some_and(|adapter| adapter.lora(self.index).is_some())
    }

    /// ‖W + scale·B·A‖ of each row (out); of W alone where the layer is not adapted.
    pub(in crate::model) fn row_norms(&self, backend: &dyn Backend, adapter: &Adapter) -> Vec<f32> {
        let (n, k) = (self.weight.rows, self.weight.cols);
        let lora = adapter.lora(self.index);
        let a = lora.map(|lora| Matrix::from_f32(lora.rank, k, &lora.a.host()));
        let (mut norms, weight) = (vec![0.0; n], self.weight.on_host());
        norms.par_chunks_mut(NORM_ROWS).enumerate().for_each(|(chunk, norms)| {
            let (start, mut rows) = (chunk * NORM_ROWS, Buffer::zeros(norms.len() * k));
            weight.decode(start * k, &mut rows);
            if let Some((lora, a)) = lora.zip(a.as_ref()) {
                let b = &lora.b[start * lora.rank..(start + norms.len()) * lora.rank];
                let b: Buffer = b.iter().map(|value| lora.scale * value).collect();
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

    fn add_bias(&self, pass: &Pass<'_>, y: &mut Buffer) {
        if let Some(bias) = &self.bias {
            pass.backend.add_bias(y, bias);
        }
    }
}
