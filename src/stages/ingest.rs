//! `uses: ingest`: notes to documents. Reads the files of `paths` (Markdown, text, PDF); writes `documents.jsonl`
//! and `rejected.jsonl`. One row a file, remembered by its content and path, so that an edited note is read anew
//! and the others are not. Bump `VERSION` whenever the same file would give another document.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_pipeline::stage::{
    EmptySource, InputSlot, ParamProblem, SourceFile, SourceSpec, StageContext, StageError, StageKind,
};

use crate::corpus::pdf::child::{self, Limits, Reader};
use crate::corpus::pdf::{Extraction, PdfError};
use crate::corpus::reader::{self, File, FileKind, FileRows, Level, Rejected};
use crate::corpus::write_table;

const VERSION: u32 = 1;

/// The rejected files named when nothing at all could be read.
const NAMED_MAX: usize = 3;

/// Reads notes.
pub(crate) struct Ingest {
    extract: fn(&Path, Limits) -> Result<Extraction, PdfError>,
}

impl Ingest {
    /// Reads PDFs in a child process, this very binary with its hidden `extract-pdf` command.
    pub(crate) const IN_CHILD: Self = Self { extract: extract_in_child };
}

fn extract_in_child(object: &Path, limits: Limits) -> Result<Extraction, PdfError> {
    let reader = Reader::this_binary().map_err(|error| PdfError::NotStarted {
        program: "tunesmith".to_owned(),
        detail: error.to_string(),
    })?;
    child::extract(&reader, limits, object)
}

/// Parameters of `ingest`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Files, folders or globs, relative to the manifest. Read are `.md`, `.markdown`, `.txt`, `.text` and `.pdf`;
    /// other files are counted and skipped.
    paths: Vec<String>,
    /// Processor time one PDF may take, in seconds; its wall time is twice that.
    #[serde(default = "pdf_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pdf_seconds: u64,
}

fn pdf_seconds() -> u64 {
    60
}

impl StageKind for Ingest {
    fn name(&self) -> &'static str {
        "ingest"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Reads notes (Markdown, text, PDF) into clean documents: one a note, one a PDF page. \
         What cannot be read is listed with a reason and a hint, and never stops the rest."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("documents.jsonl", "clean documents with their source, title, text and metadata"),
            ("rejected.jsonl", "files and pages that could not be read, and why"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let no_paths = with.get("paths").and_then(Value::as_array).is_some_and(Vec::is_empty);
        let problem = || ParamProblem {
            path: "paths".to_owned(),
            message: "`paths` is empty".to_owned(),
            hint: Some("name files, folders or globs, such as `notes/**/*.md`".to_owned()),
        };
        no_paths.then(problem).into_iter().collect()
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        let patterns = with.get("paths").and_then(Value::as_array).into_iter().flatten();
        vec![SourceSpec {
            name: "paths".to_owned(),
            patterns: patterns.filter_map(Value::as_str).map(str::to_owned).collect(),
            param: "paths".to_owned(),
            empty: EmptySource::Refused,
        }]
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let limits = Limits::of_seconds(params.pdf_seconds);
        ingest(context, &|object| (self.extract)(object, limits))
    }
}

fn ingest(
    context: &StageContext<'_>,
    extract: &dyn Fn(&Path) -> Result<Extraction, PdfError>,
) -> Result<(), StageError> {
    let files = context.source("paths");
    let mut all = FileRows::default();
    let (mut read, mut skipped) = (0_u64, 0_u64);
    for (index, file) in files.iter().enumerate() {
        context.check_cancelled()?;
        context.progress(index as u64, files.len() as u64, "files");
        let Some(kind) = FileKind::of(&file.path) else {
            skipped += 1;
            continue;
        };
        read += 1;
        let rows = read_row(context, kind, file, extract)?;
        all.documents.extend(rows.documents);
        all.rejected.extend(rows.rejected);
        all.pages += rows.pages;
    }
    context.progress(files.len() as u64, files.len() as u64, "files");
    report(context, &all, read, skipped);
    if all.documents.is_empty() {
        return Err(nothing_read(&all.rejected, skipped));
    }
    write_table(&context.out.join("documents.jsonl"), &all.documents)?;
    write_table(&context.out.join("rejected.jsonl"), &all.rejected)?;
    Ok(())
}

/// One file through the row memo. A file that gives nothing is a failed row: it becomes a row of `rejected.jsonl`
/// and is tried again next time.
fn read_row(
    context: &StageContext<'_>,
    kind: FileKind,
    file: &SourceFile,
    extract: &dyn Fn(&Path) -> Result<Extraction, PdfError>,
) -> Result<FileRows, StageError> {
    let digest = file.digest.hex();
    let input = File { path: &file.path, digest: &digest, object: &file.object, bytes: file.bytes };
    let mut refused = None;
    let rows = context.memo(&[file.digest.as_bytes(), file.path.as_bytes()], || {
        reader::read(kind, input, extract).map_err(|row| {
            let error = StageError::new("ingest::rejected", row.message.clone());
            refused = Some(row);
            error
        })
    });
    match (rows, refused) {
        (Err(_), Some(row)) => Ok(FileRows { rejected: vec![row], ..FileRows::default() }),
        (rows, _) => rows,
    }
}

fn report(context: &StageContext<'_>, all: &FileRows, read: u64, skipped: u64) {
    let errors = all.rejected.iter().filter(|row| row.level == Level::Error).count();
    let warnings = all.rejected.len() - errors;
    if skipped > 0 {
        context.info(&format!("{skipped} file(s) are neither Markdown, text nor PDF and were skipped"));
    }
    if errors > 0 {
        context.warn(&format!("{errors} files or pages could not be read; `rejected.jsonl` says why"));
    }
    if warnings > 0 {
        context.info(&format!("{warnings} files were read with a warning; `rejected.jsonl` says why"));
    }
    context.metric("documents", all.documents.len());
    context.metric("files", read);
    context.metric("pages", all.pages);
    context.metric("rejected", errors);
    context.metric("warnings", warnings);
    context.metric("skipped", skipped);
}

fn nothing_read(rejected: &[Rejected], skipped: u64) -> StageError {
    let named = rejected.iter().take(NAMED_MAX).map(|row| format!("`{}`: {}", row.path, row.message));
    let named = named.collect::<Vec<_>>().join("; ");
    let rest = rejected.len().saturating_sub(NAMED_MAX);
    let message = match (rejected.len(), rest) {
        (0, _) => format!("none of the {skipped} files of `paths` is Markdown, text or PDF"),
        (_, 0) => format!("no document could be read: {named}"),
        (_, rest) => format!("no document could be read: {named}; and {rest} more"),
    };
    StageError::new("ingest::nothing", message).hint("check `paths`, and the files named here")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::{Document, pdf};
    use crate::stages::harness::{Bench, Outcome};

    fn run(bench: &mut Bench, files: &[(&str, &[u8])]) -> Result<Outcome, StageError> {
        for (path, bytes) in files {
            bench.source("paths", path, bytes);
        }
        let in_process = Ingest { extract: |object, _| pdf::extract(object) };
        bench.run(&in_process, serde_json::json!({ "paths": ["**"] }))
    }

    fn ids(outcome: &Outcome) -> Vec<String> {
        outcome.table::<Document>("documents.jsonl").into_iter().map(|document| document.id).collect()
    }

    #[test]
    fn every_kind_of_file_becomes_documents() {
        let pdf = pdf::tests::pdf_of(&[&["Page one text."], &["Page two text."]]);
        let files: &[(&str, &[u8])] =
            &[("a.md", b"# A\nText"), ("b.txt", b"Plain"), ("c.pdf", &pdf), ("d.png", b"PNG")];
        let mut bench = Bench::new();
        let outcome = run(&mut bench, files).unwrap();
        assert_eq!(ids(&outcome), ["a.md", "b.txt", "c.pdf#page=1", "c.pdf#page=2"]);
        assert_eq!(["documents", "files", "pages", "skipped"].map(|name| outcome.count(name)), [4, 3, 2, 1]);
        assert!(outcome.messages[0].starts_with("1 file"), "{:?}", outcome.messages);
    }

    #[test]
    fn one_bad_file_never_stops_the_rest() {
        let files: &[(&str, &[u8])] =
            &[("bad.pdf", b""), ("broken.pdf", b"%PDF-1.4 nonsense"), ("good.md", b"Text")];
        let mut bench = Bench::new();
        let outcome = run(&mut bench, files).unwrap();
        let rows = outcome.table::<Rejected>("rejected.jsonl");
        assert_eq!((rows.len(), rows[0].reason.as_str()), (2, "empty_file"));
        assert!(rows.iter().all(|row| !row.hint.is_empty()));
        assert_eq!(outcome.count("rejected"), 2);
    }

    #[test]
    fn a_run_without_a_single_document_fails_and_names_the_files() {
        let files: &[(&str, &[u8])] = &[("a.pdf", b""), ("b.pdf", b""), ("c.pdf", b""), ("d.pdf", b"")];
        let error = run(&mut Bench::new(), files).err().unwrap();
        assert!(error.message.contains("`a.pdf`: the file is empty"), "{error}");
        assert!(error.message.ends_with("and 1 more"), "{error}");
        let error = run(&mut Bench::new(), &[("a.png", b"x")]).err().unwrap();
        assert!(error.message.contains("none of the 1 files"), "{error}");
    }

    #[test]
    fn edited_note_is_the_only_one_read_anew() {
        let mut bench = Bench::new();
        let counts = |outcome: &Outcome| (outcome.rows.new, outcome.rows.remembered, outcome.rows.failed);
        let outcome = run(&mut bench, &[("a.md", b"One"), ("b.md", b"Two"), ("c.pdf", b"")]).unwrap();
        assert_eq!(counts(&outcome), (2, 0, 1));
        let outcome = run(&mut bench, &[("b.md", b"Two, edited")]).unwrap();
        assert_eq!(counts(&outcome), (1, 1, 1));
        assert_eq!(outcome.table::<Document>("documents.jsonl")[1].text, "Two, edited");
    }

    #[test]
    fn the_tables_are_the_same_bytes_every_time() {
        let files: &[(&str, &[u8])] = &[("a.md", b"---\nb: 1\na: 2\n---\nOne"), ("b.txt", b"Two")];
        let text = || {
            let mut bench = Bench::new();
            run(&mut bench, files).unwrap().text("documents.jsonl")
        };
        assert_eq!(text(), text());
    }

    #[test]
    fn an_empty_list_of_paths_is_refused() {
        assert!(Bench::new().run(&Ingest::IN_CHILD, serde_json::json!({ "paths": [] })).is_err());
    }
}
