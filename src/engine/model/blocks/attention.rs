//! Causal self-attention with grouped heads, over the sequences of a pass or over a cache of earlier keys and
//! values: rotary positions or none, norms over the heads of q and k or none, a window or none.

use super::Pass;
use super::linear::Linear;
use super::norm::Norm;
use super::rope::RopeBuffer;
use crate::adapter::Gradients;
use crate::backend::{AttentionGradient, AttentionSaved, AttentionShape, Rotation, Write};
use crate::model::cache::{CacheLayout, KeysValues};
use crate::model::workspace::{Scratch, sized};

/// o(attention(rope(norm(q(x))), rope(norm(k(x))), v(x))).
pub(in crate::model) struct Attention {
    pub(in crate::model) q: Linear,
    pub(in crate::model) k: Linear,
    pub(in crate::model) v: Linear,
    pub(in crate::model) o: Linear,
    pub(in crate::model) heads: usize,
    pub(in crate::model) kv_heads: usize,
    pub(in crate::model) head_dim: usize,
    pub(in crate::model) norms: Option<HeadNorms>,
    /// Which of the model's ropes turns q and k.
    pub(in crate::model) rope: Option<usize>,
    /// Factor of the scores.
    pub(in crate::model) scale: f32,
    pub(in crate::model) softcap: Option<f32>,
    /// Keys a query sees at most.
    pub(in crate::model) window: Option<usize>,
}

/// Norms over each head (D) of q and of k.
pub(in crate::model) struct HeadNorms {
    pub(in crate::model) q: Norm,
    pub(in crate::model) k: Norm,
}

/// What the backward needs: q and k after norm and rotation.
#[derive(Debug, Default)]
pub(in crate::model) struct AttentionActivations {
    pub(in crate::model) q: Vec<f32>,
    pub(in crate::model) k: Vec<f32>,
    pub(in crate::model) v: Vec<f32>,
    /// q and k before their norms; empty where they have none.
    plain: [Vec<f32>; 2],
    /// The heads' outputs (T, H·D), before `o`.
    pub(in crate::model) attended: Vec<f32>,
    /// (T,H)
    logsumexp: Vec<f32>,
    /// x · Aᵀ of q, k, v, o.
    h: [Vec<f32>; 4],
}

impl Attention {
    /// y (T,C) from x (T,C). With a cache, appends the new keys and values to the given rows of it first and
    /// attends to what it holds.
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        y: &mut Vec<f32>,
        x: &[f32],
        ropes: &[RopeBuffer],
        saved: &mut AttentionActivations,
        cache: Option<(&mut KeysValues, &CacheLayout)>,
    ) {
        let [hq, hk, hv, ho] = &mut saved.h;
        self.q.forward(pass, &mut saved.q, hq, x);
        self.k.forward(pass, &mut saved.k, hk, x);
        self.v.forward(pass, &mut saved.v, hv, x);
        if let Some(norms) = &self.norms {
            let [q, k] = &mut saved.plain;
            std::mem::swap(q, &mut saved.q);
            std::mem::swap(k, &mut saved.k);
            norms.q.forward(pass, &mut saved.q, q);
            norms.k.forward(pass, &mut saved.k, k);
        }
        self.rotate(pass, &mut saved.q, &mut saved.k, ropes, Rotation::Forward);
        let attended = sized(&mut saved.attended, saved.q.len());
        let logsumexp = sized(&mut saved.logsumexp, pass.positions.len() * self.heads);
        let shape = self.shape(pass);
        match cache {
            None => pass.backend.attention(attended, logsumexp, &saved.q, &saved.k, &saved.v, &shape),
            Some((cache, layout)) => {
                store(&mut cache.k, &saved.k, &layout.rows);
                store(&mut cache.v, &saved.v, &layout.rows);
                pass.backend.attention(attended, logsumexp, &saved.q, &cache.k, &cache.v, &shape);
            }
        }
        self.o.forward(pass, y, ho, &saved.attended);
    }

    /// Given dy (T,C) and the block's input x (T,C), adds to the adapter's gradients and writes
    /// `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &[f32],
        ropes: &[RopeBuffer],
        saved: &AttentionActivations,
        needs_dx: bool,
    ) {
        let [hq, hk, hv, ho] = &saved.h;
        let Scratch { normed, dnormed, dattended, dq, dk, dv, dplain, dh, backend, .. } = scratch;
        let dattended = sized(dattended, saved.attended.len());
        let to_heads = Some((&mut *dattended, Write::Overwrite));
        self.o.backward(pass, gradients, to_heads, dh, (dy, &saved.attended, ho));
        let gradient = AttentionGradient {
            dq: sized(dq, saved.q.len()),
            dk: sized(dk, saved.k.len()),
            dv: sized(dv, saved.v.len()),
        };
        let AttentionActivations { q, k, v, attended, logsumexp, plain, .. } = saved;
        let forward = AttentionSaved { q, k, v, out: attended, logsumexp };
        pass.backend.attention_backward(gradient, dattended, &forward, &self.shape(pass), backend);
        self.rotate(pass, dq, dk, ropes, Rotation::Backward);
        if let Some(norms) = &self.norms {
            for (norm, d, x) in [(&norms.q, &mut *dq, &plain[0]), (&norms.k, &mut *dk, &plain[1])] {
                sized(dplain, x.len()).fill(0.0);
                norm.backward(pass, dplain, d, x);
                std::mem::swap(d, dplain);
            }
        }
        let dx = sized(dnormed, normed.len());
        let parts = [
            (&self.q, &*dq, hq, Write::Overwrite),
            (&self.k, &*dk, hk, Write::Add),
            (&self.v, &*dv, hv, Write::Add),
        ];
        for (linear, dy, h, write) in parts {
            let dx = needs_dx.then_some((&mut *dx, write));
            linear.backward(pass, gradients, dx, dh, (dy, normed, h));
        }
    }

    /// The linear layers in the order of the forward pass.
    pub(in crate::model) fn linears(&self) -> Vec<&Linear> {
        vec![&self.q, &self.k, &self.v, &self.o]
    }

    /// Each linear layer but the last with what it gave.
    pub(in crate::model) fn outputs<'a>(
        &'a self,
        saved: &'a AttentionActivations,
    ) -> Vec<(&'a Linear, &'a [f32])> {
        vec![(&self.q, &saved.q), (&self.k, &saved.k), (&self.v, &saved.v)]
    }

    fn rotate(
        &self,
        pass: &Pass<'_>,
        q: &mut [f32],
        k: &mut [f32],
        ropes: &[RopeBuffer],
        rotation: Rotation,
    ) {
        let Some(rope) = self.rope else { return };
        let table = &ropes[rope].table;
        pass.backend.rope(q, self.heads, self.head_dim, table, pass.positions, rotation);
        pass.backend.rope(k, self.kv_heads, self.head_dim, table, pass.positions, rotation);
    }

    fn shape<'a>(&self, pass: &Pass<'a>) -> AttentionShape<'a> {
        let Self { heads, kv_heads, head_dim, scale, softcap, window, .. } = *self;
        AttentionShape { heads, kv_heads, head_dim, scale, softcap, window, spans: pass.spans }
    }
}

/// Copies the rows of `new` to the rows of `cache` named by `rows`.
fn store(cache: &mut [f32], new: &[f32], rows: &[usize]) {
    let width = new.len() / rows.len();
    for (values, &row) in new.chunks_exact(width).zip(rows) {
        cache[row * width..(row + 1) * width].copy_from_slice(values);
    }
}
