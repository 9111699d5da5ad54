//! The texts a manifest is made of, and positions in them: files, includes, params files and the words of
//! the command line, each under a small id. Turns byte spans into line and column and cuts out the line to
//! show. Knows neither YAML nor TOML.
//!
//! A text enters through [`Sources::read`] under limits (10 MB, UTF-8, no NUL), so that everything behind
//! it can rely on them.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::graph::Place;
use crate::manifest::problem::{Problem, Problems};

/// The largest file that is read.
const FILE_BYTES_MAX: u64 = 10 * 1024 * 1024;
/// The longest line that is shown whole; of a longer one, a window around the span is.
const SHOWN_BYTES_MAX: usize = 160;

/// Index of a text in [`Sources`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileId(u32);

impl FileId {
    /// The manifest itself; it is read first.
    pub(crate) const ROOT: Self = Self(0);
}

/// A byte range in one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    /// The text.
    pub(crate) file: FileId,
    /// First byte.
    pub(crate) start: usize,
    /// One past the last byte.
    pub(crate) end: usize,
}

impl Span {
    /// The bytes `range` of `file`.
    pub(crate) fn new(file: FileId, range: Range<usize>) -> Self {
        Self { file, start: range.start, end: range.end.max(range.start) }
    }

    /// The very start of `file`, for what concerns the file as a whole.
    pub(crate) fn start_of(file: FileId) -> Self {
        Self { file, start: 0, end: 0 }
    }
}

/// One line of a text, ready to be shown: no control characters, cut when it is very long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Excerpt {
    /// The line, or the part of it around the span.
    pub(crate) text: String,
    /// The span inside `text`, in bytes.
    pub(crate) label: Range<usize>,
}

struct Source {
    name: PathBuf,
    text: String,
    /// Byte offset of each line's start.
    line_starts: Vec<usize>,
}

/// Every text read so far.
#[derive(Default)]
pub(crate) struct Sources {
    files: Vec<Source>,
}

impl Sources {
    /// Takes a text that is not a file: the words of the command line.
    pub(crate) fn add(&mut self, name: impl Into<PathBuf>, text: String) -> FileId {
        let line_starts =
            std::iter::once(0).chain(text.match_indices('\n').map(|(index, _)| index + 1)).collect();
        self.files.push(Source { name: name.into(), text, line_starts });
        FileId(u32::try_from(self.files.len() - 1).expect("the number of files is limited"))
    }

    /// Reads a file. What is wrong with its bytes is located in the file; that it cannot be read at all is
    /// located at `asked_at`, where it was asked for.
    pub(crate) fn read(
        &mut self,
        path: &Path,
        asked_at: Option<Span>,
        problems: &mut Problems,
    ) -> Option<FileId> {
        let mut bytes = Vec::new();
        let result = fs_err::File::open(path)
            .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map(drop));
        if let Err(error) = result {
            let span = asked_at.unwrap_or_else(|| Span::start_of(self.add(path, String::new())));
            let cause = match error.kind() {
                std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
                std::io::ErrorKind::IsADirectory => "it is a folder".to_owned(),
                _ => error.to_string(),
            };
            problems.push(Problem::new(
                "manifest::unreadable",
                span,
                format!("cannot read `{}`: {cause}", path.display()),
            ));
            return None;
        }
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let span = Span::start_of(self.add(path, String::new()));
            problems.push(
                Problem::new("manifest::too_large", span, "the file is larger than 10 MB")
                    .hint("keep data in files of its own and name them in `with`"),
            );
            return None;
        }
        self.take_bytes(path, bytes, problems)
    }

    fn take_bytes(&mut self, path: &Path, mut bytes: Vec<u8>, problems: &mut Problems) -> Option<FileId> {
        const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
        if bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        let (text, mut broken_at) = match String::from_utf8(bytes) {
            Ok(text) => (text, None),
            Err(error) => {
                let valid_bytes = error.utf8_error().valid_up_to();
                let mut bytes = error.into_bytes();
                bytes.truncate(valid_bytes);
                let mut text = String::from_utf8(bytes).expect("the part before the error is valid");
                text.push(char::REPLACEMENT_CHARACTER);
                (text, Some((valid_bytes, "the file is not UTF-8")))
            }
        };
        if let Some(offset) = text.find('\0') {
            broken_at = Some((offset, "the file holds a NUL byte"));
        }
        let file = self.add(path, text);
        let Some((offset, message)) = broken_at else { return Some(file) };
        problems.push(
            Problem::new("manifest::encoding", Span::new(file, offset..offset + 1), message)
                .hint("save the file as UTF-8 text"),
        );
        None
    }

    /// The whole text.
    pub(crate) fn text(&self, file: FileId) -> &str {
        &self.source(file).text
    }

    /// The name of the file.
    pub(crate) fn path(&self, file: FileId) -> &Path {
        &self.source(file).name
    }

    /// The text of a span; empty if it does not lie on character borders.
    pub(crate) fn slice(&self, span: Span) -> &str {
        self.text(span.file).get(span.start..span.end).unwrap_or_default()
    }

    /// File, line and column of a span's start.
    pub(crate) fn place(&self, span: Span) -> Place {
        let source = self.source(span.file);
        let start = source.shown_start(span.start);
        let line_index = source.line_index(start);
        let before = &source.text[source.line_starts[line_index]..start];
        Place { file: source.name.clone(), line: line_index + 1, column: before.chars().count() + 1 }
    }

    /// The line of a span's start; `None` for an empty text.
    pub(crate) fn excerpt(&self, span: Span) -> Option<Excerpt> {
        let source = self.source(span.file);
        if source.text.trim().is_empty() {
            return None;
        }
        let start = source.shown_start(span.start);
        let line_start = source.line_starts[source.line_index(start)];
        let line = source.text[line_start..].split('\n').next().unwrap_or_default();
        let line = line.strip_suffix('\r').unwrap_or(line);
        let label = start - line_start..span.end.saturating_sub(line_start);
        Some(shown(line, &label))
    }

    fn source(&self, file: FileId) -> &Source {
        &self.files[file.0 as usize]
    }
}

impl Source {
    /// A caret in the blank end of a text shows nothing: it goes to the last visible character instead.
    fn shown_start(&self, start: usize) -> usize {
        let visible = self.text.trim_end();
        if start < visible.len() {
            return self.text.floor_char_boundary(start);
        }
        visible.char_indices().next_back().map_or(0, |(index, _)| index)
    }

    fn line_index(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= offset).saturating_sub(1)
    }
}

/// `line` without control characters and cut around `label` when it is long.
fn shown(line: &str, label: &Range<usize>) -> Excerpt {
    let window = if line.len() <= SHOWN_BYTES_MAX {
        0..line.len()
    } else {
        let start = line.floor_char_boundary(label.start.saturating_sub(SHOWN_BYTES_MAX / 2));
        start..line.ceil_char_boundary((start + SHOWN_BYTES_MAX).min(line.len()))
    };
    let mut text = String::from(if window.start > 0 { "…" } else { "" });
    let mut shown_label = None;
    let mut label_end = 0;
    for (index, character) in line[window.clone()].char_indices() {
        let offset = window.start + index;
        if offset >= label.start && shown_label.is_none() {
            shown_label = Some(text.len());
        }
        let is_shown = !character.is_control() || character == '\t';
        text.push(if is_shown { character } else { char::REPLACEMENT_CHARACTER });
        if shown_label.is_some_and(|start| label_end < start || offset < label.end) {
            label_end = text.len();
        }
    }
    let start = shown_label.unwrap_or(text.len());
    if start == text.len() {
        // The end of the line is meant: the caret needs something to stand under.
        text.push(' ');
        label_end = text.len();
    }
    if window.end < line.len() {
        text.push('…');
    }
    Excerpt { text, label: start..label_end.max(start) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_its_line_and_column_in_characters() {
        let mut sources = Sources::default();
        let file = sources.add("a.yaml", "é: 1\n  ü: xy\n".to_owned());
        let start = sources.text(file).find("xy").unwrap();
        let span = Span::new(file, start..start + 2);
        let place = sources.place(span);
        assert_eq!((place.line, place.column), (2, 6));
        let excerpt = sources.excerpt(span).unwrap();
        assert_eq!(&excerpt.text[excerpt.label], "xy");
    }

    #[test]
    fn a_long_line_is_cut_around_the_span() {
        let mut sources = Sources::default();
        let file = sources.add("a.yaml", format!("{}HERE{}", "ä".repeat(100_000), "b".repeat(100_000)));
        let excerpt = sources.excerpt(Span::new(file, 200_000..200_004)).unwrap();
        assert!(excerpt.text.len() < 2 * SHOWN_BYTES_MAX);
        assert_eq!(&excerpt.text[excerpt.label], "HERE");
    }

    #[test]
    fn control_characters_are_not_shown() {
        let mut sources = Sources::default();
        let file = sources.add("a.yaml", "a: \u{1b}[31mred".to_owned());
        let excerpt = sources.excerpt(Span::new(file, 4..8)).unwrap();
        assert!(!excerpt.text.contains('\u{1b}'));
        assert_eq!(&excerpt.text[excerpt.label], "[31m");
    }
}
