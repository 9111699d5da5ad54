//! Every model family, one file each and one line here. A family is what is particular to a `model_type`: how
//! its `config.json` describes a model, and how it is written back. Blocks, tensors and passes are the same for
//! all; no other file asks for a `model_type`.

use serde_json::Value;

use super::config::fields::Fields;
use super::config::{ConfigError, ModelConfig};

mod gemma;
mod gemma2;
mod gemma3;
mod granite;
mod granite_hybrid;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

/// A model family.
pub(super) struct Family {
    /// `model_type` of its `config.json`.
    pub(super) model_type: &'static str,
    /// The class that transformers loads it with.
    pub(super) architecture: &'static str,
    /// Reads the description, and refuses by field what this build cannot compute.
    pub(super) read: fn(&Fields<'_>) -> Result<ModelConfig, ConfigError>,
    /// The fields of `config.json` beyond those all families have, as an object.
    pub(super) write: fn(&ModelConfig) -> Value,
}

/// Every family. One line each.
pub(super) const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &gemma::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &granite::FAMILY,
    &granite_hybrid::FAMILY,
];

/// The family of a `model_type`, or an error that names those there are.
pub(super) fn find(model_type: &str) -> Result<&'static Family, ConfigError> {
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    family.copied().ok_or_else(|| ConfigError::UnsupportedModel { model_type: model_type.to_owned() })
}

/// The names of all families, for messages.
pub(super) fn names() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}
