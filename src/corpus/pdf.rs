//! Reads the text blocks of a PDF, page by page. This is the half that runs in a child process, because a PDF
//! is untrusted input that can ask for any amount of memory or time; [`child`] is the half that starts it.
//! Knows nothing of notes or of cleaning: blocks come out as the page has them.
//!
//! ```text
//! ingest ──► child::extract ──spawn under limits──► extract_pdf_main ──► extract
//!                  ▲                                       │
//!                  └──────── one JSON document ◄───────────┘
//! ```

use std::io::Write;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use unpdf::model::ListStyle;
use unpdf::{ListInfo, PageSelection, PageStreamOptions, ParseEvent, PdfParser};

pub(crate) mod child;

/// Pages beyond this are left out; a book has a tenth of it.
const PAGES_MAX: u32 = 10_000;

/// What a PDF holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Extraction {
    /// Title from the document's own metadata, often wrong or empty.
    pub(crate) title: Option<String>,
    /// Pages in the file, readable or not.
    pub(crate) page_count: u32,
    /// The pages that could be read, in order.
    pub(crate) pages: Vec<RawPage>,
    /// The pages that could not be read, and why.
    pub(crate) failed: Vec<(u32, String)>,
}

/// One page as it is, before cleaning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RawPage {
    /// 1-based.
    pub(crate) number: u32,
    /// Text blocks in reading order.
    pub(crate) blocks: Vec<Block>,
    /// Images painted on the page; with no text at all this is a scan.
    pub(crate) images: u32,
    /// Text runs whose font gives no characters, so that their text is lost.
    pub(crate) unreadable_runs: u32,
}

/// One block of a page. Text may hold line breaks, where the page has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Block {
    /// A heading, level 1-6.
    Heading { level: u8, text: String },
    /// A list item; `marker` is `-` or `3.`, depth 0 the outermost.
    Item { depth: u8, marker: String, text: String },
    /// A paragraph.
    Text { text: String },
    /// Lines set in a fixed-pitch font.
    Code { text: String },
    /// A table, row by row, cell by cell.
    Table { rows: Vec<Vec<String>> },
}

/// Why a PDF could not be read at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PdfError {
    /// Needs a password.
    #[error("the PDF is encrypted and needs a password")]
    Encrypted,
    /// Not a PDF, or too damaged.
    #[error("the PDF is broken: {0}")]
    Broken(String),
    /// No page can be found in it.
    #[error("the PDF has no pages")]
    NoPages,
    /// The reader did not finish in time.
    #[error("the PDF took longer than {seconds} s to read")]
    TimedOut { seconds: u64 },
    /// The reader died: out of memory, or a fault in it.
    #[error("the PDF reader ended with {status}: {detail}")]
    Crashed { status: String, detail: String },
    /// The reader wrote more than any honest document needs.
    #[error("the PDF unpacks to more than {mebibytes} MiB of text")]
    TooLarge { mebibytes: u64 },
    /// The reader could not be started.
    #[error("the PDF reader `{program}` cannot be started: {detail}")]
    NotStarted { program: String, detail: String },
}

/// The hidden command `extract-pdf PATH`: prints one JSON document, `{"Ok": ..}` or `{"Err": ..}`, on stdout.
/// The exit code only says whether the printing worked.
pub(crate) fn extract_pdf_main(path: &Path) -> ExitCode {
    let result = extract(path);
    let mut out = std::io::stdout().lock();
    let written = serde_json::to_writer(&mut out, &result).is_ok() && out.flush().is_ok();
    if written { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Reads every page in turn. A page that fails, even by a panic of the reader, costs only that page.
pub(crate) fn extract(path: &Path) -> Result<Extraction, PdfError> {
    let data = fs_err::read(path).map_err(|error| PdfError::Broken(error.to_string()))?;
    let parser = guarded(|| PdfParser::from_bytes(&data))?;
    drop(data);
    let page_count = parser.page_count();
    if page_count == 0 {
        return Err(PdfError::NoPages);
    }
    let mut found = Extraction { title: None, page_count, pages: Vec::new(), failed: Vec::new() };
    for page in 1..=page_count.min(PAGES_MAX) {
        let read = guarded(|| read_page(&parser, page, &mut found));
        if let Err(error) = read {
            found.failed.push((page, error.to_string()));
        }
    }
    if page_count > PAGES_MAX {
        found.failed.push((PAGES_MAX + 1, format!("only the first {PAGES_MAX} pages are read")));
    }
    Ok(found)
}

fn read_page(parser: &PdfParser, page: u32, found: &mut Extraction) -> unpdf::Result<()> {
    let options = PageStreamOptions {
        pages: PageSelection::Pages(vec![page]),
        parallel: false,
        ..PageStreamOptions::default()
    };
    parser.for_each_page(options, |event| {
        match event {
            ParseEvent::DocumentStart { metadata, .. } => found.title = metadata.title,
            ParseEvent::PageParsed(page) => found.pages.push(raw_page(&page)),
            ParseEvent::PageFailed { page, error } => found.failed.push((page, error.to_string())),
            ParseEvent::Progress { .. } | ParseEvent::DocumentEnd { .. } => {}
        }
        ControlFlow::Continue(())
    })?;
    Ok(())
}

fn guarded<T>(read: impl FnOnce() -> unpdf::Result<T>) -> Result<T, PdfError> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(unpdf::Error::Encrypted | unpdf::Error::InvalidPassword)) => Err(PdfError::Encrypted),
        Ok(Err(error)) => Err(PdfError::Broken(error.to_string())),
        Err(_) => Err(PdfError::Broken("the reader gave up on it".to_owned())),
    }
}

fn raw_page(page: &unpdf::Page) -> RawPage {
    RawPage {
        number: page.number,
        blocks: page.elements.iter().filter_map(raw_block).collect(),
        images: page.image_op_count,
        unreadable_runs: u32::try_from(page.suppressed_text_runs).unwrap_or(u32::MAX),
    }
}

fn raw_block(block: &unpdf::Block) -> Option<Block> {
    match block {
        unpdf::Block::Paragraph(paragraph) => raw_paragraph(paragraph),
        unpdf::Block::Table(table) => Some(Block::Table {
            rows: table
                .rows
                .iter()
                .map(|row| row.cells.iter().map(unpdf::TableCell::plain_text).collect())
                .collect(),
        }),
        unpdf::Block::Code { content } => Some(Block::Code { text: content.clone() }),
        unpdf::Block::Raw { content } => Some(Block::Text { text: content.clone() }),
        unpdf::Block::Image { .. }
        | unpdf::Block::HorizontalRule
        | unpdf::Block::PageBreak
        | unpdf::Block::SectionBreak => None,
    }
    .filter(|block| !block.is_empty())
}

fn raw_paragraph(paragraph: &unpdf::Paragraph) -> Option<Block> {
    let mut bare = paragraph.clone();
    let list = bare.style.list_info.take();
    let text = bare.plain_text();
    Some(match (paragraph.heading_level(), list) {
        (Some(level), _) => Block::Heading { level, text },
        (None, Some(ListInfo { style: ListStyle::Unordered { .. }, level, .. })) => {
            Block::Item { depth: level, marker: "-".to_owned(), text }
        }
        (None, Some(ListInfo { level, .. })) => {
            // The numbering style is private to the reader; its plain text carries `iv. ` in front.
            let whole = paragraph.plain_text();
            let marker = whole.strip_suffix(&text).unwrap_or("-").trim().to_owned();
            Block::Item { depth: level, marker, text }
        }
        (None, None) => Block::Text { text },
    })
}

impl Block {
    fn is_empty(&self) -> bool {
        match self {
            Self::Heading { text, .. }
            | Self::Item { text, .. }
            | Self::Text { text }
            | Self::Code { text } => text.trim().is_empty(),
            Self::Table { rows } => rows.iter().flatten().all(|cell| cell.trim().is_empty()),
        }
    }
}
#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// A PDF with one page for each list of lines, in Helvetica.
    pub(crate) fn pdf_of(pages: &[&[&str]]) -> Vec<u8> {
        let kids = (0..pages.len()).map(|page| format!("{} 0 R", 4 + 2 * page)).collect::<Vec<_>>().join(" ");
        let mut objects = vec![
            "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
            format!("<< /Type /Pages /Count {} /Kids [{kids}] >>", pages.len()),
            "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>".to_owned(),
        ];
        for (index, lines) in pages.iter().enumerate() {
            let shown = lines.iter().map(|line| format!("({line}) Tj T* ")).collect::<String>();
            let content = format!("BT /F1 12 Tf 14 TL 72 700 Td {shown}ET");
            objects.push(format!(
                "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
                5 + 2 * index
            ));
            objects.push(format!("<< /Length {} >>\nstream\n{content}\nendstream", content.len()));
        }
        let mut pdf = "%PDF-1.4\n".to_owned();
        let mut offsets = Vec::new();
        for (index, object) in objects.iter().enumerate() {
            offsets.push(pdf.len());
            write!(pdf, "{} 0 obj\n{object}\nendobj\n", index + 1).unwrap();
        }
        let start = pdf.len();
        let size = objects.len() + 1;
        write!(pdf, "xref\n0 {size}\n0000000000 65535 f \n").unwrap();
        for offset in offsets {
            writeln!(pdf, "{offset:010} 00000 n ").unwrap();
        }
        write!(pdf, "trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n").unwrap();
        pdf.into_bytes()
    }

    fn check(content: &[u8]) -> Result<Extraction, PdfError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pdf");
        fs_err::write(&path, content).unwrap();
        extract(&path)
    }

    #[test]
    fn pages_come_out_in_order_with_their_text() {
        let found = check(&pdf_of(&[&["First page text."], &["Second page text."]])).unwrap();
        assert_eq!((found.page_count, found.failed.len()), (2, 0));
        assert_eq!(found.pages[0].blocks, [Block::Text { text: "First page text.".into() }]);
        assert_eq!(found.pages[1].number, 2);
    }

    #[test]
    fn garbage_is_broken_and_no_panic() {
        assert!(matches!(check(b"garbage"), Err(PdfError::Broken(_))));
        assert!(matches!(check(b"%PDF-1.7\ngarbage"), Err(PdfError::Broken(_) | PdfError::NoPages)));
    }

    #[test]
    fn a_password_is_asked_for_by_name() {
        let pdf = String::from_utf8(pdf_of(&[&["Secret."]])).unwrap();
        let zeros = "0".repeat(64);
        let lock = format!(
            "/Root 1 0 R /ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /O <{zeros}> /U <{zeros}> /P -4 >>"
        );
        assert_eq!(check(pdf.replace("/Root 1 0 R", &lock).as_bytes()), Err(PdfError::Encrypted));
    }

    #[test]
    fn an_extraction_survives_the_pipe() {
        let found = check(&pdf_of(&[&["Text."]])).unwrap();
        let json = serde_json::to_string(&Ok::<_, PdfError>(&found)).unwrap();
        assert_eq!(serde_json::from_str::<Result<Extraction, PdfError>>(&json).unwrap(), Ok(found));
    }
}
