//! The result of a stage as it stands in the store, for commands that look at it without running anything.

use crate::graph::Pipeline;
use crate::stage::Artifact;
use crate::store::{ScratchFolder, Store};

use super::assess::{Assessment, Finding};
use super::sources::Taking;
use super::{RunOptions, RunnerError, selection, stage_id};

/// A result that stands; its folder lasts as long as this value.
#[derive(Debug)]
pub struct Standing {
    /// The result.
    pub artifact: Artifact,
    _scratch: ScratchFolder,
}

/// The result of `stage` for the manifest and sources as they are now; none if the stage would have to run first.
/// Hashes sources, runs nothing.
pub fn standing(pipeline: &Pipeline, store: &Store, stage: &str) -> Result<Option<Standing>, RunnerError> {
    let options = RunOptions { targets: vec![stage.to_owned()], ..RunOptions::default() };
    let (selected, forced) = selection(pipeline, &options)?;
    let id = stage_id(pipeline, stage)?;
    let assessment = Assessment::make(pipeline, store, &selected, &forced, Taking::Digests)?;
    store.files().flush().map_err(crate::store::StoreError::from)?;
    let Finding::Cached(record) = &assessment.nodes[&id].finding else { return Ok(None) };
    let scratch = store.scratch()?;
    let folder = scratch.path().join("result");
    store.link_into(&folder, &record.outputs)?;
    let artifact = Artifact {
        stage: stage.to_owned(),
        digest: record.tree,
        files: record.outputs.clone(),
        metrics: record.metrics.clone(),
        folder,
    };
    Ok(Some(Standing { artifact, _scratch: scratch }))
}
