//! The operations a model is made of, over row-major buffers: the seam between models and machines.
//! Every operation is forward or hand-written backward of one step of a decoder; there is no graph and no
//! autograd. Knows nothing of layers, adapters' names or files.
//!
//! Row counts follow from buffer lengths (T = x.len() / K); lengths that do not fit are a bug of the caller
//! and are asserted. Each operation says whether it overwrites or adds. Results never depend on the number
//! of threads: work is split by shape alone and every sum has a fixed order.
//!
//! ```text
//!            ┌─► Reference   plain loops, the oracle
//! Backend ───┤
//!            └─► Cpu         tiles decoded once per pass, vectorised products, a pool of threads
//! ```

use std::fmt::Debug;
use std::ops::Range;

use crate::matrix::Matrix;

mod compute;
#[cfg(test)]
mod conformance;
mod cpu;
mod cuda;
mod host;
mod memory;
mod reference;
mod spans;

pub use compute::{BackendError, BackendKind, Compute};
pub use cpu::{Cpu, NoSuchSet, check_instruction_set, instruction_sets};
#[cfg(test)]
pub(crate) use cuda::simulator::Simulator;
pub use cuda::{
    CudaError, DeviceError, DeviceMatrix, Gpu, NvrtcError, Toolkit, cuda_version, keep_kernels_in,
};
pub use host::Dropped;
pub use memory::{Buffer, Precision};
pub use reference::Reference;
pub use spans::{AttentionShape, Span};

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
    pub a: &'a Buffer,
    /// (out, R)
    pub b: &'a Buffer,
    /// R
    pub rank: usize,
    /// alpha / R, or alpha / sqrt(R).
    pub scale: f32,
}

/// Gradients of one LoRA pair, added to.
#[derive(Debug)]
pub struct LoraGradient<'a> {
    /// (R, in)
    pub da: &'a mut Buffer,
    /// (out, R)
    pub db: &'a mut Buffer,
}

/// Cosines and sines of rotary angles, (positions, D/2) each.
#[derive(Debug, Clone, Default)]
pub struct RopeTable {
    /// cos(position * frequency)
    pub cos: Buffer,
    /// sin(position * frequency)
    pub sin: Buffer,
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
    pub past: &'a Buffer,
    /// Gets the state after the last row of each span; other slots stay as they are.
    pub next: &'a mut Buffer,
}

/// A causal convolution of each channel by itself, over the query rows of spans.
#[derive(Debug, Clone, Copy)]
pub struct Convolution<'a> {
    /// (C,K): the last tap meets the row itself.
    pub weight: &'a Buffer,
    /// (C)
    pub bias: &'a Buffer,
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
    pub dt_bias: &'a Buffer,
    /// (H), negative: the state decays by exp(dt * rate).
    pub rate: &'a Buffer,
    /// (H): what of x is added to y at once.
    pub skip: &'a Buffer,
    /// Where dt is clamped after its softplus.
    pub dt_limits: (f32, f32),
    pub spans: &'a [Span],
}

/// What a scan reads.
#[derive(Debug, Clone, Copy)]
pub struct ScanInput<'a> {
    /// (T, H·P)
    pub x: &'a Buffer,
    /// (T, G·N)
    pub b: &'a Buffer,
    /// (T, G·N)
    pub c: &'a Buffer,
    /// (T,H), before bias and softplus.
    pub dt: &'a Buffer,
}

/// Where the gradients of a scan go; shapes of [`ScanInput`].
#[derive(Debug)]
pub struct ScanGradient<'a> {
    pub dx: &'a mut Buffer,
    pub db: &'a mut Buffer,
    pub dc: &'a mut Buffer,
    pub ddt: &'a mut Buffer,
    /// (T,H): what each row adds to the gradient of its head's rate, where that is wanted.
    pub drate: Option<&'a mut Buffer>,
}

/// The memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What nobody uses.
    pub free: u64,
    /// What this backend took at most.
    pub peak: u64,
}

/// The largest shapes that a backend computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Channels of a head of attention.
    pub head_dim: usize,
    /// States of a scan.
    pub states: usize,
    /// Taps of a convolution.
    pub taps: usize,
}

/// The operations of a decoder and their gradients.
pub trait Backend: Debug + Send + Sync {
    /// Which implementation this is.
    fn kind(&self) -> BackendKind;

    /// The numerics class: results of one class are equal bit for bit. Of `Cpu`, `cpu:fma-f32.N` (AVX2, AVX-512),
    /// `cpu:amx-bf16.N` (AMX, factors rounded), `cpu:neon-f32.N` or `cpu:portable-f32.N`; `TUNESMITH_CPU` chooses
    /// among those that the CPU has. Of `Cuda`, `cuda:sm_90-bf16.N`.
    fn numerics(&self) -> String;

    /// Runs `work` where this backend's operations start cheapest (inside its thread pool).
    fn enter(&self, work: &mut (dyn FnMut() + Send));

    /// Why what was asked of this backend lately was not done, if it was not: the results are then useless.
    fn failure(&self) -> Option<DeviceError> {
        None
    }

    /// The memory of the device, where this backend computes on one.
    fn device_memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// The largest shapes that this backend computes, where it has limits.
    fn limits(&self) -> Option<Limits> {
        None
    }

    /// Gives `buffer` the length `len` where this backend computes; contents are left over.
    fn size<'b>(&self, buffer: &'b mut Buffer, len: usize, precision: Precision) -> &'b mut Buffer {
        let _ = precision;
        buffer.resize_host(len);
        buffer
    }

    /// Brings values to where this backend computes.
    fn place(&self, buffer: &mut Buffer, precision: Precision) {
        let _ = (buffer, precision);
    }

    /// Brings a weight to where this backend computes.
    fn place_matrix(&self, matrix: &mut Matrix) {
        let _ = matrix;
    }

    /// y (T,N) = or += x (T,K) · Wᵀ, with W (N,K) in any encoding.
    fn linear(&self, y: &mut Buffer, x: &Buffer, weight: &Matrix, write: Write);

    /// dx (T,K) = or += dy (T,N) · W (N,K): the backward of [`Backend::linear`] to its input.
    fn linear_backward(&self, dx: &mut Buffer, dy: &Buffer, weight: &Matrix, write: Write);

    /// h (T,R) = x (T,K) · Aᵀ; y (T,N) += scale * h · Bᵀ. Overwrites h, which is for the backward of the same backend
    /// (a device keeps it multiplied by the scale), adds to y.
    fn lora(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, lora: &Lora<'_>);

    /// dB += scale * dyᵀ · h; dh (T,R) = scale * dy · B; dA += dhᵀ · x; dx (T,K) += dh · A if asked for.
    fn lora_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: Option<&mut Buffer>,
        dh: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        h: &Buffer,
        lora: &Lora<'_>,
    );

    /// [`Backend::linear`] and [`Backend::lora`] in one: h (T,R) = x · Aᵀ; y (T,N) = x (T,K) · Wᵀ + scale * h · Bᵀ.
    /// Overwrites both.
    fn adapted(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, weight: &Matrix, lora: &Lora<'_>) {
        self.linear(y, x, weight, Write::Overwrite);
        self.lora(y, h, x, lora);
    }

    /// [`Backend::linear_backward`] and [`Backend::lora_backward`] in one: dx (T,K) = or += dy · W + dh · A.
    fn adapted_backward(
        &self,
        gradient: LoraGradient<'_>,
        (dx, write): (&mut Buffer, Write),
        dh: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        h: &Buffer,
        weight: &Matrix,
        lora: &Lora<'_>,
    ) {
        self.linear_backward(dx, dy, weight, write);
        self.lora_backward(gradient, Some(dx), dh, dy, x, h, lora);
    }

    /// y (T,N) += bias (N) in each row.
    fn add_bias(&self, y: &mut Buffer, bias: &Buffer);

    /// y (T,C) = x / sqrt(mean(x²) + epsilon) * weight (C), row by row; the mean is of each `group` channels.
    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, weight: &Buffer, group: usize, epsilon: f32);

    /// dx (T,C) += the gradient through [`Backend::rms_norm`] of dy (T,C); recomputes the norm from x.
    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        weight: &Buffer,
        group: usize,
        epsilon: f32,
    );

    /// Rotates the halves of each head of x (T, heads, D) in place by its row's position.
    fn rope(
        &self,
        x: &mut Buffer,
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
        out: &mut Buffer,
        logsumexp: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        shape: &AttentionShape<'_>,
    );

    /// The backward of [`Backend::attention`] where queries and keys are the same rows. Overwrites dq, dk, dv; those
    /// of a prefix are sums over all spans that see it, in the spans' order.
    /// Probabilities are recomputed from `saved` log-sum-exp (T,H); `scratch` is grown as needed.
    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (n) = activation(gate) * up.
    fn glu(&self, y: &mut Buffer, gate: &Buffer, up: &Buffer, activation: Activation);

    /// Turns gate and up (n) into their gradients, in place, given dy (n).
    fn glu_backward(&self, gate: &mut Buffer, up: &mut Buffer, dy: &Buffer, activation: Activation);

    /// y (T,C) = the rows of `table` (V,C) named by `tokens` (T).
    fn embed(&self, y: &mut Buffer, table: &Matrix, tokens: &[u32]);

    /// nll (S) = `-log softmax(map(hidden (S,C) · headᵀ))[target]` per row. With `gradient`, also writes
    /// dhidden (S,C) = scale * d(sum nll)/d(hidden). Logits exist for a bounded chunk of rows at a time, in
    /// `scratch`.
    fn cross_entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut Buffer, f32)>,
        hidden: &Buffer,
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
        scratch: &mut Vec<f32>,
    );

    /// Applies `map` to logits (n) in place.
    fn map_logits(&self, logits: &mut Buffer, map: LogitMap);

    /// y (n) += x (n).
    fn add(&self, y: &mut Buffer, x: &Buffer);

    /// y (T,V) = x (T,C) · headᵀ, as exact as can be.
    fn logits(&self, y: &mut Buffer, x: &Buffer, head: &Matrix) {
        self.linear(y, x, head, Write::Overwrite);
    }

    /// y (n) *= factor.
    fn scale(&self, y: &mut Buffer, factor: f32);

    /// Parts (rows, width of each) = the columns of x (rows, sum of widths), from left to right.
    fn split(&self, parts: &mut [&mut Buffer], x: &Buffer, rows: usize);

    /// The inverse of [`Backend::split`]: x (rows, sum of widths) = the parts side by side.
    fn join(&self, x: &mut Buffer, parts: &[&Buffer], rows: usize);

    /// y (T,C) = `silu(bias + Σ weight[k] * x[t - K + 1 + k])`, the sum over the taps k. Rows before a span's
    /// first are those of its slot, or zero. Overwrites the rows of its spans.
    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>);

    /// dx (T,C) = the gradient through [`Backend::causal_conv`] of dy (T,C), spans beginning at zero.
    /// `scratch` is grown as needed.
    fn causal_conv_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        conv: &Convolution<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (T, H·P): per head, S = exp(dt * rate) S + dt x ⊗ B and y = S C + skip x, row after row, where
    /// dt = clamp(softplus(dt + dt_bias)). S is that of the span's slot, or zero. Overwrites the rows of its
    /// spans.
    fn scan(&self, y: &mut Buffer, input: &ScanInput<'_>, scan: &Scan<'_>, carry: Option<Carry<'_>>);

    /// The gradient through [`Backend::scan`] of dy (T, H·P), spans beginning at zero. Overwrites; states are
    /// recomputed. `scratch` is grown as needed.
    fn scan_backward(
        &self,
        gradient: ScanGradient<'_>,
        dy: &Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        scratch: &mut Vec<f32>,
    );

    /// y (n) = x (n).
    fn copy(&self, y: &mut Buffer, x: &Buffer) {
        y.copy_from_slice(x);
    }

    /// y (n) = 0.
    fn clear(&self, y: &mut Buffer) {
        y.fill(0.0);
    }

    /// y (S,C): its row i = row `rows[i]` of x (T,C).
    fn gather_rows(&self, y: &mut Buffer, x: &Buffer, rows: &[usize]) {
        host::gather_rows(y, x, rows);
    }

    /// Row `rows[i]` of y (T,C) = row i of x (S,C); other rows stay.
    fn scatter_rows(&self, y: &mut Buffer, x: &Buffer, rows: &[usize]) {
        host::scatter_rows(y, x, rows);
    }

    /// The values of y that begin at `to` = those in `from`.
    fn copy_within(&self, y: &mut Buffer, from: Range<usize>, to: usize) {
        y.copy_within(from, to);
    }

    /// The values of y in `range` = those of x there.
    fn copy_range(&self, y: &mut Buffer, x: &Buffer, range: Range<usize>) {
        y[range.clone()].copy_from_slice(&x[range]);
    }

    /// The values of y in `range` = 0.
    fn clear_range(&self, y: &mut Buffer, range: Range<usize>) {
        y[range].fill(0.0);
    }

    /// y (T,N) = or += factor * x (T,N), one factor a column (N); without factors, `sign`, which they are
    /// multiplied by.
    fn add_columns(&self, y: &mut Buffer, x: &Buffer, factors: Option<&Buffer>, sign: f32, write: Write) {
        host::add_columns(y, x, factors.map(|factors| &**factors), sign, write);
    }

    /// sums (N) += Σ dy (T,N) · z (T,N) / divisor (N) over the rows.
    fn column_dots(&self, sums: &mut Buffer, dy: &Buffer, z: &Buffer, divisors: &[f32]) {
        let (dy, z) = (dy.host(), z.host());
        sums.update(|sums| host::column_dots(sums, &dy, &z, divisors));
    }

    /// y (T,K) = or += x (T,K), with the values dropped that `dropped` says.
    fn dropout(&self, y: &mut Buffer, x: &Buffer, dropped: &Dropped<'_>, write: Write) {
        let x = x.host();
        y.update(|y| host::dropout(y, &x, dropped, write));
    }

    /// x (T,C) += uniform noise in ±alpha / sqrt(L·C), from the stream of its row (T), L the tokens of the row's
    /// sequence (T).
    fn add_noise(&self, x: &mut Buffer, rows: &[u64], lengths: &[usize], alpha: f32) {
        x.update(|x| host::add_noise(x, rows, lengths, alpha));
    }

    /// Whether no value is infinite or not a number.
    fn is_finite(&self, x: &Buffer) -> bool {
        host::is_finite(x)
    }

    /// The gradients (H) of the logarithm of a scan's decay rate, of what it adds to y at once and of dt's bias, added
    /// to: from dy and x (T, H·P), `drate` and `ddt` (T,H). Each head's sum runs over the rows in their order.
    fn scan_constants_backward(
        &self,
        gradients: [&mut Buffer; 3],
        rate: &Buffer,
        (dy, x): (&Buffer, &Buffer),
        (drate, ddt): (&Buffer, &Buffer),
    ) {
        let (rate, values, steps) = (rate.host(), (dy.host(), x.host()), (drate.host(), ddt.host()));
        let sums = host::scan_constants(&rate, (&values.0, &values.1), (&steps.0, &steps.1));
        for (gradient, which) in gradients.into_iter().zip(0..) {
            gradient
                .update(|values| values.iter_mut().zip(&sums).for_each(|(value, sum)| *value += sum[which]));
        }
    }
}

/// Where the gradients of an attention go: dq (T, H·D), dk and dv (T, kv_heads·D).
#[derive(Debug)]
pub struct AttentionGradient<'a> {
    pub dq: &'a mut Buffer,
    pub dk: &'a mut Buffer,
    pub dv: &'a mut Buffer,
}

/// What the forward attention read and wrote.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSaved<'a> {
    pub q: &'a Buffer,
    pub k: &'a Buffer,
    pub v: &'a Buffer,
    /// The output (T, H·D).
    pub out: &'a Buffer,
    /// (T,H)
    pub logsumexp: &'a Buffer,
}
