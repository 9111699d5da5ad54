//! Who uses the store: every open store holds a shared lock, and what removes content takes it alone. The
//! kernel lets go of a lock when its process dies, so a killed process is never in the way.

use std::fs::TryLockError;
use std::io;
use std::path::Path;

/// The lock of one open store.
#[derive(Debug)]
pub(super) struct Usage {
    file: fs_err::File,
}

impl Usage {
    /// Begins to use the store at `root`; waits while content is being removed.
    pub(super) fn begin(root: &Path) -> io::Result<Self> {
        let path = root.join("locks/use.lock");
        let file = fs_err::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        file.lock_shared()?;
        Ok(Self { file })
    }

    /// Runs `work` while nobody else uses the store; `None` if somebody does.
    pub(super) fn alone<T>(&self, work: impl FnOnce() -> T) -> io::Result<Option<T>> {
        match self.file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                // A lock that could not be raised may be lost; it was shared before and is so again.
                self.file.lock_shared()?;
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let done = work();
        self.file.lock_shared()?;
        Ok(Some(done))
    }
}
