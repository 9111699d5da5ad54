//! Every model family, one file each and one line here. A family is what is particular to a `model_type`: how
//! its `config.json` describes a model, and how it is written back. Blocks, tensors and passes are the same for
//! all; no other file asks for a `model_type`. GGUF files are read by the same
//! functions, from the fields their metadata stands for.

use serde_json::{Map, Value};

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
pub(crate) struct Family {
    /// `model_type` of its `config.json`.
    pub(crate) model_type: &'static str,
    /// The class that transformers loads it with.
    pub(super) architecture: &'static str,
    /// Reads the description, and refuses by field what this build cannot compute.
    pub(super) read: fn(&Fields<'_>) -> Result<ModelConfig, ConfigError>,
    /// The fields of `config.json` beyond those all families have, as an object.
    pub(super) write: fn(&ModelConfig) -> Value,
    /// How GGUF files describe it, where they tell it from other families.
    pub(super) gguf: Option<GgufFamily>,
}

/// What GGUF files of a family have of their own.
pub(crate) struct GgufFamily {
    /// `general.architecture`, which all keys begin with.
    pub(crate) architecture: &'static str,
    /// Whether the converter reorders the rows of q and k.
    pub(crate) interleaved: bool,
    /// Fields of `config.json` and the keys they come from; a file without them is refused.
    pub(crate) required: &'static [(&'static str, &'static str)],
    /// As `required`; the family's defaults stand in.
    pub(crate) optional: &'static [(&'static str, &'static str)],
    /// Fills in or corrects what follows from other fields.
    pub(crate) complete: fn(&mut Map<String, Value>),
}

impl GgufFamily {
    /// An architecture without fields of its own.
    const fn plain(architecture: &'static str) -> Self {
        Self { architecture, interleaved: false, required: &[], optional: &[], complete: |_| {} }
    }
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
    &gemma3::MULTIMODAL,
    &granite::FAMILY,
    &granite_hybrid::FAMILY,
];

/// The family of a `model_type`, or an error that names those there are.
pub(super) fn find(model_type: &str) -> Result<&'static Family, ConfigError> {
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    family.copied().ok_or_else(|| ConfigError::UnsupportedModel { model_type: model_type.to_owned() })
}

/// The family of a GGUF architecture.
pub(crate) fn find_gguf(architecture: &str) -> Option<(&'static Family, &'static GgufFamily)> {
    let with_gguf = FAMILIES.iter().filter_map(|family| Some((*family, family.gguf.as_ref()?)));
    with_gguf.into_iter().find(|(_, gguf)| gguf.architecture == architecture)
}

/// The names of all families, for messages.
pub(super) fn names() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}
