//! An adapter where a backend computes: a copy on the device for a model that is on one, kept until the adapter
//! changes, for a decoding step must not bring all pairs along.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Adapter, Gradients, Module, StateSpace};
use crate::backend::{Backend, BackendKind, Buffer, Precision};

/// The copy for the model of that number.
#[derive(Debug, Default)]
pub(super) struct Placed(Mutex<Option<(u64, Arc<Adapter>)>>);

impl Placed {
    /// Makes the next [`Adapter::placed`] copy anew.
    pub(super) fn forget(&mut self) {
        *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A clone may be changed: it starts without a copy.
impl Clone for Placed {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// A copy adds nothing to equality.
impl PartialEq for Placed {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

/// An adapter whose values are where a backend computes.
pub(crate) enum Here<'a> {
    Own(&'a Adapter),
    Copy(Arc<Adapter>),
}

impl Deref for Here<'_> {
    type Target = Adapter;

    fn deref(&self) -> &Adapter {
        match self {
            Self::Own(adapter) => adapter,
            Self::Copy(adapter) => adapter,
        }
    }
}

impl Adapter {
    /// This adapter where `backend` computes, for the model of that number.
    pub(crate) fn placed(&self, model: u64, backend: &dyn Backend) -> Here<'_> {
        if backend.kind() != BackendKind::Cuda {
            return Here::Own(self);
        }
        let mut placed = self.placed.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, copy)) = placed.as_ref().filter(|(of, _)| *of == model) {
            return Here::Copy(copy.clone());
        }
        let mut copy = self.clone();
        for Module { a, b, magnitude, .. } in &mut copy.modules {
            backend.place(a, Precision::Rounded);
            backend.place(b, Precision::Rounded);
            magnitude.iter_mut().for_each(|values| backend.place(values, Precision::Exact));
        }
        for space in &mut copy.state_spaces {
            space.buffers_mut().into_iter().for_each(|values| backend.place(values, Precision::Exact));
        }
        let copy = Arc::new(copy);
        *placed = Some((model, copy.clone()));
        Here::Copy(copy)
    }
}

impl Gradients {
    /// Zero gradients for `adapter` where `backend` computes.
    pub(crate) fn placed(adapter: &Adapter, backend: &dyn Backend) -> Self {
        let mut gradients = Self::new(adapter);
        gradients.buffers_mut().for_each(|values| backend.place(values, Precision::Exact));
        gradients
    }

    /// Sets all to 0 where `backend` computes.
    pub(crate) fn clear(&mut self, backend: &dyn Backend) {
        self.buffers_mut().for_each(|values| backend.clear(values));
    }

    /// Adds those of `other`, wherever they are.
    pub(crate) fn add(&mut self, other: &mut Self) {
        for (own, other) in self.buffers_mut().zip(other.buffers_mut()) {
            own.iter_mut().zip(&*other.host()).for_each(|(own, other)| *own += other);
        }
    }

    fn buffers_mut(&mut self) -> impl Iterator<Item = &mut Buffer> {
        let pairs = self
            .modules
            .iter_mut()
            .flat_map(|Module { a, b, magnitude, .. }| [Some(a), Some(b), magnitude.as_mut()]);
        pairs.flatten().chain(self.state_spaces.iter_mut().flat_map(StateSpace::buffers_mut))
    }
}
