//! The resolved pipeline: stages and their edges, in an order in which each comes after its needs.
//! Knows nothing of YAML, keys or running; petgraph stays in here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::stage::StageKind;

/// Index of a stage in [`Pipeline::stages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageId(pub u32);

/// One edge: the stage `stage` fills the input slot `slot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Name of the input slot (for `Arity::Any` slots: the key in `needs`, or the stage's name).
    pub slot: String,
    /// The stage that fills it.
    pub stage: StageId,
}

/// Where something stands in a manifest file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The manifest or included file.
    pub file: PathBuf,
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
}

/// One stage, fully resolved: nothing left to interpolate.
pub struct Stage {
    /// Its index.
    pub id: StageId,
    /// Its name in the manifest.
    pub name: String,
    /// What it does.
    pub kind: &'static dyn StageKind,
    /// Its inputs.
    pub needs: Vec<Need>,
    /// Its parameters, an object; defaults are not filled in.
    pub with: Value,
    /// Where each parameter was written, by dotted path; "" is the stage itself.
    pub places: BTreeMap<String, Place>,
}

/// A manifest after includes, profile, overrides and interpolation, checked and in topological order.
pub struct Pipeline {
    /// `name:` of the manifest, else its file stem.
    pub name: String,
    /// The manifest file.
    pub path: PathBuf,
    /// The folder the manifest is in; relative paths in it start here.
    pub dir: PathBuf,
    /// The resolved params, an object.
    pub params: Value,
    /// The stages; `stages[id.0]`, each after its needs.
    pub stages: Vec<Stage>,
}
