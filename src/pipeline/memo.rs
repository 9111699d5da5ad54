//! The row memo: results of single rows, kept across runs and crashes. Keys are digests of all that a row
//! depends on; values are bytes only their stage kind can read.
//!
//! A row that took a while (an answer of a language model) is on its way to the kernel before
//! [`Memo::remember`] returns, so that killing the process loses nothing. Rows that come in quick
//! succession are gathered and written together, a few milliseconds later at most, by a helper thread; no
//! transaction stays open in between, so that other processes never wait for a slow stage.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{OptionalExtension, params};

use crate::digest::Digest;
use crate::store::index::{Index, IndexError};

/// A row that comes this long after the last write is written at once.
const QUICK: Duration = Duration::from_millis(2);

/// Rows are gathered for at most this long.
const GATHER: Duration = Duration::from_millis(20);

/// Bytes gathered before they are written whatever the time.
const GATHER_BYTES_MAX: usize = 8 << 20;

/// The row memo of a store, for one run.
#[derive(Debug)]
pub struct Memo {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    index: Arc<Index>,
    gathered: Mutex<Gathered>,
    woken: Condvar,
}

#[derive(Debug)]
struct Gathered {
    rows: HashMap<Digest, Vec<u8>>,
    bytes: usize,
    written: Instant,
    closing: bool,
    failure: Option<IndexError>,
}

impl Memo {
    /// The memo inside `index`. Starts the helper thread.
    pub(crate) fn new(index: Arc<Index>) -> std::io::Result<Self> {
        let gathered = Gathered {
            rows: HashMap::new(),
            bytes: 0,
            written: Instant::now(),
            closing: false,
            failure: None,
        };
        let shared = Arc::new(Shared { index, gathered: Mutex::new(gathered), woken: Condvar::new() });
        let helper = shared.clone();
        let writer =
            std::thread::Builder::new().name("row memo".to_owned()).spawn(move || helper.write_gathered())?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// The value remembered for a row.
    pub fn recall(&self, row: &Digest) -> Result<Option<Vec<u8>>, IndexError> {
        if let Some(value) = self.shared.lock().rows.get(row) {
            return Ok(Some(value.clone()));
        }
        self.shared.index.with(|connection| {
            connection
                .prepare_cached("SELECT value FROM memo WHERE key = ?1")?
                .query_row([row.as_bytes()], |found| found.get(0))
                .optional()
        })
    }

    /// Remembers a row. An error may belong to a row that was gathered earlier.
    pub fn remember(&self, row: &Digest, value: &[u8]) -> Result<(), IndexError> {
        let mut gathered = self.shared.lock();
        if let Some(old) = gathered.rows.insert(*row, value.to_vec()) {
            gathered.bytes -= old.len();
        }
        gathered.bytes += value.len();
        if gathered.written.elapsed() >= QUICK || gathered.bytes >= GATHER_BYTES_MAX {
            self.shared.write(&mut gathered);
        } else if gathered.rows.len() == 1 {
            self.shared.woken.notify_one();
        }
        gathered.failure.take().map_or(Ok(()), Err)
    }

    /// Writes what is gathered now.
    pub fn flush(&self) -> Result<(), IndexError> {
        let mut gathered = self.shared.lock();
        self.shared.write(&mut gathered);
        gathered.failure.take().map_or(Ok(()), Err)
    }
}

impl Drop for Memo {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.woken.notify_one();
        if self.writer.take().is_some_and(|writer| writer.join().is_err()) {
            tracing::warn!("the helper thread of the row memo panicked");
        }
        if let Err(error) = self.flush() {
            tracing::warn!("rows could not be remembered: {error}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the gathered rows in one transaction. They stay gathered if that fails.
    fn write(&self, gathered: &mut Gathered) {
        gathered.written = Instant::now();
        if gathered.rows.is_empty() {
            return;
        }
        let written = self.index.write(|transaction| {
            let mut statement = transaction.prepare_cached("INSERT OR REPLACE INTO memo VALUES (?1, ?2)")?;
            for (row, value) in &gathered.rows {
                statement.execute(params![row.as_bytes(), value])?;
            }
            Ok(())
        });
        match written {
            Ok(()) => {
                gathered.rows.clear();
                gathered.bytes = 0;
            }
            Err(error) => gathered.failure = Some(error),
        }
    }

    /// The helper thread: sleeps until a first row is gathered, waits for company, writes.
    fn write_gathered(&self) {
        let mut gathered = self.lock();
        while !gathered.closing {
            if gathered.rows.is_empty() || gathered.failure.is_some() {
                gathered = self.woken.wait(gathered).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (after, _) = self
                .woken
                .wait_timeout_while(gathered, GATHER, |gathered| !gathered.closing)
                .unwrap_or_else(PoisonError::into_inner);
            gathered = after;
            self.write(&mut gathered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(dir: &tempfile::TempDir) -> Arc<Index> {
        fs_err::create_dir_all(dir.path().join("locks")).unwrap();
        Arc::new(Index::open(dir.path()).unwrap())
    }

    fn row(n: u32) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    #[test]
    fn rows_are_there_at_once_and_in_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let memo = Memo::new(index(&dir)).unwrap();
        for n in 0..500 {
            memo.remember(&row(n), &n.to_le_bytes()).unwrap();
            assert_eq!(memo.recall(&row(n)).unwrap().unwrap(), n.to_le_bytes());
        }
        assert_eq!(memo.recall(&row(500)).unwrap(), None);
        drop(memo);
        let memo = Memo::new(index(&dir)).unwrap();
        for n in 0..500 {
            assert_eq!(memo.recall(&row(n)).unwrap().unwrap(), n.to_le_bytes());
        }
    }

    #[test]
    fn slow_row_is_written_before_the_call_returns() {
        let dir = tempfile::tempdir().unwrap();
        let memo = Memo::new(index(&dir)).unwrap();
        memo.shared.lock().written = Instant::now().checked_sub(QUICK).unwrap();
        memo.remember(&row(1), b"answer").unwrap();
        let other_process = Memo::new(index(&dir)).unwrap();
        assert_eq!(other_process.recall(&row(1)).unwrap().unwrap(), b"answer");
    }

    #[test]
    fn rows_that_cannot_be_written_are_an_error_and_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let index = index(&dir);
        let memo = Memo::new(index.clone()).unwrap();
        index.with(|c| c.execute_batch("ALTER TABLE memo RENAME TO away")).unwrap();
        memo.shared.lock().rows.insert(row(1), b"answer".to_vec());
        assert!(memo.flush().is_err());
        index.with(|c| c.execute_batch("ALTER TABLE away RENAME TO memo")).unwrap();
        memo.flush().unwrap();
        assert!(memo.shared.lock().rows.is_empty());
        assert_eq!(memo.recall(&row(1)).unwrap().unwrap(), b"answer");
    }
}
