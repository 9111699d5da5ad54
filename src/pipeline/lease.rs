//! One holder at a time of a name in the store, across threads and processes.
//!
//! A lease is an advisory lock on a file, so the kernel lets go of it when its process dies: there are no
//! stale locks to clear by hand. The holder removes the file before it lets go; whoever waited on the
//! removed file notices that the name now means another file, and tries again.

use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest pause between two looks at a lock somebody else holds.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// The right to be the only one; given back on drop.
#[derive(Debug)]
pub struct Lease {
    file: fs_err::File,
    path: PathBuf,
}

impl Lease {
    /// Takes the lease if nobody has it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = fs_err::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            if is_still(&file, path)? {
                return Ok(Some(Self { file, path: path.to_owned() }));
            }
        }
    }

    /// Takes the lease, waiting for whoever has it. Calls `waiting` once if it has to wait; gives `None`
    /// once `cancelled` says so.
    pub fn take(
        path: &Path,
        cancelled: &dyn Fn() -> bool,
        waiting: &mut dyn FnMut(),
    ) -> io::Result<Option<Self>> {
        if let Some(lease) = Self::try_take(path)? {
            return Ok(Some(lease));
        }
        waiting();
        let mut pause = Duration::from_millis(1);
        while !cancelled() {
            if let Some(lease) = Self::try_take(path)? {
                return Ok(Some(lease));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(None)
    }

    /// Takes the lease, however long that takes: for locks that are held for moments only.
    pub(crate) fn wait(path: &Path) -> io::Result<Self> {
        let lease = Self::take(path, &|| false, &mut || {})?;
        Ok(lease.expect("`take` gives none only when cancelled"))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Removed while still locked; a file that cannot be removed is only an empty file left lying.
        let _left_lying = std::fs::remove_file(&self.path);
        let _closing_unlocks_too = self.file.unlock();
    }
}

/// Whether `path` still names the locked file and not a younger one.
fn is_still(file: &fs_err::File, path: &Path) -> io::Result<bool> {
    let locked = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok(named.ino() == locked.ino() && named.dev() == locked.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lock");
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let lease = Lease::wait(&path).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lease);
                    }
                });
            }
        });
        assert!(!path.exists(), "the last holder removes the file");
    }

    #[test]
    fn waiting_ends_when_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lock");
        let _held = Lease::try_take(&path).unwrap().unwrap();
        let mut waited = 0;
        assert!(Lease::take(&path, &|| true, &mut || waited += 1).unwrap().is_none());
        assert_eq!(waited, 1);
    }

    #[test]
    fn unusable_lock_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("file"), "").unwrap();
        let error = Lease::try_take(&dir.path().join("file/a.lock")).unwrap_err();
        assert!(error.to_string().contains("file/a.lock"), "{error}");
    }
}
