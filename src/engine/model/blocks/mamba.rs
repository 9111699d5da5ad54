//! The Mamba2 block: a projection to gate z, convolved channels (x, B, C) and step sizes dt; a short causal
//! convolution; the scan; a norm of what the gate lets through; a projection back. Sequences of a pass begin
//! with an empty state; with a cache they go on from theirs.

use std::borrow::Cow;

use rayon::prelude::*;

use super::Pass;
use super::linear::Linear;
use super::norm::Norm;
use crate::adapter::{Gradients, StateSpace};
use crate::backend::{Activation, Convolution, Scan, ScanGradient, ScanInput, Write};
use crate::model::cache::{CacheLayout, RecurrentState};
use crate::model::config::MambaOptions;
use crate::model::workspace::{Scratch, sized};

/// out_proj(norm(scan(silu(conv(xBC)), dt) * silu(z))), with z, xBC, dt = in_proj(x).
pub(in crate::model) struct Mamba {
    /// `model.layers.0.mamba`
    pub(in crate::model) name: String,
    /// Place among the model's Mamba layers: what the adapter knows it by.
    pub(in crate::model) index: usize,
    pub(in crate::model) options: MambaOptions,
    pub(in crate::model) in_proj: Linear,
    /// (channels, taps)
    pub(in crate::model) conv_weight: Vec<f32>,
    /// (channels)
    pub(in crate::model) conv_bias: Vec<f32>,
    /// (H)
    pub(in crate::model) dt_bias: Vec<f32>,
    /// (H)
    pub(in crate::model) a_log: Vec<f32>,
    /// (H): -exp(A_log)
    pub(in crate::model) rate: Vec<f32>,
    /// (H): D
    pub(in crate::model) skip: Vec<f32>,
    /// Over each group of the gated output.
    pub(in crate::model) norm: Norm,
    pub(in crate::model) out_proj: Linear,
}

/// What the backward needs; it overwrites `gate` and `scanned` with their gradients.
#[derive(Debug, Default)]
pub(in crate::model) struct MambaActivations {
    /// z (T, H·P)
    gate: Vec<f32>,
    /// The convolution's input (T, channels).
    unconvolved: Vec<f32>,
    /// (T,H)
    dt: Vec<f32>,
    /// (T, H·P)
    x: Vec<f32>,
    /// (T, G·N)
    b: Vec<f32>,
    /// (T, G·N)
    c: Vec<f32>,
    /// The scan's output (T, H·P).
    scanned: Vec<f32>,
    /// x · Aᵀ of in_proj and out_proj.
    h: [Vec<f32>; 2],
}

/// Buffers of one layer at a time.
#[derive(Debug, Default)]
pub(in crate::model) struct MambaScratch {
    /// in_proj's output, or its gradient.
    projected: Vec<f32>,
    /// The convolution's output, or its gradient.
    convolved: Vec<f32>,
    /// The convolution's input's gradient.
    dunconvolved: Vec<f32>,
    gated: Vec<f32>,
    dgated: Vec<f32>,
    gated_normed: Vec<f32>,
    dgated_normed: Vec<f32>,
    dx: Vec<f32>,
    db: Vec<f32>,
    dc: Vec<f32>,
    ddt: Vec<f32>,
    drate: Vec<f32>,
}

/// What the scan is computed with: the model's own constants, or those that the adapter trains.
struct Constants<'a> {
    dt_bias: &'a [f32],
    rate: Cow<'a, [f32]>,
    skip: &'a [f32],
}

impl Mamba {
    /// y (T,C) from `scratch.normed` (T,C), written to `scratch.dnormed`.
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
        saved: &mut MambaActivations,
        cache: Option<(&mut RecurrentState, &CacheLayout)>,
    ) {
        let Scratch { normed, dnormed: y, mamba: own, .. } = scratch;
        let (tokens, options) = (pass.positions.len(), &self.options);
        let whole = pass.spans.iter().all(|span| span.prefix.is_empty());
        assert!(whole, "BUG: a pack with a shared beginning for a model with Mamba layers");
        let (inner, states) = (options.inner(), options.groups * options.states);
        let [h_in, h_out] = &mut saved.h;
        self.in_proj.forward(pass, &mut own.projected, h_in, normed);
        let mut parts = [
            sized(&mut saved.gate, tokens * inner),
            sized(&mut saved.unconvolved, tokens * options.conv_channels()),
            sized(&mut saved.dt, tokens * options.heads),
        ];
        pass.backend.split(&mut parts, &own.projected, tokens);
        let (conv_carry, scan_carry) = match cache {
            None => (None, None),
            Some((state, layout)) => {
                let (conv, scan) = state.carries(&layout.slots);
                (Some(conv), Some(scan))
            }
        };
        let convolved = sized(&mut own.convolved, saved.unconvolved.len());
        pass.backend.causal_conv(convolved, &saved.unconvolved, &self.convolution(pass), conv_carry);
        let mut parts = [
            sized(&mut saved.x, tokens * inner),
            sized(&mut saved.b, tokens * states),
            sized(&mut saved.c, tokens * states),
        ];
        pass.backend.split(&mut parts, convolved, tokens);
        let input = ScanInput { x: &saved.x, b: &saved.b, c: &saved.c, dt: &saved.dt };
        let scanned = sized(&mut saved.scanned, tokens * inner);
        pass.backend.scan(scanned, &input, &self.scan(pass, &self.constants(pass)), scan_carry);
        pass.backend.glu(sized(&mut own.gated, scanned.len()), &saved.gate, scanned, Activation::Silu);
        self.norm.forward(pass, &mut own.gated_normed, &own.gated);
        self.out_proj.forward(pass, y, h_out, &own.gated_normed);
    }

    /// Given dy (T,C) and the block's input x = `scratch.normed` (T,C), adds to the adapter's gradients and
    /// writes `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &[f32],
        saved: &mut MambaActivations,
        needs_dx: bool,
    ) {
        let MambaActivations { gate, unconvolved, dt, x, b, c, scanned, h: [h_in, h_out] } = saved;
        let Scratch { normed, dnormed, dh, mamba: own, backend, .. } = scratch;
        let tokens = pass.positions.len();
        pass.backend.glu(sized(&mut own.gated, gate.len()), gate, scanned, Activation::Silu);
        self.norm.forward(pass, &mut own.gated_normed, &own.gated);
        let to_norm = Some((sized(&mut own.dgated_normed, gate.len()), Write::Overwrite));
        self.out_proj.backward(pass, gradients, to_norm, dh, (dy, &own.gated_normed, h_out));
        sized(&mut own.dgated, gate.len()).fill(0.0);
        self.norm.backward(pass, &mut own.dgated, &own.dgated_normed, &own.gated);
        pass.backend.glu_backward(gate, scanned, &own.dgated, Activation::Silu);
        let mut own_gradients = gradients.state_space(self.index);
        let gradient = ScanGradient {
            dx: sized(&mut own.dx, x.len()),
            db: sized(&mut own.db, b.len()),
            dc: sized(&mut own.dc, c.len()),
            ddt: sized(&mut own.ddt, dt.len()),
            drate: own_gradients.is_some().then_some(sized(&mut own.drate, dt.len())),
        };
        let input = ScanInput { x, b, c, dt };
        let constants = self.constants(pass);
        pass.backend.scan_backward(gradient, scanned, &input, &self.scan(pass, &constants), backend);
        if let Some(gradients) = &mut own_gradients {
            self.constants_backward(gradients, &constants, (scanned, x), (&own.drate, &own.ddt));
        }
        let dconvolved = sized(&mut own.convolved, unconvolved.len());
        pass.backend.join(dconvolved, &[&own.dx, &own.db, &own.dc], tokens);
        let dunconvolved = sized(&mut own.dunconvolved, unconvolved.len());
        let convolution = self.convolution(pass);
        pass.backend.causal_conv_backward(dunconvolved, dconvolved, unconvolved, &convolution, backend);
        let dprojected = sized(&mut own.projected, gate.len() + unconvolved.len() + dt.len());
        pass.backend.join(dprojected, &[gate, dunconvolved, &own.ddt], tokens);
        let dx = needs_dx.then_some((sized(dnormed, normed.len()), Write::Overwrite));
        self.in_proj.backward(pass, gradients, dx, dh, (dprojected, normed, h_in));
    }

    /// Adds to the gradients of A_log, D and dt_bias (H), given dy and x (T, H·P), drate and ddt (T,H). Each head's sum
    /// runs over the rows in their order.
    fn constants_backward(
        &self,
        gradients: &mut StateSpace,
        constants: &Constants<'_>,
        (dy, x): (&[f32], &[f32]),
        (drate, ddt): (&[f32], &[f32]),
    ) {
        let MambaOptions { heads, head_dim, .. } = self.options;
        let column = |values: &[f32], head: usize| -> f64 {
            values.iter().skip(head).step_by(heads).map(|&value| f64::from(value)).sum()
        };
        let of_head = |head: usize| {
            let rows = dy.chunks_exact(head_dim).zip(x.chunks_exact(head_dim)).skip(head).step_by(heads);
            let seen =
                rows.flat_map(|(dy, x)| dy.iter().zip(x)).map(|(&dy, &x)| f64::from(dy) * f64::from(x));
            // The rate is -exp(A_log), and so is its slope.
            let da_log = f64::from(constants.rate[head]) * column(drate, head);
            (da_log as f32, seen.sum::<f64>() as f32, column(ddt, head) as f32)
        };
        let sums: Vec<(f32, f32, f32)> = (0..heads).into_par_iter().map(of_head).collect();
        for (head, (da_log, dskip, ddt_bias)) in sums.into_iter().enumerate() {
            gradients.a_log[head] += da_log;
            gradients.skip[head] += dskip;
            gradients.dt_bias[head] += ddt_bias;
        }
    }

    /// The constants as the model has them.
    pub(in crate::model) fn state_space(&self) -> StateSpace {
        StateSpace {
            name: self.name.clone(),
            a_log: self.a_log.clone(),
            skip: self.skip.clone(),
            dt_bias: self.dt_bias.clone(),
        }
    }

    /// Whether the pass adapts this block.
    pub(in crate::model) fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        let trained = pass.adapter.is_some_and(|adapter| adapter.state_space(self.index).is_some());
        trained || self.linears().iter().any(|linear| linear.is_adapted(pass))
    }

    /// The linear layers in the order of the forward pass.
    pub(in crate::model) fn linears(&self) -> Vec<&Linear> {
        vec![&self.in_proj, &self.out_proj]
    }

    /// Each linear layer but the last with what it gave.
    pub(in crate::model) fn outputs<'a>(
        &'a self,
        saved: &'a MambaActivations,
    ) -> Vec<(&'a Linear, &'a [f32])> {
        [&saved.gate, &saved.unconvolved, &saved.dt].map(|values| (&self.in_proj, &values[..])).into()
    }

    /// Values of a sequence's state: of the convolution and of the scan.
    pub(in crate::model) fn state_sizes(&self) -> (usize, usize) {
        let options = &self.options;
        ((options.taps - 1) * options.conv_channels(), options.inner() * options.states)
    }

    fn convolution<'a>(&'a self, pass: &Pass<'a>) -> Convolution<'a> {
        let (weight, bias) = (&self.conv_weight, &self.conv_bias);
        Convolution { weight, bias, taps: self.options.taps, spans: pass.spans }
    }

    fn constants<'a>(&'a self, pass: &Pass<'a>) -> Constants<'a> {
        match pass.adapter.and_then(|adapter| adapter.state_space(self.index)) {
            Some(trained) => {
                Constants { dt_bias: &trained.dt_bias, rate: Cow::Owned(trained.rate()), skip: &trained.skip }
            }
            None => Constants { dt_bias: &self.dt_bias, rate: Cow::Borrowed(&self.rate), skip: &self.skip },
        }
    }

    fn scan<'a>(&self, pass: &Pass<'a>, constants: &'a Constants<'_>) -> Scan<'a> {
        let MambaOptions { heads, head_dim, groups, states, dt_limits, .. } = self.options;
        Scan {
            heads,
            head_dim,
            groups,
            states,
            dt_bias: constants.dt_bias,
            rate: &constants.rate,
            skip: constants.skip,
            dt_limits,
            spans: pass.spans,
        }
    }
}
