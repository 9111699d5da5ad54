//! What the store holds (`cache stats`), and whether it is what it says (`cache verify`).

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use walkdir::WalkDir;

use crate::digest::Digest;

use super::objects::{hash_object, object_name};
use super::{ActionRecord, Store, StoreError};

/// The result of re-hashing every object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// How many objects there are.
    pub objects: u64,
    /// Objects whose content is not what their name says, sorted.
    pub corrupt: Vec<Digest>,
    /// Objects that an action record names and that are not there, sorted.
    pub missing: Vec<Digest>,
}

/// What the store holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreStats {
    /// The store's folder.
    pub path: PathBuf,
    /// How many objects there are.
    pub objects: u64,
    /// Their size together.
    pub object_bytes: u64,
    /// How many finished actions are recorded.
    pub actions: u64,
    /// Size of all checkpoints.
    pub checkpoint_bytes: u64,
    /// Rows in the memo.
    pub memo_rows: u64,
    /// Runs in the history.
    pub runs: u64,
}

impl Store {
    /// Re-hashes every object and looks for what the action records name. Changes nothing, except that a
    /// corrupt object is no longer trusted: the next run that needs it makes it again.
    pub fn verify(&self) -> Result<Verification, StoreError> {
        self.files.flush()?;
        let mut result = Verification { objects: 0, corrupt: Vec::new(), missing: Vec::new() };
        for (path, _) in files_below(&self.root.join("objects"))? {
            result.objects += 1;
            let Some(digest) = named_digest(&path) else {
                return Err(StoreError::Unfit { path, problem: "is no object of the store" });
            };
            if hash_object(&path)? != digest {
                self.files.forget(&object_name(digest))?;
                result.corrupt.push(digest);
            }
        }
        for (path, _) in files_below(&self.root.join("actions"))? {
            let Ok(record) = serde_json::from_slice::<ActionRecord>(&fs_err::read(&path)?) else {
                tracing::warn!("action record `{}` cannot be read", path.display());
                continue;
            };
            let absent = record.outputs.iter().map(|file| file.digest).filter(|d| !self.contains(*d));
            result.missing.extend(absent);
        }
        result.corrupt.sort_unstable();
        result.missing.sort_unstable();
        result.missing.dedup();
        Ok(result)
    }

    /// Counts what the store holds.
    pub fn stats(&self) -> Result<StoreStats, StoreError> {
        let objects = files_below(&self.root.join("objects"))?;
        let checkpoints = files_below(&self.root.join("checkpoints"))?;
        let count = |table: &str| {
            let sql = format!("SELECT count(*) FROM {table}");
            self.index.with(|connection| connection.query_row(&sql, [], |row| row.get::<_, i64>(0)))
        };
        Ok(StoreStats {
            path: self.root.clone(),
            objects: objects.len() as u64,
            object_bytes: objects.iter().map(|(_, bytes)| bytes).sum(),
            actions: files_below(&self.root.join("actions"))?.len() as u64,
            checkpoint_bytes: checkpoints.iter().map(|(_, bytes)| bytes).sum(),
            memo_rows: count("memo")?.cast_unsigned(),
            runs: count("runs")?.cast_unsigned(),
        })
    }
}

pub(super) fn named_digest(path: &Path) -> Option<Digest> {
    path.file_name()?.to_str()?.parse().ok()
}

/// All files below `folder`, or the file itself, with their sizes, sorted.
pub(super) fn files_below(folder: &Path) -> Result<Vec<(PathBuf, u64)>, StoreError> {
    let mut files = Vec::new();
    for entry in WalkDir::new(folder).sort_by_file_name() {
        let entry = entry.map_err(io::Error::from)?;
        if entry.file_type().is_file() {
            let bytes = entry.metadata().map_err(io::Error::from)?.len();
            files.push((entry.into_path(), bytes));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::stage::OutputFile;
    use crate::store::Flush;

    #[test]
    fn verify_names_corrupt_and_missing_objects() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let put = |text: &str| {
            let placed = store.put_bytes(text.as_bytes(), Flush::Lazy).unwrap();
            OutputFile { path: text.to_owned(), digest: placed.digest, bytes: placed.bytes }
        };
        let mut record = ActionRecord::new(Digest::of(b"key"), "notes", Vec::new());
        record.outputs = vec![put("altered"), put("fine"), put("missing")];
        store.commit(&record).unwrap();
        let whole = Verification { objects: 3, corrupt: vec![], missing: vec![] };
        assert_eq!(store.verify().unwrap(), whole);

        let altered = store.object_path(record.outputs[0].digest);
        fs_err::set_permissions(&altered, std::fs::Permissions::from_mode(0o644)).unwrap();
        fs_err::write(altered, "alterad").unwrap();
        fs_err::remove_file(store.object_path(record.outputs[2].digest)).unwrap();
        let found = store.verify().unwrap();
        assert_eq!(found.objects, 2);
        assert_eq!(found.corrupt, vec![record.outputs[0].digest]);
        assert_eq!(found.missing, vec![record.outputs[2].digest]);
        let stats = store.stats().unwrap();
        assert_eq!((stats.objects, stats.actions, stats.object_bytes), (2, 1, 11));
    }
}
