//! Remembers which digest a file had when it looked a certain way, so that an unchanged file is not read
//! again. It decides nothing about keys: a digest that comes from here is the digest of the content.
//!
//! Two kinds of files are looked up. **Live** files belong to the user: all of size, mtime, ctime and inode
//! must agree, and a file changed within two seconds of its hashing is not remembered, since another write
//! could leave the same timestamps behind. **Own** files were written by the store and are touched by
//! nobody: ctime is left out for them, as the store's own hard links change it.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, params};

use crate::digest::Digest;
use crate::store::index::{Index, IndexError, digest_at};

/// A file changed this shortly before it was hashed is hashed again next time.
const RACY: Duration = Duration::from_secs(2);

/// Rows kept in memory before they are written.
const PENDING_MAX: usize = 4096;

/// How a file looks from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    /// Size of the content.
    pub bytes: u64,
    /// Last change of the content, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of content or attributes; 0 for files of the store.
    pub ctime_ns: i64,
    /// Inode number.
    pub inode: u64,
}

impl Signature {
    /// Of a file that belongs to the user.
    pub fn live(metadata: &Metadata) -> Self {
        Self {
            ctime_ns: metadata.ctime().saturating_mul(1_000_000_000).saturating_add(metadata.ctime_nsec()),
            ..Self::own(metadata)
        }
    }

    /// Of a file that only the store writes.
    pub fn own(metadata: &Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            mtime_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
            ctime_ns: 0,
            inode: metadata.ino(),
        }
    }

    /// Whether the file changed so recently that a later change might not show.
    fn is_racy(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let settled = now.saturating_sub(RACY).as_nanos();
        u128::try_from(self.mtime_ns.max(self.ctime_ns)).is_ok_and(|changed| changed >= settled)
    }
}

/// Digests of the files below one folder, by path.
#[derive(Debug, Default)]
pub struct Known(HashMap<String, (Signature, Digest)>);

impl Known {
    /// The digest of the file at `path`, if it looks as it did when it was hashed.
    pub fn digest(&self, path: &str, signature: &Signature) -> Option<Digest> {
        self.0.get(path).filter(|(seen, _)| seen == signature).map(|(_, digest)| *digest)
    }
}

/// The table of known files.
#[derive(Debug)]
pub struct StatIndex {
    index: Arc<Index>,
    pending: Mutex<Vec<(String, Signature, Digest)>>,
}

impl StatIndex {
    /// The table inside `index`.
    pub(crate) fn new(index: Arc<Index>) -> Self {
        Self { index, pending: Mutex::default() }
    }

    /// The digest of one file, if it looks as it did when it was hashed.
    pub fn digest(&self, path: &str, signature: &Signature) -> Result<Option<Digest>, IndexError> {
        let seen = self.index.with(|connection| {
            connection
                .prepare_cached("SELECT bytes, mtime, ctime, inode, digest FROM files WHERE path = ?1")?
                .query_row([path], |row| Ok((signature_at(row, 0)?, digest_at(row, 4)?)))
                .optional()
        })?;
        Ok(seen.filter(|(seen, _)| seen == signature).map(|(_, digest)| digest))
    }

    /// All that is known of the file `path` and the files below it, in one query.
    pub fn known_below(&self, path: &str) -> Result<Known, IndexError> {
        let folder = if path.ends_with('/') { path.to_owned() } else { format!("{path}/") };
        // '0' is the character after '/', so this is the range of all paths that start with the folder.
        let end = format!("{}0", &folder[..folder.len() - 1]);
        self.index.with(|connection| {
            let mut known = HashMap::new();
            let mut statement = connection.prepare_cached(
                "SELECT bytes, mtime, ctime, inode, digest, path FROM files
                 WHERE path = ?1 OR (path >= ?2 AND path < ?3)",
            )?;
            let mut rows = statement.query(params![path, folder, end])?;
            while let Some(row) = rows.next()? {
                known.insert(row.get(5)?, (signature_at(row, 0)?, digest_at(row, 4)?));
            }
            Ok(Known(known))
        })
    }

    /// Remembers the digest of a user's file, unless it changed a moment ago.
    pub fn record_live(&self, path: &str, signature: Signature, digest: Digest) -> Result<(), IndexError> {
        if signature.is_racy() { Ok(()) } else { self.record(path, signature, digest) }
    }

    /// Remembers the digest of a file of the store.
    pub fn record_own(&self, path: &str, signature: Signature, digest: Digest) -> Result<(), IndexError> {
        self.record(path, signature, digest)
    }

    /// Forgets a file, so that it is read again when it is next asked for.
    pub fn forget(&self, path: &str) -> Result<(), IndexError> {
        self.flush()?;
        self.index.with(|connection| {
            connection.prepare_cached("DELETE FROM files WHERE path = ?1")?.execute([path]).map(drop)
        })
    }

    /// Writes what was recorded, in one transaction.
    pub fn flush(&self) -> Result<(), IndexError> {
        let rows = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        if rows.is_empty() {
            return Ok(());
        }
        self.index.write(|transaction| insert(transaction, &rows))
    }

    fn record(&self, path: &str, signature: Signature, digest: Digest) -> Result<(), IndexError> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.push((path.to_owned(), signature, digest));
        let full = pending.len() >= PENDING_MAX;
        drop(pending);
        if full { self.flush() } else { Ok(()) }
    }
}

fn insert(connection: &Connection, rows: &[(String, Signature, Digest)]) -> rusqlite::Result<()> {
    let mut statement =
        connection.prepare_cached("INSERT OR REPLACE INTO files VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    for (path, seen, digest) in rows {
        statement.execute(params![
            path,
            seen.bytes.cast_signed(),
            seen.mtime_ns,
            seen.ctime_ns,
            seen.inode.cast_signed(),
            digest.as_bytes()
        ])?;
    }
    Ok(())
}

fn signature_at(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<Signature> {
    let bytes: i64 = row.get(first)?;
    let inode: i64 = row.get(first + 3)?;
    Ok(Signature {
        bytes: bytes.cast_unsigned(),
        mtime_ns: row.get(first + 1)?,
        ctime_ns: row.get(first + 2)?,
        inode: inode.cast_unsigned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> (tempfile::TempDir, StatIndex) {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join("locks")).unwrap();
        let index = Arc::new(Index::open(dir.path()).unwrap());
        (dir, StatIndex::new(index))
    }

    const OLD: Signature = Signature { bytes: 4, mtime_ns: 1_000, ctime_ns: 2_000, inode: u64::MAX };

    #[test]
    fn any_difference_is_a_miss() {
        let (_dir, table) = table();
        let digest = Digest::of(b"note");
        table.record_live("/notes/a.md", OLD, digest).unwrap();
        table.flush().unwrap();
        assert_eq!(table.digest("/notes/a.md", &OLD).unwrap(), Some(digest));
        for changed in [
            Signature { bytes: 5, ..OLD },
            Signature { mtime_ns: 1_001, ..OLD },
            Signature { ctime_ns: 2_001, ..OLD },
            Signature { inode: 1, ..OLD },
        ] {
            assert_eq!(table.digest("/notes/a.md", &changed).unwrap(), None);
        }
        table.forget("/notes/a.md").unwrap();
        assert_eq!(table.digest("/notes/a.md", &OLD).unwrap(), None);
    }

    #[test]
    fn file_changed_just_now_is_not_remembered() {
        let (dir, table) = table();
        let path = dir.path().join("fresh.md");
        fs_err::write(&path, "note").unwrap();
        let signature = Signature::live(&fs_err::metadata(&path).unwrap());
        table.record_live("/fresh.md", signature, Digest::of(b"note")).unwrap();
        table.flush().unwrap();
        assert_eq!(table.digest("/fresh.md", &signature).unwrap(), None);
    }

    #[test]
    fn one_query_knows_a_folder_and_only_it() {
        let (_dir, table) = table();
        for path in ["/n", "/n/a", "/n/b/c", "/n-other/a", "/na"] {
            table.record_own(path, OLD, Digest::of(path.as_bytes())).unwrap();
        }
        table.flush().unwrap();
        let known = table.known_below("/n").unwrap();
        assert_eq!(known.0.len(), 3);
        assert_eq!(known.digest("/n/b/c", &OLD), Some(Digest::of(b"/n/b/c")));
        assert_eq!(known.digest("/n-other/a", &OLD), None);
    }
}
