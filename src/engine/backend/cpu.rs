//! The fast backend on a CPU: every operation cut into tasks by shape alone, the tasks run on a pool of
//! threads, each output written by one task. Weights are decoded tile by tile next to the product that uses
//! them, once per pass over at most 512 tokens, and never stand in memory as a whole.
//!
//! Knows the operations' arithmetic but not the model that calls them. Products are written once per width of
//! register (`tile`) and compiled for the instruction sets of `kernel`, one of which is chosen at run time;
//! everything else is plain Rust compiled for several sets (`rows`), with sums in a fixed order of lanes, so only
//! products depend on the set.
//!
//! ```text
//! linear ──► decode ──► product        attention ──► product + rows        entropy ──► linear + rows
//! ```

use rayon::prelude::*;

use super::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, BackendKind, Buffer, Carry,
    Convolution, LogitMap, Lora, LoraGradient, RopeTable, Rotation, Scan, ScanGradient, ScanInput, Write,
};
use crate::matrix::Matrix;

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod conv;
mod entropy;
mod gemv;
mod kernel;
mod linear;
mod panel;
mod peak;
mod product;
mod rows;
mod scan;
mod scratch;
mod tile;
mod vector;

use kernel::Kernel;
use product::Shared;

/// Rows of activations a row-wise task takes.
const TASK_ROWS: usize = 32;
/// Values an elementwise task takes.
const TASK_VALUES: usize = 16 * 1024;

/// The vectorised backend with its own pool of threads.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    kernel: Kernel,
}

/// `TUNESMITH_CPU` names an instruction set that this CPU lacks, or none at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`TUNESMITH_CPU` asks for `{asked}`, which is no instruction set of this CPU; it has `{}`",
    here.join("`, `")
)]
pub struct NoSuchSet {
    asked: String,
    here: Vec<&'static str>,
}

/// Checks that the instruction set which `TUNESMITH_CPU` names is here.
///
/// # Errors
/// It is not.
pub fn check_instruction_set() -> Result<(), NoSuchSet> {
    Kernel::chosen().map(|_| ())
}

/// The instruction sets of this CPU, the slowest first, and the one whose products are taken.
///
/// # Errors
/// As [`check_instruction_set`].
pub fn instruction_sets() -> Result<(Vec<&'static str>, &'static str), NoSuchSet> {
    Ok((Kernel::here().into_iter().map(Kernel::name).collect(), Kernel::chosen()?.name()))
}

/// The numerics class of the backend in this process.
pub(super) fn numerics() -> Result<String, NoSuchSet> {
    Ok(named(Kernel::chosen()?))
}

fn named(kernel: Kernel) -> String {
    format!("cpu:{}", kernel.numerics())
}

impl Cpu {
    /// A backend with `threads` threads, at least one.
    ///
    /// # Errors
    /// `TUNESMITH_CPU` names an instruction set that is not here.
    pub fn new(threads: usize) -> Result<Self, NoSuchSet> {
        Ok(Self::with(Kernel::chosen()?, threads))
    }

    fn with(kernel: Kernel, threads: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("tunesmith-cpu-{index}"))
            .build()
            .expect("the system can start a handful of threads");
        Self { pool, kernel }
    }

    /// One for every instruction set of this CPU, by its name.
    #[cfg(test)]
    pub(super) fn all(threads: usize) -> Vec<(&'static str, Self)> {
        Kernel::here().into_iter().map(|kernel| (kernel.name(), Self::with(kernel, threads))).collect()
    }

    /// That of the fastest set which computes products in f32.
    #[cfg(test)]
    pub(super) fn exact(threads: usize) -> Self {
        let exact = Kernel::here().into_iter().rfind(|kernel| !kernel.rounds());
        Self::with(exact.expect("plain Rust is everywhere"), threads)
    }

    /// Whether products round their factors to bfloat16.
    #[cfg(test)]
    pub(super) fn rounds(&self) -> bool {
        self.kernel.rounds()
    }

    fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs tasks `0..tasks` in any order on the pool.
    fn run(&self, tasks: usize, task: impl Fn(usize) + Send + Sync) {
        match tasks {
            0 => {}
            1 => task(0),
            _ => self.pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(task)),
        }
    }

    /// Runs `task(start, rows)` over `values` cut at multiples of `step`.
    fn run_over(&self, values: &mut [f32], step: usize, task: impl Fn(usize, &mut [f32]) + Send + Sync) {
        let len = values.len();
        let shared = Shared::new(values);
        self.run(len.div_ceil(step), |index| {
            let range = index * step..len.min((index + 1) * step);
            let start = range.start;
            // SAFETY: the ranges of different tasks do not overlap.
            task(start, unsafe { shared.slice(range) });
        });
    }
}

impl Backend for Cpu {
    fn kind(&self) -> BackendKind {
        BackendKind::Cpu
    }

    fn numerics(&self) -> String {
        named(self.kernel)
    }

    fn enter(&self, work: &mut (dyn FnMut() + Send)) {
        self.pool.install(work);
    }

    fn linear(&self, y: &mut Buffer, x: &Buffer, weight: &Matrix, write: Write) {
        linear::forward(self, y, x, weight, write);
    }

    fn linear_backward(&self, dx: &mut Buffer, dy: &Buffer, weight: &Matrix, write: Write) {
        linear::backward(self, dx, dy, weight, write);
    }

    fn lora(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, lora: &Lora<'_>) {
        linear::lora_forward(self, y, h, x, lora);
    }

    fn lora_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: Option<&mut Buffer>,
        dh: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        h: &Buffer,
        lora: &Lora<'_>,
    ) {
        linear::lora_backward(self, gradient, dx.map(|dx| &mut **dx), dh, dy, x, h, lora);
    }

    fn adapted(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, weight: &Matrix, lora: &Lora<'_>) {
        linear::adapted_forward(self, y, h, x, weight, lora);
    }

    fn adapted_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: (&mut Buffer, Write),
        dh: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        h: &Buffer,
        weight: &Matrix,
        lora: &Lora<'_>,
    ) {
        let dx = (&mut **dx.0, dx.1);
        linear::adapted_backward(self, gradient, dx, dh, dy, x, h, weight, lora);
    }

    fn add_bias(&self, y: &mut Buffer, bias: &Buffer) {
        self.run_over(y, TASK_ROWS * bias.len(), |_, rows| {
            rows.chunks_exact_mut(bias.len()).for_each(|row| rows::add(row, bias));
        });
    }

    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, weight: &Buffer, group: usize, epsilon: f32) {
        assert_eq!(y.len(), x.len(), "BUG: shape of a norm");
        self.run_over(y, norm_step(weight), |start, y| {
            rows::rms_norm(y, &x[start..start + y.len()], weight, group, epsilon);
        });
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        weight: &Buffer,
        group: usize,
        epsilon: f32,
    ) {
        assert!(dx.len() == x.len() && dy.len() == x.len(), "BUG: shape of a norm");
        self.run_over(dx, norm_step(weight), |start, dx| {
            let range = start..start + dx.len();
            rows::rms_norm_backward(dx, &dy[range.clone()], &x[range], weight, group, epsilon);
        });
    }

    fn rope(
        &self,
        x: &mut Buffer,
        heads: usize,
        head_dim: usize,
        table: &RopeTable,
        positions: &[usize],
        rotation: Rotation,
    ) {
        let width = heads * head_dim;
        assert_eq!(x.len(), positions.len() * width, "BUG: shape of a rotation");
        let sign = match rotation {
            Rotation::Forward => 1.0,
            Rotation::Backward => -1.0,
        };
        self.run_over(x, TASK_ROWS * width, |start, x| {
            let positions = &positions[start / width..start / width + x.len() / width];
            rows::rope(x, heads, head_dim, &table.cos, &table.sin, positions, sign);
        });
    }

    fn attention(
        &self,
        out: &mut Buffer,
        logsumexp: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        shape: &AttentionShape<'_>,
    ) {
        attention::forward(self, out, logsumexp, q, k, v, shape);
    }

    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        scratch: &mut Vec<f32>,
    ) {
        attention::backward(self, gradient, dout, saved, shape, scratch);
    }

    fn glu(&self, y: &mut Buffer, gate: &Buffer, up: &Buffer, activation: Activation) {
        self.run_over(y, TASK_VALUES, |start, y| {
            let (gate, up) = (&gate[start..start + y.len()], &up[start..start + y.len()]);
            match activation {
                Activation::Silu => rows::swiglu(y, gate, up),
                Activation::GeluTanh => rows::geglu(y, gate, up),
            }
        });
    }

    fn glu_backward(&self, gate: &mut Buffer, up: &mut Buffer, dy: &Buffer, activation: Activation) {
        assert!(gate.len() == dy.len() && up.len() == dy.len(), "BUG: shape of a gate");
        let up = Shared::new(up);
        self.run_over(gate, TASK_VALUES, |start, gate| {
            let range = start..start + gate.len();
            // SAFETY: the ranges are those of `gate`, which do not overlap.
            let up = unsafe { up.slice(range.clone()) };
            match activation {
                Activation::Silu => rows::swiglu_backward(gate, up, &dy[range]),
                Activation::GeluTanh => rows::geglu_backward(gate, up, &dy[range]),
            }
        });
    }

    fn embed(&self, y: &mut Buffer, table: &Matrix, tokens: &[u32]) {
        self.run_over(y, TASK_ROWS * table.cols, |start, rows| {
            let tokens = &tokens[start / table.cols..];
            for (row, &token) in rows.chunks_exact_mut(table.cols).zip(tokens) {
                table.decode(token as usize * table.cols, row);
            }
        });
    }

    fn cross_entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut Buffer, f32)>,
        hidden: &Buffer,
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
        scratch: &mut Vec<f32>,
    ) {
        let gradient = gradient.map(|(dhidden, scale)| (&mut **dhidden, scale));
        entropy::cross_entropy(self, nll, gradient, hidden, targets, head, map, scratch);
    }

    fn map_logits(&self, logits: &mut Buffer, map: LogitMap) {
        if map != LogitMap::IDENTITY {
            self.run_over(logits, TASK_VALUES, |_, logits| rows::map_logits(logits, map));
        }
    }

    fn add(&self, y: &mut Buffer, x: &Buffer) {
        assert_eq!(y.len(), x.len(), "BUG: shape of a sum");
        self.run_over(y, TASK_VALUES, |start, y| rows::add(y, &x[start..start + y.len()]));
    }

    fn scale(&self, y: &mut Buffer, factor: f32) {
        self.run_over(y, TASK_VALUES, |_, y| rows::scale(y, factor));
    }

    fn split(&self, parts: &mut [&mut Buffer], x: &Buffer, rows: usize) {
        let width = x.len() / rows;
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), x.len(), "BUG: parts of a split");
        let mut start = 0;
        for part in parts {
            let cols = part.len() / rows;
            self.run_over(part, TASK_ROWS * cols, |at, part| {
                let rows = x[at / cols * width..].chunks(width);
                for (part, row) in part.chunks_exact_mut(cols).zip(rows) {
                    part.copy_from_slice(&row[start..start + cols]);
                }
            });
            start += cols;
        }
    }

    fn join(&self, x: &mut Buffer, parts: &[&Buffer], rows: usize) {
        let width = x.len() / rows;
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), x.len(), "BUG: parts of a join");
        self.run_over(x, TASK_ROWS * width, |at, x| {
            for (row, x) in (at / width..).zip(x.chunks_exact_mut(width)) {
                let mut start = 0;
                for part in parts {
                    let cols = part.len() / rows;
                    x[start..start + cols].copy_from_slice(&part[row * cols..(row + 1) * cols]);
                    start += cols;
                }
            }
        });
    }

    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
        conv::forward(self, y, x, conv, carry);
    }

    fn causal_conv_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        conv: &Convolution<'_>,
        scratch: &mut Vec<f32>,
    ) {
        conv::backward(self, dx, dy, x, conv, scratch);
    }

    fn scan(&self, y: &mut Buffer, input: &ScanInput<'_>, scan: &Scan<'_>, carry: Option<Carry<'_>>) {
        scan::forward(self, y, input, scan, carry);
    }

    fn scan_backward(
        &self,
        gradient: ScanGradient<'_>,
        dy: &Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        scratch: &mut Vec<f32>,
    ) {
        scan::backward(self, gradient, dy, input, scan, scratch);
    }
}

/// Values of a norm that a task takes: whole rows of a weight, about as many values as elsewhere where the
/// weight is that of a head.
fn norm_step(weight: &[f32]) -> usize {
    weight.len() * TASK_ROWS.max(TASK_VALUES / weight.len())
}
