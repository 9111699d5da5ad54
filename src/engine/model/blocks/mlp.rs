//! The gated feed-forward block: down(activation(gate(x)) * up(x)), gate and up apart or one above the other
//! in one matrix.

use super::Pass;
use super::linear::Linear;
use crate::adapter::Gradients;
use crate::backend::{Activation, Write};
use crate::model::workspace::{Scratch, sized};

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
    pub(in crate::model) gate: Vec<f32>,
    /// (T,I)
    pub(in crate::model) up: Vec<f32>,
    /// x · Aᵀ of gate, or of both stacked, of up, and of down.
    h: [Vec<f32>; 3],
}

impl Mlp {
    /// y (T,C) from x (T,C); `wide` is scratch (T,I).
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        y: &mut Vec<f32>,
        x: &[f32],
        wide: &mut Vec<f32>,
        saved: &mut MlpActivations,
    ) {
        let [hgate, hup, hdown] = &mut saved.h;
        match &self.gated {
            Gated::Apart { gate, up } => {
                gate.forward(pass, &mut saved.gate, hgate, x);
                up.forward(pass, &mut saved.up, hup, x);
            }
            Gated::Stacked(both) => {
                both.forward(pass, wide, hgate, x);
                let half = wide.len() / 2;
                let mut parts = [sized(&mut saved.gate, half), sized(&mut saved.up, half)];
                pass.backend.split(&mut parts, wide, pass.positions.len());
            }
        }
        pass.backend.glu(sized(wide, saved.gate.len()), &saved.gate, &saved.up, self.activation);
        self.down.forward(pass, y, hdown, wide);
    }

    /// Given dy (T,C) and the block's input x = `scratch.normed` (T,C), adds to the adapter's gradients and
    /// writes `scratch.dnormed` = dx (T,C), unless `needs_dx` is false.
    pub(in crate::model) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        scratch: &mut Scratch,
        dy: &[f32],
        saved: &mut MlpActivations,
        needs_dx: bool,
    ) {
        let MlpActivations { gate, up, h: [hgate, hup, hdown] } = saved;
        let Scratch { normed, dnormed, wide, dwide, dh, .. } = scratch;
        pass.backend.glu(sized(wide, gate.len()), gate, up, self.activation);
        let dwide = sized(dwide, gate.len());
        self.down.backward(pass, gradients, Some((&mut *dwide, Write::Overwrite)), dh, (dy, wide, hdown));
        pass.backend.glu_backward(gate, up, dwide, self.activation);
        let dx = sized(dnormed, normed.len());
        let mut backward = |linear: &Linear, dy: &[f32], h: &[f32], write| {
            let dx = needs_dx.then_some((&mut *dx, write));
            linear.backward(pass, gradients, dx, dh, (dy, normed, h));
        };
        match &self.gated {
            Gated::Apart { gate: gate_linear, up: up_linear } => {
                backward(gate_linear, gate, hgate, Write::Overwrite);
                backward(up_linear, up, hup, Write::Add);
            }
            Gated::Stacked(both) => {
                let joined = sized(wide, 2 * gate.len());
                pass.backend.join(joined, &[gate, up], pass.positions.len());
                backward(both, joined, hgate, Write::Overwrite);
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
    pub(in crate::model) fn outputs<'a>(&'a self, saved: &'a MlpActivations) -> Vec<(&'a Linear, &'a [f32])> {
        match &self.gated {
            Gated::Apart { gate, up } => vec![(gate, &saved.gate), (up, &saved.up)],
            Gated::Stacked(both) => vec![(both, &saved.gate), (both, &saved.up)],
        }
    }
}
