//! Answers from a recording: JSON Lines of `{"source", "quote", "response"}`. A row belongs to the passages of
//! the note `source` that hold `quote`, white space aside; without a quote, to the note's first passage. So a
//! recording survives another chunk size. Knows no network.

use serde::Deserialize;
use serde_json::Value;
use tunesmith_pipeline::digest::Digest;
use tunesmith_pipeline::stage::SourceFile;

use super::{Answer, Generator, LlmError, Passage, Request, Usage};
use crate::corpus::words::single_spaced;

/// A recording in memory.
pub(crate) struct Replay {
    name: String,
    rows: Vec<Row>,
}

struct Row {
    /// The recording and the line.
    place: String,
    /// Path of the note as the recording names it, and as seen from the manifest.
    source: [String; 2],
    /// With single spaces.
    quote: Option<String>,
    response: String,
}

#[derive(Deserialize)]
struct RecordedRow {
    source: String,
    #[serde(default)]
    quote: Option<String>,
    response: Value,
}

impl Replay {
    /// Reads the recording; every row must be usable.
    pub(super) fn read(files: &[SourceFile]) -> Result<Self, LlmError> {
        let mut rows = Vec::new();
        for file in files {
            let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
            let text = fs_err::read(&file.object)?;
            for (index, line) in String::from_utf8_lossy(&text).lines().enumerate() {
                if line.trim().is_empty() {
                    continue;
                }
                let error =
                    |reason: String| LlmError::Recording { path: file.path.clone(), line: index + 1, reason };
                let row: RecordedRow = serde_json::from_str(line).map_err(|e| error(e.to_string()))?;
                if row.source.trim().is_empty() {
                    return Err(error("`source` is empty".to_owned()));
                }
                let source = row.source.trim_start_matches("./").to_owned();
                let from_manifest =
                    if folder.is_empty() { source.clone() } else { format!("{folder}/{source}") };
                rows.push(Row {
                    place: format!("`{}` line {}", file.path, index + 1),
                    source: [source, from_manifest],
                    quote: row.quote.map(|quote| single_spaced(&quote)).filter(|quote| !quote.is_empty()),
                    response: row.response.as_str().map_or_else(|| row.response.to_string(), str::to_owned),
                });
            }
        }
        let name = files.first().map_or("", |file| file.path.rsplit('/').next().unwrap_or(&file.path));
        Ok(Self { name: name.to_owned(), rows })
    }

    fn matching(&self, passage: Option<Passage<'_>>) -> Vec<&Row> {
        let Some(passage) = passage else { return Vec::new() };
        let text = single_spaced(passage.text);
        self.rows.iter().filter(|row| row.answers(passage, &text)).collect()
    }
}

impl Row {
    /// Whether the row belongs to the passage; `text` is its text with single spaces.
    fn answers(&self, passage: Passage<'_>, text: &str) -> bool {
        let is_its_note = |source: &String| {
            passage.path == source
                || passage.path.strip_suffix(source.as_str()).is_some_and(|head| head.ends_with('/'))
        };
        self.source.iter().any(is_its_note)
            && self.quote.as_ref().map_or(passage.is_first, |quote| text.contains(quote))
    }
}

impl Generator for Replay {
    fn answers(
        &self,
        request: &Request<'_>,
        _stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Answer>, LlmError> {
        let answer =
            |row: &Row| Answer { text: row.response.clone(), is_cut_off: false, usage: Usage::default() };
        Ok(self.matching(request.passage).into_iter().map(answer).collect())
    }

    fn identity(&self) -> String {
        format!("replay:{}", self.name)
    }

    /// The content of the rows that answer: editing another row changes nothing here.
    fn key(&self, request: &Request<'_>) -> String {
        let responses: Vec<&str> =
            self.matching(request.passage).iter().map(|row| row.response.as_str()).collect();
        format!("replay:{}", Digest::of(Value::from(responses).to_string().as_bytes()))
    }

    fn is_live(&self) -> bool {
        false
    }

    fn unused(&self, passages: &[Passage<'_>]) -> Vec<String> {
        let texts: Vec<String> = passages.iter().map(|passage| single_spaced(passage.text)).collect();
        let is_used =
            |row: &Row| passages.iter().zip(&texts).any(|(passage, text)| row.answers(*passage, text));
        self.rows.iter().filter(|row| !is_used(row)).map(|row| row.place.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(path: &str, text: &str) -> Result<Replay, LlmError> {
        let dir = tempfile::tempdir().unwrap();
        let object = dir.path().join("object");
        fs_err::write(&object, text).unwrap();
        let digest = Digest::of(text.as_bytes());
        Replay::read(&[SourceFile { path: path.to_owned(), digest, bytes: 0, object }])
    }

    fn check(row: &str, path: &str, text: &str, is_first: bool, expected: usize) {
        let replay = recording("exec/answers.jsonl", row).unwrap();
        let found = replay.matching(Some(Passage { path, text, is_first })).len();
        assert_eq!(found, expected, "{row} on {path}");
    }

    #[test]
    fn a_row_finds_its_passage() {
        let row = r#"{"source":"notes/a.md","quote":"1,130 on  Friday","response":"{}"}"#;
        check(row, "exec/notes/a.md", "It stood at 1,130\non Friday.", false, 1);
        check(row, "notes/a.md", "It stood at 1,130 on Friday.", false, 1);
        check(row, "deep/down/notes/a.md", "It stood at 1,130 on Friday.", false, 1);
        check(row, "exec/notes/aa.md", "It stood at 1,130 on Friday.", false, 0);
        check(row, "exec/othernotes/a.md", "It stood at 1,130 on Friday.", false, 0);
        check(row, "exec/notes/a.md", "It stood at 400 on Friday.", true, 0);
    }

    #[test]
    fn without_a_quote_the_first_passage_is_meant() {
        let row = r#"{"source":"a.md","response":{"examples":[]}}"#;
        check(row, "exec/a.md", "anything", true, 1);
        check(row, "exec/a.md", "anything", false, 0);
    }

    #[test]
    fn several_rows_answer_one_passage() {
        let rows = "{\"source\":\"a.md\",\"quote\":\"x\",\"response\":\"one\"}\n\n{\"source\":\"a.md\",\"quote\":\"y\",\"response\":\"two\"}\n";
        check(rows, "exec/a.md", "x and y", false, 2);
        let replay = recording("r.jsonl", rows).unwrap();
        let passage = Passage { path: "a.md", text: "x", is_first: true };
        assert_eq!(replay.unused(&[passage]), ["`r.jsonl` line 3"]);
    }

    #[test]
    fn a_bad_row_names_its_line() {
        let error = recording("r.jsonl", "{\"source\":\"a\",\"response\":\"x\"}\nnot json\n").err().unwrap();
        assert!(error.to_string().starts_with("`r.jsonl` line 2 is no recorded answer"), "{error}");
    }
}
