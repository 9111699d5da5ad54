//! Whether the operations are right on this machine: each one on the backend that a run would take, against plain loops
//! over the same values. For a GPU or CPU that nobody has tried before.

use std::time::Instant;

use serde::Serialize;
use tunesmith_engine::backend::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, Buffer, Compute, Convolution,
    LogitMap, Lora, LoraGradient, Reference, RopeTable, Rotation, Scan, ScanGradient, ScanInput, Span, Write,
};
use tunesmith_engine::matrix::{Bytes, Matrix, Values};
use tunesmith_engine::quant::Nf4;

use super::BenchError;

/// What a backend in f32 may be off by, and one that rounds to bfloat16, of the largest value: the latter rounds what it
/// hands from one operation to the next, too.
const TOLERANCES: (f64, f64) = (1e-4, 1.5e-2);
/// Added to the largest value: small differences of values near 1.
const FLOOR: f64 = 2e-2;

/// All operations.
#[derive(Debug, Serialize)]
pub(crate) struct SelfTest {
    pub(crate) numerics: String,
    pub(crate) ok: bool,
    pub(crate) operations: Vec<Checked>,
}

/// One operation.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    pub(crate) name: &'static str,
    pub(crate) shape: String,
    /// The largest difference, of the largest value.
    pub(crate) error: f64,
    pub(crate) allowed: f64,
    pub(crate) ok: bool,
    /// Of the first call, which brings the values along.
    pub(crate) ms: f64,
}

/// Runs every operation on the backend of `compute`.
pub(crate) fn selftest(compute: &Compute) -> Result<SelfTest, BenchError> {
    let backend = compute.backend()?;
    let numerics = compute.numerics()?;
    let allowed = if numerics.contains("bf16") { TOLERANCES.1 } else { TOLERANCES.0 };
    let mut test = Test { backend: &*backend, allowed, operations: Vec::new() };
    for (tokens, n, k) in [(1, 96, 64), (5, 200, 192), (150, 130, 320)] {
        test.linear(tokens, n, k);
    }
    test.rows();
    for (shared, lengths, heads, kv_heads, head_dim) in
        [(0, &[70, 3][..], 4, 2, 64), (20, &[40, 1, 33], 6, 2, 32), (0, &[65], 2, 1, 128)]
    {
        test.attention(shared, lengths, heads, kv_heads, head_dim);
    }
    test.head();
    test.recurrent();
    let ok = test.operations.iter().all(|operation| operation.ok);
    match backend.failure() {
        Some(failure) => Err(BenchError::Device(failure)),
        None => Ok(SelfTest { numerics, ok, operations: test.operations }),
    }
}

struct Test<'a> {
    backend: &'a dyn Backend,
    allowed: f64,
    operations: Vec<Checked>,
}

impl Test<'_> {
    /// Holds what `operation` gives against what it gives in plain loops.
    fn check(&mut self, name: &'static str, shape: String, operation: impl Fn(&dyn Backend) -> Vec<Buffer>) {
        let expected = operation(&Reference::EXACT);
        let start = Instant::now();
        let got = operation(self.backend);
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let errors = got.iter().zip(&expected).map(|(got, expected)| {
            let largest =
                expected.iter().fold(0.0, |largest: f64, value| largest.max(f64::from(value.abs())));
            let off = got.iter().zip(&**expected).map(|(got, expected)| f64::from((got - expected).abs()));
            off.fold(0.0, |worst, off| if off > worst || off.is_nan() { off } else { worst })
                / (largest + FLOOR)
        });
        let error =
            errors.fold(0.0, |worst, error| if error > worst || error.is_nan() { error } else { worst });
        let (allowed, ok) = (self.allowed, error <= self.allowed);
        self.operations.push(Checked { name, shape, error, allowed, ok, ms });
    }

    fn linear(&mut self, tokens: usize, n: usize, k: usize) {
        let weights = drawn(1, n * k);
        let narrow = weights.iter().flat_map(|value| value.to_le_bytes().into_iter().skip(2)).collect();
        let encodings =
            [("nf4", Values::Nf4(Nf4::encode(&weights))), ("bf16", Values::Bf16(Bytes::owned(narrow)))];
        for (encoding, values) in encodings {
            let weight = Matrix { rows: n, cols: k, values };
            self.check("linear", format!("{tokens} x {k} to {n}, {encoding}"), |backend| {
                let (mut y, mut dx) = (drawn(2, tokens * n), drawn(3, tokens * k));
                backend.linear(&mut y, &drawn(4, tokens * k), &weight, Write::Overwrite);
                backend.linear_backward(&mut dx, &drawn(5, tokens * n), &weight, Write::Add);
                vec![y, dx]
            });
            let rank = 16;
            self.check("lora", format!("{tokens} x {k} to {n}, {encoding}, rank {rank}"), |backend| {
                let (a, b) = (drawn(6, rank * k), drawn(7, n * rank));
                let lora = Lora { a: &a, b: &b, rank, scale: 0.5 };
                let (x, dy) = (drawn(4, tokens * k), drawn(5, tokens * n));
                let (mut y, mut h) = (Buffer::zeros(tokens * n), Buffer::zeros(tokens * rank));
                backend.adapted(&mut y, &mut h, &x, &weight, &lora);
                let (mut da, mut db) = (drawn(8, a.len()), drawn(9, b.len()));
                let (mut dx, mut dh) = (Buffer::zeros(x.len()), Buffer::zeros(tokens * rank));
                let gradient = LoraGradient { da: &mut da, db: &mut db };
                let to = (&mut dx, Write::Overwrite);
                backend.adapted_backward(gradient, to, &mut dh, &dy, &x, &h, &weight, &lora);
                vec![y, da, db, dx]
            });
        }
    }

    fn rows(&mut self) {
        for (tokens, c, group) in [(9, 576, 576), (33, 96, 32)] {
            self.check("norm", format!("{tokens} x {c} by {group}"), |backend| {
                let (x, weight) = (drawn(1, tokens * c), drawn(2, c));
                let (mut y, mut dx) = (Buffer::zeros(x.len()), drawn(4, x.len()));
                backend.rms_norm(&mut y, &x, &weight, group, 1e-5);
                backend.rms_norm_backward(&mut dx, &drawn(3, x.len()), &x, &weight, group, 1e-5);
                vec![y, dx]
            });
        }
        for activation in [Activation::Silu, Activation::GeluTanh] {
            self.check("glu", format!("5003, {activation:?}"), |backend| {
                let (mut gate, mut up) = (drawn(1, 5003), drawn(2, 5003));
                let mut y = Buffer::zeros(gate.len());
                backend.glu(&mut y, &gate, &up, activation);
                backend.glu_backward(&mut gate, &mut up, &drawn(3, 5003), activation);
                let mut sum = drawn(4, 5003);
                backend.add(&mut sum, &y);
                backend.scale(&mut sum, 0.5);
                vec![y, gate, up, sum]
            });
        }
        let angles = drawn(5, 40 * 16);
        let table = RopeTable {
            cos: angles.iter().map(|angle| angle.cos()).collect(),
            sin: angles.iter().map(|angle| angle.sin()).collect(),
        };
        let positions: Vec<usize> = (0..40).rev().collect();
        self.check("rope", "40 x 3 x 32".to_owned(), |backend| {
            let mut x = drawn(6, 40 * 3 * 32);
            backend.rope(&mut x, 3, 32, &table, &positions, Rotation::Forward);
            vec![x]
        });
    }

    fn attention(
        &mut self,
        shared: usize,
        lengths: &[usize],
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) {
        let mut spans: Vec<Span> = (shared > 0).then(|| Span::whole(0..shared)).into_iter().collect();
        let mut tokens = shared;
        for length in lengths {
            spans.push(Span { prefix: 0..shared, ..Span::whole(tokens..tokens + length) });
            tokens += length;
        }
        for (window, softcap) in [(None, None), (Some(9), Some(2.0))] {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let shape = AttentionShape { heads, kv_heads, head_dim, scale, softcap, window, spans: &spans };
            let title = format!("{shared} + {lengths:?}, {heads}/{kv_heads} x {head_dim}, window {window:?}");
            self.check("attention", title, |backend| {
                let (width, kv_width) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
                let (q, k, v) = (drawn(1, width), drawn(2, kv_width), drawn(3, kv_width));
                let (mut out, mut logsumexp) = (Buffer::zeros(width), Buffer::zeros(tokens * heads));
                backend.attention(&mut out, &mut logsumexp, &q, &k, &v, &shape);
                let [mut dq, mut dk, mut dv] = [width, kv_width, kv_width].map(Buffer::zeros);
                let gradient = AttentionGradient { dq: &mut dq, dk: &mut dk, dv: &mut dv };
                let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &out, logsumexp: &logsumexp };
                backend.attention_backward(gradient, &drawn(4, width), &saved, &shape, &mut Vec::new());
                vec![out, logsumexp, dq, dk, dv]
            });
        }
    }

    fn head(&mut self) {
        let (rows, vocabulary, c) = (40, 1001, 64);
        let head = Matrix::from_f32(vocabulary, c, &drawn(1, vocabulary * c));
        let targets: Vec<u32> = (0..rows).map(|row| (row * 37 % vocabulary) as u32).collect();
        for softcap in [None, Some(3.0)] {
            let map = LogitMap { scale: 0.5, softcap };
            self.check("cross-entropy", format!("{rows} x {c} to {vocabulary}, {map:?}"), |backend| {
                let mut hidden = Buffer::zeros(rows * c);
                backend.embed(&mut hidden, &head, &targets);
                let (mut nll, mut dhidden) = (vec![0.0; rows], Buffer::zeros(rows * c));
                let gradient = Some((&mut dhidden, 0.3));
                let mut scratch = Vec::new();
                backend.cross_entropy(&mut nll, gradient, &hidden, &targets, &head, map, &mut scratch);
                vec![hidden, nll.iter().map(|nll| *nll as f32).collect(), dhidden]
            });
        }
    }

    fn recurrent(&mut self) {
        let spans = [Span::whole(0..70), Span::whole(70..73)];
        let (tokens, channels, taps) = (73, 40, 4);
        let (weight, bias) = (drawn(1, channels * taps), drawn(2, channels));
        let conv = Convolution { weight: &weight, bias: &bias, taps, spans: &spans };
        self.check("convolution", format!("{tokens} x {channels} by {taps}"), |backend| {
            let x = drawn(3, tokens * channels);
            let (mut y, mut dx) = (Buffer::zeros(x.len()), Buffer::zeros(x.len()));
            backend.causal_conv(&mut y, &x, &conv, None);
            backend.causal_conv_backward(&mut dx, &drawn(4, x.len()), &x, &conv, &mut Vec::new());
            vec![y, dx]
        });
        let (heads, head_dim, groups, states) = (4, 32, 2, 16);
        let (dt_bias, skip) = (drawn(5, heads), drawn(6, heads));
        let rate: Buffer = drawn(7, heads).iter().map(|value| -1.5 - value).collect();
        let scan = Scan {
            heads,
            head_dim,
            groups,
            states,
            dt_bias: &dt_bias,
            rate: &rate,
            skip: &skip,
            dt_limits: (0.0, f32::INFINITY),
            spans: &spans,
        };
        self.check("scan", format!("{tokens} x {heads} x {head_dim} x {states}"), |backend| {
            let (x, dt) = (drawn(8, tokens * heads * head_dim), drawn(9, tokens * heads));
            let (b, c) = (drawn(10, tokens * groups * states), drawn(11, tokens * groups * states));
            let input = ScanInput { x: &x, b: &b, c: &c, dt: &dt };
            let mut y = Buffer::zeros(x.len());
            backend.scan(&mut y, &input, &scan, None);
            let [mut dx, mut db, mut dc, mut ddt] =
                [&x, &b, &c, &dt].map(|values| Buffer::zeros(values.len()));
            let gradient = ScanGradient { dx: &mut dx, db: &mut db, dc: &mut dc, ddt: &mut ddt, drate: None };
            backend.scan_backward(gradient, &drawn(12, x.len()), &input, &scan, &mut Vec::new());
            vec![y, dx, db, dc, ddt]
        });
    }
}

/// Values in ±1 that bfloat16 has, the same ones for the same seed.
fn drawn(seed: u64, count: usize) -> Buffer {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from_bits(((state >> 40) as f32 / (1 << 23) as f32 - 1.0).to_bits() & 0xFFFF_0000)
    };
    (0..count).map(|_| next()).collect()
}
