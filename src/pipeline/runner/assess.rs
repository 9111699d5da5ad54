//! One pass over the stages in order: which results stand, which stages run and why, and which have to
//! wait for another stage before that can be said. Plan, explain and run all begin with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::digest::Digest;
use crate::graph::{Pipeline, Stage, StageId};
use crate::key::{self, Inputs, Part, Reason, ReasonKind};
use crate::stage::OutputFile;
use crate::store::{ActionRecord, Latest, Store, StoreError, tree_decode};

use super::sources::{Snapshot, SourceReader, Taking, adopt};
use super::{RunnerError, inputs_of};

/// What was found out about the selected stages.
pub(super) struct Assessment {
    pub(super) nodes: BTreeMap<StageId, Node>,
    /// The newest result of each stage of the pipeline, by name.
    pub(super) latest: BTreeMap<String, Latest>,
}

/// What was found out about one stage.
pub(super) struct Node {
    pub(super) sources: Arc<Vec<Snapshot>>,
    pub(super) finding: Finding,
}

/// Whether a stage has to run.
pub(super) enum Finding {
    /// Its result stands.
    Cached(Arc<ActionRecord>),
    /// It has to run.
    Run { key: Digest, parts: Vec<Part>, reasons: Vec<Reason> },
    /// A stage it needs has to run first.
    Blocked { reasons: Vec<Reason> },
}

impl Assessment {
    pub(super) fn make(
        pipeline: &Pipeline,
        store: &Store,
        selected: &BTreeSet<StageId>,
        forced: &BTreeSet<StageId>,
        taking: Taking,
    ) -> Result<Self, RunnerError> {
        let mut reader = SourceReader::new(pipeline, store, taking)?;
        let latest = store.latest(&pipeline.name)?;
        let mut nodes = BTreeMap::new();
        let mut records: BTreeMap<StageId, Arc<ActionRecord>> = BTreeMap::new();
        for id in selected {
            let stage = &pipeline.stages[id.0 as usize];
            let sources = Arc::new(reader.read(stage)?);
            let judge = Judge { pipeline, store, latest: &latest };
            let finding = judge.judge(stage, &sources, &records, forced.contains(id))?;
            if let Finding::Cached(record) = &finding {
                records.insert(*id, record.clone());
            }
            nodes.insert(*id, Node { sources, finding });
        }
        Ok(Self { nodes, latest })
    }

    /// Makes sure that the sources of all stages that may run are in the store. `false`: a file changed
    /// since it was hashed, and the assessment no longer holds.
    pub(super) fn adopt_sources(&self, pipeline: &Pipeline, store: &Store) -> Result<bool, StoreError> {
        for node in self.nodes.values().filter(|node| !matches!(node.finding, Finding::Cached(_))) {
            for file in node.sources.iter().flat_map(|source| &source.files) {
                if !adopt(pipeline, store, file)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Decides about one stage.
pub(super) struct Judge<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) store: &'a Store,
    pub(super) latest: &'a BTreeMap<String, Latest>,
}

impl Judge<'_> {
    /// Whether a stage has to run, given the records of the stages that are settled.
    pub(super) fn judge(
        &self,
        stage: &Stage,
        sources: &[Snapshot],
        records: &BTreeMap<StageId, Arc<ActionRecord>>,
        forced: bool,
    ) -> Result<Finding, StoreError> {
        let inputs: Vec<(&str, Option<Digest>)> = inputs_of(self.pipeline, stage.id, records)
            .into_iter()
            .map(|(slot, _, record)| (slot, record.map(|record| record.tree)))
            .collect();
        let trees: Vec<(&str, Digest)> =
            sources.iter().map(|source| (source.name.as_str(), source.tree)).collect();
        let parts = key::walk(stage.kind, &stage.with, Inputs { inputs: &inputs, sources: &trees });
        if inputs.iter().any(|(_, tree)| tree.is_none()) {
            let reasons = self.changes(stage, sources, &parts, None)?;
            return Ok(Finding::Blocked { reasons });
        }
        let key = key::digest(&parts);
        if forced {
            let reasons = vec![Reason::new(ReasonKind::Forced, stage.name.as_str())];
            return Ok(Finding::Run { key, parts, reasons });
        }
        let reasons = match self.store.action(key)? {
            None => self.changes(stage, sources, &parts, Some(key))?,
            Some(record) => match self.store.damaged_output(&record)? {
                None => return Ok(Finding::Cached(Arc::new(record))),
                Some((file, _)) => vec![Reason::new(ReasonKind::OutputMissing, file.path.as_str())],
            },
        };
        Ok(Finding::Run { key, parts, reasons })
    }

    /// What changed since the newest result.
    fn changes(
        &self,
        stage: &Stage,
        sources: &[Snapshot],
        parts: &[Part],
        key: Option<Digest>,
    ) -> Result<Vec<Reason>, StoreError> {
        let first_run = || vec![Reason::new(ReasonKind::FirstRun, stage.name.as_str())];
        let Some(latest) = self.latest.get(&stage.name) else { return Ok(first_run()) };
        if Some(latest.key) == key {
            return Ok(vec![Reason::new(ReasonKind::OutputMissing, "action record")]);
        }
        let Some(old) = self.store.action(latest.key)? else { return Ok(first_run()) };
        let context = Context { pipeline: self.pipeline, store: self.store, stage, sources };
        Ok(key::compare(&old.parts, parts, &context))
    }
}

struct Context<'a> {
    pipeline: &'a Pipeline,
    store: &'a Store,
    stage: &'a Stage,
    sources: &'a [Snapshot],
}

impl key::Context for Context<'_> {
    fn tree(&self, digest: Digest) -> Option<Vec<OutputFile>> {
        if let Some(source) = self.sources.iter().find(|source| source.tree == digest) {
            return Some(source.listing());
        }
        // A tree that cannot be read makes the explanation shorter, not wrong.
        self.store.read_object(digest).ok().flatten().and_then(|bytes| tree_decode(&bytes))
    }

    fn content(&self, digest: Digest) -> Option<Vec<u8>> {
        let stored = self.store.read_object(digest).ok().flatten();
        // `plan` takes nothing into the store; then the file itself is looked at.
        stored.or_else(|| {
            let file = self.sources.iter().flat_map(|source| &source.files).find(|f| f.digest == digest)?;
            let bytes = fs_err::read(self.pipeline.dir.join(&file.path)).ok()?;
            (Digest::of(&bytes) == digest).then_some(bytes)
        })
    }

    fn origin(&self, path: &str) -> Option<String> {
        self.stage.origin(path)
    }

    fn stage_of(&self, slot: &str) -> Option<String> {
        let need = self.stage.needs.iter().find(|need| need.slot == slot)?;
        Some(self.pipeline.stages[need.stage.0 as usize].name.clone())
    }
}
