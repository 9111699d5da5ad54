//! How a block sits on the residual stream: the norm before it, perhaps one after it, and the factor with which
//! its result is added.

use super::Pass;
use super::norm::Norm;
use crate::model::workspace::sized;

/// x += multiplier * after(block(before(x))).
pub(in crate::model) struct Residual {
    pub(in crate::model) before: Norm,
    pub(in crate::model) after: Option<Norm>,
    pub(in crate::model) multiplier: f32,
}

impl Residual {
    /// Adds the block's result `y` (T,C) to the stream. Keeps y in `saved` where the backward needs it.
    pub(in crate::model) fn add(
        &self,
        pass: &Pass<'_>,
        stream: &mut [f32],
        y: &mut Vec<f32>,
        saved: &mut Vec<f32>,
    ) {
        if let Some(after) = &self.after {
            sized(saved, y.len()).copy_from_slice(y);
            after.forward(pass, y, saved);
        }
        if self.multiplier != 1.0 {
            pass.backend.scale(y, self.multiplier);
        }
        pass.backend.add(stream, y);
    }

    /// The gradient of the block's result (T,C), given that of the stream; `buffer` is where it may be put.
    pub(in crate::model) fn add_backward<'a>(
        &self,
        pass: &Pass<'_>,
        dstream: &'a [f32],
        buffer: &'a mut Vec<f32>,
        saved: &[f32],
    ) -> &'a [f32] {
        if self.after.is_none() && self.multiplier == 1.0 {
            return dstream;
        }
        let dy = sized(buffer, dstream.len());
        match &self.after {
            None => dy.copy_from_slice(dstream),
            Some(after) => {
                dy.fill(0.0);
                after.backward(pass, dy, dstream, saved);
            }
        }
        if self.multiplier != 1.0 {
            pass.backend.scale(dy, self.multiplier);
        }
        dy
    }
}
