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

pub use cpu::{Cpu, NoSuchSet, check_instruction_set};
pub use reference::Reference;

/// Which implementation of [`Backend`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Plain loops, one thread: the oracle of tests.
    Reference,
    /// The fast path on a CPU.
    Cpu,
    /// That in f32, where it would round the factors of products.
    #[cfg(test)]
    CpuExact,
    /// Plain loops that round these factors.
    #[cfg(test)]
    Naive,
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
    ///
    /// # Errors
    /// `TUNESMITH_CPU` names an instruction set that this CPU lacks.
    pub fn backend(&self) -> Result<Box<dyn Backend>, NoSuchSet> {
        Ok(match self.kind {
            BackendKind::Reference => Box::new(Reference::EXACT),
            BackendKind::Cpu => Box::new(Cpu::new(self.threads)?),
            #[cfg(test)]
            BackendKind::CpuExact => Box::new(Cpu::exact(self.threads)),
            #[cfg(test)]
            BackendKind::Naive => Box::new(Reference::BF16),
        })
    }
}

/// The numerics class of a backend in this process: results of one class are equal bit for bit. Of `Cpu`,
/// `cpu:fma-f32.N` (AVX2, AVX-512), `cpu:amx-bf16.N` (AMX, factors rounded), `cpu:neon-f32.N` or
/// `cpu:portable-f32.N`; `TUNESMITH_CPU` chooses among those that the CPU has.
pub fn numerics(kind: BackendKind) -> String {
    match kind {
        BackendKind::Reference => "reference:f32".to_owned(),
        BackendKind::Cpu => format!("cpu:{}", cpu::numerics()),
        #[cfg(test)]
        BackendKind::CpuExact | BackendKind::Naive => {
            unreachable!("BUG: no backend says that it is this kind")
        }
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

/// Rows of queries and the rows of keys they look back on: first those of `prefix`, then `keys`, of which the
/// queries are the last positions. Several spans may have the same prefix; its rows' own span has none.
///
/// ```text
/// rows      0 ─ prefix ─ P ─── a ─── A ──── b ──── B
/// span a    ▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ████████                       ▒ seen by all its queries
/// span b    ▒▒▒▒▒▒▒▒▒▒▒▒▒▒           ███████████████      █ seen by those not before it
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of q, of the output and of its saved log-sum-exp.
    pub queries: Range<usize>,
    /// Rows of k and v.
    pub keys: Range<usize>,
    /// Rows of k and v that precede `keys`; empty where the sequence stands whole.
    pub prefix: Range<usize>,
}

impl Span {
    /// A sequence that stands whole in `rows`.
    pub fn whole(rows: Range<usize>) -> Self {
        Self { queries: rows.clone(), keys: rows, prefix: 0..0 }
    }

    /// How many keys all queries see together, a window's at most each.
    pub fn pairs(&self, window: Option<usize>) -> usize {
        let seen = |query: usize| (self.past() + query + 1).min(window.unwrap_or(usize::MAX));
        (0..self.queries.len()).map(seen).sum()
    }

    /// Positions before that of the first query.
    fn past(&self) -> usize {
        self.prefix.len() + self.keys.len() - self.queries.len()
    }

    /// The row of the key at a position.
    fn key_row(&self, position: usize) -> usize {
        match position.checked_sub(self.prefix.len()) {
            None => self.prefix.start + position,
            Some(own) => self.keys.start + own,
        }
    }
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
    /// Factor of the scores; mostly 1 / sqrt(D).
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)` before they are masked.
    pub softcap: Option<f32>,
    /// A query sees this many keys at most, itself among them.
    pub window: Option<usize>,
    /// One span a sequence; nothing is seen across spans.
    pub spans: &'a [Span],
}

impl AttentionShape<'_> {
    /// The keys that a query sees of which `end` keys are not in its future.
    fn seen(&self, end: usize) -> Range<usize> {
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// The gate of a gated linear unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))
    GeluTanh,
}

/// What becomes of the head's products: `softcap * tanh(scale * x / softcap)`, or `scale * x`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitMap {
    pub scale: f32,
    pub softcap: Option<f32>,
}

impl LogitMap {
    /// Logits as the head gives them.
    pub const IDENTITY: Self = Self { scale: 1.0, softcap: None };
}

/// The state that sequences bring from earlier tokens and take along, one block of values a slot.
#[derive(Debug)]
pub struct Carry<'a> {
    /// The slot of each span.
    pub slots: &'a [usize],
    /// The state before the first row of each span.
    pub past: &'a [f32],
    /// Gets the state after the last row of each span; other slots stay as they are.
    pub next: &'a mut [f32],
}

/// A causal convolution of each channel by itself, over the query rows of spans.
#[derive(Debug, Clone, Copy)]
pub struct Convolution<'a> {
    /// (C,K): the last tap meets the row itself.
    pub weight: &'a [f32],
    /// (C)
    pub bias: &'a [f32],
    /// K, at least 2. A slot's state is its last K - 1 rows (K-1, C).
    pub taps: usize,
    pub spans: &'a [Span],
}

/// The constants of a Mamba2 scan, over the query rows of spans. A slot's state is (H,P,N).
#[derive(Debug, Clone, Copy)]
pub struct Scan<'a> {
    /// H
    pub heads: usize,
    /// P
    pub head_dim: usize,
    /// G: groups of B and C; divides `heads`.
    pub groups: usize,
    /// N
    pub states: usize,
    /// (H), added to dt before its softplus.
    pub dt_bias: &'a [f32],
    /// (H), negative: the state decays by exp(dt * rate).
    pub rate: &'a [f32],
    /// (H): what of x is added to y at once.
    pub skip: &'a [f32],
    /// Where dt is clamped after its softplus.
    pub dt_limits: (f32, f32),
    pub spans: &'a [Span],
}

/// What a scan reads.
#[derive(Debug, Clone, Copy)]
pub struct ScanInput<'a> {
    /// (T, H·P)
    pub x: &'a [f32],
    /// (T, G·N)
    pub b: &'a [f32],
    /// (T, G·N)
    pub c: &'a [f32],
    /// (T,H), before bias and softplus.
    pub dt: &'a [f32],
}

/// Where the gradients of a scan go; shapes of [`ScanInput`].
#[derive(Debug)]
pub struct ScanGradient<'a> {
    pub dx: &'a mut [f32],
    pub db: &'a mut [f32],
    pub dc: &'a mut [f32],
    pub ddt: &'a mut [f32],
    /// (T,H): what each row adds to the gradient of its head's rate, where that is wanted.
    pub drate: Option<&'a mut [f32]>,
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

    /// [`Backend::linear`] and [`Backend::lora`] in one: h (T,R) = x · Aᵀ; y (T,N) = x (T,K) · Wᵀ + scale * h · Bᵀ.
    /// Overwrites both.
    fn adapted(&self, y: &mut [f32], h: &mut [f32], x: &[f32], weight: &Matrix, lora: &Lora<'_>) {
        self.linear(y, x, weight, Write::Overwrite);
        self.lora(y, h, x, lora);
    }

    /// [`Backend::linear_backward`] and [`Backend::lora_backward`] in one: dx (T,K) = or += dy · W + dh · A.
    fn adapted_backward(
        &self,
        gradient: LoraGradient<'_>,
        (dx, write): (&mut [f32], Write),
        dh: &mut [f32],
        dy: &[f32],
        x: &[f32],
        h: &[f32],
        weight: &Matrix,
        lora: &Lora<'_>,
    ) {
        self.linear_backward(dx, dy, weight, write);
        self.lora_backward(gradient, Some(dx), dh, dy, x, h, lora);
    }

    /// y (T,N) += bias (N) in each row.
    fn add_bias(&self, y: &mut [f32], bias: &[f32]);

    /// y (T,C) = x / sqrt(mean(x²) + epsilon) * weight (C), row by row; the mean is of each `group` channels.
    fn rms_norm(&self, y: &mut [f32], x: &[f32], weight: &[f32], group: usize, epsilon: f32);

    /// dx (T,C) += the gradient through [`Backend::rms_norm`] of dy (T,C); recomputes the norm from x.
    fn rms_norm_backward(
        &self,
        dx: &mut [f32],
        dy: &[f32],
        x: &[f32],
        weight: &[f32],
        group: usize,
        epsilon: f32,
    );

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

    /// out (T, H·D) = softmax(q kᵀ * scale, causal) v per span and head; saves log-sum-exp (T,H).
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

    /// The backward of [`Backend::attention`] where queries and keys are the same rows. Overwrites dq, dk, dv; those
    /// of a prefix are sums over all spans that see it, in the spans' order.
    /// Probabilities are recomputed from `saved` log-sum-exp (T,H); `scratch` is grown as needed.
    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &[f32],
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (n) = activation(gate) * up.
    fn glu(&self, y: &mut [f32], gate: &[f32], up: &[f32], activation: Activation);

    /// Turns gate and up (n) into their gradients, in place, given dy (n).
    fn glu_backward(&self, gate: &mut [f32], up: &mut [f32], dy: &[f32], activation: Activation);

    /// y (T,C) = the rows of `table` (V,C) named by `tokens` (T).
    fn embed(&self, y: &mut [f32], table: &Matrix, tokens: &[u32]);

    /// nll (S) = `-log softmax(map(hidden (S,C) · headᵀ))[target]` per row. With `gradient`, also writes
    /// dhidden (S,C) = scale * d(sum nll)/d(hidden). Logits exist for a bounded chunk of rows at a time, in
    /// `scratch`.
    fn cross_entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut [f32], f32)>,
        hidden: &[f32],
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
        scratch: &mut Vec<f32>,
    );

    /// Applies `map` to logits (n) in place.
    fn map_logits(&self, logits: &mut [f32], map: LogitMap);

    /// y (n) += x (n).
    fn add(&self, y: &mut [f32], x: &[f32]);

    /// y (n) *= factor.
    fn scale(&self, y: &mut [f32], factor: f32);

    /// Parts (rows, width of each) = the columns of x (rows, sum of widths), from left to right.
    fn split(&self, parts: &mut [&mut [f32]], x: &[f32], rows: usize);

    /// The inverse of [`Backend::split`]: x (rows, sum of widths) = the parts side by side.
    fn join(&self, x: &mut [f32], parts: &[&[f32]], rows: usize);

    /// y (T,C) = `silu(bias + Σ weight[k] * x[t - K + 1 + k])`, the sum over the taps k. Rows before a span's
    /// first are those of its slot, or zero. Overwrites the rows of its spans.
    fn causal_conv(&self, y: &mut [f32], x: &[f32], conv: &Convolution<'_>, carry: Option<Carry<'_>>);

    /// dx (T,C) = the gradient through [`Backend::causal_conv`] of dy (T,C), spans beginning at zero.
    /// `scratch` is grown as needed.
    fn causal_conv_backward(
        &self,
        dx: &mut [f32],
        dy: &[f32],
        x: &[f32],
        conv: &Convolution<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (T, H·P): per head, S = exp(dt * rate) S + dt x ⊗ B and y = S C + skip x, row after row, where
    /// dt = clamp(softplus(dt + dt_bias)). S is that of the span's slot, or zero. Overwrites the rows of its
    /// spans.
    fn scan(&self, y: &mut [f32], input: &ScanInput<'_>, scan: &Scan<'_>, carry: Option<Carry<'_>>);

    /// The gradient through [`Backend::scan`] of dy (T, H·P), spans beginning at zero. Overwrites; states are
    /// recomputed. `scratch` is grown as needed.
    fn scan_backward(
        &self,
        gradient: ScanGradient<'_>,
        dy: &[f32],
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        scratch: &mut Vec<f32>,
    );
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
