//! The data contract: documents, chunks and examples, and the JSON Lines tables they travel in.
//! An artifact is a folder; a table in it is one JSON object a line, keys in the order of the structs here,
//! so any tool reads it. Knows no stage, no tensor and no network.
//!
//! Provenance never breaks: [`Example::provenance`] names chunks, a [`Chunk`] names its document, and a
//! [`Document`] names the file and the page or heading it came from.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) mod chunk;
pub(crate) mod clean;
pub(crate) mod formats;
pub(crate) mod front_matter;
pub(crate) mod markdown;
pub(crate) mod near_duplicates;
pub(crate) mod pages;
pub(crate) mod pdf;
pub(crate) mod plain;
pub(crate) mod quality;
pub(crate) mod reader;
pub(crate) mod split;
pub(crate) mod words;

/// One piece of a note: a Markdown or text file, or one page of a PDF. Table `documents.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Document {
    /// `<path>` or `<path>#page=3`; unique in its table.
    pub(crate) id: String,
    /// Where it came from.
    pub(crate) source: Source,
    /// Title from the front matter, the first heading, or the file's stem.
    pub(crate) title: String,
    /// Clean text, paragraphs separated by blank lines, Markdown headings kept as `# ...` lines.
    pub(crate) text: String,
    /// Front matter and what the reader found out (`language`, `date`, `tags`, ...).
    pub(crate) meta: serde_json::Map<String, serde_json::Value>,
}

/// The file, and the place in it, a document came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Path relative to the manifest.
    pub(crate) path: String,
    /// 1-based page of a PDF.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) page: Option<u32>,
    /// BLAKE3 of the file, hex.
    pub(crate) digest: String,
}

/// A passage of a document that fits a token budget. Table `chunks.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Chunk {
    /// `<document id>@<start byte>`; unique in its table.
    pub(crate) id: String,
    /// Id of the document.
    pub(crate) document: String,
    /// Copied from the document, so that one table is enough to show where a passage stands.
    pub(crate) source: Source,
    /// Headings above the passage, outermost first.
    pub(crate) headings: Vec<String>,
    /// Byte range in the document's text.
    pub(crate) span: [usize; 2],
    /// The passage: exactly `document.text[span]`.
    pub(crate) text: String,
    /// Its length in tokens.
    pub(crate) tokens: usize,
}

/// One training example. Table `examples.jsonl`; a split folder holds `train.jsonl`, `validation.jsonl`, `test.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Example {
    /// Unique in its table; derived from content and origin, so that it is stable across runs.
    pub(crate) id: String,
    /// The conversation; the last message is the assistant's.
    pub(crate) messages: Vec<Message>,
    /// Ties paraphrases of one fact, or rows of one source, together: a split never separates a group.
    pub(crate) group: String,
    /// Free labels (`category:email-summary`).
    pub(crate) tags: Vec<String>,
    /// What a right answer must hold: for each entry, at least one of its alternatives. Empty where unknown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) key_facts: Vec<Vec<String>>,
    /// Where it came from.
    pub(crate) provenance: Provenance,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// `system`, `user` or `assistant`.
    pub(crate) role: String,
    /// What was said.
    pub(crate) content: String,
}

/// How an example came to be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Provenance {
    /// Ids of the chunks it was made from.
    pub(crate) chunks: Vec<String>,
    /// The file and page behind the chunks (or the file and row it was loaded from), for people.
    pub(crate) places: Vec<String>,
    /// What made it: `replay:answers.jsonl`, `openai:gpt-x`, `load:alpaca`.
    pub(crate) generator: String,
    /// BLAKE3 of the prompt that was answered, hex; empty for loaded rows.
    pub(crate) prompt: String,
    /// The passage the answer must be grounded in, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) evidence: Option<String>,
}

impl Example {
    /// The last user message.
    pub(crate) fn question(&self) -> &str {
        self.messages
            .iter()
            .rev()
            .find(|message| message.role == "user")
            .map_or("", |message| &message.content)
    }

    /// Everything before the last answer but the system message, for comparing what was asked: of a conversation
    /// of one turn this is the question.
    pub(crate) fn asked(&self) -> String {
        let end = self
            .messages
            .iter()
            .rposition(|message| message.role == "assistant")
            .unwrap_or(self.messages.len());
        let turns = self.messages[..end].iter().filter(|message| message.role != "system");
        turns.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// The last assistant message.
    pub(crate) fn answer(&self) -> &str {
        self.messages
            .iter()
            .rev()
            .find(|message| message.role == "assistant")
            .map_or("", |message| &message.content)
    }
}

/// Why a table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    /// The file could not be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A line is not the object the table holds.
    #[error("`{path}` line {line}: {source}")]
    Row {
        /// The file.
        path: PathBuf,
        /// 1-based.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl From<TableError> for tunesmith_pipeline::stage::StageError {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Io(error) => error.into(),
            TableError::Row { path, line, source } => {
                Self::new("table::row", source.to_string()).at(path, Some(line))
            }
        }
    }
}

/// Reads a table; empty lines are skipped.
pub(crate) fn read_table<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, TableError> {
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(fs_err::File::open(path)?).lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        rows.push(serde_json::from_str(&line).map_err(|source| TableError::Row {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?);
    }
    Ok(rows)
}

/// Writes a table.
pub(crate) fn write_table<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), TableError> {
    let mut out = std::io::BufWriter::new(fs_err::File::create(path)?);
    for row in rows {
        serde_json::to_writer(&mut out, row).map_err(std::io::Error::from)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}
