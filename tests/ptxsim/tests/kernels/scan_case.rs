//! Inputs of a Mamba2 scan, and what comes of them in f64, row after row.

use std::ops::Range;

use super::spans::spans;
use crate::harness::{Random, round_bf16s};

/// One scan. Sizes: H heads of P values, G groups of N states.
pub(crate) struct Case {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) groups: usize,
    pub(crate) states: usize,
    pub(crate) spans: Vec<Range<usize>>,
    /// (T, H·P)
    pub(crate) x: Vec<f32>,
    /// (T, G·N)
    pub(crate) b: Vec<f32>,
    pub(crate) c: Vec<f32>,
    /// (T,H)
    pub(crate) dt: Vec<f32>,
    /// (T, H·P)
    pub(crate) dy: Vec<f32>,
    pub(crate) dt_bias: Vec<f32>,
    pub(crate) rate: Vec<f32>,
    pub(crate) skip: Vec<f32>,
    pub(crate) dt_limits: (f32, f32),
    /// Of each span.
    pub(crate) slots: Vec<i32>,
    /// One slot more than spans, (H,P,N) each.
    pub(crate) past: Vec<f32>,
}

/// One row of one head.
struct Step {
    /// Of x, and of b and c.
    x: usize,
    group: usize,
    dt: f64,
    slope: f64,
    decay: f64,
}

/// The gradients of a scan.
pub(crate) struct Gradients {
    pub(crate) dx: Vec<f64>,
    pub(crate) db: Vec<f64>,
    pub(crate) dc: Vec<f64>,
    pub(crate) ddt: Vec<f64>,
    pub(crate) drate: Vec<f64>,
}

impl Case {
    pub(crate) fn new(lengths: &[usize], [heads, head_dim, groups, states]: [usize; 4]) -> Self {
        let mut random = Random::new((heads * 1000 + head_dim * 100 + groups * 10 + states) as u64);
        let rows: usize = lengths.iter().sum();
        let mut values = |count| round_bf16s(&random.normals(count));
        let (x, dy, dt) =
            (values(rows * heads * head_dim), values(rows * heads * head_dim), values(rows * heads));
        let (b, c) = (values(rows * groups * states), values(rows * groups * states));
        Self {
            heads,
            head_dim,
            groups,
            states,
            spans: spans(lengths),
            x,
            b,
            c,
            dt,
            dy,
            dt_bias: random.ranges(heads, -3.0, 0.0),
            rate: random.ranges(heads, -2.0, -0.1),
            skip: random.normals(heads),
            dt_limits: (0.01, 1.5),
            slots: (0..lengths.len() as i32).rev().collect(),
            past: random.normals((lengths.len() + 1) * heads * head_dim * states),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.dt.len() / self.heads
    }

    /// This with every sign taken away: its results are the sums of the sizes of all terms.
    pub(crate) fn sizes(&self) -> Self {
        let sizes = |values: &[f32]| values.iter().map(|value| value.abs()).collect();
        Self {
            spans: self.spans.clone(),
            x: sizes(&self.x),
            b: sizes(&self.b),
            c: sizes(&self.c),
            dy: sizes(&self.dy),
            skip: sizes(&self.skip),
            past: sizes(&self.past),
            dt: self.dt.clone(),
            dt_bias: self.dt_bias.clone(),
            rate: self.rate.clone(),
            slots: self.slots.clone(),
            ..*self
        }
    }

    fn step(&self, row: usize, head: usize) -> Step {
        let raw = f64::from(self.dt[row * self.heads + head]) + f64::from(self.dt_bias[head]);
        let soft = raw.exp().ln_1p();
        let (low, high) = (f64::from(self.dt_limits.0), f64::from(self.dt_limits.1));
        let dt = soft.clamp(low, high);
        Step {
            x: (row * self.heads + head) * self.head_dim,
            group: (row * self.groups + head * self.groups / self.heads) * self.states,
            dt,
            slope: if (low..=high).contains(&soft) { 1.0 / (1.0 + (-raw).exp()) } else { 0.0 },
            decay: (dt * f64::from(self.rate[head])).exp(),
        }
    }

    fn advance(&self, state: &mut [f64], step: &Step) {
        for (i, row) in state.chunks_exact_mut(self.states).enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                let taken = f64::from(self.x[step.x + i]) * f64::from(self.b[step.group + j]);
                *value = *value * step.decay + step.dt * taken;
            }
        }
    }

    /// y, and the states after; slots that no span has stay as they are.
    pub(crate) fn forward(&self, carried: bool) -> (Vec<f64>, Vec<f64>) {
        let (p, n) = (self.head_dim, self.states);
        let mut y = vec![0.0; self.x.len()];
        let mut next: Vec<f64> = self.past.iter().map(|&value| f64::from(value)).collect();
        for (index, span) in self.spans.iter().enumerate() {
            for head in 0..self.heads {
                let place = (self.slots[index] as usize * self.heads + head) * p * n;
                let mut state = if carried { next[place..place + p * n].to_vec() } else { vec![0.0; p * n] };
                for row in span.clone() {
                    let step = self.step(row, head);
                    self.advance(&mut state, &step);
                    for i in 0..p {
                        let seen: f64 =
                            (0..n).map(|j| state[i * n + j] * f64::from(self.c[step.group + j])).sum();
                        y[step.x + i] = seen + f64::from(self.skip[head]) * f64::from(self.x[step.x + i]);
                    }
                }
                if carried {
                    next[place..place + p * n].copy_from_slice(&state);
                }
            }
        }
        (y, next)
    }

    /// The gradients of every input. `sign` is -1, or 1 for [`Case::sizes`].
    pub(crate) fn backward(&self, sign: f64) -> Gradients {
        let (p, n) = (self.head_dim, self.states);
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let (mut dx, mut db, mut dc) = (zeros(&self.x), zeros(&self.b), zeros(&self.c));
        let (mut ddt, mut drate) = (zeros(&self.dt), zeros(&self.dt));
        for span in &self.spans {
            for head in 0..self.heads {
                let rate = sign * f64::from(self.rate[head]).abs();
                let mut states = vec![vec![0.0; p * n]];
                for row in span.clone() {
                    let mut state = states[states.len() - 1].clone();
                    self.advance(&mut state, &self.step(row, head));
                    states.push(state);
                }
                let mut dstate = vec![0.0; p * n];
                for (index, row) in span.clone().enumerate().rev() {
                    let step = self.step(row, head);
                    let (before, after) = (&states[index], &states[index + 1]);
                    let (mut taken, mut decayed) = (0.0, 0.0);
                    for i in 0..p {
                        let (x, dy) = (f64::from(self.x[step.x + i]), f64::from(self.dy[step.x + i]));
                        let mut sum = f64::from(self.skip[head]) * dy;
                        for j in 0..n {
                            let (at, b) = (i * n + j, f64::from(self.b[step.group + j]));
                            dstate[at] += dy * f64::from(self.c[step.group + j]);
                            dc[step.group + j] += dy * after[at];
                            db[step.group + j] += step.dt * x * dstate[at];
                            sum += step.dt * dstate[at] * b;
                            decayed += dstate[at] * before[at];
                            taken += dstate[at] * x * b;
                            dstate[at] *= step.decay;
                        }
                        dx[step.x + i] = sum;
                    }
                    ddt[row * self.heads + head] = (taken + rate * step.decay * decayed) * step.slope;
                    drate[row * self.heads + head] = step.dt * step.decay * decayed;
                }
            }
        }
        Gradients { dx, db, dc, ddt, drate }
    }
}
