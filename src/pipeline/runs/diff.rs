//! What is different between two runs, stage by stage: what went in, told by the same walk as the key, and
//! what came out, metrics and files.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::key::{self, FileChange, Reason};
use crate::stage::OutputFile;
use crate::store::{Store, StoreError, tree_decode};

use super::{RunDetails, Runs};

/// Two runs, held side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunDiff {
    /// Id of the first run.
    pub a: String,
    /// Id of the second run.
    pub b: String,
    /// The stages of either that are not the same in both, in the order of the second run.
    pub stages: Vec<StageDiff>,
}

/// One stage that is not the same in both runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageDiff {
    /// Its name.
    pub name: String,
    /// How it differs.
    pub change: StageChange,
    /// What went in differently; empty where nothing is known of it any more.
    pub reasons: Vec<Reason>,
    /// Metrics with another value.
    pub metrics: Vec<MetricChange>,
    /// Files with another content.
    pub files: Vec<FileChange>,
}

/// How a stage differs between two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageChange {
    /// It is in both.
    Changed,
    /// Only the second run has it.
    Added,
    /// Only the first run has it.
    Removed,
}

/// A metric with another value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricChange {
    /// Its name.
    pub name: String,
    /// In the first run.
    pub old: Option<Value>,
    /// In the second run.
    pub new: Option<Value>,
}

/// A stage as a run's report has it.
#[derive(Default)]
struct Ran {
    key: Option<Digest>,
    metrics: Map<String, Value>,
    outputs: Vec<OutputFile>,
}

impl Runs<'_> {
    /// The difference of two runs.
    pub fn diff(&self, a: &RunDetails, b: &RunDetails) -> Result<RunDiff, StoreError> {
        let (before, now) = (stages(a), stages(b));
        let removed = before.iter().filter(|(name, _)| !now.iter().any(|(other, _)| other == name));
        let mut diffs = Vec::new();
        for (name, _) in now.iter().chain(removed) {
            let [old, new] = [&before, &now].map(|all| all.iter().find(|(other, _)| other == name));
            let diff = self.stage_diff(name, old.map(|(_, ran)| ran), new.map(|(_, ran)| ran))?;
            diffs.extend(diff);
        }
        Ok(RunDiff { a: a.summary.run.clone(), b: b.summary.run.clone(), stages: diffs })
    }

    fn stage_diff(
        &self,
        name: &str,
        old: Option<&Ran>,
        new: Option<&Ran>,
    ) -> Result<Option<StageDiff>, StoreError> {
        let change = match (old, new) {
            (Some(_), Some(_)) => StageChange::Changed,
            (None, _) => StageChange::Added,
            (_, None) => StageChange::Removed,
        };
        let nothing = Ran::default();
        let (old, new) = (old.unwrap_or(&nothing), new.unwrap_or(&nothing));
        let diff = StageDiff {
            name: name.to_owned(),
            change,
            reasons: if change == StageChange::Changed { self.reasons(old, new)? } else { Vec::new() },
            metrics: metrics(&old.metrics, &new.metrics),
            files: files(&old.outputs, &new.outputs),
        };
        let is_same = change == StageChange::Changed
            && old.key == new.key
            && diff.metrics.is_empty()
            && diff.files.is_empty();
        Ok((!is_same).then_some(diff))
    }

    fn reasons(&self, old: &Ran, new: &Ran) -> Result<Vec<Reason>, StoreError> {
        let (Some(old), Some(new)) = (old.key, new.key) else { return Ok(Vec::new()) };
        let (Some(old), Some(new)) = (self.store.action(old)?, self.store.action(new)?) else {
            return Ok(Vec::new());
        };
        Ok(key::compare(&old.parts, &new.parts, &Stored(self.store)))
    }
}

/// Speaks of trees and contents that are in the store; knows no manifest.
struct Stored<'s>(&'s Store);

impl key::Context for Stored<'_> {
    fn tree(&self, digest: Digest) -> Option<Vec<OutputFile>> {
        self.content(digest).and_then(|bytes| tree_decode(&bytes))
    }

    fn stage_of(&self, _slot: &str) -> Option<String> {
        None
    }

    fn content(&self, digest: Digest) -> Option<Vec<u8>> {
        self.0.read_object(digest).ok().flatten()
    }

    fn origin(&self, _path: &str) -> Option<String> {
        None
    }
}

fn stages(run: &RunDetails) -> Vec<(String, Ran)> {
    let stage = |stage: &Value| {
        let name = stage["name"].as_str()?.to_owned();
        let ran = Ran {
            key: stage["key"].as_str().and_then(|key| key.parse().ok()),
            metrics: stage["metrics"].as_object().cloned().unwrap_or_default(),
            outputs: serde_json::from_value(stage["outputs"].clone()).unwrap_or_default(),
        };
        Some((name, ran))
    };
    run.stages.as_array().into_iter().flatten().filter_map(stage).collect()
}

fn metrics(old: &Map<String, Value>, new: &Map<String, Value>) -> Vec<MetricChange> {
    let names = new.keys().chain(old.keys().filter(|name| !new.contains_key(*name)));
    names
        .map(|name| MetricChange {
            name: name.clone(),
            old: old.get(name).cloned(),
            new: new.get(name).cloned(),
        })
        .filter(|change| change.old != change.new)
        .collect()
}

fn files(old: &[OutputFile], new: &[OutputFile]) -> Vec<FileChange> {
    let by_path = |files: &[OutputFile]| -> BTreeMap<String, Digest> {
        files.iter().map(|file| (file.path.clone(), file.digest)).collect()
    };
    let (old, new) = (by_path(old), by_path(new));
    let paths = new.keys().chain(old.keys().filter(|path| !new.contains_key(*path)));
    paths
        .filter(|path| old.get(*path) != new.get(*path))
        .map(|path| FileChange {
            path: path.clone(),
            was: old.contains_key(path),
            is: new.contains_key(path),
            rows: None,
        })
        .collect()
}
