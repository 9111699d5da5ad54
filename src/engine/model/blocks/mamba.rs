//! The Mamba2 block: a projection to gate z, convolved channels (x, B, C) and step sizes dt; a short causal
//! convolution; the scan; a norm of what the gate lets through; a projection back. Sequences of a pass begin
//! with an empty state; with a cache they go on from theirs.

use std::borrow::Cow;

use super::Pass;
use super::linear::{Linear, PairActivations};
use super::norm::Norm;
use crate::adapter::{Gradients, StateSpace};
use crate::backend::{
    Activation, Backend, Buffer, Convolution, Precision, Scan, ScanGradient, ScanInput, Write,
};
use crate::model::cache::{CacheLayout, RecurrentState};
use crate::model::config::MambaOptions;
use crate::model::workspace::Scratch;

/// out_proj(norm(scan(silu(conv(xBC)), dt) * silu(z))), with z, xBC, dt = in_proj(x).
pub(in crate::model) struct Mamba {
    /// `model.layers.0.mamba`
    pub(in crate::model) name: String,
    /// Place among the model's Mamba layers: what the adapter knows it by.
    pub(in crate::model) index: usize,
    pub(in crate::model) options: MambaOptions,
    pub(in crate::model) in_proj: Linear,
    /// (channels, taps)
    pub(in crate::model) conv_weight: Buffer,
    /// (channels)
    pub(in crate::model) conv_bias: Buffer,
    /// (H)
    pub(in crate::model) dt_bias: Buffer,
    /// (H)
    pub(in crate::model) a_log: Buffer,
    /// (H): -exp(A_log)
    pub(in crate::model) rate: Buffer,
    /// (H): D
    pub(in crate::model) skip: Buffer,
    /// Over each group of the gated output.
    pub(in crate::model) norm: Norm,
    pub(in crate::model) out_proj: Linear,
}

/// What the backward needs; it overwrites `gate` and `scanned` with their gradients.
#[derive(Debug, Default)]
pub(in crate::model) struct MambaActivations {
    /// z (T, H·P)
    gate: Buffer,
    /// The convolution's input (T, channels).
    unconvolved: Buffer,
    /// (T,H)
    dt: Buffer,
    /// (T, H·P)
    x: Buffer,
    /// (T, G·N)
    b: Buffer,
    /// (T, G·N)
    c: Buffer,
    /// The scan's output (T, H·P).
    scanned: Buffer,
    /// Of in_proj and out_proj.
    pairs: [PairActivations; 2],
}

/// Buffers of one layer at a time.
#[derive(Debug, Default)]
pub(in crate::model) struct MambaScratch {
    /// in_proj's output, or its gradient.
    projected: Buffer,
    /// The convolution's output, or its gradient.
    convolved: Buffer,
    /// The convolution's input's gradient.
    dunconvolved: Buffer,
    gated: Buffer,
    dgated: Buffer,
    gated_normed: Buffer,
    dgated_normed: Buffer,
    dx: Buffer,
    db: Buffer,
    dc: Buffer,
    ddt: Buffer,
    drate: Buffer,
}

/// What the scan is computed with: the model's own constants, or those that the adapter trains.
struct Constants<'a> {
    dt_bias: &'a Buffer,
    rate: Cow<'a, Buffer>,
    skip: &'a Buffer,
}

impl Mamba {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        let Self { conv_weight, conv_bias, dt_bias, rate, skip, .. } = self;
        for constants in [conv_weight, conv_bias, dt_bias, rate, skip] {
            backend.place(constants, Precision::Exact);
        }
        for linear in [&mut self.in_proj, &mut self.out_proj] {
            linear.place(backend);
        }
        self.norm.place(backend);
    }

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
        let [pair_in, pair_out] = &mut saved.pairs;
        self.in_proj.forward(pass, &mut own.projected, pair_in, normed);
        let mut parts = [
            pass.sized(&mut saved.gate, tokens * inner),
            pass.sized(&mut saved.unconvolved, tokens * options.conv_channels()),
            pass.sized(&mut saved.dt, tokens * options.heads),
        ];
        pass.backend.split(&mut parts, &own.projected, tokens);
        let (conv_carry, scan_carry) = match cache {
            None => (None, None),
            Some((state, layout)) => {
                let (conv, scan) = state.carries(&layout.slots);
                (Some(conv), Some(scan))
            }
        };
        let convolved = pass.sized(&mut own.convolved, saved.unconvolved.len());
        pass.backend.causal_conv(convolved, &saved.unconvolved, &self.convolution(pass), conv_carry);
        let mut parts = [
            pass.sized(&mut saved.x, tokens * inner),
            pass.sized(&mut saved.b, tokens * states),
            pass.sized(&mut saved.c, tokens * states),
        ];
        pass.backend.split(&mut parts, convolved, tokens);
        let input = ScanInput { x: &saved.x, b: &saved.b, c: &saved.c, dt: &saved.dt };
        let scanned = pass.sized(&mut saved.scanned, tokens * inner);
        pass.backend.scan(scanned, &input, &self.scan(pass, &self.constants(pass)), scan_carry);
        pass.backend.glu(pass.sized(&mut own.gated, scanned.len()), &saved.gate, scanned, Activation::Silu);
        self.norm.forward(pass, &mut own.gated_normed, &own.gated);
        self.out_proj.forward(pass, y, pair_out, &own.gated_normed);
    }

    /// Given dy (T,C) and the block's input x = `scratch.normed` (T,C), adds to the adapter's gradients and
    /// writes `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &Buffer,
        saved: &mut MambaActivations,
        needs_dx: bool,
    ) {
        let MambaActivations { gate, unconvolved, dt, x, b, c, scanned, pairs: [pair_in, pair_out] } = saved;
        let Scratch { normed, dnormed, pair, mamba: own, backend, .. } = scratch;
        let tokens = pass.positions.len();
        pass.backend.glu(pass.sized(&mut own.gated, gate.len()), gate, scanned, Activation::Silu);
        self.norm.forward(pass, &mut own.gated_normed, &own.gated);
        let to_norm = Some((pass.sized(&mut own.dgated_normed, gate.len()), Write::Overwrite));
        self.out_proj.backward(pass, gradients, to_norm, pair, (dy, &own.gated_normed, pair_out));
        pass.backend.clear(pass.sized(&mut own.dgated, gate.len()));
        self.norm.backward(pass, &mut own.dgated, &own.dgated_normed, &own.gated);
        pass.backend.glu_backward(gate, scanned, &own.dgated, Activation::Silu);
        let mut own_gradients = gradients.state_space(self.index);
        let gradient = ScanGradient {
            dx: pass.sized(&mut own.dx, x.len()),
            db: pass.sized(&mut own.db, b.len()),
            dc: pass.sized(&mut own.dc, c.len()),
            ddt: pass.sized(&mut own.ddt, dt.len()),
            drate: own_gradients.is_some().then_some(pass.exact(&mut own.drate, dt.len())),
        };
        let input = ScanInput { x, b, c, dt };
        let constants = self.constants(pass);
        pass.backend.scan_backward(gradient, scanned, &input, &self.scan(pass, &constants), backend);
        if let Some(gradients) = &mut own_gradients {
            let StateSpace { a_log, skip, dt_bias, .. } = &mut **gradients;
            let (own, values) = ((&own.drate, &own.ddt), (&*scanned, &*x));
            pass.backend.scan_constants_backward([a_log, skip, dt_bias], &constants.rate, values, own);
        }
        let dconvolved = pass.sized(&mut own.convolved, unconvolved.len());
        pass.backend.join(dconvolved, &[&own.dx, &own.db, &own.dc], tokens);
        let dunconvolved = pass.sized(&mut own.dunconvolved, unconvolved.len());
        let convolution = self.convolution(pass);
        pass.backend.causal_conv_backward(dunconvolved, dconvolved, unconvolved, &convolution, backend);
        let dprojected = pass.sized(&mut own.projected, gate.len() + unconvolved.len() + dt.len());
        pass.backend.join(dprojected, &[gate, dunconvolved, &own.ddt], tokens);
        let dx = needs_dx.then_some((pass.sized(dnormed, normed.len()), Write::Overwrite));
        self.in_proj.backward(pass, gradients, dx, pair, (dprojected, normed, pair_in));
    }

    /// The constants as the model has them.
    pub(in crate::model) fn state_space(&self) -> StateSpace {
        StateSpace {
            name: self.name.clone(),
            a_log: self.a_log.to_host().into(),
            skip: self.skip.to_host().into(),
            dt_bias: self.dt_bias.to_host().into(),
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
    ) -> Vec<(&'a Linear, &'a Buffer)> {
        [&saved.gate, &saved.unconvolved, &saved.dt].map(|values| (&self.in_proj, values)).into()
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
                let mut rate = trained.rate().into();
                pass.backend.place(&mut rate, Precision::Exact);
                Constants { dt_bias: &trained.dt_bias, rate: Cow::Owned(rate), skip: &trained.skip }
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
