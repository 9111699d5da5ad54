//! Content in and out of `objects/`.
//!
//! Content comes in by a rename from scratch and is named by what was really written, not by what the
//! source file held a moment earlier. Going out it is either looked at (size, mtime and inode as when it
//! came in: cheap, for results that are only reported) or re-hashed (always, before a stage reads it).

use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::stage::OutputFile;
use crate::stat_index::Signature;

use super::{Damage, Store, StoreError, create_dir, metadata_of};

/// Files up to this size are hashed and written from memory.
const IN_MEMORY_MAX: u64 = 4 << 20;

/// Whether new content is flushed to the disk before it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Yes: outputs, which an action record will vouch for.
    Disk,
    /// No: copies of files that still exist. A power cut may damage them; that is found when they are used.
    Lazy,
}

/// Content that is in the store now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Its name.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

impl Store {
    /// Where the object `digest` is, or would be.
    pub fn object_path(&self, digest: Digest) -> PathBuf {
        self.root.join(object_name(digest))
    }

    /// Whether the object is there. Says nothing of its content.
    pub fn contains(&self, digest: Digest) -> bool {
        self.object_path(digest).exists()
    }

    /// Puts bytes into the store.
    pub fn put_bytes(&self, bytes: &[u8], flush: Flush) -> Result<Placed, StoreError> {
        let placed = Placed { digest: Digest::of(bytes), bytes: bytes.len() as u64 };
        if self.stands(placed.digest, placed.bytes)?.is_some() {
            let scratch = self.scratch.fresh_path();
            let mut file = create_object_file(&scratch)?;
            file.write_all(bytes)?;
            if flush == Flush::Disk {
                file.sync_data()?;
            }
            drop(file);
            self.place(&scratch, placed)?;
        }
        Ok(placed)
    }

    /// Copies a file into the store. The digest is that of the bytes taken, whatever becomes of the file
    /// while it is read; its own object is never linked to it.
    pub fn put_file(&self, path: &Path) -> Result<Placed, StoreError> {
        if let Some(bytes) = read_at_most(path, IN_MEMORY_MAX)? {
            return self.put_bytes(&bytes, Flush::Lazy);
        }
        let known = Digest::of_reader(fs_err::File::open(path)?)?;
        if self.stands(known.digest, known.bytes)?.is_none() {
            return Ok(known);
        }
        let scratch = self.scratch.fresh_path();
        // Shares the blocks on file systems that can.
        fs_err::copy(path, &scratch)?;
        self.take_scratch(&scratch, Flush::Lazy)
    }

    /// Moves a file that only this process can write into the store.
    pub(crate) fn take_file(&self, path: &Path) -> Result<Placed, StoreError> {
        self.take_scratch(path, Flush::Disk)
    }

    /// A cheap look at an object: `None` if it looks as it did when its content was known, else the damage.
    /// An object that looks different is re-hashed, and set aside if it is damaged.
    pub fn stands(&self, digest: Digest, bytes: u64) -> Result<Option<Damage>, StoreError> {
        let Some(metadata) = metadata_of(&self.object_path(digest))? else {
            return Ok(Some(Damage::Missing));
        };
        let known = self.files.digest(&object_name(digest), &Signature::own(&metadata))?;
        if known == Some(digest) && metadata.len() == bytes {
            return Ok(None);
        }
        match self.checked(digest, bytes) {
            Ok(_) => Ok(None),
            Err(StoreError::Damaged { damage, .. }) => Ok(Some(damage)),
            Err(error) => Err(error),
        }
    }

    /// The path of an object whose content has just been re-hashed.
    ///
    /// A damaged object is set aside, so that the next look finds it missing and it is made again.
    pub fn checked(&self, digest: Digest, bytes: u64) -> Result<PathBuf, StoreError> {
        let path = self.object_path(digest);
        let damage = match metadata_of(&path)? {
            None => Damage::Missing,
            Some(metadata) if metadata.len() != bytes => {
                Damage::Size { expected: bytes, found: metadata.len() }
            }
            Some(metadata) if hash_object(&path)? == digest => {
                self.files.record_own(&object_name(digest), Signature::own(&metadata), digest)?;
                return Ok(path);
            }
            Some(_) => Damage::Altered,
        };
        if damage != Damage::Missing {
            self.set_aside(digest)?;
        }
        Err(StoreError::Damaged { digest, damage })
    }

    /// The content of an object of any recorded size, re-hashed; `None` if it is missing or damaged.
    pub(crate) fn read_object(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        match fs_err::read(self.object_path(digest)) {
            Ok(bytes) => Ok((Digest::of(&bytes) == digest).then_some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Brings the objects of `files` below `folder` under their own names, re-hashing each. They are hard
    /// links (copies where the file system has none): `find -type f` and `grep -r` see plain files.
    pub(crate) fn link_into(&self, folder: &Path, files: &[OutputFile]) -> Result<(), StoreError> {
        fs_err::create_dir_all(folder)?;
        for file in files {
            let object = self.checked(file.digest, file.bytes)?;
            let path = folder.join(&file.path);
            if file.path.contains('/')
                && let Some(parent) = path.parent()
            {
                fs_err::create_dir_all(parent)?;
            }
            if std::fs::hard_link(&object, &path).is_err() {
                fs_err::copy(&object, &path)?;
            }
        }
        Ok(())
    }

    fn take_scratch(&self, scratch: &Path, flush: Flush) -> Result<Placed, StoreError> {
        let file = fs_err::File::open(scratch)?;
        let metadata = file.metadata()?;
        let placed = Placed { digest: hash_object(scratch)?, bytes: metadata.len() };
        if self.stands(placed.digest, placed.bytes)?.is_some() {
            file.set_permissions(std::fs::Permissions::from_mode(0o444))?;
            if flush == Flush::Disk {
                file.sync_data()?;
            }
            self.place(scratch, placed)?;
        } else {
            fs_err::remove_file(scratch)?;
        }
        Ok(placed)
    }

    /// Renames a finished, read-only scratch file into `objects/`.
    fn place(&self, scratch: &Path, placed: Placed) -> Result<(), StoreError> {
        let path = self.object_path(placed.digest);
        let signature = Signature::own(&fs_err::metadata(scratch)?);
        if signature.bytes != placed.bytes {
            return Err(StoreError::Unfit {
                path: scratch.to_owned(),
                problem: "changed while it was stored",
            });
        }
        if let Some(parent) = path.parent() {
            create_dir(parent)?;
        }
        fs_err::rename(scratch, &path)?;
        self.files.record_own(&object_name(placed.digest), signature, placed.digest)?;
        Ok(())
    }

    fn set_aside(&self, digest: Digest) -> Result<(), StoreError> {
        tracing::warn!("object `{digest}` is damaged and set aside; the stage that made it makes it again");
        self.files.forget(&object_name(digest))?;
        match fs_err::rename(self.object_path(digest), self.root.join("damaged").join(digest.hex())) {
            // Another process was quicker.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => Ok(result?),
        }
    }
}

impl Digest {
    /// Digest and size of a stream. Unlike [`Digest::of_file`] it never maps the file, so that a file that
    /// is cut short while it is read cannot kill the process.
    pub(crate) fn of_reader(reader: impl Read) -> io::Result<Placed> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok(Placed { bytes: hasher.count(), digest: hasher.finalize().into() })
    }
}

/// Path of an object inside the store, which is also its name in the stat cache.
pub(super) fn object_name(digest: Digest) -> String {
    let hex = digest.hex();
    format!("objects/{}/{hex}", &hex[..2])
}

/// Digest of a file inside the store, which nobody cuts short while it is mapped.
pub(super) fn hash_object(path: &Path) -> io::Result<Digest> {
    Digest::of_file(path).map_err(|error| {
        io::Error::new(error.kind(), format!("failed to read `{}`: {error}", path.display()))
    })
}

fn create_object_file(path: &Path) -> io::Result<fs_err::File> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o444);
    fs_err::OpenOptions::from_options(options).open(path)
}

/// The content of a file of at most `bytes_max` bytes; `None` if it is larger.
fn read_at_most(path: &Path, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
    let file = fs_err::File::open(path)?;
    if file.metadata()?.len() > bytes_max {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= bytes_max).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    /// Changes an object behind the store's back.
    fn overwrite(path: &Path, bytes: &[u8]) {
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
        fs_err::write(path, bytes).unwrap();
    }

    #[test]
    fn same_content_is_one_read_only_object() {
        let (dir, store) = store();
        let path = dir.path().join("note.md");
        fs_err::write(&path, "a note").unwrap();
        let copied = store.put_file(&path).unwrap();
        let written = store.put_bytes(b"a note", Flush::Disk).unwrap();
        assert_eq!(copied, written);
        let object = store.object_path(copied.digest);
        assert_eq!(fs_err::metadata(&object).unwrap().permissions().mode() & 0o777, 0o444);
        fs_err::write(&path, "edited").unwrap();
        assert_eq!(fs_err::read_to_string(object).unwrap(), "a note", "never a link to a live file");
    }

    #[test]
    fn large_file_goes_in_by_copy() {
        let (dir, store) = store();
        let path = dir.path().join("large.bin");
        let content = vec![7u8; usize::try_from(IN_MEMORY_MAX).unwrap() + 1];
        fs_err::write(&path, &content).unwrap();
        let placed = store.put_file(&path).unwrap();
        assert_eq!(placed, Placed { digest: Digest::of(&content), bytes: content.len() as u64 });
        assert_eq!(store.put_file(&path).unwrap(), placed);
        assert!(store.checked(placed.digest, placed.bytes).is_ok());
    }

    #[test]
    fn altered_object_of_the_same_size_is_set_aside() {
        let (dir, store) = store();
        let placed = store.put_bytes(b"a note", Flush::Disk).unwrap();
        store.files().flush().unwrap();
        assert_eq!(store.stands(placed.digest, placed.bytes).unwrap(), None);
        overwrite(&store.object_path(placed.digest), b"a nota");
        assert_eq!(store.stands(placed.digest, placed.bytes).unwrap(), Some(Damage::Altered));
        assert_eq!(store.stands(placed.digest, placed.bytes).unwrap(), Some(Damage::Missing));
        assert_eq!(fs_err::read(dir.path().join("damaged").join(placed.digest.hex())).unwrap(), b"a nota");
        store.put_bytes(b"a note", Flush::Disk).unwrap();
        assert_eq!(store.stands(placed.digest, placed.bytes).unwrap(), None);
    }

    #[test]
    fn damage_with_old_timestamps_is_found_on_use() {
        let (_dir, store) = store();
        let placed = store.put_bytes(b"a note", Flush::Disk).unwrap();
        store.files().flush().unwrap();
        let path = store.object_path(placed.digest);
        let modified = fs_err::metadata(&path).unwrap().modified().unwrap();
        overwrite(&path, b"a nota");
        fs_err::OpenOptions::new().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert_eq!(store.stands(placed.digest, placed.bytes).unwrap(), None, "a look cannot see it");
        let error = store.checked(placed.digest, placed.bytes).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { damage: Damage::Altered, .. }), "{error}");
    }

    #[test]
    fn putting_heals_a_damaged_object() {
        let (_dir, store) = store();
        let placed = store.put_bytes(b"a note", Flush::Disk).unwrap();
        overwrite(&store.object_path(placed.digest), b"short");
        store.put_bytes(b"a note", Flush::Disk).unwrap();
        assert!(store.checked(placed.digest, placed.bytes).is_ok());
    }
}
