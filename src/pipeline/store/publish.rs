//! The newest results under their own names, `out/<pipeline>/<stage>/`, for people and other tools.
//!
//! A folder is built beside its place and swapped in. What a person changed or added there is carried over:
//! a file of ours that was edited goes on as `<file>.edited`. In between lies `.<stage>.old`; a kill leaves
//! it behind, and the next publishing takes the person's files out of it first.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::{OptionalExtension, params};

use crate::digest::Digest;
use crate::lease::Lease;
use crate::stage::OutputFile;
use crate::stat_index::Signature;

use super::index::digest_at;
use super::objects::hash_object;
use super::{ActionRecord, Store, StoreError, metadata_of, remove_tree, tree_decode};

/// Files up to this size are copied, so that a person may edit them; larger ones are hard links.
const COPY_MAX: u64 = 1 << 20;

/// Names tried for an edited file before giving up.
const EDITED_MAX: u32 = 10_000;

impl Store {
    /// Where the newest results of a stage stand unless the user wants them elsewhere.
    pub fn out_folder(&self, pipeline: &str) -> PathBuf {
        self.root.join("out").join(super::folder_name(pipeline))
    }

    /// Makes `folder` hold the outputs of `record`, unless it does already.
    ///
    /// Fails with [`StoreError::Damaged`] if an object that has to be read is damaged.
    pub fn publish(&self, folder: &Path, record: &ActionRecord) -> Result<(), StoreError> {
        let name = text_of(folder)?;
        let published = self.published(name)?;
        if published == Some(record.tree) && self.folder_stands(folder, &record.outputs)? {
            return Ok(());
        }
        let lock = format!("out-{}.lock", Digest::of(name.as_bytes()).short());
        let _lease = Lease::wait(&self.root.join("locks").join(lock))?;
        self.swap(folder, record, published)?;
        self.index.with(|connection| {
            connection
                .prepare_cached("INSERT OR REPLACE INTO published VALUES (?1, ?2)")?
                .execute(params![name, record.tree.as_bytes()])
        })?;
        self.files.flush()?;
        Ok(())
    }

    fn published(&self, folder: &str) -> Result<Option<Digest>, StoreError> {
        Ok(self.index.with(|connection| {
            connection
                .prepare_cached("SELECT tree FROM published WHERE folder = ?1")?
                .query_row([folder], |row| digest_at(row, 0))
                .optional()
        })?)
    }

    /// Whether each file looks as it did when it was put there.
    fn folder_stands(&self, folder: &Path, files: &[OutputFile]) -> Result<bool, StoreError> {
        if files.is_empty() {
            return Ok(folder.is_dir());
        }
        for file in files {
            let path = folder.join(&file.path);
            let Some(metadata) = metadata_of(&path)? else { return Ok(false) };
            if self.files.digest(text_of(&path)?, &Signature::own(&metadata))? != Some(file.digest) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn swap(
        &self,
        folder: &Path,
        record: &ActionRecord,
        published: Option<Digest>,
    ) -> Result<(), StoreError> {
        let (new, old) = (sibling(folder, ".new"), sibling(folder, ".old"));
        if let Some(parent) = folder.parent() {
            fs_err::create_dir_all(parent)?;
        }
        let ours = self.files_of(published)?;
        if old.exists() {
            // Killed between the renames, or before the person's files were carried over.
            if folder.exists() {
                carry(&old, folder, &ours)?;
                remove_tree(&old)?;
            } else {
                fs_err::rename(&old, folder)?;
            }
        }
        remove_tree(&new)?;
        self.fill(&new, &record.outputs)?;
        if folder.symlink_metadata().is_ok() {
            if !folder.is_dir() {
                remove_tree(&new)?;
                return Err(StoreError::Unfit {
                    path: folder.to_owned(),
                    problem: "is not a folder, so results cannot be put there",
                });
            }
            fs_err::rename(folder, &old)?;
        }
        fs_err::rename(&new, folder)?;
        if old.exists() {
            carry(&old, folder, &ours)?;
            remove_tree(&old)?;
        }
        for file in &record.outputs {
            let path = folder.join(&file.path);
            let signature = Signature::own(&fs_err::metadata(&path)?);
            self.files.record_own(text_of(&path)?, signature, file.digest)?;
        }
        Ok(())
    }

    /// What was put into a folder by path: the files of the tree, if that is still known.
    fn files_of(&self, tree: Option<Digest>) -> Result<BTreeMap<String, Digest>, StoreError> {
        let bytes = tree.map_or(Ok(None), |tree| self.read_object(tree))?;
        let files = bytes.and_then(|bytes| tree_decode(&bytes)).unwrap_or_default();
        Ok(files.into_iter().map(|file| (file.path, file.digest)).collect())
    }

    fn fill(&self, folder: &Path, files: &[OutputFile]) -> Result<(), StoreError> {
        fs_err::create_dir_all(folder)?;
        for file in files {
            let object = self.checked(file.digest, file.bytes)?;
            let path = folder.join(&file.path);
            if file.path.contains('/')
                && let Some(parent) = path.parent()
            {
                fs_err::create_dir_all(parent)?;
            }
            if file.bytes <= COPY_MAX {
                fs_err::write(&path, fs_err::read(&object)?)?;
            } else if std::fs::hard_link(&object, &path).is_err() {
                fs_err::copy(&object, &path)?;
            }
        }
        Ok(())
    }
}

/// Brings what a person changed or added in `old` over to `folder`: first the files that are the person's
/// own, under their names, then edited ones of ours beside the new ones.
fn carry(old: &Path, folder: &Path, ours: &BTreeMap<String, Digest>) -> Result<(), StoreError> {
    let (mut added, mut edited) = (Vec::new(), Vec::new());
    for entry in walkdir::WalkDir::new(old).min_depth(1).sort_by_file_name() {
        let entry = entry.map_err(io::Error::from)?;
        if entry.file_type().is_dir() {
            continue;
        }
        let relative = entry.path().strip_prefix(old).expect("a walk stays below its root");
        let target = folder.join(relative);
        let put_there = relative.to_str().and_then(|path| ours.get(path));
        if entry.file_type().is_file() {
            let digest = hash_object(entry.path())?;
            if put_there == Some(&digest) || (target.is_file() && hash_object(&target)? == digest) {
                continue;
            }
        }
        let list = if put_there.is_some() { &mut edited } else { &mut added };
        list.push((entry.into_path(), target));
    }
    for (path, target) in added {
        let is_free = target.symlink_metadata().is_err();
        keep(&path, if is_free { target } else { edited_name(&target)? })?;
    }
    for (path, target) in edited {
        let target = edited_name(&target)?;
        tracing::warn!("a result was edited by hand; the edited file is now `{}`", target.display());
        keep(&path, target)?;
    }
    Ok(())
}

fn keep(path: &Path, target: PathBuf) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs_err::create_dir_all(parent)?;
    }
    fs_err::rename(path, target)
}

/// `<file>.edited`, or the first of `<file>.edited.2`, `.3`, … that is free.
fn edited_name(path: &Path) -> Result<PathBuf, StoreError> {
    let with = |end: String| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    std::iter::once(with(".edited".to_owned()))
        .chain((2..EDITED_MAX).map(|n| with(format!(".edited.{n}"))))
        .find(|name| name.symlink_metadata().is_err())
        .ok_or_else(|| StoreError::Unfit { path: path.to_owned(), problem: "has too many edited versions" })
}

/// `.<name><end>` beside `folder`.
fn sibling(folder: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(folder.file_name().unwrap_or_default());
    name.push(end);
    folder.with_file_name(name)
}

fn text_of(path: &Path) -> Result<&str, StoreError> {
    path.to_str().ok_or_else(|| StoreError::Unfit { path: path.to_owned(), problem: "is not valid UTF-8" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Flush, tree_digest, tree_encode};

    struct Desk {
        dir: tempfile::TempDir,
        store: Store,
    }

    impl Desk {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("cache")).unwrap();
            Self { dir, store }
        }

        fn out(&self) -> PathBuf {
            self.dir.path().join("out/notes")
        }

        /// Publishes an artifact with these files and gives what lies in the folder afterwards.
        fn publish(&self, files: &[(&str, &str)]) -> BTreeMap<String, String> {
            let mut record = ActionRecord::new(Digest::of(b"key"), "notes", Vec::new());
            for (path, content) in files {
                let placed = self.store.put_bytes(content.as_bytes(), Flush::Lazy).unwrap();
                record.outputs.push(OutputFile {
                    path: (*path).to_owned(),
                    digest: placed.digest,
                    bytes: placed.bytes,
                });
            }
            record.tree = tree_digest(&record.outputs);
            self.store.put_bytes(&tree_encode(&record.outputs), Flush::Lazy).unwrap();
            self.store.publish(&self.out(), &record).unwrap();
            let siblings = fs_err::read_dir(self.out().parent().unwrap()).unwrap().count();
            assert_eq!(siblings, 1, "nothing is left beside the folder");
            self.content()
        }

        fn content(&self) -> BTreeMap<String, String> {
            let mut content = BTreeMap::new();
            for entry in walkdir::WalkDir::new(self.out()) {
                let entry = entry.unwrap();
                if entry.file_type().is_file() {
                    let path = entry.path().strip_prefix(self.out()).unwrap().to_str().unwrap().to_owned();
                    content.insert(path, fs_err::read_to_string(entry.path()).unwrap());
                }
            }
            content
        }
    }

    fn content(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn newer_results_replace_older_ones() {
        let desk = Desk::new();
        assert_eq!(desk.publish(&[("a", "1"), ("b/c", "2")]), content(&[("a", "1"), ("b/c", "2")]));
        assert_eq!(desk.publish(&[("a", "3")]), content(&[("a", "3")]));
    }

    #[test]
    fn edited_file_is_kept_beside_the_new_one() {
        let desk = Desk::new();
        desk.publish(&[("a", "1"), ("b/c", "2")]);
        fs_err::write(desk.out().join("b/c"), "mine").unwrap();
        fs_err::write(desk.out().join("added"), "also mine").unwrap();
        let after = desk.publish(&[("a", "1"), ("b/c", "2")]);
        let kept = [("a", "1"), ("added", "also mine"), ("b/c", "2"), ("b/c.edited", "mine")];
        assert_eq!(after, content(&kept));
        fs_err::write(desk.out().join("b/c"), "mine again").unwrap();
        let after = desk.publish(&[("a", "9")]);
        let kept =
            [("a", "9"), ("added", "also mine"), ("b/c.edited", "mine"), ("b/c.edited.2", "mine again")];
        assert_eq!(after, content(&kept));
    }

    #[test]
    fn kill_between_the_renames_loses_nothing() {
        let desk = Desk::new();
        desk.publish(&[("a", "1")]);
        fs_err::write(desk.out().join("a"), "mine").unwrap();
        fs_err::rename(desk.out(), sibling(&desk.out(), ".old")).unwrap();
        fs_err::create_dir(sibling(&desk.out(), ".new")).unwrap();
        assert_eq!(desk.publish(&[("a", "2")]), content(&[("a", "2"), ("a.edited", "mine")]));
    }

    #[test]
    fn standing_folder_is_left_alone() {
        let desk = Desk::new();
        desk.publish(&[("a", "1")]);
        let before = Signature::live(&fs_err::metadata(desk.out().join("a")).unwrap());
        desk.publish(&[("a", "1")]);
        assert_eq!(Signature::live(&fs_err::metadata(desk.out().join("a")).unwrap()), before);
    }

    #[test]
    fn file_in_the_way_is_named_and_kept() {
        let desk = Desk::new();
        fs_err::create_dir_all(desk.out().parent().unwrap()).unwrap();
        fs_err::write(desk.out(), "a file").unwrap();
        let record = ActionRecord::new(Digest::of(b"key"), "notes", Vec::new());
        let error = desk.store.publish(&desk.out(), &record).unwrap_err();
        assert!(error.to_string().contains("out/notes"), "{error}");
        assert_eq!(fs_err::read_to_string(desk.out()).unwrap(), "a file");
    }
}
