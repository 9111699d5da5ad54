//! Action records: what a finished action was made of and what it made. Writing the record is the commit.
//! Also the newest key of each stage of a pipeline, for explanations and time estimates.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use rusqlite::params;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::digest::Digest;
use crate::key::Part;
use crate::stage::{OutputFile, RowCounts};

use super::index::digest_at;
use super::{Damage, Store, StoreError, create_dir};

/// Version of the record's format.
const RECORD_FORMAT: u32 = 1;

/// A finished action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionRecord {
    /// Version of this format.
    pub format: u32,
    /// The action key.
    pub key: Digest,
    /// Name of the stage that ran it first; no part of the key.
    pub stage: String,
    /// What the key was made of.
    pub parts: Vec<Part>,
    /// Digest of the tree of outputs.
    pub tree: Digest,
    /// The outputs, sorted by path.
    pub outputs: Vec<OutputFile>,
    /// The metrics the stage reported.
    pub metrics: Map<String, Value>,
    /// The rows the stage handled.
    pub rows: RowCounts,
    /// How long it took.
    pub seconds: f64,
    /// Which version of the runner wrote it.
    pub runner: String,
}

impl ActionRecord {
    /// A record in today's format.
    pub(crate) fn new(key: Digest, stage: &str, parts: Vec<Part>) -> Self {
        Self {
            format: RECORD_FORMAT,
            key,
            stage: stage.to_owned(),
            parts,
            tree: super::tree_digest(&[]),
            outputs: Vec::new(),
            metrics: Map::new(),
            rows: RowCounts::default(),
            seconds: 0.0,
            runner: concat!("tunesmith ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// The newest finished action of a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latest {
    /// Its key.
    pub key: Digest,
    /// How long it took when it ran.
    pub seconds: f64,
}

impl Store {
    /// The record of an action. A record that cannot be read counts as none: the action is run again.
    pub fn action(&self, key: Digest) -> Result<Option<ActionRecord>, StoreError> {
        let path = self.action_path(key);
        let bytes = match fs_err::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match serde_json::from_slice::<ActionRecord>(&bytes) {
            Ok(record) if record.key == key && record.format == RECORD_FORMAT => Ok(Some(record)),
            Ok(_) => {
                tracing::warn!("action record `{}` is of another key or format", path.display());
                Ok(None)
            }
            Err(error) => {
                tracing::warn!("action record `{}` cannot be read: {error}", path.display());
                Ok(None)
            }
        }
    }

    /// The first output of `record` that does not stand, and what is wrong with it.
    pub fn damaged_output<'r>(
        &self,
        record: &'r ActionRecord,
    ) -> Result<Option<(&'r OutputFile, Damage)>, StoreError> {
        for file in &record.outputs {
            if let Some(damage) = self.stands(file.digest, file.bytes)? {
                return Ok(Some((file, damage)));
            }
        }
        Ok(None)
    }

    /// Writes the record of an action whose outputs are in the store. This is the commit.
    pub fn commit(&self, record: &ActionRecord) -> Result<(), StoreError> {
        let path = self.action_path(record.key);
        if let Some(parent) = path.parent() {
            create_dir(parent)?;
        }
        let mut bytes = serde_json::to_vec(record).map_err(io::Error::from)?;
        bytes.push(b'\n');
        let scratch = self.scratch.fresh_path();
        let mut file = fs_err::File::create_new(&scratch)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        fs_err::rename(&scratch, &path)?;
        self.files.flush()?;
        Ok(())
    }

    /// The newest finished action of each stage of `pipeline`.
    pub fn latest(&self, pipeline: &str) -> Result<BTreeMap<String, Latest>, StoreError> {
        Ok(self.index.with(|connection| {
            connection
                .prepare_cached("SELECT stage, key, seconds FROM latest WHERE pipeline = ?1")?
                .query_map([pipeline], |row| {
                    Ok((row.get(0)?, Latest { key: digest_at(row, 1)?, seconds: row.get(2)? }))
                })?
                .collect()
        })?)
    }

    /// Notes the newest finished action of a stage.
    pub(crate) fn set_latest(&self, pipeline: &str, stage: &str, latest: Latest) -> Result<(), StoreError> {
        self.index.with(|connection| {
            connection
                .prepare_cached("INSERT OR REPLACE INTO latest VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![pipeline, stage, latest.key.as_bytes(), latest.seconds])
        })?;
        Ok(())
    }

    fn action_path(&self, key: Digest) -> PathBuf {
        let hex = key.hex();
        self.root.join("actions").join(&hex[..2]).join(format!("{hex}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Flush;

    #[test]
    fn half_a_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"key");
        let placed = store.put_bytes(b"{}", Flush::Disk).unwrap();
        let mut record = ActionRecord::new(key, "notes", Vec::new());
        record.outputs =
            vec![OutputFile { path: "a.jsonl".to_owned(), digest: placed.digest, bytes: placed.bytes }];
        store.commit(&record).unwrap();
        assert_eq!(store.action(key).unwrap(), Some(record.clone()));
        assert!(store.damaged_output(&record).unwrap().is_none());

        let path = store.action_path(key);
        let whole = fs_err::read(&path).unwrap();
        fs_err::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert_eq!(store.action(key).unwrap(), None);

        fs_err::remove_file(store.object_path(placed.digest)).unwrap();
        let (file, damage) = store.damaged_output(&record).unwrap().unwrap();
        assert_eq!((file.path.as_str(), damage), ("a.jsonl", Damage::Missing));
    }

    #[test]
    fn record_under_a_foreign_key_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = ActionRecord::new(Digest::of(b"key"), "notes", Vec::new());
        store.commit(&record).unwrap();
        let other = Digest::of(b"other");
        fs_err::create_dir_all(store.action_path(other).parent().unwrap()).unwrap();
        fs_err::copy(store.action_path(record.key), store.action_path(other)).unwrap();
        assert_eq!(store.action(other).unwrap(), None);
    }
}
