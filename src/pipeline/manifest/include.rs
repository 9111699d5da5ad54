//! Reads a manifest and the files it includes, and lays them over each other: the including file wins, and
//! of two included files the later one. Depth and number are limited; a cycle is an error that shows it.

use std::path::{Path, PathBuf};

use crate::manifest::document::{self, Document, Text};
use crate::manifest::node::Node;
use crate::manifest::problem::{Problem, Problems};
use crate::manifest::source::{FileId, Sources, Span};
use crate::manifest::{toml, yaml};

/// How deep includes may nest.
const DEPTH_MAX: usize = 16;
/// How many files one manifest may read.
const FILES_MAX: usize = 128;

/// The manifest at `path` with everything it includes; `None` if a file of it could not be read or parsed.
pub(crate) fn read(path: &Path, sources: &mut Sources, problems: &mut Problems) -> Option<Document> {
    let mut reader = Reader { sources, problems, stack: Vec::new(), files: 0, is_complete: true };
    let document = reader.read(path, None);
    if reader.is_complete { document } else { None }
}

/// The tree of one file; TOML by its ending, else YAML.
pub(crate) fn parse(file: FileId, sources: &Sources, problems: &mut Problems) -> Option<Node> {
    let is_toml = sources.path(file).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("toml"));
    match is_toml {
        true => toml::parse(file, sources.text(file), problems),
        false => yaml::parse(file, sources.text(file), 0, problems),
    }
}

struct Reader<'a> {
    sources: &'a mut Sources,
    problems: &'a mut Problems,
    /// The files being read, outermost first: the name to show and the one to compare.
    stack: Vec<(PathBuf, PathBuf)>,
    files: usize,
    is_complete: bool,
}

impl Reader<'_> {
    fn read(&mut self, path: &Path, asked_at: Option<Span>) -> Option<Document> {
        let document = self.read_whole(path, asked_at);
        self.is_complete &= document.is_some();
        document
    }

    fn read_whole(&mut self, path: &Path, asked_at: Option<Span>) -> Option<Document> {
        let identity = fs_err::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Some(at) = asked_at {
            self.refuse_endless(path, &identity, at)?;
        }
        self.files += 1;
        let file = self.sources.read(path, asked_at, self.problems)?;
        let root = parse(file, self.sources, self.problems)?;
        let read = document::read(root, self.problems);

        self.stack.push((path.to_owned(), identity));
        let mut merged = Document::default();
        for Text { text, span } in read.includes {
            let included = path.parent().unwrap_or(Path::new("")).join(&text);
            if let Some(below) = self.read(&included, Some(span)) {
                merged.overlay(Document { name: None, ..below });
            }
        }
        self.stack.pop();
        merged.overlay(read.document);
        Some(merged)
    }

    fn refuse_endless(&mut self, path: &Path, identity: &Path, at: Span) -> Option<()> {
        let start = self.stack.iter().position(|(_, other)| other == identity);
        let problem = if let Some(start) = start {
            let names = self.stack[start..].iter().map(|(name, _)| name.as_path()).chain([path]);
            let names = names.map(|name| name.display().to_string()).collect::<Vec<_>>().join(" -> ");
            Problem::new("manifest::include_cycle", at, format!("files include each other: `{names}`"))
        } else if self.stack.len() >= DEPTH_MAX {
            let message = format!("includes nest more than {DEPTH_MAX} files deep");
            Problem::new("manifest::too_deep", at, message)
        } else if self.files >= FILES_MAX {
            Problem::new("manifest::too_large", at, format!("more than {FILES_MAX} files are included"))
        } else {
            return Some(());
        };
        self.problems.push(problem);
        None
    }
}
