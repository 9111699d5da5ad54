//! Measures the engine's operations one by one at the sizes of SmolLM2-135M, against what the machine's arithmetic
//! and memory give at most. Knows the backend's operations; nothing of models.
//!
//! The peak is the best of its rounds, a figure the median of its own. What only passes over memory is held
//! against reads of memory far beyond the caches; where it finds its values in a cache it may well be faster.

use std::time::Instant;

use serde::Serialize;
use tunesmith_engine::backend::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, BackendError, Buffer, Cpu,
    LogitMap, Lora, LoraGradient, RopeTable, Rotation, Span, Write,
};
use tunesmith_engine::matrix::{Bytes, Matrix, Values};
use tunesmith_engine::process::cpu_seconds;
use tunesmith_engine::quant::Nf4;

use super::{BenchError, median_and_spread};

/// SmolLM2-135M's numbers.
const HIDDEN: usize = 576;
const KEY_VALUE: usize = 192;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49_152;
const RANK: usize = 16;
/// (out, in) of its linear layers, and of a part of its head.
const LINEARS: [(usize, usize); 5] =
    [(HIDDEN, HIDDEN), (KEY_VALUE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (4096, HIDDEN)];

/// f32 values read for the memory's peak: 256 MiB, beyond the caches of common machines.
const MEMORY: usize = 64 << 20;
/// Rounds of multiply-adds timed at once: some milliseconds.
const SPINS: usize = 1 << 20;
/// Times the peak is measured.
const PEAKS: usize = 8;
/// Least time of what is timed at once.
const LEAST_SECONDS: f64 = 5e-3;

/// What the machine gives at most.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Peak {
    /// Billions of floating-point operations a second, by fused multiply-adds of the instruction set in use.
    pub(crate) thread_gflop_s: f64,
    pub(crate) gflop_s: f64,
    /// Billions of bytes read a second.
    pub(crate) thread_gb_s: f64,
    pub(crate) gb_s: f64,
}

/// Billions of floating-point operations a second that the threads of `cpu` do together at most.
pub(crate) fn peak_gflop_s(cpu: &Cpu) -> f64 {
    best(|| cpu.spin(SPINS)) / 1e9
}

fn peak(threads: usize, memory: usize) -> Result<Peak, BenchError> {
    let values = vec![1.0; memory];
    let new = |threads| Cpu::new(threads).map_err(BackendError::from);
    let (one, all) = (new(1)?, new(threads)?);
    Ok(Peak {
        thread_gflop_s: peak_gflop_s(&one),
        gflop_s: peak_gflop_s(&all),
        thread_gb_s: best(|| one.read(&values)) / 1e9,
        gb_s: best(|| all.read(&values)) / 1e9,
    })
}

/// The highest rate of `work`, which gives how much it did.
fn best(work: impl Fn() -> f64) -> f64 {
    (0..PEAKS)
        .map(|_| {
            let start = Instant::now();
            let done = work();
            done / start.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}

/// What is measured of the operations.
pub(crate) struct Kernels {
    pub(crate) threads: usize,
    /// Rows of activations: the tokens of a step.
    pub(crate) tokens: usize,
    pub(crate) rounds: usize,
}

/// What was measured of the operations.
#[derive(Debug, Serialize)]
pub(crate) struct KernelFigures {
    pub(crate) numerics: String,
    pub(crate) threads: usize,
    pub(crate) tokens: usize,
    pub(crate) peak: Peak,
    pub(crate) kernels: Vec<KernelFigure>,
}

/// One operation.
#[derive(Debug, Serialize)]
pub(crate) struct KernelFigure {
    pub(crate) name: &'static str,
    /// `576 to 1536, nf4`
    pub(crate) shape: String,
    pub(crate) ms: f64,
    /// Time on all cores together of the fastest round: what to compare where the machine is shared.
    pub(crate) cpu_ms: f64,
    /// Billions of `unit` a second.
    pub(crate) rate: f64,
    pub(crate) unit: Unit,
    pub(crate) spread: f64,
    pub(crate) peak_percent: f64,
}

/// What an operation is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Floating-point operations that the mathematics asks for, a multiply-add as two.
    #[serde(rename = "GFLOP/s")]
    Flops,
    /// Bytes of f32 values read and written.
    #[serde(rename = "GB/s")]
    Bytes,
}

impl Unit {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Flops => "GFLOP/s",
            Self::Bytes => "GB/s",
        }
    }
}

/// Measures every operation of a training step.
pub(crate) fn kernels(options: &Kernels) -> Result<KernelFigures, BenchError> {
    // As much memory as the operations need is enough of a machine for a quick look.
    let memory = if options.tokens < 256 { MEMORY / 16 } else { MEMORY };
    let mut bench = Bench {
        cpu: Cpu::new(options.threads).map_err(BackendError::from)?,
        tokens: options.tokens,
        rounds: options.rounds,
        peak: peak(options.threads, memory)?,
        figures: Vec::new(),
    };
    for (n, k) in LINEARS {
        bench.linear(n, k);
    }
    for (n, k) in &LINEARS[..4] {
        bench.lora(*n, *k);
    }
    bench.attention();
    bench.head();
    bench.row_wise();
    Ok(KernelFigures {
        numerics: bench.cpu.numerics(),
        threads: options.threads,
        tokens: options.tokens,
        peak: bench.peak,
        kernels: bench.figures,
    })
}

struct Bench {
    cpu: Cpu,
    tokens: usize,
    rounds: usize,
    peak: Peak,
    figures: Vec<KernelFigure>,
}

impl Bench {
    /// Times `run`, which does `amount` of `unit`.
    fn measure(
        &mut self,
        (name, shape): (&'static str, String),
        (amount, unit): (usize, Unit),
        mut run: impl FnMut(&Cpu) + Send,
    ) {
        let (cpu, rounds) = (&self.cpu, self.rounds);
        let (mut seconds, mut least_busy) = (Vec::with_capacity(rounds), f64::INFINITY);
        cpu.enter(&mut || {
            let mut time = |times: usize| {
                let (start, busy) = (Instant::now(), cpu_seconds());
                (0..times).for_each(|_| run(cpu));
                least_busy = least_busy.min((cpu_seconds() - busy) / times as f64);
                start.elapsed().as_secs_f64() / times as f64
            };
            // Warms up, too.
            let times = (LEAST_SECONDS / time(1)).ceil().clamp(1.0, 1000.0) as usize;
            seconds.extend((0..rounds).map(|_| time(times)));
        });
        let (median, spread) = median_and_spread(&seconds);
        let rate = amount as f64 / median / 1e9;
        let peak = match unit {
            Unit::Flops => self.peak.gflop_s,
            Unit::Bytes => self.peak.gb_s,
        };
        let (ms, cpu_ms, peak_percent) = (median * 1e3, least_busy * 1e3, 100.0 * rate / peak);
        self.figures.push(KernelFigure { name, shape, ms, cpu_ms, rate, unit, spread, peak_percent });
    }

    /// A frozen layer (n,k), forward and backward, in each encoding of weights.
    fn linear(&mut self, n: usize, k: usize) {
        let (x, mut y) = (drawn(self.tokens * k), drawn(self.tokens * n));
        let mut dx = Buffer::zeros(x.len());
        let weights = drawn(n * k);
        let bf16 = weights.iter().flat_map(|value| value.to_le_bytes().into_iter().skip(2)).collect();
        let encodings =
            [("nf4", Values::Nf4(Nf4::encode(&weights))), ("bf16", Values::Bf16(Bytes::owned(bf16)))];
        let work = (2 * self.tokens * n * k, Unit::Flops);
        for (encoding, values) in encodings {
            let (weight, shape) = (Matrix { rows: n, cols: k, values }, format!("{k} to {n}, {encoding}"));
            self.measure(("linear", shape.clone()), work, |cpu| {
                cpu.linear(&mut y, &x, &weight, Write::Overwrite);
            });
            self.measure(("linear backward", shape), work, |cpu| {
                cpu.linear_backward(&mut dx, &y, &weight, Write::Overwrite);
            });
        }
    }

    /// The pair beside a layer (n,k).
    fn lora(&mut self, n: usize, k: usize) {
        let (tokens, r) = (self.tokens, RANK);
        let (x, dy, mut y) = (drawn(tokens * k), drawn(tokens * n), drawn(tokens * n));
        let (a, b) = (drawn(r * k), drawn(n * r));
        let lora = Lora { a: &a, b: &b, rank: r, scale: 1e-3 };
        let (mut h, mut dh, mut dx) =
            (Buffer::zeros(tokens * r), Buffer::zeros(tokens * r), Buffer::zeros(tokens * k));
        let (mut da, mut db) = (Buffer::zeros(a.len()), Buffer::zeros(b.len()));
        let (shape, flops) = (format!("{k} to {n}, rank {r}"), 2 * tokens * r * (n + k));
        self.measure(("lora", shape.clone()), (flops, Unit::Flops), |cpu| {
            cpu.lora(&mut y, &mut h, &x, &lora);
        });
        self.measure(("lora backward", shape), (2 * flops, Unit::Flops), |cpu| {
            let gradient = LoraGradient { da: &mut da, db: &mut db };
            cpu.lora_backward(gradient, Some(&mut dx), &mut dh, &dy, &x, &h, &lora);
        });
    }

    /// Causal attention over one sequence, and over sequences of a quarter.
    fn attention(&mut self) {
        let tokens = self.tokens;
        let (q, k, v) = (drawn(tokens * HIDDEN), drawn(tokens * KEY_VALUE), drawn(tokens * KEY_VALUE));
        let dout = drawn(tokens * HIDDEN);
        let (mut out, mut logsumexp) = (Buffer::zeros(tokens * HIDDEN), Buffer::zeros(tokens * HEADS));
        let (mut dq, mut dk, mut dv) =
            (Buffer::zeros(q.len()), Buffer::zeros(k.len()), Buffer::zeros(v.len()));
        let mut scratch = Vec::new();
        for length in [tokens, tokens.div_ceil(4)] {
            let starts = (0..tokens).step_by(length);
            let spans: Vec<Span> =
                starts.map(|start| Span::whole(start..tokens.min(start + length))).collect();
            let shape = AttentionShape {
                heads: HEADS,
                kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                scale: 0.125,
                softcap: None,
                window: None,
                spans: &spans,
            };
            let pairs: usize = spans.iter().map(|span| span.pairs(None)).sum();
            let (title, product) = (format!("{} x {length}", spans.len()), 2 * pairs * HIDDEN);
            self.measure(("attention", title.clone()), (2 * product, Unit::Flops), |cpu| {
                cpu.attention(&mut out, &mut logsumexp, &q, &k, &v, &shape);
            });
            self.measure(("attention backward", title), (5 * product, Unit::Flops), |cpu| {
                let gradient = AttentionGradient { dq: &mut dq, dk: &mut dk, dv: &mut dv };
                let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &out, logsumexp: &logsumexp };
                cpu.attention_backward(gradient, &dout, &saved, &shape, &mut scratch);
            });
        }
    }

    /// Cross-entropy over the whole vocabulary, with its gradient.
    fn head(&mut self) {
        let rows = self.tokens;
        let weights = drawn(VOCABULARY * HIDDEN);
        let bf16 = weights.iter().flat_map(|value| value.to_le_bytes().into_iter().skip(2)).collect();
        let head = Matrix { rows: VOCABULARY, cols: HIDDEN, values: Values::Bf16(Bytes::owned(bf16)) };
        let (hidden, mut dhidden) = (drawn(rows * HIDDEN), Buffer::zeros(rows * HIDDEN));
        let targets: Vec<u32> = (0..rows).map(|row| (row * 37 % VOCABULARY) as u32).collect();
        let (mut nll, mut scratch) = (vec![0.0; rows], Vec::new());
        let flops = 4 * rows * VOCABULARY * HIDDEN;
        let shape = format!("{HIDDEN} to {VOCABULARY}, bf16");
        self.measure(("cross-entropy", shape), (flops, Unit::Flops), |cpu| {
            let gradient = Some((&mut dhidden, 1e-3));
            let map = LogitMap::IDENTITY;
            cpu.cross_entropy(&mut nll, gradient, &hidden, &targets, &head, map, &mut scratch);
        });
    }

    /// What passes over activations row by row or value by value.
    fn row_wise(&mut self) {
        let tokens = self.tokens;
        let (x, dy, weight) = (drawn(tokens * HIDDEN), drawn(tokens * HIDDEN), drawn(HIDDEN));
        let mut y = Buffer::zeros(x.len());
        let bytes = |values: usize| (values * size_of::<f32>(), Unit::Bytes);
        let hidden = format!("{HIDDEN}");
        self.measure(("norm", hidden.clone()), bytes(2 * y.len()), |cpu| {
            cpu.rms_norm(&mut y, &x, &weight, HIDDEN, 1e-5);
        });
        self.measure(("norm backward", hidden.clone()), bytes(4 * y.len()), |cpu| {
            cpu.rms_norm_backward(&mut y, &dy, &x, &weight, HIDDEN, 1e-5);
        });
        self.measure(("add", hidden.clone()), bytes(3 * y.len()), |cpu| cpu.add(&mut y, &x));
        let positions: Vec<usize> = (0..tokens).collect();
        let angles = drawn(tokens * HEAD_DIM / 2);
        let table = RopeTable { cos: angles.clone(), sin: angles };
        self.measure(("rope", hidden), bytes(2 * y.len()), |cpu| {
            cpu.rope(&mut y, HEADS, HEAD_DIM, &table, &positions, Rotation::Forward);
        });
        let (mut gate, mut up) = (drawn(tokens * INTERMEDIATE), drawn(tokens * INTERMEDIATE));
        let mut wide = drawn(tokens * INTERMEDIATE);
        let shape = format!("{INTERMEDIATE}");
        self.measure(("glu", shape.clone()), bytes(3 * gate.len()), |cpu| {
            cpu.glu(&mut wide, &gate, &up, Activation::Silu);
        });
        self.measure(("glu backward", shape), bytes(5 * gate.len()), |cpu| {
            cpu.glu_backward(&mut gate, &mut up, &wide, Activation::Silu);
        });
    }
}

/// A fixed sequence of values in ±0.5.
fn drawn(count: usize) -> Buffer {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}
