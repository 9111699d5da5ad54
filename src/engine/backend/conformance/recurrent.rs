//! The operations with a state: against the reference, against finite differences, and cut into pieces with the
//! state carried over.

use super::{check, check_on_device, check_on_hosts, nines, noise};
use crate::backend::{
    Backend, Buffer, Carry, Convolution, Cpu, Reference, Scan, ScanGradient, ScanInput, Span,
};

fn spans(lengths: &[usize]) -> (Vec<Span>, usize) {
    let mut tokens = 0;
    let span = |len: &usize| {
        tokens += len;
        Span::whole(tokens - len..tokens)
    };
    (lengths.iter().map(span).collect(), tokens)
}

const CONVOLUTIONS: [(&[usize], usize, usize); 4] =
    [(&[1], 1, 2), (&[3, 1, 70], 20, 4), (&[100], 37, 3), (&[2, 2, 65], 130, 5)];

/// Taps that a device has kernels for.
const DEVICE_TAPS: usize = 4;

#[test]
fn convolution_and_its_backward() {
    for (lengths, c, taps) in CONVOLUTIONS {
        let (spans, tokens) = spans(lengths);
        let (weight, bias) = (noise(1, c * taps), noise(2, c));
        let conv = Convolution { weight: &weight, bias: &bias, taps, spans: &spans };
        let operation = |backend: &dyn Backend| {
            let (x, dy) = (noise(3, tokens * c), noise(4, tokens * c));
            let (mut y, mut dx) = (nines(tokens * c), nines(tokens * c));
            backend.causal_conv(&mut y, &x, &conv, None);
            backend.causal_conv_backward(&mut dx, &dy, &x, &conv, &mut Vec::new());
            // From a past, for a slot each, the last slot unused.
            let past = noise(5, (lengths.len() + 1) * (taps - 1) * c);
            let (mut next, slots) = (past.clone(), (0..lengths.len()).rev().collect::<Vec<_>>());
            let carry = Carry { slots: &slots, past: &past, next: &mut next };
            let mut carried = nines(tokens * c);
            backend.causal_conv(&mut carried, &x, &conv, Some(carry));
            vec![y, dx, carried, next]
        };
        check_on_hosts(&format!("convolution {lengths:?} {c} by {taps}"), 1e-5, operation);
        if taps <= DEVICE_TAPS {
            check_on_device(&format!("convolution {lengths:?} {c} by {taps}"), operation);
        }
    }
}

/// Constants and inputs of a scan of `tokens` rows.
struct Case {
    spans: Vec<Span>,
    tokens: usize,
    shape: [usize; 4],
    constants: [Buffer; 3],
    dt_limits: (f32, f32),
    input: [Buffer; 4],
}

impl Case {
    fn new(lengths: &[usize], [heads, head_dim, groups, states]: [usize; 4], dt_limits: (f32, f32)) -> Self {
        let (spans, tokens) = spans(lengths);
        let rate = noise(2, heads).iter().map(|value| -1.5 - value).collect();
        Self {
            spans,
            tokens,
            shape: [heads, head_dim, groups, states],
            constants: [noise(1, heads), rate, noise(3, heads)],
            dt_limits,
            input: [
                noise(4, tokens * heads * head_dim),
                noise(5, tokens * groups * states),
                noise(6, tokens * groups * states),
                noise(7, tokens * heads).iter().map(|value| 2.0 * value).collect(),
            ],
        }
    }

    fn scan<'a>(&'a self, spans: &'a [Span]) -> Scan<'a> {
        let [heads, head_dim, groups, states] = self.shape;
        let [dt_bias, rate, skip] = &self.constants;
        Scan { heads, head_dim, groups, states, dt_bias, rate, skip, dt_limits: self.dt_limits, spans }
    }

    fn input(&self) -> ScanInput<'_> {
        let [x, b, c, dt] = &self.input;
        ScanInput { x, b, c, dt }
    }

    fn width(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    fn forward(&self, backend: &dyn Backend) -> Buffer {
        let mut y = nines(self.tokens * self.width());
        backend.scan(&mut y, &self.input(), &self.scan(&self.spans), None);
        y
    }

    fn backward(&self, backend: &dyn Backend, dy: &Buffer) -> [Buffer; 5] {
        let [mut dx, mut db, mut dc, mut ddt] = self.input.clone();
        let mut drate = nines(ddt.len());
        let gradient =
            ScanGradient { dx: &mut dx, db: &mut db, dc: &mut dc, ddt: &mut ddt, drate: Some(&mut drate) };
        backend.scan_backward(gradient, dy, &self.input(), &self.scan(&self.spans), &mut Vec::new());
        [dx, db, dc, ddt, drate]
    }
}

const NO_LIMITS: (f32, f32) = (0.0, f32::INFINITY);

fn cases() -> [Case; 5] {
    [
        Case::new(&[1], [1, 1, 1, 1], NO_LIMITS),
        Case::new(&[3, 1, 70], [4, 6, 2, 5], NO_LIMITS),
        Case::new(&[33, 32], [10, 3, 1, 17], NO_LIMITS),
        Case::new(&[64, 2], [9, 8, 3, 16], (0.3, 1.2)),
        Case::new(&[97], [17, 5, 1, 33], (0.0, 0.5)),
    ]
}

#[test]
fn scan_and_its_backward() {
    for case in cases() {
        check(&format!("scan {:?} over {:?}", case.shape, case.spans), 2e-5, |backend| {
            let y = case.forward(backend);
            let [dx, db, dc, ddt, drate] = case.backward(backend, &noise(8, y.len()));
            let [heads, head_dim, _, states] = case.shape;
            let past = noise(9, (case.spans.len() + 1) * heads * head_dim * states);
            let (mut next, slots) = (past.clone(), (0..case.spans.len()).rev().collect::<Vec<_>>());
            let carry = Carry { slots: &slots, past: &past, next: &mut next };
            let mut carried = nines(y.len());
            backend.scan(&mut carried, &case.input(), &case.scan(&case.spans), Some(carry));
            vec![y, dx, db, dc, ddt, drate, carried, next]
        });
    }
}

#[test]
fn gradients_of_the_scan_are_its_slopes() {
    let case = Case::new(&[7, 40], [3, 4, 1, 5], NO_LIMITS);
    let dy = noise(8, case.tokens * case.width());
    for backend in [&Reference::EXACT as &dyn Backend, &Cpu::new(2).unwrap()] {
        let gradients = case.backward(backend, &dy);
        for which in 0..4 {
            let direction = noise(20 + which as u64, case.input[which].len());
            let loss_at = |step: f32| {
                let mut moved = Case::new(&[7, 40], case.shape, case.dt_limits);
                for (value, d) in moved.input[which].iter_mut().zip(&*direction) {
                    *value += step * d;
                }
                let y = moved.forward(&Reference::EXACT);
                y.iter().zip(&*dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>()
            };
            let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
            let dot = |a: &[f32]| -> f64 { a.iter().zip(&*direction).map(|(a, b)| f64::from(a * b)).sum() };
            let norm = gradients[which].iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let expected = dot(&gradients[which]);
            assert!((slope - expected).abs() < 2e-3 * norm, "input {which}: slope {slope}, got {expected}");
        }
        for head in 0..case.shape[0] {
            let loss_at = |step: f32| {
                let mut moved = Case::new(&[7, 40], case.shape, case.dt_limits);
                moved.constants[1][head] += step;
                let y = moved.forward(&Reference::EXACT);
                y.iter().zip(&*dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum::<f64>()
            };
            let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
            let rows = gradients[4].iter().skip(head).step_by(case.shape[0]);
            let (got, size) = rows.fold((0.0, 0.0f64), |(sum, size), &row| {
                (sum + f64::from(row), size.max(f64::from(row.abs())))
            });
            assert!((slope - got).abs() < 1e-2 * size, "rate of head {head}: slope {slope}, got {got}");
        }
    }
}

#[test]
fn carried_state_gives_what_the_whole_sequence_gives() {
    let case = Case::new(&[50], [4, 6, 2, 5], NO_LIMITS);
    let (c, taps) = (24, 4);
    let (weight, bias, conv_x) = (noise(1, c * taps), noise(2, c), noise(3, 50 * c));
    let width = case.width();
    for backend in [&Reference::EXACT as &dyn Backend, &Cpu::new(2).unwrap()] {
        let whole_scan = case.forward(backend);
        let spans = [Span::whole(0..50)];
        let mut whole_conv = nines(50 * c);
        let conv = Convolution { weight: &weight, bias: &bias, taps, spans: &spans };
        backend.causal_conv(&mut whole_conv, &conv_x, &conv, None);
        let (mut scan_state, mut conv_state) = (Buffer::zeros(width * 5), Buffer::zeros((taps - 1) * c));
        for piece in [0..1, 1..2, 2..4, 4..40, 40..50] {
            let (rows, slots) = ([Span::whole(piece.clone())], [0]);
            let (past, mut y) = (scan_state.clone(), nines(50 * width));
            let carry = Carry { slots: &slots, past: &past, next: &mut scan_state };
            backend.scan(&mut y, &case.input(), &case.scan(&rows), Some(carry));
            let part = piece.start * width..piece.end * width;
            for (got, expected) in y[part.clone()].iter().zip(&whole_scan[part]) {
                assert!((got - expected).abs() < 1e-5, "scan at {piece:?}: {got}, whole {expected}");
            }
            let (past, mut y) = (conv_state.clone(), nines(50 * c));
            let carry = Carry { slots: &slots, past: &past, next: &mut conv_state };
            let conv = Convolution { spans: &rows, ..conv };
            backend.causal_conv(&mut y, &conv_x, &conv, Some(carry));
            let part = piece.start * c..piece.end * c;
            for (got, expected) in y[part.clone()].iter().zip(&whole_conv[part]) {
                assert!((got - expected).abs() < 1e-6, "convolution at {piece:?}: {got}, whole {expected}");
            }
        }
    }
}
