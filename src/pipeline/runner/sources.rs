//! The files a stage reads from beside the manifest: from patterns to a list of digests.
//!
//! A file is hashed through the stat cache; when it is going to be read by a stage its content is taken
//! into the store in the same step, so that the key speaks of the very bytes the stage will see, whatever
//! the user does to the file meanwhile. Within one run each file is looked at once, and all stages see the
//! same version of it.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use walkdir::{DirEntry, WalkDir};

use crate::digest::Digest;
use crate::graph::{Pipeline, Stage};
use crate::lock::lock_path;
use crate::stage::{EmptySource, OutputFile, SourceFile, SourceSpec};
use crate::stat_index::{Known, Signature};
use crate::store::{Placed, Store, StoreError, metadata_of, tree_digest};

use super::error::{RunnerError, SourceError, SourceProblem};

/// How often a file that changes while it is read is read again.
const READS_MAX: usize = 3;

/// What is done with a file that the stat cache does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taking {
    /// It is hashed.
    Digests,
    /// It is copied into the store, and the copy is hashed.
    Contents,
}

/// The files of one source of a stage.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) name: String,
    pub(super) files: Vec<SourceFile>,
    pub(super) tree: Digest,
}

impl Snapshot {
    fn new(name: String, files: Vec<SourceFile>) -> Self {
        let mut snapshot = Self { name, files, tree: tree_digest(&[]) };
        snapshot.tree = tree_digest(&snapshot.listing());
        snapshot
    }

    /// The files as a tree.
    pub(super) fn listing(&self) -> Vec<OutputFile> {
        let file = |file: &SourceFile| OutputFile {
            path: file.path.clone(),
            digest: file.digest,
            bytes: file.bytes,
        };
        self.files.iter().map(file).collect()
    }
}

/// Reads the sources of the stages of one pipeline.
pub(super) struct SourceReader<'a> {
    store: &'a Store,
    dir: PathBuf,
    /// The manifest's lock, which runs write: a source that held it would never be at rest.
    lock: PathBuf,
    taking: Taking,
    /// Files looked at already, by path as in [`SourceFile::path`].
    seen: BTreeMap<String, Placed>,
}

/// A file that a pattern matches.
struct Match {
    name: String,
    path: PathBuf,
    metadata: Metadata,
}

impl<'a> SourceReader<'a> {
    pub(super) fn new(pipeline: &Pipeline, store: &'a Store, taking: Taking) -> Result<Self, StoreError> {
        let dir = if pipeline.dir.as_os_str().is_empty() { Path::new(".") } else { &pipeline.dir };
        let lock = std::path::absolute(lock_path(&pipeline.path))?;
        Ok(Self { store, dir: std::path::absolute(dir)?, lock, taking, seen: BTreeMap::new() })
    }

    /// The sources of a stage.
    pub(super) fn read(&mut self, stage: &Stage) -> Result<Vec<Snapshot>, RunnerError> {
        stage.kind.sources(&stage.with).into_iter().map(|spec| self.read_one(stage, spec)).collect()
    }

    fn read_one(&mut self, stage: &Stage, spec: SourceSpec) -> Result<Snapshot, RunnerError> {
        let refused = |problem| SourceError::new(stage, &spec.param, problem);
        let files = self.files(&spec.patterns).map_err(refused)?;
        if files.is_empty() && spec.empty == EmptySource::Refused {
            let patterns: Vec<String> = spec.patterns.iter().map(|pattern| format!("`{pattern}`")).collect();
            let problem = SourceProblem::Empty {
                param: spec.param.clone(),
                patterns: patterns.join(", "),
                folder: self.dir.clone(),
            };
            return Err(refused(problem).into());
        }
        Ok(Snapshot::new(spec.name, files))
    }

    /// The files that any of the patterns matches, sorted by path.
    fn files(&mut self, patterns: &[String]) -> Result<Vec<SourceFile>, SourceProblem> {
        let mut files = BTreeMap::new();
        for pattern in patterns {
            let search = Search::new(&self.dir, pattern)?;
            let known = self.store.files().known_below(text_of(&search.base)?).map_err(StoreError::from)?;
            for found in search.run(self.store.root(), &self.lock)? {
                let placed = match self.seen.get(&found.name) {
                    Some(placed) => *placed,
                    None => self.digest(&found, &known)?,
                };
                self.seen.insert(found.name.clone(), placed);
                let Placed { digest, bytes } = placed;
                let object = self.store.object_path(digest);
                files.insert(found.name.clone(), SourceFile { path: found.name, digest, bytes, object });
            }
        }
        Ok(files.into_values().collect())
    }

    fn digest(&self, found: &Match, known: &Known) -> Result<Placed, StoreError> {
        let path = text_of(&found.path)?;
        let mut before = Signature::live(&found.metadata);
        if let Some(digest) = known.digest(path, &before) {
            return Ok(Placed { digest, bytes: before.bytes });
        }
        for _ in 1..READS_MAX {
            let placed = self.take(&found.path)?;
            let after = Signature::live(&fs_err::metadata(&found.path)?);
            if after == before && placed.bytes == after.bytes {
                self.store.files().record_live(path, after, placed.digest)?;
                return Ok(placed);
            }
            before = after;
        }
        // It is written to all the time; what was read once is one version of it.
        self.take(&found.path)
    }

    fn take(&self, path: &Path) -> Result<Placed, StoreError> {
        match self.taking {
            Taking::Contents => self.store.put_file(path),
            Taking::Digests => Ok(Digest::of_reader(fs_err::File::open(path)?)?),
        }
    }
}

/// Takes the content of a source file into the store if it is not there. `false`: the file has other
/// content by now.
pub(super) fn adopt(pipeline: &Pipeline, store: &Store, file: &SourceFile) -> Result<bool, StoreError> {
    if store.contains(file.digest) {
        return Ok(true);
    }
    match store.put_file(&pipeline.dir.join(&file.path)) {
        Ok(placed) => Ok(placed.digest == file.digest),
        Err(StoreError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// One pattern, taken apart.
struct Search {
    /// The file or folder at which the search begins.
    base: PathBuf,
    /// The name of `base` in results.
    base_name: String,
    /// What names must match; `None`: everything below.
    matcher: Option<GlobMatcher>,
}

impl Search {
    fn new(dir: &Path, pattern: &str) -> Result<Self, globset::Error> {
        let absolute = pattern.starts_with('/');
        let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let literal = std::iter::once(dir).chain(parts.iter().map(Path::new)).collect::<PathBuf>();
        let is_special = |part: &&str| part.contains(['*', '?', '[', ']', '{', '}', '\\']);
        let stands = !pattern.is_empty() && !absolute && literal.exists();
        let fixed =
            if stands { parts.len() } else { parts.iter().take_while(|part| !is_special(part)).count() };
        let root = if absolute { "/" } else { "" };
        let base_name = format!("{root}{}", parts[..fixed].join("/"));
        let matcher = (fixed < parts.len() || pattern.is_empty())
            .then(|| {
                let whole = format!("{root}{}", parts.join("/"));
                GlobBuilder::new(&whole).literal_separator(true).build().map(|glob| glob.compile_matcher())
            })
            .transpose()?;
        Ok(Self { base: dir.join(&base_name), base_name, matcher })
    }

    fn run(&self, store: &Path, lock: &Path) -> Result<Vec<Match>, StoreError> {
        if metadata_of(&self.base)?.is_none() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        // The base itself is followed: the user named it.
        let walk = WalkDir::new(&self.base).follow_root_links(true).sort_by_file_name();
        let is_wanted = |entry: &DirEntry| {
            entry.depth() == 0 || !(is_hidden(entry) || is_store(entry, store) || entry.path() == lock)
        };
        for entry in walk.into_iter().filter_entry(is_wanted) {
            let entry = entry.map_err(io::Error::from)?;
            let Some(metadata) = file_metadata(&entry)? else { continue };
            let relative = entry.path().strip_prefix(&self.base).unwrap_or(Path::new(""));
            let name = self.name(text_of(relative)?);
            if self.matcher.as_ref().is_none_or(|matcher| matcher.is_match(&name)) {
                found.push(Match { name, path: entry.into_path(), metadata });
            }
        }
        Ok(found)
    }

    fn name(&self, relative: &str) -> String {
        match (self.base_name.as_str(), relative) {
            (base, "") => base.to_owned(),
            ("", relative) => relative.to_owned(),
            ("/", relative) => format!("/{relative}"),
            (base, relative) => format!("{base}/{relative}"),
        }
    }
}

fn is_hidden(entry: &DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().starts_with(b".")
}

fn is_store(entry: &DirEntry, store: &Path) -> bool {
    entry.file_type().is_dir()
        && Some(entry.file_name()) == store.file_name()
        && std::fs::canonicalize(entry.path()).is_ok_and(|path| path == store)
}

/// The metadata of a file, or of the file a link leads to; `None` for folders, dead links and devices.
fn file_metadata(entry: &DirEntry) -> Result<Option<Metadata>, StoreError> {
    let metadata = if entry.path_is_symlink() {
        metadata_of(entry.path())?
    } else if entry.file_type().is_file() {
        Some(entry.metadata().map_err(io::Error::from)?)
    } else {
        None
    };
    Ok(metadata.filter(Metadata::is_file))
}

fn text_of(path: &Path) -> Result<&str, StoreError> {
    path.to_str().ok_or_else(|| StoreError::Unfit {
        path: path.to_owned(),
        problem: "has a name that is not valid UTF-8; rename it",
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn check(patterns: &[&str], expected: &[&str]) {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("project");
        for file in [
            "notes/a.md",
            "notes/deep/b.md",
            "notes/deep/c.txt",
            "notes/.hidden.md",
            "notes/m.yaml.lock",
            "notes/.git/x.md",
            "notes/[odd] name.md",
            "other/d.md",
            "../beside/e.md",
        ] {
            let path = dir.join(file);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, file).unwrap();
        }
        symlink("../../other/d.md", dir.join("notes/deep/link.md")).unwrap();
        symlink("../other", dir.join("notes/linked-folder")).unwrap();
        symlink("nowhere.md", dir.join("notes/dead-link.md")).unwrap();
        let store = Store::open(&dir.join("notes/cache")).unwrap();
        let mut found: Vec<String> = Vec::new();
        for pattern in patterns {
            let pattern = pattern.replace("{temp}", temp.path().to_str().unwrap());
            let search = Search::new(&dir, &pattern).unwrap();
            found.extend(search.run(store.root(), &dir.join("notes/m.yaml.lock")).unwrap().into_iter().map(
                |found| {
                    assert!(found.path.is_file());
                    found.name.replace(temp.path().to_str().unwrap(), "{temp}")
                },
            ));
        }
        found.sort();
        assert_eq!(found, expected);
    }

    const ALL: [&str; 5] =
        ["notes/[odd] name.md", "notes/a.md", "notes/deep/b.md", "notes/deep/c.txt", "notes/deep/link.md"];

    #[test]
    fn folder_is_everything_below_but_hidden_files_the_store_and_the_lock() {
        check(&["notes"], &ALL);
        check(&["./notes/"], &ALL);
        check(&["notes/**/*"], &ALL);
        check(&["notes/**"], &ALL);
    }

    #[test]
    fn globs_do_not_cross_folders_unless_they_say_so() {
        check(&["notes/*.md"], &["notes/[odd] name.md", "notes/a.md"]);
        check(&["notes/**/*.txt"], &["notes/deep/c.txt"]);
        check(&["*/d.md"], &["other/d.md"]);
        check(&["n*/{a,b}.md"], &["notes/a.md"]);
    }

    #[test]
    fn named_files_need_no_pattern() {
        check(&["notes/.hidden.md"], &["notes/.hidden.md"]);
        check(&["notes/[odd] name.md"], &["notes/[odd] name.md"]);
        check(&["notes/gone.md", "gone/**", ""], &[]);
    }

    #[test]
    fn files_outside_the_manifests_folder_keep_the_written_form() {
        check(&["../beside"], &["../beside/e.md"]);
        check(&["{temp}/beside/*.md"], &["{temp}/beside/e.md"]);
    }
}
