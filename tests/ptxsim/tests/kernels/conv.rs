//! `conv.cu` against loops in f64.

use std::ops::Range;

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::in_both_orders;
use super::spans::{spans, tiles, words};
use crate::harness::{
    Random, Tolerance, assert_close, download, download_bf16, kernels, round_bf16s, upload, upload_bf16,
};

/// Rows of a tile.
const ROWS: usize = 32;

struct Case {
    channels: usize,
    taps: usize,
    spans: Vec<Range<usize>>,
    x: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    /// Of each span.
    slots: Vec<i32>,
    /// One slot more than spans.
    past: Vec<f32>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Case {
    fn new(lengths: &[usize], channels: usize, taps: usize) -> Self {
        let mut random = Random::new((channels * 10 + taps) as u64);
        let rows: usize = lengths.iter().sum();
        Self {
            channels,
            taps,
            spans: spans(lengths),
            x: round_bf16s(&random.normals(rows * channels)),
            dy: round_bf16s(&random.normals(rows * channels)),
            weight: random.normals(channels * taps),
            bias: random.normals(channels),
            slots: (0..lengths.len() as i32).rev().collect(),
            past: random.normals((lengths.len() + 1) * (taps - 1) * channels),
        }
    }

    fn launch(&self) -> Launch {
        let blocks = self.channels.div_ceil(1024) as u32;
        let tiles = tiles(&self.spans, ROWS).len() as u32 / 2;
        Launch { grid: [blocks, tiles, 1], block: [128, 1, 1], shared: 0 }
    }

    fn constants(&self, device: &mut Device) -> [u64; 4] {
        let (spans, tiles) = (words(&self.spans), tiles(&self.spans, ROWS));
        [
            upload(device, &self.weight),
            upload(device, &self.bias),
            upload(device, &spans),
            upload(device, &tiles),
        ]
    }

    fn sizes(&self) -> [Arg; 2] {
        [self.channels, self.taps].map(|size| Arg::I32(size as i32))
    }

    /// y, and the states after.
    fn forward(&self, device: &mut Device, carried: bool) -> (Vec<f32>, Vec<f32>, Counts) {
        let (y, x) = (device.allocate(self.x.len() * 2), upload_bf16(device, &self.x));
        let constants = self.constants(device);
        let next = upload(device, &vec![7.0f32; self.past.len()]);
        let carry =
            if carried { [upload(device, &self.slots), upload(device, &self.past), next] } else { [0; 3] };
        let arrays = [&[y, x], &constants[..], &carry].concat();
        let arguments: Vec<Arg> = arrays.into_iter().map(Arg::Pointer).chain(self.sizes()).collect();
        let counts =
            device.launch(kernels("conv.cu"), "causal_conv", &self.launch(), &arguments).expect("no fault");
        (download_bf16(device, y, self.x.len()), download(device, next, self.past.len()), counts)
    }

    fn backward(&self, device: &mut Device) -> (Vec<f32>, Counts) {
        let dx = device.allocate(self.x.len() * 2);
        let arrays = [dx, upload_bf16(device, &self.dy), upload_bf16(device, &self.x)];
        let constants = self.constants(device);
        let arguments: Vec<Arg> =
            [&arrays[..], &constants].concat().into_iter().map(Arg::Pointer).chain(self.sizes()).collect();
        let counts = device
            .launch(kernels("conv.cu"), "causal_conv_backward", &self.launch(), &arguments)
            .expect("no fault");
        (download_bf16(device, dx, self.x.len()), counts)
    }

    /// Row `i` of a span, counted from its slot's first.
    fn seen(&self, span: usize, i: usize, channel: usize, carried: bool) -> f64 {
        let kept = self.taps - 1;
        if i >= kept {
            return f64::from(self.x[(self.spans[span].start + i - kept) * self.channels + channel]);
        }
        let slot = self.slots[span] as usize;
        if carried { f64::from(self.past[(slot * kept + i) * self.channels + channel]) } else { 0.0 }
    }

    fn before_silu(&self, span: usize, i: usize, channel: usize, carried: bool) -> f64 {
        let product = |tap| {
            f64::from(self.weight[channel * self.taps + tap]) * self.seen(span, i + tap, channel, carried)
        };
        f64::from(self.bias[channel]) + (0..self.taps).map(product).sum::<f64>()
    }

    fn expected(&self, carried: bool) -> (Vec<f64>, Vec<f64>) {
        let mut y = vec![0.0; self.x.len()];
        let mut next = vec![7.0; self.past.len()];
        for (index, span) in self.spans.iter().enumerate() {
            for channel in 0..self.channels {
                for (i, row) in span.clone().enumerate() {
                    let u = self.before_silu(index, i, channel, carried);
                    y[row * self.channels + channel] = u * sigmoid(u);
                }
                for i in 0..if carried && !span.is_empty() { self.taps - 1 } else { 0 } {
                    let at = (self.slots[index] as usize * (self.taps - 1) + i) * self.channels + channel;
                    next[at] = self.seen(index, span.len() + i, channel, carried);
                }
            }
        }
        (y, next)
    }

    fn expected_gradient(&self) -> Vec<f64> {
        let mut dx = vec![0.0; self.x.len()];
        for (index, span) in self.spans.iter().enumerate() {
            for channel in 0..self.channels {
                for (i, row) in span.clone().enumerate() {
                    let u = self.before_silu(index, i, channel, false);
                    let slope = sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u)));
                    let du = f64::from(self.dy[row * self.channels + channel]) * slope;
                    for tap in 0..self.taps.min(i + 1) {
                        let weight = self.weight[channel * self.taps + self.taps - 1 - tap];
                        dx[(row - tap) * self.channels + channel] += du * f64::from(weight);
                    }
                }
            }
        }
        dx
    }
}

/// Four products and sums of values below 60 in f32, a sigmoid within 3 ulp, four such summed in the gradient.
const TOLERANCE: f64 = 4.0 * 60.0 * 12.0 / (1 << 24) as f64;

#[test]
fn a_convolution_sees_its_span_and_its_slot_alone() {
    for (lengths, channels, taps) in
        [(&[70, 1, 33, 2][..], 24, 4), (&[3, 40], 7, 3), (&[5, 64], 8, 2), (&[1, 1, 1], 1032, 4)]
    {
        let case = Case::new(lengths, channels, taps);
        for carried in [false, true] {
            let name = format!("conv {lengths:?} {channels} {taps} {carried}");
            let (y, next, _) = in_both_orders(|device| case.forward(device, carried));
            let expected = case.expected(carried);
            assert_close(&name, &y, &expected.0, Tolerance::bf16(TOLERANCE));
            assert_close(&format!("{name} next"), &next, &expected.1, Tolerance::EXACT);
        }
        let (dx, _) = in_both_orders(|device| case.backward(device));
        assert_close(
            &format!("conv {lengths:?} dx"),
            &dx,
            &case.expected_gradient(),
            Tolerance::bf16(TOLERANCE),
        );
    }
}

#[test]
fn a_sequence_in_pieces_is_the_sequence() {
    let whole = Case::new(&[50], 16, 4);
    let (y, _, _) = whole.forward(&mut Device::new(), false);
    let cut = |rows: Range<usize>, past: Vec<f32>| Case {
        spans: spans(&[rows.len()]),
        x: whole.x[rows.start * 16..rows.end * 16].to_vec(),
        slots: vec![0],
        past,
        weight: whole.weight.clone(),
        bias: whole.bias.clone(),
        dy: Vec::new(),
        ..whole
    };
    let (mut got, mut state) = (Vec::new(), vec![0.0; 3 * 16]);
    for rows in [0..2, 2..37, 37..38, 38..50] {
        let (part, next, _) = cut(rows, state).forward(&mut Device::new(), true);
        got.extend(part);
        state = next;
    }
    assert_eq!(got, y);
}

#[test]
fn a_tile_reads_each_row_once_and_three_more() {
    let case = Case::new(&[96], 1024, 4);
    let sectors = |rows: u64| rows * 1024 * 2 / 32;
    let (_, _, counts) = case.forward(&mut Device::new(), false);
    assert_eq!(counts.global_store_sectors, sectors(96));
    // A weight is touched by one of 4 bytes an access, 128 apart between lanes: a sector each, for 32 weights a thread and
    // 3 tiles; biases by two of 16 bytes, 32 apart; a tile's place is read once a warp, and both ends
    // of its span.
    let constants = 3 * (32 * 128 + 2 * 128 + 4 * 3);
    assert_eq!(counts.global_load_sectors, sectors(96 + 2 * 3) + constants);
    assert!(counts.lane_instructions < 40 * 96 * 1024, "{} instructions", counts.lane_instructions);
    let (_, counts) = case.backward(&mut Device::new());
    assert_eq!(counts.global_store_sectors, sectors(96));
    assert_eq!(counts.global_load_sectors, sectors(96 + 2 * 3 + 2 * 3 + 96 + 2 * 3) + constants);
    assert!(counts.lane_instructions < 60 * 96 * 1024, "{} instructions", counts.lane_instructions);
}
