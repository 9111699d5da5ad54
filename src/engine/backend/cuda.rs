//! The backend on a CUDA device: every operation is a kernel of `kernels/`, launched over buffers that stay in the
//! device's memory. Activations are bfloat16, sums f32, and every sum has an order that shapes alone decide. Knows
//! kernels and their launches; not how a device is found (`driver`) nor how kernels are compiled (`program`).
//!
//! ```text
//! operation ──► operand (addresses, lists) ──► kernel's launch ──► Device ─┬─► driver
//!                                                                          └─► the PTX interpreter, in tests
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, BackendKind, Buffer, Carry,
    Convolution, DeviceMemory, Dropped, Limits, LogitMap, Lora, LoraGradient, Precision, RopeTable, Rotation,
    Scan, ScanGradient, ScanInput, Write,
};
use crate::matrix::{Matrix, Values};
use crate::random::mix;

mod attention;
mod device;
mod driver;
mod entropy;
mod found;
mod library;
mod linear;
mod nvrtc;
mod operand;
mod program;
mod recurrent;
#[cfg(test)]
pub(crate) mod simulator;
mod toolkit;

pub(crate) use device::DeviceBuffer;
pub use device::DeviceError;
pub(super) use found::numerics;
pub use found::{CudaError, Gpu, cuda_version};
pub use operand::DeviceMatrix;
pub use program::keep_kernels_in;
pub use toolkit::{NvrtcError, Toolkit};

use Precision::{Exact, Rounded};
use device::{Arg, Device, Launch};
use linear::int;
use operand::Lists;

/// A device and what stays on it between operations.
#[derive(Debug)]
pub(crate) struct Cuda {
    device: Arc<dyn Device>,
    lists: Mutex<Lists>,
    /// The weight that was decoded last.
    decoded: Mutex<DeviceBuffer>,
}

impl Cuda {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        let decoded = Mutex::new(DeviceBuffer::new(&device, 0, Rounded));
        Self { device, lists: Mutex::default(), decoded }
    }

    /// Starts a kernel on a line of blocks without dynamic shared memory.
    fn launch(&self, kernel: &'static str, blocks: usize, block: u32, args: &[Arg]) {
        self.start(kernel, Launch { grid: [blocks as u32, 1, 1], block, shared: 0 }, args);
    }

    fn start(&self, kernel: &'static str, launch: Launch, args: &[Arg]) {
        if launch.grid.iter().all(|&blocks| blocks > 0) {
            self.device.launch(kernel, launch, args);
        }
    }

    /// A launch over rows in pieces of eight columns.
    fn over_pieces(&self, kernel: &'static str, rows: usize, columns: usize, args: &[Arg]) {
        self.launch(kernel, (rows * columns.div_ceil(8)).div_ceil(256), 256, args);
    }

    /// A launch over values, eight a thread.
    fn over_values(&self, kernel: &'static str, values: usize, args: &[Arg]) {
        self.launch(kernel, values.div_ceil(2048), 256, args);
    }

    fn columns(
        &self,
        (to, to_ld, to_first): (Arg, usize, usize),
        from: (Arg, usize, usize),
        size: (usize, usize),
    ) {
        let ((from, from_ld, from_first), (rows, width)) = (from, size);
        let args =
            [to, int(to_ld), int(to_first), from, int(from_ld), int(from_first), int(rows), int(width)];
        self.over_pieces("copy_columns", rows, width, &args);
    }

    /// The launch of a norm over `groups` groups: a block each, or a few lanes each where they are heads.
    fn norm(&self, kernels: [&'static str; 2], groups: usize, group: usize, args: &[Arg]) {
        let [rows, heads] = kernels;
        if group <= 256 {
            let lanes = group.div_ceil(8).next_power_of_two();
            self.launch(heads, (groups * lanes).div_ceil(256), 256, args);
        } else {
            self.launch(rows, groups, (group.div_ceil(16).next_multiple_of(32)) as u32, args);
        }
    }

    /// Copies values between buffers of the device, or within one.
    fn copy_values(&self, (to, first): (&Buffer, usize), (from, range): (&Buffer, Range<usize>)) -> bool {
        let (Some(to), Some(from)) = (to.device(), from.device()) else { return false };
        if to.precision() != from.precision() {
            return false;
        }
        let bytes = range.len() * to.precision().bytes();
        if bytes > 0 {
            self.device.copy(to.at_value(first), from.at_value(range.start), bytes);
        }
        true
    }
}

impl Backend for Cuda {
    fn kind(&self) -> BackendKind {
        BackendKind::Cuda
    }

    fn numerics(&self) -> String {
        numerics(&self.device.architecture())
    }

    fn enter(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }

    fn failure(&self) -> Option<DeviceError> {
        self.device.failure()
    }

    fn device_memory(&self) -> Option<DeviceMemory> {
        Some(DeviceMemory { free: self.device.free_bytes(), peak: self.device.usage().peak() })
    }

    fn limits(&self) -> Option<Limits> {
        Some(Limits { head_dim: attention::LARGEST_HEAD, states: 128, taps: 4 })
    }

    fn size<'b>(&self, buffer: &'b mut Buffer, len: usize, precision: Precision) -> &'b mut Buffer {
        match buffer.device_mut().filter(|values| values.precision() == precision) {
            Some(values) => values.resize(len),
            None => *buffer = DeviceBuffer::new(&self.device, len, precision).into(),
        }
        buffer
    }

    fn place(&self, buffer: &mut Buffer, precision: Precision) {
        if buffer.device().is_none() {
            *buffer = DeviceBuffer::of(&self.device, buffer, precision).into();
        }
    }

    fn place_matrix(&self, matrix: &mut Matrix) {
        matrix.values = Values::Device(self.matrix(matrix));
    }

    fn linear(&self, y: &mut Buffer, x: &Buffer, weight: &Matrix, write: Write) {
        self.linear_forward(y, x, weight, write);
    }

    fn linear_backward(&self, dx: &mut Buffer, dy: &Buffer, weight: &Matrix, write: Write) {
        self.linear_back(dx, dy, weight, write);
    }

    fn lora(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, lora: &Lora<'_>) {
        self.pair_forward(y, h, x, None, lora);
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
        self.pair_backward(gradient, dx.map(|dx| (dx, Write::Add, None)), dh, (dy, x, h), lora);
    }

    fn adapted(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, weight: &Matrix, lora: &Lora<'_>) {
        self.pair_forward(y, h, x, Some(weight), lora);
    }

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
        self.pair_backward(gradient, Some((dx, write, Some(weight))), dh, (dy, x, h), lora);
    }

    fn add_bias(&self, y: &mut Buffer, bias: &Buffer) {
        let (n, rows) = (bias.len(), y.len() / bias.len());
        let (bias, y) = (self.input(bias, Exact), self.output(y, Rounded));
        self.over_pieces("add_bias", rows, n, &[y.arg(), bias.arg(), int(rows), int(n)]);
    }

    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, weight: &Buffer, group: usize, epsilon: f32) {
        let (groups, channels) = (x.len() / group, weight.len());
        let (x, weight, y) = (self.input(x, Rounded), self.input(weight, Exact), self.output(y, Rounded));
        let shape = [int(groups), int(group), int(channels), Arg::F32(epsilon)];
        let args = [&[y.arg(), x.arg(), weight.arg()][..], &shape].concat();
        self.norm(["rms_norm", "rms_norm_heads"], groups, group, &args);
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
        let (groups, channels) = (x.len() / group, weight.len());
        let (dy, x, weight) = (self.input(dy, Rounded), self.input(x, Rounded), self.input(weight, Exact));
        let dx = self.output(dx, Rounded);
        let shape = [int(groups), int(group), int(channels), Arg::F32(epsilon)];
        let args = [&[dx.arg(), dy.arg(), x.arg(), weight.arg()][..], &shape].concat();
        self.norm(["rms_norm_backward", "rms_norm_heads_backward"], groups, group, &args);
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
        let (cos, sin) = (self.input(&table.cos, Exact), self.input(&table.sin, Exact));
        let (rows, x) = (self.list(positions.iter().copied()), self.output(x, Rounded));
        let backward = usize::from(rotation == Rotation::Backward);
        let shape = [positions.len(), heads, head_dim, backward].map(int);
        let args = [&[x.arg(), cos.arg(), sin.arg(), rows.arg()][..], &shape].concat();
        let threads = positions.len() * heads.div_ceil(4) * (head_dim / 2).div_ceil(8);
        self.launch("rope", threads.div_ceil(256), 256, &args);
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
        self.attend(out, logsumexp, (q, k, v), shape);
    }

    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        self.attend_backward(gradient, dout, saved, shape);
    }

    fn glu(&self, y: &mut Buffer, gate: &Buffer, up: &Buffer, activation: Activation) {
        let n = y.len();
        let (gate, up, y) = (self.input(gate, Rounded), self.input(up, Rounded), self.output(y, Rounded));
        let args = [y.arg(), gate.arg(), up.arg(), Arg::I64(n as i64), gelu(activation)];
        self.over_values("glu", n, &args);
    }

    fn glu_backward(&self, gate: &mut Buffer, up: &mut Buffer, dy: &Buffer, activation: Activation) {
        let n = dy.len();
        let (dy, gate, up) = (self.input(dy, Rounded), self.output(gate, Rounded), self.output(up, Rounded));
        let args = [gate.arg(), up.arg(), dy.arg(), Arg::I64(n as i64), gelu(activation)];
        self.over_values("glu_backward", n, &args);
    }

    fn embed(&self, y: &mut Buffer, table: &Matrix, tokens: &[u32]) {
        let (y, rows) = (self.output(y, Rounded), self.list(tokens.iter().map(|&token| token as usize)));
        let table_values = self.dense(table);
        let args = [y.arg(), table_values.arg(), rows.arg(), int(tokens.len()), int(table.cols)];
        self.over_pieces("gather_rows", tokens.len(), table.cols, &args);
    }

    fn cross_entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut Buffer, f32)>,
        hidden: &Buffer,
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
        _scratch: &mut Vec<f32>,
    ) {
        self.entropy(nll, gradient, hidden, targets, head, map);
    }

    fn map_logits(&self, logits: &mut Buffer, map: LogitMap) {
        if map == LogitMap::IDENTITY {
            return;
        }
        let n = logits.len();
        let logits = self.output(logits, Exact);
        let args =
            [logits.arg(), Arg::I64(n as i64), Arg::F32(map.scale), Arg::F32(map.softcap.unwrap_or(0.0))];
        self.launch("map_logits", n.div_ceil(1024), 256, &args);
    }

    fn logits(&self, y: &mut Buffer, x: &Buffer, head: &Matrix) {
        let (n, k) = (head.rows, head.cols);
        let shape = (x.len() / k, n, k);
        let (x, y, w) = (self.input(x, Rounded), self.output(y, Exact), self.dense(head));
        let from = ((x.arg(), k), w.arg());
        self.gemm(linear::Gemm::NtExact, (y.arg(), n), from, shape, None, Write::Overwrite);
    }

    fn add(&self, y: &mut Buffer, x: &Buffer) {
        let n = y.len();
        let (x, y) = (self.input(x, Rounded), self.output(y, Rounded));
        self.over_values("add", n, &[y.arg(), x.arg(), Arg::I64(n as i64)]);
    }

    fn scale(&self, y: &mut Buffer, factor: f32) {
        let n = y.len();
        let y = self.output(y, Rounded);
        self.over_values("scale", n, &[y.arg(), Arg::F32(factor), Arg::I64(n as i64)]);
    }

    fn split(&self, parts: &mut [&mut Buffer], x: &Buffer, rows: usize) {
        let (width, x) = (x.len() / rows, self.input(x, Rounded));
        let mut first = 0;
        for part in parts {
            let cols = part.len() / rows;
            let part = self.output(part, Rounded);
            self.columns((part.arg(), cols, 0), (x.arg(), width, first), (rows, cols));
            first += cols;
        }
    }

    fn join(&self, x: &mut Buffer, parts: &[&Buffer], rows: usize) {
        let (width, x) = (x.len() / rows, self.output(x, Rounded));
        let mut first = 0;
        for part in parts {
            let cols = part.len() / rows;
            let part = self.input(part, Rounded);
            self.columns((x.arg(), width, first), (part.arg(), cols, 0), (rows, cols));
            first += cols;
        }
    }

    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
        self.conv(y, x, conv, carry);
    }

    fn causal_conv_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        conv: &Convolution<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        self.conv_backward(dx, dy, x, conv);
    }

    fn scan(&self, y: &mut Buffer, input: &ScanInput<'_>, scan: &Scan<'_>, carry: Option<Carry<'_>>) {
        self.scan_forward(y, input, scan, carry);
    }

    fn scan_backward(
        &self,
        gradient: ScanGradient<'_>,
        dy: &Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        self.scan_back(gradient, dy, input, scan);
    }

    fn copy(&self, y: &mut Buffer, x: &Buffer) {
        let all = 0..x.len();
        if !self.copy_values((y, 0), (x, all)) {
            y.update(|y| y.copy_from_slice(&x.host()));
        }
    }

    fn clear(&self, y: &mut Buffer) {
        self.clear_range(y, 0..y.len());
    }

    fn clear_range(&self, y: &mut Buffer, range: Range<usize>) {
        match y.device() {
            Some(values) if !range.is_empty() => {
                self.device.clear(values.at_value(range.start), range.len() * values.precision().bytes());
            }
            Some(_) => {}
            None => y[range].fill(0.0),
        }
    }

    fn copy_range(&self, y: &mut Buffer, x: &Buffer, range: Range<usize>) {
        if !self.copy_values((y, range.start), (x, range.clone())) {
            y.update(|y| y[range.clone()].copy_from_slice(&x.host()[range]));
        }
    }

    fn copy_within(&self, y: &mut Buffer, from: Range<usize>, to: usize) {
        if !self.copy_values((y, to), (y, from.clone())) {
            y.update(|y| y.copy_within(from, to));
        }
    }

    fn gather_rows(&self, y: &mut Buffer, x: &Buffer, rows: &[usize]) {
        let c = y.len() / rows.len().max(1);
        let (x, y, list) = (self.input(x, Rounded), self.output(y, Rounded), self.list(rows.iter().copied()));
        let args = [y.arg(), x.arg(), list.arg(), int(rows.len()), int(c)];
        self.over_pieces("gather_rows", rows.len(), c, &args);
    }

    fn scatter_rows(&self, y: &mut Buffer, x: &Buffer, rows: &[usize]) {
        let c = x.len() / rows.len().max(1);
        let (x, y, list) = (self.input(x, Rounded), self.output(y, Rounded), self.list(rows.iter().copied()));
        let args = [y.arg(), x.arg(), list.arg(), int(rows.len()), int(c)];
        self.over_pieces("scatter_rows", rows.len(), c, &args);
    }

    fn add_columns(&self, y: &mut Buffer, x: &Buffer, factors: Option<&Buffer>, sign: f32, write: Write) {
        let n = factors.map_or(x.len(), Buffer::len);
        let rows = x.len() / n.max(1);
        let factors = factors.map(|factors| self.input(factors, Exact));
        let (x, y) = (self.input(x, Rounded), self.output(y, Rounded));
        let keep = if write == Write::Add { 1.0 } else { 0.0 };
        let at = factors.as_ref().map_or(Arg::Pointer(0), operand::Input::arg);
        let args = [y.arg(), x.arg(), at, int(rows), int(n), Arg::F32(keep), Arg::F32(sign)];
        self.over_pieces("combine_columns", rows, n, &args);
    }

    fn column_dots(&self, sums: &mut Buffer, dy: &Buffer, z: &Buffer, divisors: &[f32]) {
        let n = divisors.len();
        let (rows, parts) = (z.len() / n, (z.len() / n).div_ceil(32));
        let partial = DeviceBuffer::new(&self.device, parts * n, Exact);
        let (dy, z) = (self.input(dy, Rounded), self.input(z, Rounded));
        let at = Arg::Pointer(partial.at(Exact));
        let grid = [n.div_ceil(1024) as u32, parts as u32, 1];
        let launch = Launch { grid, block: 128, shared: 0 };
        self.start("column_dots", launch, &[at, dy.arg(), z.arg(), int(rows), int(n)]);
        let divisors = DeviceBuffer::of(&self.device, divisors, Exact);
        let sums = self.output(sums, Exact);
        let args = [sums.arg(), at, Arg::Pointer(divisors.at(Exact)), int(parts), int(n)];
        self.launch("add_column_dots", n.div_ceil(256), 256, &args);
    }

    fn dropout(&self, y: &mut Buffer, x: &Buffer, dropped: &Dropped<'_>, write: Write) {
        let (t, k) = (dropped.rows.len(), x.len() / dropped.rows.len());
        let rows = self.bytes(dropped.rows.iter().flat_map(|row| row.to_le_bytes()).collect());
        let (x, y) = (self.input(x, Rounded), self.output(y, Rounded));
        let args = [
            y.arg(),
            x.arg(),
            rows.arg(),
            int(t),
            int(k),
            Arg::U64(mix(dropped.linear as u64 + 1)),
            int(dropped.threshold.into()),
            Arg::F32(dropped.scale),
            int(usize::from(write == Write::Add)),
        ];
        self.over_pieces("dropout", t, k, &args);
    }

    fn add_noise(&self, x: &mut Buffer, rows: &[u64], lengths: &[usize], alpha: f32) {
        let (t, c) = (rows.len(), x.len() / rows.len());
        let rows = self.bytes(rows.iter().flat_map(|row| row.to_le_bytes()).collect());
        let (lengths, x) = (self.list(lengths.iter().copied()), self.output(x, Rounded));
        let args = [x.arg(), rows.arg(), lengths.arg(), int(t), int(c), Arg::F32(alpha)];
        self.over_pieces("embedding_noise", t, c, &args);
    }

    fn is_finite(&self, x: &Buffer) -> bool {
        let n = x.len();
        let flag = operand::Constant::new(&self.device, &[0; 4]);
        let (kernel, precision) = match x.device().map(DeviceBuffer::precision) {
            Some(Exact) => ("not_finite_f32", Exact),
            _ => ("not_finite", Rounded),
        };
        let x = self.input(x, precision);
        self.launch(kernel, n.div_ceil(8192), 256, &[flag.arg(), x.arg(), Arg::I64(n as i64)]);
        flag.to_host() == [0; 4]
    }
}

fn gelu(activation: Activation) -> Arg {
    int(usize::from(activation == Activation::GeluTanh))
}
