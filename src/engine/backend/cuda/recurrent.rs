//! The operations with a state: Mamba2's convolution and scan.

use std::sync::Arc;

use super::super::{Buffer, Carry, Convolution, Precision, Scan, ScanGradient, ScanInput, Span};
use super::Cuda;
use super::device::{Arg, Launch};
use super::linear::int;
use super::operand::{Constant, Input, Output};

use Precision::{Exact, Rounded};

/// Rows that a tile of a convolution takes.
const CONV_ROWS: usize = 32;

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

    /// (span, first row within it) of each tile of a convolution.
    fn row_tiles(&self, spans: &[Span]) -> (Arc<Constant>, usize) {
        let tiles: Vec<[usize; 2]> = spans
            .iter()
            .enumerate()
            .flat_map(|(index, span)| {
                (0..span.queries.len()).step_by(CONV_ROWS).map(move |first| [index, first])
            })
            .collect();
        (self.list(tiles.iter().flatten().copied()), tiles.len())
    }

    pub(super) fn conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
        let channels = conv.bias.len();
        let (spans, (tiles, count)) = (self.spans(conv.spans), self.row_tiles(conv.spans));
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
        let (spans, (tiles, count)) = (self.spans(conv.spans), self.row_tiles(conv.spans));
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
        let spans = self.spans(scan.spans);
        let given = self.scan_input(input);
        let constants = self.scan_constants(scan);
        let (y, carried) = (self.output(y, Rounded), self.carried(carry));
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
        let _ = (gradient, dy, input, scan);
        unimplemented!()
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
