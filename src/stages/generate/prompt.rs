//! What `generate` asks for: the prompt around a chunk, and the form an answer must have. Knows no provider.

use serde_json::{Value, json};

use crate::corpus::Chunk;

const DEFAULT_PROMPT: &str = "\
You prepare training data for an assistant that answers questions about its owner's notes.

The passage below is from the note \"{title}\"{headings}.
---
{chunk}
---
Choose up to {n} facts, decisions or insights that stand in this passage and are worth remembering. For each, \
write two or three differently worded questions that a colleague might naturally ask months later, without the \
passage at hand: name people, projects and dates, never \"the passage\" or \"the text\". Answer each in one to three \
sentences with what the passage says: concise, concrete, with its names and numbers, nothing added. Give all \
questions on one fact the same short `fact` identifier of lower-case words joined by hyphens. If the passage holds \
nothing worth asking, return an empty list.";

const FORM: &str = "\n\nReply with one JSON object and nothing else: \
{\"examples\": [{\"question\": \"...\", \"answer\": \"...\", \"fact\": \"...\"}]}";

/// The whole prompt for a chunk: the template's places filled in one pass, so that braces in a note are never
/// taken for a place, and the form of the answer.
pub(super) fn render(template: Option<&str>, chunk: &Chunk, questions: usize) -> String {
    let template = template.unwrap_or(DEFAULT_PROMPT);
    let headings = if chunk.headings.is_empty() {
        String::new()
    } else {
        format!(", under \"{}\"", chunk.headings.join(" > "))
    };
    let mut out = String::with_capacity(template.len() + chunk.text.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let places = [
            ("{chunk}", chunk.text.clone()),
            ("{title}", title(chunk).to_owned()),
            ("{headings}", headings.clone()),
            ("{n}", questions.to_string()),
        ];
        match places.into_iter().find(|(place, _)| rest.starts_with(place)) {
            Some((place, value)) => {
                out.push_str(&value);
                rest = &rest[place.len()..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out + rest + FORM
}

/// The outermost heading, else the file's stem.
fn title(chunk: &Chunk) -> &str {
    chunk.headings.first().map_or_else(
        || {
            let name = chunk.source.path.rsplit('/').next().unwrap_or(&chunk.source.path);
            name.rsplit_once('.').map_or(name, |(stem, _)| stem)
        },
        String::as_str,
    )
}

/// Servers that enforce a schema want every field required; what we accept may leave `fact` out.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum FactField {
    /// In what a server is asked to enforce.
    Required,
    /// In what is accepted.
    Optional,
}

/// JSON Schema of an answer.
pub(super) fn answer_schema(fact: FactField) -> Value {
    let mut required = vec!["question", "answer"];
    if fact == FactField::Required {
        required.push("fact");
    }
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["examples"],
        "properties": { "examples": { "type": "array", "items": {
            "type": "object",
            "additionalProperties": false,
            "required": required,
            "properties": {
                "question": { "type": "string" },
                "answer": { "type": "string" },
                "fact": { "type": "string" },
            },
        } } },
    })
}
