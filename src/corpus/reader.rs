//! One file to its documents and to what could not be read: the one place that knows which kind of file is read
//! by whom. Takes bytes of the store, never a live file; the PDF extractor comes in as a function, so that the
//! stage can run it in a child process.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::clean::{characters, one_line};
use super::pages::{self, Page};
use super::pdf::{Extraction, PdfError};
use super::{Document, Source, markdown, plain};

/// Text files above this are no notes.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Fewer letters than this are too few to tell a language.
const LANGUAGE_CHARS_MIN: usize = 60;

/// The kinds of files that are read, told by the extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Markdown,
    Text,
    Pdf,
}

impl FileKind {
    /// The kind of a path; `None` for files that are skipped.
    pub(crate) fn of(path: &str) -> Option<Self> {
        let extension = Path::new(path).extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "md" | "markdown" => Some(Self::Markdown),
            "txt" | "text" => Some(Self::Text),
            "pdf" => Some(Self::Pdf),
            _ => None,
        }
    }
}

/// How bad a row of `rejected.jsonl` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// The file or page gave no document.
    Error,
    /// Something of it was left out.
    Warning,
}

/// A file or page that could not be read, or not wholly. Table `rejected.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rejected {
    /// Path relative to the manifest.
    pub(crate) path: String,
    /// 1-based page, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page: Option<u32>,
    pub(crate) level: Level,
    /// A stable word: `empty_file`, `scanned_page`, `encrypted`, ...
    pub(crate) reason: String,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: String,
}

/// What came of one file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileRows {
    pub(crate) documents: Vec<Document>,
    pub(crate) rejected: Vec<Rejected>,
    /// Pages of a PDF; 0 for other files.
    pub(crate) pages: u32,
}

/// One file to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct File<'a> {
    /// Path relative to the manifest.
    pub(crate) path: &'a str,
    /// BLAKE3 of the content, hex.
    pub(crate) digest: &'a str,
    /// Where the content is.
    pub(crate) object: &'a Path,
    pub(crate) bytes: u64,
}

/// Reads a file. `Err` is a file that gave nothing at all.
pub(crate) fn read(
    kind: FileKind,
    file: File<'_>,
    extract: &dyn Fn(&Path) -> Result<Extraction, PdfError>,
) -> Result<FileRows, Rejected> {
    if file.bytes == 0 {
        return Err(reject(file, "empty_file", "the file is empty", "delete it or leave it out of `paths`"));
    }
    match kind {
        FileKind::Pdf => read_pdf(file, extract),
        FileKind::Markdown | FileKind::Text => read_text(kind, file),
    }
}

fn reject(file: File<'_>, reason: &str, message: impl Into<String>, hint: &str) -> Rejected {
    Rejected {
        path: file.path.to_owned(),
        page: None,
        level: Level::Error,
        reason: reason.to_owned(),
        message: message.into(),
        hint: hint.to_owned(),
    }
}

fn read_text(kind: FileKind, file: File<'_>) -> Result<FileRows, Rejected> {
    if file.bytes > TEXT_BYTES_MAX {
        let message =
            format!("the file has {} MiB, more than {} MiB of text", file.bytes >> 20, TEXT_BYTES_MAX >> 20);
        return Err(reject(file, "too_large", message, "split it into notes"));
    }
    let bytes = fs_err::read(file.object)
        .map_err(|error| reject(file, "unreadable", error.to_string(), "run `cache verify`"))?;
    let Some(decoded) = plain::decode(&bytes) else {
        return Err(reject(file, "binary", "the file is binary data, not text", "leave it out of `paths`"));
    };
    let mut rows = FileRows::default();
    let (title, mut meta, text) = if kind == FileKind::Markdown {
        let note = markdown::read(&decoded.text);
        if let Some(problem) = note.front_matter_problem {
            let message = format!("the front matter cannot be parsed: {problem}");
            let hint = "fix the block between the `---` lines; the text below it is used as it is";
            rows.rejected
                .push(Rejected { level: Level::Warning, ..reject(file, "front_matter", message, hint) });
        }
        (note.title, note.meta, note.text)
    } else {
        (None, Map::new(), plain::paragraphs(&decoded.text))
    };
    if decoded.encoding != "utf-8" {
        meta.insert("encoding".to_owned(), decoded.encoding.into());
    }
    if text.is_empty() {
        let hint = "nothing to do, unless you expected text in it";
        rows.rejected.push(Rejected {
            level: Level::Warning,
            ..reject(file, "no_text", "the note holds no text", hint)
        });
        return Ok(rows);
    }
    rows.documents.push(document(file, None, title, meta, text));
    Ok(rows)
}

fn read_pdf(
    file: File<'_>,
    extract: &dyn Fn(&Path) -> Result<Extraction, PdfError>,
) -> Result<FileRows, Rejected> {
    let extraction = extract(file.object).map_err(|error| reject_pdf(file, &error))?;
    let mut rows = FileRows { pages: extraction.page_count, ..FileRows::default() };
    let title = extraction
        .title
        .as_deref()
        .map(|title| one_line(&characters(title)))
        .filter(|title| is_telling_title(title));
    for page in pages::clean(&extraction) {
        match page {
            Page::Text { number, section, text } => {
                let mut meta = Map::new();
                if let Some(section) = section {
                    meta.insert("section".to_owned(), section.into());
                }
                rows.documents.push(document(file, Some(number), title.clone(), meta, text));
            }
            Page::Empty { .. } => {}
            Page::Scanned { number } => rows.rejected.push(Rejected {
                page: Some(number),
                ..reject(
                    file,
                    "scanned_page",
                    "the page is an image without text",
                    "run OCR over the PDF, e.g. `ocrmypdf`",
                )
            }),
            Page::Garbled { number, score } => rows.rejected.push(Rejected {
                page: Some(number),
                ..reject(
                    file,
                    "garbled",
                    format!(
                        "{:.0} % of the words are no words: the font does not say which letters it draws",
                        score * 100.0
                    ),
                    "run OCR over the PDF, e.g. `ocrmypdf --force-ocr`",
                )
            }),
        }
    }
    for (number, problem) in &extraction.failed {
        let message = format!("the page cannot be read: {problem}");
        let row = reject(file, "broken_page", message, "print the PDF to a new PDF and use that");
        rows.rejected.push(Rejected { page: Some(*number), ..row });
    }
    rows.rejected.sort_by_key(|row| row.page);
    if rows.documents.is_empty() && rows.rejected.is_empty() {
        let hint = "nothing to do, unless you expected text in it";
        rows.rejected.push(Rejected {
            level: Level::Warning,
            ..reject(file, "no_text", "the PDF holds no text", hint)
        });
    }
    Ok(rows)
}

fn reject_pdf(file: File<'_>, error: &PdfError) -> Rejected {
    let (reason, hint) = match error {
        PdfError::Encrypted => ("encrypted", "save a copy without a password"),
        PdfError::Broken(_) => ("broken", "open it in a viewer and print it to a new PDF"),
        PdfError::NoPages => ("no_pages", "open it in a viewer and print it to a new PDF"),
        PdfError::TimedOut { .. } => ("timeout", "raise `pdf_seconds`, or print the PDF to a new PDF"),
        PdfError::Crashed { .. } => {
            ("crashed", "print the PDF to a new PDF; if that helps nothing, please report it")
        }
        PdfError::TooLarge { .. } => ("too_large", "split the PDF"),
        PdfError::NotStarted { .. } => ("not_started", "check that the program file is still in its place"),
    };
    reject(file, reason, error.to_string(), hint)
}

/// Many PDFs are titled by the program that wrote them: `Microsoft Word - draft3.doc`, `Untitled`.
fn is_telling_title(title: &str) -> bool {
    let title = title.trim();
    title.contains(' ') && !title.starts_with("Microsoft ") && !title.to_lowercase().starts_with("untitled")
}

fn document(
    file: File<'_>,
    page: Option<u32>,
    title: Option<String>,
    mut meta: Map<String, Value>,
    text: String,
) -> Document {
    if !meta.contains_key("language")
        && let Some(language) = language(&text)
    {
        meta.insert("language".to_owned(), language.into());
    }
    let stem =
        Path::new(file.path).file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    Document {
        id: page.map_or_else(|| file.path.to_owned(), |page| format!("{}#page={page}", file.path)),
        source: Source { path: file.path.to_owned(), page, digest: file.digest.to_owned() },
        title: title.map(|title| title.trim().to_owned()).filter(|title| !title.is_empty()).unwrap_or(stem),
        text,
        meta,
    }
}

/// The ISO 639-3 code of the language, where there is enough text to be sure.
fn language(text: &str) -> Option<&'static str> {
    if text.chars().filter(|char| char.is_alphabetic()).count() < LANGUAGE_CHARS_MIN {
        return None;
    }
    whatlang::detect(text).filter(whatlang::Info::is_reliable).map(|info| info.lang().code())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, content: &[u8]) -> Result<FileRows, Rejected> {
        let folder = tempfile::tempdir().unwrap();
        let object = folder.path().join("object");
        fs_err::write(&object, content).unwrap();
        let file = File { path, digest: "d0", object: &object, bytes: content.len() as u64 };
        read(FileKind::of(path).unwrap(), file, &super::super::pdf::extract)
    }

    #[test]
    fn a_note_is_one_document() {
        let rows = check("notes/1-1 Ann.md", b"---\ndate: 2024-05-03\n---\nAnn wants to lead the new team, and says that she is ready for it now. \
              We agreed that she will shadow Bo through the next two quarters before anything is announced.").unwrap();
        let [document] = rows.documents.as_slice() else { panic!("{rows:?}") };
        assert_eq!((document.id.as_str(), document.title.as_str()), ("notes/1-1 Ann.md", "1-1 Ann"));
        assert_eq!(document.meta["date"], "2024-05-03");
        assert_eq!(document.meta["language"], "eng");
        assert_eq!(document.source.digest, "d0");
    }

    #[test]
    fn a_latin1_text_says_so() {
        let rows = check("a.txt", b"Gespr\xE4ch").unwrap();
        assert_eq!(rows.documents[0].text, "Gespräch");
        assert_eq!(rows.documents[0].meta["encoding"], "windows-1252");
    }

    #[test]
    fn broken_front_matter_is_a_warning_beside_the_document() {
        let rows = check("a.md", b"---\na: [b\n---\nText").unwrap();
        assert_eq!(rows.documents[0].text, "Text");
        assert_eq!(
            (rows.rejected[0].level, rows.rejected[0].reason.as_str()),
            (Level::Warning, "front_matter")
        );
    }

    #[test]
    fn what_cannot_be_read_is_rejected_with_a_reason() {
        let reason = |path: &str, content: &[u8]| check(path, content).unwrap_err().reason;
        assert_eq!(reason("a.pdf", b""), "empty_file");
        assert_eq!(reason("a.md", b""), "empty_file");
        assert_eq!(reason("a.pdf", b"this is no PDF at all"), "broken");
        assert_eq!(reason("a.txt", b"\0\0\0\0\x01\x02"), "binary");
        assert_eq!(check("a.md", b"---\na: b\n---\n").unwrap().rejected[0].reason, "no_text");
    }

    #[test]
    fn a_truncated_pdf_never_panics() {
        let whole = super::super::pdf::tests::pdf_of(&[&["Alpha beta gamma."], &["Delta epsilon zeta."]]);
        for cut in (1..whole.len()).step_by(7) {
            match check("a.pdf", &whole[..cut]) {
                Ok(rows) => assert!(rows.pages > 0),
                Err(row) => {
                    assert!(["broken", "no_pages", "encrypted"].contains(&row.reason.as_str()), "{row:?}");
                }
            }
        }
    }

    #[test]
    fn a_pdf_is_a_document_a_page() {
        let pdf = super::super::pdf::tests::pdf_of(&[&["Alpha beta gamma."], &["Delta epsilon zeta."]]);
        let rows = check("b/deck.pdf", &pdf).unwrap();
        let ids = rows.documents.iter().map(|document| document.id.as_str()).collect::<Vec<_>>();
        assert_eq!(ids, ["b/deck.pdf#page=1", "b/deck.pdf#page=2"]);
        assert_eq!(rows.documents[1].source.page, Some(2));
        assert_eq!(rows.documents[1].text, "Delta epsilon zeta.");
        assert_eq!((rows.pages, rows.documents[0].title.as_str()), (2, "deck"));
    }
}
