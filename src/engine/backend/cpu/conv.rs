//! Causal convolution of each channel by itself, with silu: Mamba's short look at the past. A task is a run of
//! rows of one span; a sequence's state is its last rows, so decoding is the same loop over one row.

use super::product::Shared;
use super::{Carry, Convolution, Cpu, TASK_ROWS, rows};

/// Runs of rows of one span: (span, first row, end row).
fn runs(conv: &Convolution<'_>) -> Vec<(usize, usize, usize)> {
    let spans = conv.spans.iter().enumerate();
    spans
        .flat_map(|(index, span)| {
            let end = span.queries.end;
            let starts = span.queries.clone().step_by(TASK_ROWS);
            starts.map(move |start| (index, start, end.min(start + TASK_ROWS)))
        })
        .collect()
}

/// The weight with each tap's values side by side (K,C).
fn by_tap(conv: &Convolution<'_>) -> Vec<f32> {
    let taps = 0..conv.taps;
    taps.flat_map(|tap| conv.weight.iter().skip(tap).step_by(conv.taps).copied()).collect()
}

/// y = silu(conv(x)); see [`crate::backend::Backend::causal_conv`].
pub(super) fn forward(
    cpu: &Cpu,
    y: &mut [f32],
    x: &[f32],
    conv: &Convolution<'_>,
    mut carry: Option<Carry<'_>>,
) {
    let (c, kept) = (conv.bias.len(), conv.taps - 1);
    let (weight, runs, shared) = (by_tap(conv), runs(conv), Shared::new(y));
    let past = carry.as_ref().map(|carry| (carry.past, carry.slots));
    cpu.run(runs.len(), |task| {
        let (index, start, end) = runs[task];
        let past = past.map(|(past, slots)| &past[slots[index] * kept * c..(slots[index] + 1) * kept * c]);
        // SAFETY: the runs of different tasks do not overlap.
        let y = unsafe { shared.slice(start * c..end * c) };
        convolve(y, x, conv, &weight, conv.spans[index].queries.start, start, past);
        rows::silu(y);
    });
    if let Some(carry) = &mut carry {
        for (span, slot) in conv.spans.iter().zip(carry.slots) {
            let state = slot * kept * c..(slot + 1) * kept * c;
            let new = span.queries.len().min(kept);
            let next = &mut carry.next[state.clone()];
            next[..(kept - new) * c].copy_from_slice(&carry.past[state][new * c..]);
            next[(kept - new) * c..].copy_from_slice(&x[(span.queries.end - new) * c..span.queries.end * c]);
        }
    }
}

/// u: bias and taps at the rows from `start`, of a span that begins at `first`, before silu.
fn convolve(
    u: &mut [f32],
    x: &[f32],
    conv: &Convolution<'_>,
    weight: &[f32],
    first: usize,
    start: usize,
    past: Option<&[f32]>,
) {
    let (c, taps) = (conv.bias.len(), conv.taps);
    for (row, u) in (start..).zip(u.chunks_exact_mut(c)) {
        u.copy_from_slice(conv.bias);
        for (tap, weight) in weight.chunks_exact(c).enumerate() {
            let back = taps - 1 - tap;
            let within = row - first;
            if back <= within {
                rows::multiply_add(u, &x[(row - back) * c..], weight);
            } else if let Some(past) = past {
                rows::multiply_add(u, &past[(within + taps - 1 - back) * c..], weight);
            }
        }
    }
}

/// dx; see [`crate::backend::Backend::causal_conv_backward`].
pub(super) fn backward(
    cpu: &Cpu,
    dx: &mut [f32],
    dy: &[f32],
    x: &[f32],
    conv: &Convolution<'_>,
    scratch: &mut Vec<f32>,
) {
    let (c, taps) = (conv.bias.len(), conv.taps);
    if scratch.len() < x.len() {
        scratch.resize(x.len(), 0.0);
    }
    let (weight, runs) = (by_tap(conv), runs(conv));
    let shared = Shared::new(&mut scratch[..x.len()]);
    cpu.run(runs.len(), |task| {
        let (index, start, end) = runs[task];
        // SAFETY: the runs of different tasks do not overlap.
        let du = unsafe { shared.slice(start * c..end * c) };
        convolve(du, x, conv, &weight, conv.spans[index].queries.start, start, None);
        rows::silu_backward(du, &dy[start * c..end * c]);
    });
    let (du, shared) = (&scratch[..x.len()], Shared::new(dx));
    cpu.run(runs.len(), |task| {
        let (index, start, end) = runs[task];
        let last = conv.spans[index].queries.end;
        // SAFETY: as above.
        let dx = unsafe { shared.slice(start * c..end * c) };
        dx.fill(0.0);
        for (row, dx) in (start..).zip(dx.chunks_exact_mut(c)) {
            for (tap, weight) in weight.chunks_exact(c).enumerate() {
                let ahead = row + taps - 1 - tap;
                if ahead < last {
                    rows::multiply_add(dx, &du[ahead * c..], weight);
                }
            }
        }
    });
}
