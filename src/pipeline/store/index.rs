//! The SQLite file of the store: opening it, its tables, and one lock around one connection.
//!
//! It only speeds things up or keeps history: every fact about content is in the objects and the action
//! records. What the tables mean is the business of `stat_index`, `memo`, `runs` and `store::latest`.
//!
//! WAL mode with `synchronous = NORMAL`: a commit costs no disk flush and survives a killed process; a
//! power cut may drop the newest rows, which then are simply found out again.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::lease::Lease;

/// Version of the tables, kept in SQLite's `user_version`.
const SCHEMA_VERSION: i64 = 1;

/// How long a writer waits for another process before it gives up.
const BUSY_TIMEOUT: Duration = Duration::from_secs(60);

const SCHEMA: &str = "
CREATE TABLE files (path TEXT PRIMARY KEY, bytes INTEGER NOT NULL, mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL, inode INTEGER NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE memo (key BLOB PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE latest (pipeline TEXT NOT NULL, stage TEXT NOT NULL, key BLOB NOT NULL,
    seconds REAL NOT NULL, PRIMARY KEY (pipeline, stage)) WITHOUT ROWID;
CREATE TABLE published (folder TEXT PRIMARY KEY, tree BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (id TEXT PRIMARY KEY, pipeline TEXT NOT NULL, manifest TEXT NOT NULL,
    started TEXT NOT NULL, seconds REAL, ok INTEGER, stages TEXT, errors TEXT) WITHOUT ROWID;
";

/// The index of a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// SQLite refused.
    #[error("index `{}`: {source}", path.display())]
    Sqlite {
        /// The SQLite file.
        path: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
    /// The tables were written by a newer version.
    #[error("index `{}` has version {found}, newer than {SCHEMA_VERSION}, the newest known here", path.display())]
    Newer {
        /// The SQLite file.
        path: PathBuf,
        /// The version found.
        found: i64,
    },
    /// The lock that guards the making of the tables cannot be taken.
    #[error(transparent)]
    Lock(#[from] std::io::Error),
}

impl IndexError {
    /// Whether SQLite found no room: it says so itself, or could not grow the shared memory beside its file.
    pub(super) fn is_full_disk(&self) -> bool {
        const IOERR_WRITE: i32 = 778;
        const IOERR_SHMSIZE: i32 = 4874;
        let Self::Sqlite { source: rusqlite::Error::SqliteFailure(failure, _), .. } = self else {
            return false;
        };
        failure.code == rusqlite::ErrorCode::DiskFull
            || [IOERR_WRITE, IOERR_SHMSIZE].contains(&failure.extended_code)
    }
}

/// One connection to the store's SQLite file, used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl Index {
    /// Opens the index of the store at `root`, making its tables if it is new.
    pub(crate) fn open(root: &Path) -> Result<Self, IndexError> {
        let path = root.join("index.sqlite");
        let sqlite = |source| IndexError::Sqlite { path: path.clone(), source };
        let mut connection = connect(&path).map_err(sqlite)?;
        if version(&connection).map_err(sqlite)? != SCHEMA_VERSION {
            // Two processes may find the file empty at once; SQLite does not queue for a change of the
            // journal mode, so the making of the tables has a lock of its own.
            let _lease = Lease::wait(&root.join("locks/index.lock"))?;
            let found = version(&connection).map_err(sqlite)?;
            if found > SCHEMA_VERSION {
                return Err(IndexError::Newer { path, found });
            }
            if found < SCHEMA_VERSION {
                create(&mut connection).map_err(sqlite)?;
            }
        }
        Ok(Self { path, connection: Mutex::new(connection) })
    }

    /// Runs `work` on the connection.
    pub(crate) fn with<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, IndexError> {
        work(&self.lock()).map_err(|source| self.error(source))
    }

    /// Runs `work` inside one write transaction.
    pub(crate) fn write<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, IndexError> {
        let mut connection = self.lock();
        let whole = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        whole().map_err(|source| self.error(source))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock was held rolled its transaction back; the connection is fine.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, source: rusqlite::Error) -> IndexError {
        IndexError::Sqlite { path: self.path.clone(), source }
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA synchronous = NORMAL; PRAGMA cache_size = -16000;")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

fn create(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(SCHEMA)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

/// A digest as SQLite keeps it.
pub(crate) fn digest_at(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<crate::digest::Digest> {
    let bytes: [u8; 32] = row.get(column)?;
    Ok(blake3::Hash::from_bytes(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_tables_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join("locks")).unwrap();
        drop(Index::open(dir.path()).unwrap());
        let raw = Connection::open(dir.path().join("index.sqlite")).unwrap();
        raw.pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
        let error = Index::open(dir.path()).unwrap_err();
        assert!(matches!(error, IndexError::Newer { found, .. } if found == SCHEMA_VERSION + 1), "{error}");
    }

    #[test]
    fn failed_transaction_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join("locks")).unwrap();
        let index = Index::open(dir.path()).unwrap();
        let failed: Result<(), _> = index.write(|transaction| {
            transaction.execute("INSERT INTO memo VALUES (x'00', x'01')", [])?;
            transaction.execute("INSERT INTO no_such_table VALUES (1)", [])?;
            Ok(())
        });
        assert!(failed.unwrap_err().to_string().contains("index.sqlite"));
        let rows: i64 = index.with(|c| c.query_row("SELECT count(*) FROM memo", [], |r| r.get(0))).unwrap();
        assert_eq!(rows, 0);
    }
}
