//! `<manifest>.lock`: the key and the digests of every stage of a run, to be kept with the manifest. A run
//! that is held to it makes these very bytes or fails.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::runner::{ErrorReport, Plan, PlannedState, RunReport, StageReport, StageState};
use crate::store::tree_digest;

/// Version of the file's form.
const FORMAT: u32 = 1;

/// What a run made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Version of this form.
    pub format: u32,
    /// Name of the pipeline.
    pub pipeline: String,
    /// The stages by name.
    pub stages: BTreeMap<String, LockedStage>,
}

/// What one stage made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedStage {
    /// The action key: stands for everything that went in.
    pub key: Digest,
    /// Digest of all that came out.
    pub tree: Digest,
    /// Digest of each output.
    pub outputs: BTreeMap<String, Digest>,
}

/// A lock cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// There is none.
    #[error("there is no `{}`", path.display())]
    Missing {
        /// Where it would be.
        path: PathBuf,
    },
    /// It is not what `run` writes.
    #[error("`{}` is no lock of format {FORMAT}", path.display())]
    Shape {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl LockError {
    /// The next step for the user.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Missing { .. } => Some("a whole run without `--set`, `--params` and `--profile` writes it"),
            Self::Shape { .. } => Some("take the one you committed, or remove it and run again"),
            Self::Io(_) => None,
        }
    }
}

/// The lock of the manifest at `path`: `notes.yaml.lock`.
pub fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

impl Lock {
    /// What a finished run made; `None` if not every stage of it stands.
    pub fn of(pipeline: &str, report: &RunReport) -> Option<Self> {
        let stage = |stage: &StageReport| {
            let settled = matches!(stage.state, StageState::Cached | StageState::Ran);
            let outputs = stage.outputs.iter().map(|file| (file.path.clone(), file.digest)).collect();
            let locked = LockedStage { key: stage.key?, tree: tree_digest(&stage.outputs), outputs };
            settled.then(|| (stage.name.clone(), locked))
        };
        let stages = report.stages.iter().map(stage).collect::<Option<_>>()?;
        report.ok.then(|| Self { format: FORMAT, pipeline: pipeline.to_owned(), stages })
    }

    /// Reads the lock at `path`.
    ///
    /// # Errors
    /// There is none, or it is no lock of this format.
    pub fn read(path: &Path) -> Result<Self, LockError> {
        let bytes = match fs_err::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LockError::Missing { path: path.to_owned() });
            }
            bytes => bytes?,
        };
        let shape = |source| LockError::Shape { path: path.to_owned(), source };
        let lock: Self = serde_json::from_slice(&bytes).map_err(shape)?;
        if lock.format == FORMAT {
            return Ok(lock);
        }
        Err(shape(serde::de::Error::custom(format!("it has format {}", lock.format))))
    }

    /// Writes the lock to `path`, whole or not at all, unless it stands there already.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), LockError> {
        if Self::read(path).is_ok_and(|standing| standing == *self) {
            return Ok(());
        }
        let mut text = serde_json::to_string_pretty(self).map_err(io::Error::from)?;
        text.push('\n');
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(name);
        fs_err::write(&beside, text)?;
        Ok(fs_err::rename(beside, path)?)
    }

    /// What of a plan is not what was locked; told before anything runs.
    pub fn refusals(&self, plan: &Plan) -> Vec<ErrorReport> {
        let mut refused = Vec::new();
        for stage in &plan.stages {
            let Some(locked) = self.stages.get(&stage.name) else {
                refused.push(differs(&stage.name, "it is not in the lock"));
                continue;
            };
            // A stage that waits for another has no key yet; what it makes is looked at afterwards.
            if stage.key.is_none_or(|key| key == locked.key) {
                continue;
            }
            let reasons: Vec<String> = stage.reasons.iter().map(ToString::to_string).collect();
            let why = match stage.state {
                PlannedState::Run if !reasons.is_empty() => reasons.join("; "),
                _ => format!(
                    "its key would be {}, and {} is locked",
                    stage.key.map(|key| key.short()).unwrap_or_default(),
                    locked.key.short()
                ),
            };
            refused.push(differs(&stage.name, &why));
        }
        refused
    }

    /// What a run made that is not what was locked.
    pub fn differences(&self, report: &RunReport) -> Vec<ErrorReport> {
        let mut different = Vec::new();
        for stage in &report.stages {
            let settled = matches!(stage.state, StageState::Cached | StageState::Ran);
            let Some(locked) = self.stages.get(&stage.name).filter(|_| settled) else { continue };
            if tree_digest(&stage.outputs) == locked.tree {
                continue;
            }
            let made =
                stage.outputs.iter().filter(|file| locked.outputs.get(&file.path) != Some(&file.digest));
            let made = made.map(|file| file.path.clone());
            let absent = |path: &&String| !stage.outputs.iter().any(|file| file.path == **path);
            let paths: Vec<String> =
                made.chain(locked.outputs.keys().filter(absent).cloned()).map(|p| format!("`{p}`")).collect();
            let why = format!("{} is not what was locked", paths.join(", "));
            different.push(differs(&stage.name, &why));
        }
        different
    }
}

fn differs(stage: &str, why: &str) -> ErrorReport {
    let hint = "run without `--locked` to make and lock a new one";
    let message = format!("the result would not be the one locked: {why}");
    ErrorReport { stage: Some(stage.to_owned()), ..ErrorReport::plain("lock::differs", message, Some(hint)) }
}
