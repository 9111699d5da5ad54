//! The gated feed-forward block: down(activation(gate(x)) * up(x)), gate and up apart or one above the other
//! in one matrix.

use super::Pass;
use super::linear::{Linear, PairActivations};
use crate::adapter::Gradients;
use crate::backend::{Activation, Backend, Buffer, Write};
use crate::model::workspace::Scratch;

/// down(activation(gate(x)) * up(x)).
pub(in crate::model) struct Mlp {
    pub(in crate::model) gated: Gated,
    pub(in crate::model) down: Linear,
    pub(in crate::model) activation: Activation,
}

/// The linear layers before the gate.
pub(in crate::model) enum Gated {
    /// Two of (I,C).
    Apart { gate: Linear, up: Linear },
    /// One of (2I,C), the gate's rows first.
    Stacked(Linear),
}

/// What the backward needs; it overwrites gate and up with their gradients.
#[derive(Debug, Default)]
pub(in crate::model) struct MlpActivations {
    /// (T,I)
    pub(in crate::model) gate: Buffer,
    /// (T,I)
    pub(in crate::model) up: Buffer,
    /// Of gate, or of both stacked, of up, and of down.
    pairs: [PairActivations; 3],
}

impl Mlp {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        match &mut self.gated {
            Gated::Apart { gate, up } => {
                gate.place(backend);
                up.place(backend);
            }
            Gated::Stacked(both) => both.place(backend),
        }
        self.down.place(backend);
    }

    /// y (T,C) from x (T,C); `wide` is scratch (T,I).
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        y: &mut Buffer,
        x: &Buffer,
        wide: &mut Buffer,
        saved: &mut MlpActivations,
    ) {
        let [pair_gate, pair_up, pair_down] = &mut saved.pairs;
        match &self.gated {
            Gated::Apart { gate, up } => {
                gate.forward(pass, &mut saved.gate, pair_gate, x);
                up.forward(pass, &mut saved.up, pair_up, x);
            }
            Gated::Stacked(both) => {
                both.forward(pass, wide, pair_gate, x);
                let half = wide.len() / 2;
                let mut parts = [pass.sized(&mut saved.gate, half), pass.sized(&mut saved.up, half)];
                pass.backend.split(&mut parts, wide, pass.positions.len());
            }
        }
        pass.backend.glu(pass.sized(wide, saved.gate.len()), &saved.gate, &saved.up, self.activation);
        self.down.forward(pass, y, pair_down, wide);
    }

    /// Given dy (T,C) and the block's input x = `scratch.normed` (T,C), adds to the adapter's gradients and
    /// writes `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &Buffer,
        saved: &mut MlpActivations,
        needs_dx: bool,
    ) {
        let MlpActivations { gate, up, pairs: [pair_gate, pair_up, pair_down] } = saved;
        let Scratch { normed, dnormed, wide, dwide, pair, .. } = scratch;
        pass.backend.glu(pass.sized(wide, gate.len()), gate, up, self.activation);
        let dwide = pass.sized(dwide, gate.len());
        self.down.backward(
            pass,
            gradients,
            Some((&mut *dwide, Write::Overwrite)),
            pair,
            (dy, wide, pair_down),
        );
        pass.backend.glu_backward(gate, up, dwide, self.activation);
        let dx = pass.sized(dnormed, normed.len());
        let mut backward = |linear: &Linear, dy: &Buffer, saved: &PairActivations, write| {
            let dx = needs_dx.then_some((&mut *dx, write));
            linear.backward(pass, gradients, dx, pair, (dy, normed, saved));
        };
        match &self.gated {
            Gated::Apart { gate: gate_linear, up: up_linear } => {
                backward(gate_linear, gate, pair_gate, Write::Overwrite);
                backward(up_linear, up, pair_up, Write::Add);
            }
            Gated::Stacked(both) => {
                let joined = pass.sized(wide, 2 * gate.len());
                pass.backend.join(joined, &[gate, up], pass.positions.len());
                backward(both, joined, pair_gate, Write::Overwrite);
            }
        }
    }

    /// The linear layers in the order of the forward pass.
    pub(in crate::model) fn linears(&self) -> Vec<&Linear> {
        match &self.gated {
            Gated::Apart { gate, up } => vec![gate, up, &self.down],
            Gated::Stacked(both) => vec![both, &self.down],
        }
    }

    /// Each linear layer but the last with what it gave.
    pub(in crate::model) fn outputs<'a>(
        &'a self,
        saved: &'a MlpActivations,
    ) -> Vec<(&'a Linear, &'a Buffer)> {
        match &self.gated {
            Gated::Apart { gate, up } => vec![(gate, &saved.gate), (up, &saved.up)],
            Gated::Stacked(both) => vec![(both, &saved.gate), (both, &saved.up)],
        }
    }
}
