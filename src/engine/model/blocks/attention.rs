//! Causal self-attention with grouped heads, over the sequences of a pass or over a cache of earlier keys and
//! values: rotary positions or none, norms over the heads of q and k or none, a window or none.

use super::Pass;
use super::linear::{Linear, PairActivations};
use super::norm::Norm;
use super::rope::RopeBuffer;
use crate::adapter::Gradients;
use crate::backend::{AttentionGradient, AttentionSaved, AttentionShape, Backend, Buffer, Rotation, Write};
use crate::model::cache::{CacheLayout, KeysValues};
use crate::model::workspace::Scratch;

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
    pub(in crate::model) q: Buffer,
    pub(in crate::model) k: Buffer,
    pub(in crate::model) v: Buffer,
    /// q and k before their norms; empty where they have none.
    plain: [Buffer; 2],
    /// The heads' outputs (T, H·D), before `o`.
    pub(in crate::model) attended: Buffer,
    /// (T,H)
    logsumexp: Buffer,
    /// Of q, k, v, o.
    pairs: [PairActivations; 4],
}

impl Attention {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        for linear in [&mut self.q, &mut self.k, &mut self.v, &mut self.o] {
            linear.place(backend);
        }
        if let Some(norms) = &mut self.norms {
            norms.q.place(backend);
            norms.k.place(backend);
        }
    }

    /// y (T,C) from x (T,C). With a cache, appends the new keys and values to the given rows of it first and
    /// attends to what it holds.
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        y: &mut Buffer,
        x: &Buffer,
        ropes: &[RopeBuffer],
        saved: &mut AttentionActivations,
        cache: Option<(&mut KeysValues, &CacheLayout)>,
    ) {
        let [pair_q, pair_k, pair_v, pair_o] = &mut saved.pairs;
        self.q.forward(pass, &mut saved.q, pair_q, x);
        self.k.forward(pass, &mut saved.k, pair_k, x);
        self.v.forward(pass, &mut saved.v, pair_v, x);
        if let Some(norms) = &self.norms {
            let [q, k] = &mut saved.plain;
            std::mem::swap(q, &mut saved.q);
            std::mem::swap(k, &mut saved.k);
            norms.q.forward(pass, &mut saved.q, q);
            norms.k.forward(pass, &mut saved.k, k);
        }
        self.rotate(pass, &mut saved.q, &mut saved.k, ropes, Rotation::Forward);
        let attended = pass.sized(&mut saved.attended, saved.q.len());
        let logsumexp = pass.exact(&mut saved.logsumexp, pass.positions.len() * self.heads);
        let shape = self.shape(pass);
        match cache {
            None => pass.backend.attention(attended, logsumexp, &saved.q, &saved.k, &saved.v, &shape),
            Some((cache, layout)) => {
                pass.backend.scatter_rows(&mut cache.k, &saved.k, &layout.rows);
                pass.backend.scatter_rows(&mut cache.v, &saved.v, &layout.rows);
                pass.backend.attention(attended, logsumexp, &saved.q, &cache.k, &cache.v, &shape);
            }
        }
        self.o.forward(pass, y, pair_o, &saved.attended);
    }

    /// Given dy (T,C) and the block's input x (T,C), adds to the adapter's gradients and writes
    /// `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &Buffer,
        ropes: &[RopeBuffer],
        saved: &AttentionActivations,
        needs_dx: bool,
    ) {
        let [pair_q, pair_k, pair_v, pair_o] = &saved.pairs;
        let Scratch { normed, dnormed, dattended, dq, dk, dv, dplain, pair: scratch_pair, backend, .. } =
            scratch;
        let dattended = pass.sized(dattended, saved.attended.len());
        let to_heads = Some((&mut *dattended, Write::Overwrite));
        self.o.backward(pass, gradients, to_heads, scratch_pair, (dy, &saved.attended, pair_o));
        let gradient = AttentionGradient {
            dq: pass.sized(dq, saved.q.len()),
            dk: pass.sized(dk, saved.k.len()),
            dv: pass.sized(dv, saved.v.len()),
        };
        let AttentionActivations { q, k, v, attended, logsumexp, plain, .. } = saved;
        let forward = AttentionSaved { q, k, v, out: attended, logsumexp };
        pass.backend.attention_backward(gradient, dattended, &forward, &self.shape(pass), backend);
        self.rotate(pass, dq, dk, ropes, Rotation::Backward);
        if let Some(norms) = &self.norms {
            for (norm, d, x) in [(&norms.q, &mut *dq, &plain[0]), (&norms.k, &mut *dk, &plain[1])] {
                pass.backend.clear(pass.sized(dplain, x.len()));
                norm.backward(pass, dplain, d, x);
                std::mem::swap(d, dplain);
            }
        }
        let dx = pass.sized(dnormed, normed.len());
        let parts = [
            (&self.q, &*dq, pair_q, Write::Overwrite),
            (&self.k, &*dk, pair_k, Write::Add),
            (&self.v, &*dv, pair_v, Write::Add),
        ];
        for (linear, dy, pair, write) in parts {
            let dx = needs_dx.then_some((&mut *dx, write));
            linear.backward(pass, gradients, dx, scratch_pair, (dy, normed, pair));
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
    ) -> Vec<(&'a Linear, &'a Buffer)> {
        vec![(&self.q, &saved.q), (&self.k, &saved.k), (&self.v, &saved.v)]
    }

    fn rotate(
        &self,
        pass: &Pass<'_>,
        q: &mut Buffer,
        k: &mut Buffer,
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
