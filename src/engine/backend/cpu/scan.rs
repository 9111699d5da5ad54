//! Mamba2's scan, row after row: a state (P,N) a head that decays and takes in dt x ⊗ B. A task is one span and
//! some heads. The backward keeps the states of every 32nd row, goes over the stretches between them from the
//! last to the first, and recomputes the states inside.
//!
//! B and C belong to groups of heads, so a task writes their gradients to its own place and the places are
//! added in order.

use std::ops::Range;

use super::product::Shared;
use super::{Carry, Cpu, Scan, ScanGradient, ScanInput, TASK_ROWS, rows, scratch};

/// Heads of a task.
const HEADS: usize = 8;
/// Rows between two kept states.
const STRETCH: usize = 32;

/// What a row brings to one head.
struct Step<'a> {
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    dt: f32,
    decay: f32,
    /// d(dt) / d(dt before bias and softplus)
    dt_slope: f32,
}

impl<'a> Step<'a> {
    fn new(input: &ScanInput<'a>, scan: &Scan<'_>, row: usize, head: usize) -> Self {
        let (x, group) = (x_at(scan, row, head), group_at(scan, row, head));
        let raw = input.dt[row * scan.heads + head] + scan.dt_bias[head];
        let soft = if raw > 20.0 { raw } else { raw.exp().ln_1p() };
        let (low, high) = scan.dt_limits;
        let dt = soft.clamp(low, high);
        let dt_slope = if dt == soft { 1.0 / (1.0 + (-raw).exp()) } else { 0.0 };
        let decay = (dt * scan.rate[head]).exp();
        Self { x: &input.x[x], b: &input.b[group.clone()], c: &input.c[group], dt, decay, dt_slope }
    }

    fn advance(&self, state: &mut [f32]) {
        rows::scan_advance(state, self.x, self.b, self.dt, self.decay);
    }
}

fn x_at(scan: &Scan<'_>, row: usize, head: usize) -> Range<usize> {
    let start = (row * scan.heads + head) * scan.head_dim;
    start..start + scan.head_dim
}

fn group_at(scan: &Scan<'_>, row: usize, head: usize) -> Range<usize> {
    let start = (row * scan.groups + head * scan.groups / scan.heads) * scan.states;
    start..start + scan.states
}

/// The heads of block `block`.
fn heads_of(scan: &Scan<'_>, block: usize) -> Range<usize> {
    block * HEADS..scan.heads.min((block + 1) * HEADS)
}

/// y; see [`crate::backend::Backend::scan`].
pub(super) fn forward(
    cpu: &Cpu,
    y: &mut [f32],
    input: &ScanInput<'_>,
    scan: &Scan<'_>,
    carry: Option<Carry<'_>>,
) {
    let size = scan.head_dim * scan.states;
    let blocks = scan.heads.div_ceil(HEADS);
    let y = Shared::new(y);
    let carry = carry.map(|carry| (carry.slots, carry.past, Shared::new(carry.next)));
    cpu.run(scan.spans.len() * blocks, |task| {
        let (span, index) = (&scan.spans[task / blocks], task / blocks);
        let run = |head: usize, state: &mut [f32]| {
            for row in span.queries.clone() {
                let step = Step::new(input, scan, row, head);
                step.advance(state);
                // SAFETY: one task per span and head.
                let y = unsafe { y.slice(x_at(scan, row, head)) };
                rows::scan_read(y, state, step.x, step.c, scan.skip[head]);
            }
        };
        for head in heads_of(scan, task % blocks) {
            match &carry {
                None => scratch::with(size, |state| {
                    state.fill(0.0);
                    run(head, state);
                }),
                Some((slots, past, next)) => {
                    let start = (slots[index] * scan.heads + head) * size;
                    // SAFETY: as above; each span has its own slot.
                    let state = unsafe { next.slice(start..start + size) };
                    state.copy_from_slice(&past[start..start + size]);
                    run(head, state);
                }
            }
        }
    });
}

/// Gradients of the inputs; see [`crate::backend::Backend::scan_backward`].
pub(super) fn backward(
    cpu: &Cpu,
    gradient: ScanGradient<'_>,
    dy: &[f32],
    input: &ScanInput<'_>,
    scan: &Scan<'_>,
    scratch: &mut Vec<f32>,
) {
    let ScanGradient { dx, db, dc, ddt, drate } = gradient;
    let (blocks, size) = (scan.heads.div_ceil(HEADS), input.b.len());
    if scratch.len() < 2 * blocks * size {
        scratch.resize(2 * blocks * size, 0.0);
    }
    let (db_blocks, dc_blocks) = scratch[..2 * blocks * size].split_at_mut(blocks * size);
    let (db_shared, dc_shared) = (Shared::new(db_blocks), Shared::new(dc_blocks));
    let (dx, ddt, drate) = (Shared::new(dx), Shared::new(ddt), drate.map(|drate| Shared::new(drate)));
    let width = scan.groups * scan.states;
    cpu.run(scan.spans.len() * blocks, |task| {
        let (span, block) = (&scan.spans[task / blocks], task % blocks);
        let place = block * size + span.queries.start * width..block * size + span.queries.end * width;
        // SAFETY: one task per span and block, and each writes only its own rows of its own place and heads.
        let (db, dc) = unsafe { (db_shared.slice(place.clone()), dc_shared.slice(place)) };
        db.fill(0.0);
        dc.fill(0.0);
        for head in heads_of(scan, block) {
            head_backward(
                (&dx, &ddt, drate.as_ref()),
                (&mut *db, &mut *dc),
                dy,
                input,
                scan,
                &span.queries,
                head,
            );
        }
    });
    for (target, blocks) in [(db, &*db_blocks), (dc, &*dc_blocks)] {
        cpu.run_over(target, TASK_ROWS * width, |start, values| {
            values.fill(0.0);
            for block in blocks.chunks_exact(size) {
                rows::add(values, &block[start..start + values.len()]);
            }
        });
    }
}

/// One head over one span: writes its dx, ddt and drate, adds to the span's db and dc.
fn head_backward(
    (dx, ddt, drate): (&Shared<'_>, &Shared<'_>, Option<&Shared<'_>>),
    (db, dc): (&mut [f32], &mut [f32]),
    dy: &[f32],
    input: &ScanInput<'_>,
    scan: &Scan<'_>,
    span: &Range<usize>,
    head: usize,
) {
    let size = scan.head_dim * scan.states;
    let stretches = span.len().div_ceil(STRETCH);
    let base = group_at(scan, span.start, 0).start;
    scratch::with((stretches + STRETCH + 2) * size, |buffer| {
        let (kept, rest) = buffer.split_at_mut(stretches * size);
        let (states, dstate) = rest.split_at_mut((STRETCH + 1) * size);
        keep_states(kept, dstate, input, scan, span, head);
        dstate.fill(0.0);
        for (index, kept) in kept.chunks_exact(size).enumerate().rev() {
            let first = span.start + index * STRETCH;
            let end = span.end.min(first + STRETCH);
            states[..size].copy_from_slice(kept);
            for (i, row) in (first..end).enumerate() {
                let (before, after) = states[i * size..(i + 2) * size].split_at_mut(size);
                after.copy_from_slice(before);
                Step::new(input, scan, row, head).advance(after);
            }
            for (i, row) in (first..end).enumerate().rev() {
                let step = Step::new(input, scan, row, head);
                let group = group_at(scan, row, head);
                let group = group.start - base..group.end - base;
                let states = states[i * size..(i + 2) * size].split_at(size);
                let x_at = x_at(scan, row, head);
                let at = row * scan.heads + head;
                // SAFETY: the caller has this head and span to itself.
                let (dx, ddt) = unsafe { (dx.slice(x_at.clone()), ddt.slice(at..at + 1)) };
                let gradients = (dx, &mut db[group.clone()], &mut dc[group]);
                let slopes = row_backward(dstate, gradients, &dy[x_at], &step, states, scan, head);
                ddt[0] = slopes.0;
                if let Some(drate) = drate {
                    // SAFETY: as above.
                    let drate = unsafe { drate.slice(at..at + 1) };
                    drate[0] = slopes.1;
                }
            }
        }
    });
}

/// The state before each stretch; `state` is scratch.
fn keep_states(
    kept: &mut [f32],
    state: &mut [f32],
    input: &ScanInput<'_>,
    scan: &Scan<'_>,
    span: &Range<usize>,
    head: usize,
) {
    state.fill(0.0);
    for (index, kept) in kept.chunks_exact_mut(state.len()).enumerate() {
        kept.copy_from_slice(state);
        let first = span.start + index * STRETCH;
        for row in first..span.end.min(first + STRETCH) {
            Step::new(input, scan, row, head).advance(state);
        }
    }
}

/// One row: turns the gradient of the state after it into that of the state before it. Writes dx, adds to db
/// and dc, gives ddt and drate.
fn row_backward(
    dstate: &mut [f32],
    (dx, db, dc): (&mut [f32], &mut [f32], &mut [f32]),
    dy: &[f32],
    step: &Step<'_>,
    (before, after): (&[f32], &[f32]),
    scan: &Scan<'_>,
    head: usize,
) -> (f32, f32) {
    let n = scan.states;
    let (mut from_input, mut from_decay) = (0.0, 0.0);
    for i in 0..scan.head_dim {
        let row = i * n..(i + 1) * n;
        let (taken, decayed) = rows::scan_row_backward(
            &mut dstate[row.clone()],
            dc,
            db,
            &after[row.clone()],
            &before[row],
            step.b,
            step.c,
            dy[i],
            step.dt * step.x[i],
            step.decay,
        );
        dx[i] = step.dt * taken + scan.skip[head] * dy[i];
        from_input += step.x[i] * taken;
        from_decay += decayed;
    }
    let ddt = (from_input + scan.rate[head] * step.decay * from_decay) * step.dt_slope;
    (ddt, step.dt * step.decay * from_decay)
}
