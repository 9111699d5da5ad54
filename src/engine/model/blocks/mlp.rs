//! The gated feed-forward block: down(silu(gate(x)) * up(x)).

use super::Pass;
use super::linear::Linear;
use crate::adapter::Gradients;
use crate::backend::Write;
use crate::model::workspace::{Scratch, sized};

/// down(silu(gate(x)) * up(x)).
pub(in crate::model) struct Mlp {
    pub(in crate::model) gate: Linear,
    pub(in crate::model) up: Linear,
    pub(in crate::model) down: Linear,
}

/// What the backward needs; it overwrites gate and up with their gradients.
#[derive(Debug, Default)]
pub(in crate::model) struct MlpActivations {
    /// (T,I)
    pub(in crate::model) gate: Vec<f32>,
    /// (T,I)
    pub(in crate::model) up: Vec<f32>,
    /// x · Aᵀ of gate, up, down.
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
        self.gate.forward(pass, &mut saved.gate, hgate, x);
        self.up.forward(pass, &mut saved.up, hup, x);
        pass.backend.swiglu(sized(wide, saved.gate.len()), &saved.gate, &saved.up);
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
        pass.backend.swiglu(sized(wide, gate.len()), gate, up);
        let dwide = sized(dwide, gate.len());
        self.down.backward(pass, gradients, Some((&mut *dwide, Write::Overwrite)), dh, (dy, wide, hdown));
        pass.backend.swiglu_backward(gate, up, dwide);
        let dx = sized(dnormed, normed.len());
        for (linear, dy, h, write) in
            [(&self.gate, gate, hgate, Write::Overwrite), (&self.up, up, hup, Write::Add)]
        {
            let dx = needs_dx.then_some((&mut *dx, write));
            linear.backward(pass, gradients, dx, dh, (dy, normed, h));
        }
    }

    /// The linear layers in the order of the forward pass.
    pub(in crate::model) fn linears(&self) -> [&Linear; 3] {
        [&self.gate, &self.up, &self.down]
    }
}
