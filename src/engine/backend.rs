//! The operations a model is made of, over row-major f32 slices: the seam between models and machines.
//! Every operation is forward or hand-written backward of one step of a decoder; there is no graph and no
//! autograd. Knows nothing of layers, adapters' names or files.
//!
//! Row counts follow from slice lengths (T = x.len() / K); lengths that do not fit are a bug of the caller
//! and are asserted. Each operation says whether it overwrites or adds. Results never depend on the number
//! of threads: work is split by shape alone and every sum has a fixed order.
//!
//! ```text
//!            ┌─► Reference   plain loops, the oracle
//! Backend ───┤
//!            └─► Cpu         tiles decoded once per pass, vectorised products, a pool of threads
//! ```

use std::ops::Range;

use crate::matrix::Matrix;

#[cfg(test)]
mod conformance;
mod cpu;
mod reference;

pub use cpu::Cpu;
pub use reference::Reference;

/// Which implementation of [`Backend`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Plain loops, one thread: the oracle of tests.
    Reference,
    /// The fast path on a CPU.
    Cpu,
}

/// Where and how wide to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// The implementation.
    pub kind: BackendKind,
    /// Threads of the `Cpu` backend; 0 means 1. Changes no result.
    pub threads: usize,
}

impl Compute {
    /// The backend this describes.
    pub fn backend(&self) -> Box<dyn Backend> {
        match self.kind {
            BackendKind::Reference => Box::new(Reference),
            BackendKind::Cpu => Box::new(Cpu::new(self.threads)),
        }
    }
}

/// The numerics class of a backend on this machine: results of one class are equal bit for bit.
pub fn numerics(kind: BackendKind) -> String {
    match kind {
        BackendKind::Reference => "reference:f32".to_owned(),
        BackendKind::Cpu => format!("cpu:{}", cpu::numerics()),
    }
}

/// Whether an operation replaces its destination or adds to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `y = …`
    Overwrite,
    /// `y += …`
    Add,
}

/// Forward or inverse rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// By the angle: the forward pass.
    Forward,
    /// By the negative angle: the backward pass, for a rotation's transpose is its inverse.
    Backward,
}

/// One LoRA pair: adds `scale * x · Aᵀ · Bᵀ` to a linear layer.
#[derive(Debug, Clone, Copy)]
pub struct Lora<'a> {
    /// (R, in)
    pub a: &'a [f32],
    /// (out, R)
    pub b: &'a [f32],
    /// R
    pub rank: usize,
    /// alpha / R, or alpha / sqrt(R).
    pub scale: f32,
}

/// Gradients of one LoRA pair, added to.
#[derive(Debug)]
pub struct LoraGradient<'a> {
    /// (R, in)
    pub da: &'a mut [f32],
    /// (out, R)
    pub db: &'a mut [f32],
}

/// Cosines and sines of rotary angles, (positions, D/2) each.
#[derive(Debug, Clone, Default)]
pub struct RopeTable {
    /// cos(position * frequency)
    pub cos: Vec<f32>,
    /// sin(position * frequency)
    pub sin: Vec<f32>,
}

/// Rows of queries and the rows of keys they look back on: the queries are the last positions of the keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of q, of the output and of its saved log-sum-exp.
    pub queries: Range<usize>,
    /// Rows of k and v.
    pub keys: Range<usize>,
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
    /// One span a sequence; nothing is seen across spans.
    pub spans: &'a [Span],
}

impl AttentionShape<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// The operations of a decoder and their gradients.
pub trait Backend: Send + Sync {
    /// Which implementation this is.
    fn kind(&self) -> BackendKind;

    /// Runs `work` where this backend's operations start cheapest (inside its thread pool).
    fn enter(&self, work: &mut (dyn FnMut() + Send));

    /// y (T,N) = or += x (T,K) · Wᵀ, with W (N,K) in any encoding.
    fn linear(&self, y: &mut [f32], x: &[f32], weight: &Matrix, write: Write);

    /// dx (T,K) = or += dy (T,N) · W (N,K): the backward of [`Backend::linear`] to its input.
    fn linear_backward(&self, dx: &mut [f32], dy: &[f32], weight: &Matrix, write: Write);

    /// h (T,R) = x (T,K) · Aᵀ; y (T,N) += scale * h · Bᵀ. Overwrites h, adds to y.
    fn lora(&self, y: &mut [f32], h: &mut [f32], x: &[f32], lora: &Lora<'_>);

    /// dB += scale * dyᵀ · h; dh (T,R) = scale * dy · B; dA += dhᵀ · x; dx (T,K) += dh · A if asked for.
    fn lora_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: Option<&mut [f32]>,
        dh: &mut [f32],
        dy: &[f32],
        x: &[f32],
        h: &[f32],
        lora: &Lora<'_>,
    );

    /// y (T,N) += bias (N) in each row.
    fn add_bias(&self, y: &mut [f32], bias: &[f32]);

    /// y (T,C) = x / sqrt(mean(x²) + epsilon) * weight, row by row.
    fn rms_norm(&self, y: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32);

    /// dx (T,C) += the gradient through [`Backend::rms_norm`] of dy (T,C); recomputes the norm from x.
    fn rms_norm_backward(&self, dx: &mut [f32], dy: &[f32], x: &[f32], weight: &[f32], epsilon: f32);

    /// Rotates the halves of each head of x (T, heads, D) in place by its row's position.
    fn rope(
        &self,
        x: &mut [f32],
        heads: usize,
        head_dim: usize,
        table: &RopeTable,
        positions: &[usize],
        rotation: Rotation,
    );

    /// out (T, H·D) = softmax(q kᵀ / sqrt(D), causal) v per span and head; saves log-sum-exp (T,H).
    /// q is (T, H·D); k and v are (rows, kv_heads·D). Overwrites the rows of its spans.
    fn attention(
        &self,
        out: &mut [f32],
        logsumexp: &mut [f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        shape: &AttentionShape<'_>,
    );

    /// The backward of [`Backend::attention`] where queries and keys are the same rows. Overwrites dq, dk, dv.
    /// Probabilities are recomputed from `saved` log-sum-exp (T,H); `scratch` is grown as needed.
    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &[f32],
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (n) = silu(gate) * up.
    fn swiglu(&self, y: &mut [f32], gate: &[f32], up: &[f32]);

    /// Turns gate and up (n) into their gradients, in place, given dy (n).
    fn swiglu_backward(&self, gate: &mut [f32], up: &mut [f32], dy: &[f32]);

    /// y (T,C) = the rows of `table` (V,C) named by `tokens` (T).
    fn embed(&self, y: &mut [f32], table: &Matrix, tokens: &[u32]);

    /// nll (S) = `-log softmax(hidden (S,C) · headᵀ)[target]` per row. With `gradient`, also writes
    /// dhidden (S,C) = scale * d(sum nll)/d(hidden). Logits exist for a bounded chunk of rows at a time, in
    /// `scratch`.
    fn cross_entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut [f32], f32)>,
        hidden: &[f32],
        targets: &[u32],
        head: &Matrix,
        scratch: &mut Vec<f32>,
    );

    /// y (n) += x (n).
    fn add(&self, y: &mut [f32], x: &[f32]);
}

/// Where the gradients of an attention go: dq (T, H·D), dk and dv (T, kv_heads·D).
#[derive(Debug)]
pub struct AttentionGradient<'a> {
    pub dq: &'a mut [f32],
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
}

/// What the forward attention read and wrote.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSaved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// The output (T, H·D).
    pub out: &'a [f32],
    /// (T,H)
    pub logsumexp: &'a [f32],
}
