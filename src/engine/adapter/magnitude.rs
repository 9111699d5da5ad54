//! What DoRA adds to a pair: the norm of each row of the adapted weight, kept until the adapter changes, for a
//! decoding step must not walk over all weights; and the adapted weight itself, for merging.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Adapter, Module};

/// The norms of the rows of W + scale·B·A of one module, and the number of the model that W is of.
#[derive(Debug, Default)]
pub(super) struct Norms(Mutex<Option<(u64, Arc<[f32]>)>>);

impl Norms {
    /// The norms for `model`, computed if they are not known.
    pub(super) fn get(&self, model: u64, compute: impl FnOnce() -> Vec<f32>) -> Arc<[f32]> {
        if let Some((_, norms)) = self.lock().as_ref().filter(|(of, _)| *of == model) {
            return norms.clone();
        }
        // Not under the lock: a thread that waits for the pool may be given another pass that wants it.
        let norms: Arc<[f32]> = compute().into();
        *self.lock() = Some((model, norms.clone()));
        norms
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, Arc<[f32]>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next [`Norms::get`] compute anew.
    pub(super) fn forget(&mut self) {
        *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A clone may be changed: it starts without norms.
impl Clone for Norms {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// What is computed from values adds nothing to their equality.
impl PartialEq for Norms {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Adapter {
    /// Turns `weight` (out, in), row-major, of the linear layer `name` into the adapted weight that a model
    /// without the adapter needs to compute the same: W + scale·B·A, each row brought to its magnitude for DoRA.
    /// False, and nothing is changed, if the layer is not adapted. Sums run in f64.
    pub fn merge(&self, name: &str, weight: &mut [f32]) -> bool {
        let module = self.modules.iter().find(|module| module.name == name);
        module.is_some_and(|module| {
            module.merge(weight);
            true
        })
    }
}

impl Module {
    fn merge(&self, weight: &mut [f32]) {
        let (rank, input) = (self.rank, self.a.len() / self.rank);
        assert_eq!(weight.len(), self.b.len() / rank * input, "BUG: the weight is of another layer");
        for (row, values) in weight.chunks_exact_mut(input).enumerate() {
            let mut sums = vec![0.0f64; input];
            for (&b, a) in self.b[row * rank..].iter().zip(self.a.chunks_exact(input)) {
                sums.iter_mut().zip(a).for_each(|(sum, &a)| *sum += f64::from(b) * f64::from(a));
            }
            let scale = f64::from(self.scale);
            sums.iter_mut().zip(&*values).for_each(|(sum, &own)| *sum = f64::from(own) + scale * *sum);
            let factor = self.magnitude.as_ref().map_or(1.0, |magnitude| {
                f64::from(magnitude[row]) / sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt()
            });
            values.iter_mut().zip(sums).for_each(|(value, sum)| *value = (factor * sum) as f32);
        }
    }
}
