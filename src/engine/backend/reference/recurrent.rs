//! The oracle of the operations that carry a state along a sequence: causal convolution and Mamba2's scan, row
//! after row in f64. The backwards keep every state; only tests and tiny models can afford that.

use super::{Carry, Convolution, Scan, ScanGradient, ScanInput};

/// y = silu(conv(x)).
pub(super) fn conv(y: &mut [f32], x: &[f32], conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
    let c = conv.bias.len();
    let size = (conv.taps - 1) * c;
    let mut carry = carry;
    for (index, span) in conv.spans.iter().enumerate() {
        let slot = carry.as_ref().map(|carry| carry.slots[index] * size);
        let past = match (&carry, slot) {
            (Some(carry), Some(slot)) => carry.past[slot..slot + size].to_vec(),
            _ => vec![0.0; size],
        };
        // The rows a span sees: its slot's, then its own.
        let rows = [&past[..], &x[span.queries.start * c..span.queries.end * c]].concat();
        for (i, row) in span.queries.clone().enumerate() {
            for channel in 0..c {
                let u = before_silu(&rows, i, channel, conv);
                y[row * c + channel] = (u * sigmoid(u)) as f32;
            }
        }
        if let (Some(carry), Some(slot)) = (&mut carry, slot) {
            carry.next[slot..slot + size].copy_from_slice(&rows[rows.len() - size..]);
        }
    }
}

/// dx through `conv` of dy.
pub(super) fn conv_backward(dx: &mut [f32], dy: &[f32], x: &[f32], conv: &Convolution<'_>) {
    let (c, taps) = (conv.bias.len(), conv.taps);
    dx.fill(0.0);
    for span in conv.spans {
        let own = &x[span.queries.start * c..span.queries.end * c];
        let rows = [&vec![0.0; (taps - 1) * c][..], own].concat();
        for (i, row) in span.queries.clone().enumerate() {
            for channel in 0..c {
                let u = before_silu(&rows, i, channel, conv);
                let slope = sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u)));
                let du = f64::from(dy[row * c + channel]) * slope;
                for tap in 0..taps.min(i + 1) {
                    let weight = conv.weight[channel * taps + taps - 1 - tap];
                    dx[(row - tap) * c + channel] += (du * f64::from(weight)) as f32;
                }
            }
        }
    }
}

/// The convolution at row i of `rows`, whose first `taps - 1` rows came before.
fn before_silu(rows: &[f32], i: usize, channel: usize, conv: &Convolution<'_>) -> f64 {
    let (c, taps) = (conv.bias.len(), conv.taps);
    let products = (0..taps)
        .map(|k| f64::from(conv.weight[channel * taps + k]) * f64::from(rows[(i + k) * c + channel]));
    f64::from(conv.bias[channel]) + products.sum::<f64>()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// One row of one head, with dt after its softplus.
struct Step<'a> {
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    dt: f64,
    /// d(dt) / d(dt before bias and softplus)
    dt_slope: f64,
}

fn step<'a>(input: &ScanInput<'a>, scan: &Scan<'_>, row: usize, head: usize) -> Step<'a> {
    let (p, n) = (scan.head_dim, scan.states);
    let x = (row * scan.heads + head) * p;
    let group = (row * scan.groups + head * scan.groups / scan.heads) * n;
    let raw = f64::from(input.dt[row * scan.heads + head]) + f64::from(scan.dt_bias[head]);
    let soft = if raw > 20.0 { raw } else { raw.exp().ln_1p() };
    let (low, high) = (f64::from(scan.dt_limits.0), f64::from(scan.dt_limits.1));
    Step {
        x: &input.x[x..x + p],
        b: &input.b[group..group + n],
        c: &input.c[group..group + n],
        dt: soft.clamp(low, high),
        dt_slope: if (low..=high).contains(&soft) { sigmoid(raw) } else { 0.0 },
    }
}

/// Advances a state (P,N) by one row.
fn advance(state: &mut [f64], step: &Step<'_>, rate: f64) {
    let decay = (step.dt * rate).exp();
    for (row, &x) in state.chunks_exact_mut(step.b.len()).zip(step.x) {
        for (s, &b) in row.iter_mut().zip(step.b) {
            *s = *s * decay + step.dt * f64::from(x) * f64::from(b);
        }
    }
}

/// y of every head and row.
pub(super) fn scan(y: &mut [f32], input: &ScanInput<'_>, scan: &Scan<'_>, mut carry: Option<Carry<'_>>) {
    let (heads, p, n) = (scan.heads, scan.head_dim, scan.states);
    for (index, span) in scan.spans.iter().enumerate() {
        for head in 0..heads {
            let mut state = vec![0.0; p * n];
            let place = carry.as_ref().map(|carry| (carry.slots[index] * heads + head) * p * n);
            if let (Some(carry), Some(place)) = (&carry, place) {
                state = carry.past[place..place + p * n].iter().map(|&value| f64::from(value)).collect();
            }
            for row in span.queries.clone() {
                let step = step(input, scan, row, head);
                advance(&mut state, &step, f64::from(scan.rate[head]));
                for (i, state) in state.chunks_exact(n).enumerate() {
                    let seen: f64 = state.iter().zip(step.c).map(|(s, &c)| s * f64::from(c)).sum();
                    let skipped = f64::from(scan.skip[head]) * f64::from(step.x[i]);
                    y[(row * heads + head) * p + i] = (seen + skipped) as f32;
                }
            }
            if let (Some(carry), Some(place)) = (&mut carry, place) {
                let next = &mut carry.next[place..place + p * n];
                next.iter_mut().zip(&state).for_each(|(next, &value)| *next = value as f32);
            }
        }
    }
}

/// The gradients of every input of `scan`.
pub(super) fn scan_backward(gradient: ScanGradient<'_>, dy: &[f32], input: &ScanInput<'_>, scan: &Scan<'_>) {
    let (heads, p, n) = (scan.heads, scan.head_dim, scan.states);
    let ScanGradient { dx, db, dc, ddt, mut drate } = gradient;
    db.fill(0.0);
    dc.fill(0.0);
    for span in scan.spans {
        for head in 0..heads {
            let rate = f64::from(scan.rate[head]);
            let mut states = vec![vec![0.0; p * n]];
            for row in span.queries.clone() {
                let mut state = states.last().expect("the first state is zero").clone();
                advance(&mut state, &step(input, scan, row, head), rate);
                states.push(state);
            }
            let mut dstate = vec![0.0; p * n];
            for (i, row) in span.queries.clone().enumerate().rev() {
                let step = step(input, scan, row, head);
                let (before, after) = (&states[i], &states[i + 1]);
                let decay = (step.dt * rate).exp();
                let group = (row * scan.groups + head * scan.groups / heads) * n;
                let place = (row * heads + head) * p;
                let (mut ddt_sum, mut decayed_sum) = (0.0, 0.0);
                for i in 0..p {
                    let (x, dy) = (f64::from(step.x[i]), f64::from(dy[place + i]));
                    let mut dx_sum = f64::from(scan.skip[head]) * dy;
                    for j in 0..n {
                        let (at, b) = (i * n + j, f64::from(step.b[j]));
                        dstate[at] += dy * f64::from(step.c[j]);
                        dc[group + j] += (dy * after[at]) as f32;
                        db[group + j] += (step.dt * x * dstate[at]) as f32;
                        dx_sum += step.dt * dstate[at] * b;
                        decayed_sum += dstate[at] * before[at];
                        ddt_sum += dstate[at] * (x * b + rate * decay * before[at]);
                        dstate[at] *= decay;
                    }
                    dx[place + i] = dx_sum as f32;
                }
                ddt[row * heads + head] = (ddt_sum * step.dt_slope) as f32;
                if let Some(drate) = &mut drate {
                    drate[row * heads + head] = (step.dt * decay * decayed_sum) as f32;
                }
            }
        }
    }
}
