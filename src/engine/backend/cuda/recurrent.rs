//! The operations with a state: Mamba2's convolution and scan.

use std::sync::Arc;

use super::super::{Buffer, Carry, Convolution, Precision, Scan, ScanGradient, ScanInput, Span};
use super::Cuda;
use super::device::{Arg, DeviceBuffer, Launch};
use super::linear::int;
use super::operand::{Constant, Input, Output};

use Precision::{Exact, Rounded};

/// Rows that a tile of a convolution takes.
const CONV_ROWS: usize = 32;
/// Rows of a chunk of a scan.
const CHUNK_ROWS: usize = 64;
/// Heads that a block of the scan's gradient takes.
const GRADIENT_HEADS: usize = 8;

/// A carry on the device; null pointers where nothing is carried.
struct Carried<'b> {
    slots: Option<Arc<Constant>>,
    past: Option<Input>,
    next: Option<Output<'b>>,
}

impl Carried<'_> {
    fn args(&self) -> [Arg; 3] {
        let null = Arg::Pointer(0);
        let slots = self.slots.as_ref().map_or(null, |slots| slots.arg());
        [slots, self.past.as_ref().map_or(null, Input::arg), self.next.as_ref().map_or(null, Output::arg)]
    }
}

impl Cuda {
    fn carried<'b>(&self, carry: Option<Carry<'b>>) -> Carried<'b> {
        let Some(Carry { slots, past, next }) = carry else {
            return Carried { slots: None, past: None, next: None };
        };
        Carried {
            slots: Some(self.list(slots.iter().copied())),
            past: Some(self.input(past, Exact)),
            next: Some(self.output(next, Exact)),
        }
    }

    /// (span, first row within it) of each tile of `step` rows of a span, how many there are, and where each span's
    /// begin.
    fn row_tiles(&self, spans: &[Span], step: usize) -> (Arc<Constant>, usize, Arc<Constant>) {
        let (mut tiles, mut starts) = (Vec::new(), vec![0]);
        for (index, span) in spans.iter().enumerate() {
            tiles.extend((0..span.queries.len()).step_by(step).flat_map(|first| [index, first]));
            starts.push(tiles.len() / 2);
        }
        (self.list(tiles.iter().copied()), tiles.len() / 2, self.list(starts.into_iter()))
    }

    pub(super) fn conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
        let channels = conv.bias.len();
        let (spans, (tiles, count, _)) = (self.spans(conv.spans), self.row_tiles(conv.spans, CONV_ROWS));
        let (weight, bias) = (self.input(conv.weight, Exact), self.input(conv.bias, Exact));
        let (x, y, carried) = (self.input(x, Rounded), self.output(y, Rounded), self.carried(carry));
        let [slots, past, next] = carried.args();
        let args = [
            y.arg(),
            x.arg(),
            weight.arg(),
            bias.arg(),
            spans.arg(),
            tiles.arg(),
            slots,
            past,
            next,
            int(channels),
            int(conv.taps),
        ];
        let grid = [channels.div_ceil(1024) as u32, count as u32, 1];
        self.start("causal_conv", Launch { grid, block: 128, shared: 0 }, &args);
    }

    pub(super) fn conv_backward(&self, dx: &mut Buffer, dy: &Buffer, x: &Buffer, conv: &Convolution<'_>) {
        let channels = conv.bias.len();
        let (spans, (tiles, count, _)) = (self.spans(conv.spans), self.row_tiles(conv.spans, CONV_ROWS));
        let (weight, bias) = (self.input(conv.weight, Exact), self.input(conv.bias, Exact));
        let (dy, x, dx) = (self.input(dy, Rounded), self.input(x, Rounded), self.output(dx, Rounded));
        let args = [
            dx.arg(),
            dy.arg(),
            x.arg(),
            weight.arg(),
            bias.arg(),
            spans.arg(),
            tiles.arg(),
            int(channels),
            int(conv.taps),
        ];
        let grid = [channels.div_ceil(1024) as u32, count as u32, 1];
        self.start("causal_conv_backward", Launch { grid, block: 128, shared: 0 }, &args);
    }

    pub(super) fn scan_forward(
        &self,
        y: &mut Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        carry: Option<Carry<'_>>,
    ) {
        let Some(carry) = carry else { return self.scan_chunks(y, input, scan) };
        let spans = self.spans(scan.spans);
        let given = self.scan_input(input);
        let constants = self.scan_constants(scan);
        let (y, carried) = (self.output(y, Rounded), self.carried(Some(carry)));
        let args = [
            &[y.arg()][..],
            &given.each_ref().map(Input::arg),
            &constants.each_ref().map(Input::arg),
            &[spans.arg()],
            &carried.args(),
            &scan_sizes(scan),
        ]
        .concat();
        let grid = [(scan.heads * scan.head_dim.div_ceil(64)) as u32, scan.spans.len() as u32, 1];
        self.start(scan_kernel(scan.states), Launch { grid, block: 256, shared: 0 }, &args);
    }

    fn scan_input(&self, input: &ScanInput<'_>) -> [Input; 4] {
        [input.x, input.b, input.c, input.dt].map(|values| self.input(values, Rounded))
    }

    fn scan_constants(&self, scan: &Scan<'_>) -> [Input; 3] {
        [scan.dt_bias, scan.rate, scan.skip].map(|values| self.input(values, Exact))
    }

    pub(super) fn scan_back(
        &self,
        gradient: ScanGradient<'_>,
        dy: &Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
    ) {
        let tokens = input.dt.len() / scan.heads;
        let [x, b, c, dt] = self.scan_input(input);
        let [dt_bias, rate, skip] = self.scan_constants(scan);
        let dy = self.input(dy, Rounded);
        let chunks = self.chunks(&dt, [&dt_bias, &rate], tokens, scan);
        let before = self.chunk_states(&chunks, (&x, &b), scan, false);
        let dafter = self.chunk_states(&chunks, (&dy, &c), scan, true);
        let parts = (scan.heads / scan.groups).div_ceil(GRADIENT_HEADS);
        let values = tokens * scan.groups * scan.states;
        let partial = DeviceBuffer::new(&self.device, 2 * parts * values, Exact);
        let partial = Arg::Pointer(partial.at(Exact));
        let (kernel, shared) = match chunks.wide {
            false => ("scan_gradients_64", 68_384),
            true => ("scan_gradients_128", 92_960),
        };
        {
            let (dx, ddt) = (self.output(gradient.dx, Rounded), self.output(gradient.ddt, Rounded));
            let drate = gradient.drate.map(|drate| self.output(drate, Exact));
            let args = [
                &[dx.arg(), ddt.arg(), drate.as_ref().map_or(Arg::Pointer(0), Output::arg), partial][..],
                &[dy.arg(), x.arg(), b.arg(), c.arg(), dt.arg(), dt_bias.arg(), rate.arg(), skip.arg()],
                &chunks.sums(),
                &[Arg::Pointer(before.at(Rounded)), Arg::Pointer(dafter.at(Rounded))],
                &[chunks.spans.arg(), chunks.tiles.arg(), int(tokens)],
                &scan_sizes(scan),
            ]
            .concat();
            let grid = [(scan.groups * parts) as u32, chunks.count as u32, 1];
            self.start(kernel, Launch { grid, block: 256, shared }, &args);
        }
        let (db, dc) = (self.output(gradient.db, Rounded), self.output(gradient.dc, Rounded));
        let args = [db.arg(), dc.arg(), partial, Arg::I64(values as i64), int(parts)];
        self.over_values("scan_sum_parts", values, &args);
    }

    /// The forward of whole sequences, in chunks on tensor cores.
    fn scan_chunks(&self, y: &mut Buffer, input: &ScanInput<'_>, scan: &Scan<'_>) {
        let tokens = input.dt.len() / scan.heads;
        let [x, b, c, dt] = self.scan_input(input);
        let [dt_bias, rate, skip] = self.scan_constants(scan);
        let chunks = self.chunks(&dt, [&dt_bias, &rate], tokens, scan);
        let before = self.chunk_states(&chunks, (&x, &b), scan, false);
        let y = self.output(y, Rounded);
        let args = [
            &[y.arg(), x.arg(), b.arg(), c.arg()][..],
            &chunks.sums(),
            &[skip.arg(), Arg::Pointer(before.at(Rounded)), chunks.spans.arg(), chunks.tiles.arg()],
            &scan_sizes(scan)[..4],
        ]
        .concat();
        let kernel = if chunks.wide { "scan_outputs_128" } else { "scan_outputs_64" };
        self.start(kernel, chunks.over_heads(scan), &args);
    }

    /// The steps of every row and their running sums within chunks.
    fn chunks(&self, dt: &Input, [dt_bias, rate]: [&Input; 2], tokens: usize, scan: &Scan<'_>) -> Chunks {
        let (tiles, count, starts) = self.row_tiles(scan.spans, CHUNK_ROWS);
        let chunks = Chunks {
            spans: self.spans(scan.spans),
            tiles,
            starts,
            count,
            wide: scan.states > 64,
            steps: DeviceBuffer::new(&self.device, tokens * scan.heads, Exact),
            running: DeviceBuffer::new(&self.device, tokens * scan.heads, Exact),
        };
        let (low, high) = scan.dt_limits;
        let args = [
            &chunks.sums()[..],
            &[dt.arg(), dt_bias.arg(), rate.arg(), chunks.spans.arg(), chunks.tiles.arg()],
            &[int(scan.heads), Arg::F32(low), Arg::F32(high)],
        ]
        .concat();
        let grid = [scan.heads.div_ceil(64) as u32, count as u32, 1];
        self.start("scan_steps", Launch { grid, block: 64, shared: 0 }, &args);
        chunks
    }

    /// The state before each chunk, from x and b; or the gradient of that after it, from dy and c.
    fn chunk_states(
        &self,
        chunks: &Chunks,
        (u, v): (&Input, &Input),
        scan: &Scan<'_>,
        backward: bool,
    ) -> DeviceBuffer {
        let size = scan.head_dim * scan.states;
        let states = DeviceBuffer::new(&self.device, chunks.count * scan.heads * size, Rounded);
        let (at, back) = (Arg::Pointer(states.at(Rounded)), int(usize::from(backward)));
        let args = [
            &[at, u.arg(), v.arg()][..],
            &chunks.sums(),
            &[chunks.spans.arg(), chunks.tiles.arg()],
            &scan_sizes(scan)[..4],
            &[back],
        ]
        .concat();
        let kernel = if chunks.wide { "scan_states_128" } else { "scan_states_64" };
        self.start(kernel, chunks.over_heads(scan), &args);
        let running = Arg::Pointer(chunks.running.at(Exact));
        let args = [at, running, chunks.spans.arg(), chunks.starts.arg(), int(scan.heads), int(size), back];
        let grid = [size.div_ceil(1024) as u32, scan.heads as u32, scan.spans.len() as u32];
        self.start("scan_pass", Launch { grid, block: 128, shared: 0 }, &args);
        states
    }
}

/// Sequences cut into chunks of rows, and what each row's step is.
struct Chunks {
    spans: Arc<Constant>,
    tiles: Arc<Constant>,
    starts: Arc<Constant>,
    count: usize,
    /// More than 64 states.
    wide: bool,
    /// (T,H)
    steps: DeviceBuffer,
    /// (T,H), of steps times rates from each chunk's first row.
    running: DeviceBuffer,
}

impl Chunks {
    fn sums(&self) -> [Arg; 2] {
        [&self.steps, &self.running].map(|values| Arg::Pointer(values.at(Exact)))
    }

    fn over_heads(&self, scan: &Scan<'_>) -> Launch {
        let grid = [(scan.heads * scan.head_dim.div_ceil(64)) as u32, self.count as u32, 1];
        Launch { grid, block: 128, shared: 0 }
    }
}

fn scan_sizes(scan: &Scan<'_>) -> [Arg; 6] {
    let (low, high) = scan.dt_limits;
    let [heads, head_dim, groups, states] = [scan.heads, scan.head_dim, scan.groups, scan.states].map(int);
    [heads, head_dim, groups, states, Arg::F32(low), Arg::F32(high)]
}

/// The forward scan for so many states.
fn scan_kernel(states: usize) -> &'static str {
    match states {
        0..=16 => "scan_16",
        17..=32 => "scan_32",
        33..=64 => "scan_64",
        65..=128 => "scan_128",
        129..=256 => "scan_256",
        _ => unreachable!("BUG: models with more states are refused"),
    }
}
