//! The content-addressed store: a folder that many processes share and that a kill at any instant leaves
//! whole. It knows content and action keys; not stages, not manifests.
//!
//! ```text
//! format                 `tunesmith store 1`: a newer number is refused, never rewritten
//! objects/ab/<hex>       content, named by its BLAKE3 digest, mode 0444
//! actions/ab/<key>.json  one record per finished action; writing it is the commit
//! checkpoints/<key>/     what an unfinished action left to go on from
//! index.sqlite           stat cache, row memo, newest keys, run history
//! runs/<id>/             journal and logs of a run
//! out/<pipeline>/<stage> the newest results, under their own names
//! damaged/<hex>          objects whose content did not match their name, for a post-mortem
//! tmp/<process>/         scratch; removed by the next process once the lock of its owner is free
//! locks/                 leases
//! ```
//!
//! Content becomes an object by a rename out of `tmp/`, so an object is whole or absent. What a disk or a
//! hand does to it later is found when it is used: [`Store::stands`] looks, [`Store::checked`] re-hashes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::stat_index::StatIndex;

mod actions;
mod audit;
mod gc;
pub(crate) mod index;
mod objects;
mod publish;
mod remote;
mod scratch;
mod tree;
mod usage;

pub use actions::{ActionRecord, Latest};
pub use audit::{StoreStats, Verification};
pub use gc::{GcPolicy, GcReport};
pub use index::IndexError;
pub use objects::{Flush, Placed};
pub use remote::{Remote, Transfer};
pub use tree::{tree_decode, tree_digest, tree_encode};

use index::Index;
use scratch::Scratch;
pub(crate) use scratch::ScratchFolder;
use usage::Usage;

/// Version of the on-disk format.
const FORMAT: u32 = 1;

/// Folders of a store.
const FOLDERS: [&str; 8] = ["objects", "actions", "checkpoints", "tmp", "locks", "runs", "out", "damaged"];

/// The signature that backup tools know (<https://bford.info/cachedir/>).
const CACHEDIR_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
    # This folder is a cache of tunesmith; it can be made again.\n";

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused; the text names the path.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The SQLite index cannot be used.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// An object is not what its name says. It has been moved aside.
    #[error("object `{digest}` of the store {damage}")]
    Damaged {
        /// Name of the object.
        digest: Digest,
        /// What is wrong with it.
        damage: Damage,
    },
    /// The store was written by a newer version.
    #[error("store `{}` has format `{found}`, which is not format {FORMAT}, the one known here", path.display())]
    Format {
        /// The store.
        path: PathBuf,
        /// What its `format` file says.
        found: String,
    },
    /// Another process uses the store.
    #[error("store `{}` is in use by another tunesmith", path.display())]
    InUse {
        /// The store.
        path: PathBuf,
    },
    /// Something that cannot become an object or a path in an artifact.
    #[error("`{}` {problem}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl StoreError {
    /// A stable code.
    pub fn code(&self) -> &'static str {
        match self {
            _ if self.is_full_disk() => "store::full",
            Self::Io(_) => "store::io",
            Self::Index(IndexError::Newer { .. }) | Self::Format { .. } => "store::newer",
            Self::Index(_) => "store::index",
            Self::Damaged { .. } => "store::damaged",
            Self::Unfit { .. } => "store::unfit",
            Self::InUse { .. } => "store::in_use",
        }
    }

    fn is_full_disk(&self) -> bool {
        match self {
            Self::Io(error) => error.kind() == io::ErrorKind::StorageFull,
            Self::Index(error) => error.is_full_disk(),
            _ => false,
        }
    }

    /// The next step for the user.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            _ if self.is_full_disk() => Some("free some disk space and run again; nothing finished is lost"),
            Self::Index(IndexError::Newer { .. }) | Self::Format { .. } => {
                Some("use a newer tunesmith, or another store with `--cache DIR`")
            }
            Self::Index(_) => Some(
                "if the index is broken, move `index.sqlite*` aside: it is made anew, without row memo and history",
            ),
            Self::InUse { .. } => Some("wait until it is done; nothing was removed"),
            Self::Damaged { .. } => Some("run again: the stage that made it makes it again"),
            Self::Io(_) | Self::Unfit { .. } => None,
        }
    }
}

/// What is wrong with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// It is not there.
    Missing,
    /// It has another size.
    Size {
        /// The recorded size.
        expected: u64,
        /// Its size now.
        found: u64,
    },
    /// Its content has another digest.
    Altered,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("is missing"),
            Self::Size { expected, found } => write!(f, "has {found} bytes instead of {expected}"),
            Self::Altered => f.write_str("has been altered"),
        }
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    index: Arc<Index>,
    files: StatIndex,
    scratch: Scratch,
    usage: Usage,
}

impl Store {
    /// Opens the store at `root`, making it if it is absent, and clears away what dead processes left.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        fs_err::create_dir_all(root)?;
        let root = fs_err::canonicalize(root)?;
        check_format(&root)?;
        for folder in FOLDERS {
            create_dir(&root.join(folder))?;
        }
        let usage = Usage::begin(&root)?;
        write_absent(&root.join("CACHEDIR.TAG"), CACHEDIR_TAG)?;
        write_absent(&root.join(".gitignore"), "*\n")?;
        let index = Arc::new(Index::open(&root)?);
        let scratch = Scratch::open(&root)?;
        Ok(Self { files: StatIndex::new(index.clone()), index, scratch, usage, root })
    }

    /// The folder of the store, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The stat cache.
    pub fn files(&self) -> &StatIndex {
        &self.files
    }

    /// The SQLite index.
    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// A new, empty scratch folder of this process, removed on drop.
    pub(crate) fn scratch(&self) -> Result<ScratchFolder, StoreError> {
        Ok(self.scratch.folder()?)
    }

    /// The folder in which the action `key` may leave checkpoints; created.
    pub(crate) fn checkpoints(&self, key: Digest) -> Result<PathBuf, StoreError> {
        let folder = self.root.join("checkpoints").join(key.hex());
        create_dir(&folder)?;
        Ok(folder)
    }

    /// Removes the checkpoints of a finished action.
    pub(crate) fn clear_checkpoints(&self, key: Digest) -> Result<(), StoreError> {
        remove_tree(&self.root.join("checkpoints").join(key.hex()))?;
        Ok(())
    }

    /// The lock file of an action.
    pub(crate) fn lock_path(&self, key: Digest) -> PathBuf {
        self.root.join("locks").join(format!("{key}.lock"))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.files.flush() {
            tracing::warn!("the stat cache could not be written: {error}");
        }
    }
}

fn check_format(root: &Path) -> Result<(), StoreError> {
    let path = root.join("format");
    let ours = format!("tunesmith store {FORMAT}\n");
    match fs_err::read_to_string(&path) {
        Ok(found) if found == ours => Ok(()),
        // An empty file is what a process killed at the first start leaves.
        Ok(found) if !found.is_empty() => {
            Err(StoreError::Format { path: root.to_owned(), found: found.trim().to_owned() })
        }
        Ok(_) => Ok(fs_err::write(&path, ours)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(fs_err::write(&path, ours)?),
        Err(error) => Err(error.into()),
    }
}

/// Creates a folder unless it is there.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    match fs_err::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

/// Removes a folder and all in it, if it is there.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs_err::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Metadata of what stands at `path` (links followed), if anything does.
pub(crate) fn metadata_of(path: &Path) -> io::Result<Option<std::fs::Metadata>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Asked again through `fs_err` only for its text, which names the path.
        Err(_) => fs_err::metadata(path).map(Some),
    }
}

/// A name as one part of a path: other characters than letters, digits and `._-=,+` are replaced, and such
/// a name gets a short digest so that two names never share a folder.
pub(crate) fn folder_name(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "._-=,+".contains(c);
    let dots_only = name.chars().all(|c| c == '.');
    if name.chars().all(plain) && !dots_only && !name.starts_with('.') && name.len() <= 120 {
        return name.to_owned();
    }
    let safe: String = name.chars().take(40).map(|c| if plain(c) && c != '.' { c } else { '_' }).collect();
    format!("{safe}-{}", Digest::of(name.as_bytes()).short())
}

fn write_absent(path: &Path, text: &str) -> io::Result<()> {
    if path.exists() { Ok(()) } else { fs_err::write(path, text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_hides_itself_from_git_and_keeps_a_readme() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("README.md"), "mine").unwrap();
        fs_err::write(dir.path().join(".gitignore"), "mine").unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert_eq!(fs_err::read_to_string(dir.path().join("README.md")).unwrap(), "mine");
        assert_eq!(fs_err::read_to_string(dir.path().join(".gitignore")).unwrap(), "mine");
        let other = dir.path().join("other");
        drop(Store::open(&other).unwrap());
        assert_eq!(fs_err::read_to_string(other.join(".gitignore")).unwrap(), "*\n");
        assert!(other.join("CACHEDIR.TAG").exists());
    }

    #[test]
    fn newer_store_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("format"), "tunesmith store 2\n").unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert_eq!(error.code(), "store::newer");
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn folder_names_stay_apart() {
        assert_eq!(folder_name("train-rank=8"), "train-rank=8");
        for odd in ["a/b", "a_b/", "..", ".", "", ".hidden", "a b"] {
            let name = folder_name(odd);
            assert!(!name.contains('/') && !name.starts_with('.') && !name.is_empty(), "{name}");
        }
        assert_ne!(folder_name("a/b"), folder_name("a b"));
    }
}
