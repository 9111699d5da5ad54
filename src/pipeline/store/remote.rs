//! Another store in a folder, shared by several machines: a disk of the network, a stick. Results go there
//! with `push` and come from there with `pull`, or one by one when a run needs them.
//!
//! It has the layout of a store, `objects/` and `actions/`, and nothing else: records are written last, files
//! appear by a rename, and whatever comes from there is hashed before it is believed.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::digest::Digest;
use crate::runs::fresh_id;

use super::audit::{files_below, named_digest};
use super::objects::object_name;
use super::{ActionRecord, Store, StoreError, metadata_of};

/// A folder that results are shared through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    root: PathBuf,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Transfer {
    /// Results.
    pub actions: u64,
    /// Their objects.
    pub objects: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Results that were not whole, and are left where they are.
    pub refused: u64,
}

impl Remote {
    /// The remote at a path, or a `file://` address.
    pub fn new(address: &str) -> Self {
        Self { root: PathBuf::from(address.strip_prefix("file://").unwrap_or(address)) }
    }

    fn action_path(&self, key: Digest) -> PathBuf {
        let hex = key.hex();
        self.root.join("actions").join(&hex[..2]).join(format!("{hex}.json"))
    }

    fn record(&self, key: Digest) -> Result<Option<ActionRecord>, StoreError> {
        let bytes = match fs_err::read(self.action_path(key)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        // A record that is torn or of another format is none.
        Ok(serde_json::from_slice::<ActionRecord>(&bytes).ok().filter(|record| record.key == key))
    }

    /// Writes a file so that it is there whole or not at all. `false`: it is there already.
    fn put(&self, path: &Path, from: &Path, bytes: u64) -> Result<bool, StoreError> {
        if metadata_of(path)?.is_some_and(|standing| standing.len() == bytes) {
            return Ok(false);
        }
        let parent = path.parent().unwrap_or(&self.root);
        fs_err::create_dir_all(parent)?;
        let beside = parent.join(format!(".{}", fresh_id()));
        fs_err::copy(from, &beside)?;
        fs_err::rename(beside, path)?;
        Ok(true)
    }
}

impl Store {
    /// Copies the results of this store that `remote` lacks: outputs and listings, no sources.
    pub fn push(&self, remote: &Remote) -> Result<Transfer, StoreError> {
        let mut transfer = Transfer::default();
        for (path, size) in files_below(&self.root.join("actions"))? {
            let Ok(record) = serde_json::from_slice::<ActionRecord>(&fs_err::read(&path)?) else { continue };
            match self.push_objects(remote, &record, &mut transfer) {
                Ok(()) => {}
                Err(StoreError::Damaged { .. }) => {
                    transfer.refused += 1;
                    continue;
                }
                Err(error) => return Err(error),
            }
            transfer.actions += u64::from(remote.put(&remote.action_path(record.key), &path, size)?);
        }
        Ok(transfer)
    }

    fn push_objects(
        &self,
        remote: &Remote,
        record: &ActionRecord,
        transfer: &mut Transfer,
    ) -> Result<(), StoreError> {
        let trees = std::iter::once(record.tree).chain(source_trees(record)).filter_map(|tree| {
            let bytes = metadata_of(&self.object_path(tree)).ok()??.len();
            Some((tree, bytes))
        });
        let outputs = record.outputs.iter().map(|file| (file.digest, file.bytes));
        for (digest, bytes) in outputs.chain(trees.collect::<Vec<_>>()) {
            let target = remote.root.join(object_name(digest));
            if metadata_of(&target)?.is_some_and(|standing| standing.len() == bytes) {
                continue;
            }
            let object = self.checked(digest, bytes)?;
            if remote.put(&target, &object, bytes)? {
                transfer.objects += 1;
                transfer.bytes += bytes;
            }
        }
        Ok(())
    }

    /// Copies the results of `remote` that this store lacks.
    pub fn pull(&self, remote: &Remote) -> Result<Transfer, StoreError> {
        let mut transfer = Transfer::default();
        let actions = remote.root.join("actions");
        if !actions.is_dir() {
            return Err(StoreError::Unfit { path: remote.root.clone(), problem: "holds no results" });
        }
        for (path, _) in files_below(&actions)? {
            let Some(key) = path.file_stem().and_then(|stem| named_digest(Path::new(stem))) else { continue };
            let stands = self
                .action(key)?
                .is_some_and(|record| record.outputs.iter().all(|file| self.contains(file.digest)));
            if !stands && self.fetch_counted(remote, key, &mut transfer)?.is_none() {
                transfer.refused += 1;
            }
        }
        Ok(transfer)
    }

    /// Takes the result of one action from `remote`, if that has it whole.
    pub(crate) fn fetch(&self, remote: &Remote, key: Digest) -> Result<Option<ActionRecord>, StoreError> {
        self.fetch_counted(remote, key, &mut Transfer::default())
    }

    fn fetch_counted(
        &self,
        remote: &Remote,
        key: Digest,
        transfer: &mut Transfer,
    ) -> Result<Option<ActionRecord>, StoreError> {
        let Some(record) = remote.record(key)? else { return Ok(None) };
        let outputs = record.outputs.iter().map(|file| (file.digest, Some(file.bytes)));
        // Listings make explanations longer; a result is one without them.
        let trees = std::iter::once(record.tree).chain(source_trees(&record)).map(|tree| (tree, None));
        for (digest, bytes) in outputs.chain(trees) {
            let stands = match bytes {
                Some(bytes) => self.stands(digest, bytes)?.is_none(),
                None => self.contains(digest),
            };
            if stands {
                continue;
            }
            let path = remote.root.join(object_name(digest));
            match self.put_file(&path) {
                Ok(placed) if placed.digest == digest => {
                    transfer.objects += 1;
                    transfer.bytes += placed.bytes;
                }
                _ if bytes.is_none() => {}
                Ok(_) => {
                    tracing::warn!("`{}` is not what its name says; it is not used", path.display());
                    return Ok(None);
                }
                Err(StoreError::Io(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        self.commit(&record)?;
        transfer.actions += 1;
        Ok(Some(record))
    }
}

/// Listings of the sources an action read.
fn source_trees(record: &ActionRecord) -> impl Iterator<Item = Digest> {
    let sources = record.parts.iter().filter(|part| part.name.starts_with("source."));
    sources.filter_map(|part| part.value.parse().ok())
}
