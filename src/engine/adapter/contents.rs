//! What a PEFT folder holds, read without the model it was made for: the linear layers are those its tensors fit.
//! Everything that loading it would refuse is refused here too.

use std::path::Path;

use safetensors::tensor::SafeTensors;
use serde::Serialize;

use super::peft::{CONFIG, TENSORS, key};
use super::{Adapter, AdapterError, LinearName, Module};

/// An adapter on disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterContents {
    /// `LoRA`, `rsLoRA` or `DoRA`.
    pub kind: &'static str,
    /// What it says it was trained on.
    pub base: String,
    pub rank: usize,
    pub alpha: f32,
    pub dropout: f32,
    /// As PEFT's `target_modules`.
    pub targets: Vec<String>,
    /// Adapted layers.
    pub modules: usize,
    /// Trained values.
    pub parameters: usize,
    /// Mamba layers whose constants (A_log, D, dt_bias) are trained too.
    pub state_spaces: usize,
    /// Smallest and largest Frobenius norm of an update, scale · B · A.
    pub update_norms: (f64, f64),
    /// Modules whose update is zero: they do nothing.
    pub idle: Vec<String>,
}

impl AdapterContents {
    /// Whether `folder` is that of an adapter.
    pub fn is_adapter(folder: &Path) -> bool {
        folder.join(CONFIG).is_file()
    }

    /// Reads PEFT's two files from `folder`.
    ///
    /// # Errors
    /// As [`Adapter::load_peft`], but for what only the model could tell.
    pub fn read(folder: &Path) -> Result<Self, AdapterError> {
        let adapter = Adapter::load_peft_for(folder, linears(&folder.join(TENSORS))?)?;
        let text = fs_err::read_to_string(folder.join(CONFIG))?;
        let fields: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let norms: Vec<f64> = adapter.modules.iter().map(Module::update_norm).collect();
        let idle = adapter.modules.iter().zip(&norms).filter(|(_, norm)| **norm == 0.0);
        Ok(Self {
            kind: match (adapter.shape.dora, adapter.shape.rslora) {
                (true, _) => "DoRA",
                (false, true) => "rsLoRA",
                (false, false) => "LoRA",
            },
            base: fields["base_model_name_or_path"].as_str().unwrap_or_default().to_owned(),
            rank: adapter.shape.rank,
            alpha: adapter.shape.alpha,
            dropout: adapter.shape.dropout,
            targets: adapter.target_modules(),
            modules: adapter.modules.len(),
            parameters: adapter.parameter_count(),
            state_spaces: adapter.state_spaces.len(),
            update_norms: norms
                .iter()
                .fold((f64::INFINITY, 0.0), |(low, high), &norm| (low.min(norm), high.max(norm))),
            idle: idle.map(|(module, _)| module.name.clone()).collect(),
        })
    }
}

/// The linear layers that the file's pairs fit, in the order of their names.
fn linears(path: &Path) -> Result<Vec<LinearName>, AdapterError> {
    let bytes = fs_err::read(path)?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|source| AdapterError::Tensors { path: path.to_owned(), source })?;
    let mut names: Vec<&str> = tensors.names();
    names.sort_unstable();
    let mut linears = Vec::new();
    for name in names {
        let stripped =
            name.strip_prefix("base_model.model.").and_then(|name| name.strip_suffix(".lora_A.weight"));
        let Some(module) = stripped else { continue };
        let side = |half, side: usize| {
            let tensor = key(module, half);
            let found = tensors.tensor(&tensor).ok().and_then(|view| view.shape().get(side).copied());
            found.ok_or_else(|| AdapterError::MissingTensor { path: path.to_owned(), tensor })
        };
        linears.push((module.to_owned(), side('B', 0)?, side('A', 1)?));
    }
    Ok(linears)
}

impl Module {
    /// ‖scale · B · A‖, from the traces of the two Gram matrices (R,R).
    fn update_norm(&self) -> f64 {
        let (rank, input) = (self.rank, self.a.len() / self.rank);
        let mut squares = 0.0;
        for i in 0..rank {
            for j in 0..rank {
                let (left, right) =
                    (&self.a[i * input..(i + 1) * input], &self.a[j * input..(j + 1) * input]);
                let a: f64 = left.iter().zip(right).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                let b: f64 = self.b.chunks_exact(rank).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                squares += a * b;
            }
        }
        f64::from(self.scale) * squares.max(0.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;

    #[test]
    fn an_adapter_is_described_without_its_model() {
        let linears: Vec<LinearName> =
            ["q_proj", "o_proj"].map(|leaf| (format!("model.layers.0.self_attn.{leaf}"), 6, 4)).into();
        let config = LoraConfig { rank: 2, alpha: 3.0, rslora: true, ..LoraConfig::default() };
        let mut adapter = Adapter::for_linears(linears, &config).unwrap();
        let module = &mut adapter.modules[0];
        module.b.iter_mut().enumerate().for_each(|(index, value)| *value = index as f32 - 3.0);
        let mut expected = 0.0;
        for row in module.b.chunks_exact(2) {
            for column in 0..4 {
                let value = f64::from(row[0]) * f64::from(module.a[column])
                    + f64::from(row[1]) * f64::from(module.a[4 + column]);
                expected += (f64::from(module.scale) * value).powi(2);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        adapter.save_peft(folder.path(), "some-base").unwrap();
        assert!(AdapterContents::is_adapter(folder.path()));
        let found = AdapterContents::read(folder.path()).unwrap();
        assert_eq!(
            (found.kind, found.base.as_str(), found.rank, found.modules),
            ("rsLoRA", "some-base", 2, 2)
        );
        assert_eq!(found.targets, ["o_proj", "q_proj"]);
        assert_eq!(found.parameters, 2 * (2 * 4 + 6 * 2));
        assert_eq!(found.idle, ["model.layers.0.self_attn.o_proj"]);
        assert!((found.update_norms.1 - expected.sqrt()).abs() < 1e-6, "{found:?}");
        fs_err::remove_file(folder.path().join(TENSORS)).unwrap();
        assert!(AdapterContents::read(folder.path()).is_err());
    }
}
