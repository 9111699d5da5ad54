//! Private folders of a running process below `tmp/`, and the clearing of those whose process died.
//!
//! A process first takes the lock `locks/tmp-<id>.lock` and only then makes `tmp/<id>`. So a folder whose
//! lock is free has no owner any more, however its owner ended.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::lease::Lease;
use crate::runs::fresh_id;

use super::remove_tree;

/// The scratch folder of this process, removed on drop.
#[derive(Debug)]
pub(super) struct Scratch {
    folder: PathBuf,
    next: AtomicU64,
    _lease: Lease,
}

impl Scratch {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        clear_dead(root)?;
        let id = fresh_id();
        let lock = root.join("locks").join(format!("tmp-{id}.lock"));
        let lease = Lease::try_take(&lock)?.ok_or_else(|| {
            io::Error::other(format!("scratch lock `{}` is taken although its name is new", lock.display()))
        })?;
        let folder = root.join("tmp").join(&id);
        fs_err::create_dir(&folder)?;
        Ok(Self { folder, next: AtomicU64::new(0), _lease: lease })
    }

    /// A path inside the scratch folder that nothing has had before.
    pub(super) fn fresh_path(&self) -> PathBuf {
        self.folder.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// A new folder inside the scratch folder.
    pub(super) fn folder(&self) -> io::Result<ScratchFolder> {
        let path = self.fresh_path();
        fs_err::create_dir(&path)?;
        Ok(ScratchFolder { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        clear(&self.folder);
    }
}

/// One folder inside the scratch folder, removed on drop.
#[derive(Debug)]
pub(crate) struct ScratchFolder {
    path: PathBuf,
}

impl ScratchFolder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        clear(&self.path);
    }
}

/// Removes scratch; what cannot be removed now is removed by a later process.
fn clear(folder: &Path) {
    if let Err(error) = remove_tree(folder) {
        tracing::warn!("scratch is left lying: {error}");
    }
}

fn clear_dead(root: &Path) -> io::Result<()> {
    for entry in fs_err::read_dir(root.join("tmp"))? {
        let entry = entry?;
        let lock = root.join("locks").join(format!("tmp-{}.lock", entry.file_name().display()));
        if let Some(_lease) = Lease::try_take(&lock)? {
            clear(&entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::store::Store;

    #[test]
    fn scratch_of_the_dead_is_cleared_and_of_the_living_kept() {
        let dir = tempfile::tempdir().unwrap();
        let living = Store::open(dir.path()).unwrap();
        let kept = living.scratch().unwrap();
        let dead = dir.path().join("tmp/20200101T000000-dead");
        fs_err::create_dir_all(dead.join("3/out")).unwrap();
        fs_err::write(dead.join("3/out/half.jsonl"), "{").unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert!(!dead.exists());
        assert!(kept.path().exists());
        drop(kept);
        drop(living);
        assert_eq!(fs_err::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }
}
