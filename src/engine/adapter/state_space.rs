//! The constants of Mamba's scan, A_log, D and dt_bias, trained along with the pairs: a few hundred values that decide
//! how long a layer remembers. PEFT has no option for bare parameters, but loads every tensor that an adapter's file
//! names as the wrapped model does, and so do the names here.

use safetensors::tensor::SafeTensors;

use super::{AdapterError, LinearName};
use crate::backend::Buffer;

const PREFIX: &str = "base_model.model.";
const LEAVES: [&str; 3] = ["A_log", "D", "dt_bias"];

/// The constants of one Mamba layer, or their gradients; H values each.
#[derive(Debug, Clone, PartialEq)]
pub struct StateSpace {
    /// The layer's full name, `model.layers.0.mamba`.
    pub name: String,
    /// The logarithm of the rate of decay.
    pub a_log: Buffer,
    /// What of x is added to y at once: D.
    pub skip: Buffer,
    /// Added to dt before its softplus.
    pub dt_bias: Buffer,
}

impl StateSpace {
    /// Whether a tensor of this name in PEFT's file is one of the constants.
    pub fn is_key(name: &str) -> bool {
        split(name).is_some()
    }

    /// -exp(A_log) (H).
    pub(crate) fn rate(&self) -> Vec<f32> {
        rate(&self.a_log.host())
    }

    /// Whether the two are of the same layer.
    pub(super) fn fits(&self, other: &Self) -> bool {
        self.name == other.name && self.a_log.len() == other.a_log.len()
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, &[f32])> {
        let values = [&self.a_log[..], &self.skip[..], &self.dt_bias[..]];
        LEAVES.into_iter().map(|leaf| key(&self.name, leaf)).zip(values)
    }

    pub(super) fn buffers_mut(&mut self) -> [&mut Buffer; 3] {
        [&mut self.a_log, &mut self.skip, &mut self.dt_bias]
    }

    pub(super) fn tensors_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        let Self { name, a_log, skip, dt_bias } = self;
        let values = [&mut a_log[..], &mut skip[..], &mut dt_bias[..]];
        LEAVES.map(|leaf| key(name, leaf)).into_iter().zip(values)
    }

    /// Zeros for every layer whose constants the file has, in the order of the linear layers.
    pub(super) fn of_file(tensors: &SafeTensors<'_>, linears: &[LinearName]) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for (name, view) in tensors.iter() {
            let Some(layer) = split(name).filter(|layer| found.iter().all(|known| known.name != *layer))
            else {
                continue;
            };
            let zeros = Buffer::zeros(view.shape().iter().product());
            let (a_log, skip, dt_bias) = (zeros.clone(), zeros.clone(), zeros);
            found.push(Self { name: layer.to_owned(), a_log, skip, dt_bias });
        }
        let place = |space: &Self| {
            let below = format!("{}.", space.name);
            linears.iter().position(|(linear, ..)| linear.starts_with(&below))
        };
        found.sort_by_key(|space| (place(space).unwrap_or(usize::MAX), space.name.clone()));
        found
    }
}

/// -exp(A_log) (H).
pub(crate) fn rate(a_log: &[f32]) -> Vec<f32> {
    a_log.iter().map(|log| -log.exp()).collect()
}

/// An error where `found` are not the constants of all of the model's Mamba layers, or none at all.
pub(super) fn check(
    found: &[StateSpace],
    model: &[StateSpace],
    path: &std::path::Path,
) -> Result<(), AdapterError> {
    if found.is_empty() {
        return Ok(());
    }
    let tensor = |space: &StateSpace| key(&space.name, LEAVES[0]);
    if let Some(alien) = found.iter().find(|own| !model.iter().any(|space| space.name == own.name)) {
        return Err(AdapterError::UnknownTensor { path: path.to_owned(), tensor: tensor(alien) });
    }
    for space in model {
        let Some(own) = found.iter().find(|own| own.name == space.name) else {
            return Err(AdapterError::MissingTensor { path: path.to_owned(), tensor: tensor(space) });
        };
        if !own.fits(space) {
            let (got, expected) = (vec![own.a_log.len()], vec![space.a_log.len()]);
            return Err(AdapterError::Shape { path: path.to_owned(), tensor: tensor(space), got, expected });
        }
    }
    Ok(())
}

fn key(layer: &str, leaf: &str) -> String {
    format!("{PREFIX}{layer}.{leaf}")
}

/// The layer of a constant's name.
fn split(name: &str) -> Option<&str> {
    let (layer, leaf) = name.strip_prefix(PREFIX)?.rsplit_once('.')?;
    (LEAVES.contains(&leaf)).then_some(layer)
}
