//! How a block sits on the residual stream: the norm before it, perhaps one after it, and the factor with which
//! its result is added.

use super::Pass;
use super::norm::Norm;
use crate::backend::{Backend, Buffer};

/// x += multiplier * after(block(before(x))).
pub(in crate::model) struct Residual {
    pub(in crate::model) before: Norm,
    pub(in crate::model) after: Option<Norm>,
    pub(in crate::model) multiplier: f32,
}

impl Residual {
    /// Brings the weights to where `backend` computes.
    pub(in crate::model) fn place(&mut self, backend: &dyn Backend) {
        self.before.place(backend);
        self.after.iter_mut().for_each(|norm| norm.place(backend));
    }

    /// Adds the block's result `y` (T,C) to the stream. Keeps y in `saved` where the backward needs it.
    pub(in crate::model) fn add(
        &self,
        pass: &Pass<'_>,
        stream: &mut Buffer,
        y: &mut Buffer,
        saved: &mut Buffer,
    ) {
        if let Some(after) = &self.after {
            pass.backend.copy(pass.sized(saved, y.len()), y);
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
        dstream: &'a Buffer,
        buffer: &'a mut Buffer,
        saved: &Buffer,
    ) -> &'a Buffer {
        if self.after.is_none() && self.multiplier == 1.0 {
            return dstream;
        }
        let dy = pass.sized(buffer, dstream.len());
        match &self.after {
            None => pass.backend.copy(dy, dstream),
            Some(after) => {
                pass.backend.clear(dy);
                after.backward(pass, dy, dstream, saved);
            }
        }
        if self.multiplier != 1.0 {
            pass.backend.scale(dy, self.multiplier);
        }
        dy
    }
}
