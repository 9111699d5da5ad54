//! Where training and evaluation compute: one choice a process, made before any key is, for the numerics class is in
//! the keys of these stages. Without a choice it is the CPU.

use std::sync::OnceLock;

use tunesmith_engine::backend::{BackendError, Compute};
use tunesmith_engine::model::{Model, ModelError};
use tunesmith_pipeline::graph::Pipeline;
use tunesmith_pipeline::stage::StageError;

/// The kinds that compute.
const KINDS: [&str; 2] = ["train", "eval"];

struct Chosen {
    compute: Compute,
    numerics: String,
}

static CHOSEN: OnceLock<Chosen> = OnceLock::new();

/// Lets the stages of this process compute there; the first choice stays.
pub(crate) fn compute_on(compute: Compute) -> Result<(), BackendError> {
    let numerics = compute.numerics()?;
    CHOSEN.get_or_init(|| Chosen { compute, numerics });
    Ok(())
}

/// Whether a stage of the pipeline computes.
pub(crate) fn is_used_by(pipeline: &Pipeline) -> bool {
    pipeline.stages.iter().any(|stage| KINDS.contains(&stage.kind.name()))
}

/// The numerics class, part of the key of stages whose bytes depend on it.
pub(super) fn numerics() -> String {
    chosen().numerics.clone()
}

/// Opens the model of a base folder where stages compute.
pub(super) fn open_model(base: &std::path::Path, threads: usize) -> Result<Model, StageError> {
    let compute = Compute { threads, ..chosen().compute };
    Model::open(base, &compute).map_err(|error| {
        let hint = match &error {
            ModelError::Backend(missing) => missing.hint(),
            _ => "`base` must be a `model` stage",
        };
        StageError::new("engine::model", error.to_string()).hint(hint)
    })
}

fn chosen() -> &'static Chosen {
    CHOSEN.get_or_init(|| {
        let compute = Compute::cpu(1);
        // A set that is not here has no class: `main` has refused to start, and no model is made for it.
        Chosen { compute, numerics: compute.numerics().unwrap_or_else(|missing| missing.to_string()) }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::stages::STAGES;

    #[test]
    fn kinds_that_compute_are_those_whose_keys_have_a_numerics_class() {
        let classed = STAGES.iter().filter(|kind| kind.numerics(&Value::Null).is_some());
        assert_eq!(classed.map(|kind| kind.name()).collect::<Vec<_>>(), KINDS);
    }
}
