//! Reads ready-made examples in the field's formats: chat `messages`, Alpaca, ShareGPT, prompt and completion,
//! questions with key facts, and any of them as CSV. A container (JSON Lines, a JSON array, CSV) gives located
//! objects; a shape turns an object into an [`Example`]. Every bad row is reported with its line; nothing is
//! skipped in silence. Knows no stage.

mod csv;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tunesmith_pipeline::digest::Digest;

use super::words::excerpt;
use super::{Example, Message, Provenance};

/// How the rows of a file are to be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    /// By the keys of the file's first row.
    #[default]
    Auto,
    /// `messages: [{role, content}]`.
    Messages,
    /// `instruction`, `input` (or `context`), `output` (or `response`).
    Alpaca,
    /// `conversations: [{from, value}]`.
    Sharegpt,
    /// `prompt` and `completion` (or `answer`, `response`), each a text or messages.
    PromptCompletion,
    /// A CSV file; its columns say which of the other shapes.
    Csv,
    /// `question`, `answer`, and where known `fact`, `key_facts`, `source`, `category`.
    Questions,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::PromptCompletion => "prompt-completion",
            Self::Csv => "csv",
            Self::Questions => "questions",
        }
    }

    /// The shape a row has by its keys.
    fn of(row: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| row.contains_key(key);
        if has("messages") {
            Some(Self::Messages)
        } else if has("conversations") {
            Some(Self::Sharegpt)
        } else if has("instruction") {
            Some(Self::Alpaca)
        } else if has("question") {
            Some(Self::Questions)
        } else if has("prompt") {
            Some(Self::PromptCompletion)
        } else {
            None
        }
    }
}

/// A row that is no example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadRow {
    /// 1-based line of the file where the row starts.
    pub(crate) line: usize,
    /// What is wrong: a lowercase fragment.
    pub(crate) reason: String,
}

/// Keys that carry meaning in some shape; all others become tags.
const KNOWN_KEYS: [&str; 28] = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "output",
    "response",
    "prompt",
    "completion",
    "question",
    "answer",
    "fact",
    "group",
    "key_facts",
    "source",
    "evidence",
    "system",
    "id",
    "tags",
    "provenance",
    "history",
    "from",
    "value",
    "text",
    "role",
    "content",
    "metadata",
    "instances",
];
/// Longer values are content, not labels.
const TAG_CHARACTERS_MAX: usize = 40;

/// Reads all rows of a file. `path` is for ids and messages, `group_by` the column that names the group.
pub(crate) fn read_examples(
    path: &str,
    bytes: &[u8],
    format: Format,
    group_by: Option<&str>,
) -> Result<Vec<Example>, Vec<BadRow>> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
        vec![BadRow { line, reason: "the line is not UTF-8".to_owned() }]
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is_csv =
        format == Format::Csv || path.rsplit('.').next().is_some_and(|end| end.eq_ignore_ascii_case("csv"));
    let mut bad = Vec::new();
    let mut rows = Vec::new();
    for row in if is_csv { csv::objects(text) } else { json_objects(text) } {
        match row {
            Ok(row) => rows.push(row),
            Err(row) => bad.push(row),
        }
    }
    let shape = match format {
        Format::Auto | Format::Csv => rows.first().and_then(|(_, row)| Format::of(row)),
        chosen => Some(chosen),
    };
    let Some(shape) = shape else {
        if bad.is_empty() {
            bad.push(
                rows.first().map_or(
                    BadRow { line: 1, reason: "the file holds no rows".to_owned() },
                    |(line, row)| BadRow { line: *line, reason: unknown_shape(row) },
                ),
            );
        }
        return Err(bad);
    };
    let mut examples = Vec::with_capacity(rows.len());
    for (line, row) in rows {
        match example(path, line, &row, shape, group_by) {
            Ok(example) => examples.push(example),
            Err(reason) => bad.push(BadRow { line, reason }),
        }
    }
    bad.sort_by_key(|row| row.line);
    if bad.is_empty() { Ok(examples) } else { Err(bad) }
}

fn unknown_shape(row: &Map<String, Value>) -> String {
    let keys = row.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    format!(
        "no known form: it has {keys}, and none of `messages`, `conversations`, `instruction`, `question`, `prompt`"
    )
}

type Located = Result<(usize, Map<String, Value>), BadRow>;

/// The objects of JSON Lines, or of one JSON array.
fn json_objects(text: &str) -> Vec<Located> {
    let as_object = |line: usize, value: Value| match value {
        Value::Object(row) => Ok((line, row)),
        other => Err(BadRow {
            line,
            reason: format!("a row must be an object, not `{}`", excerpt(&other.to_string(), 40)),
        }),
    };
    if text.trim_start().starts_with('[') {
        return array_items(text).into_iter().map(|(line, item)| as_object(line, item?)).collect();
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| match serde_json::from_str(line) {
            Ok(value) => as_object(index + 1, value),
            Err(error) => {
                Err(BadRow { line: index + 1, reason: format!("not JSON: {}", without_place(&error)) })
            }
        })
        .collect()
}

/// The items of a JSON array with the lines they start on; reading stops at the first that is not JSON.
fn array_items(text: &str) -> Vec<(usize, Result<Value, BadRow>)> {
    let mut items = Vec::new();
    let mut at = text.find('[').map_or(text.len(), |at| at + 1);
    let line_of = |at: usize| text[..at].bytes().filter(|byte| *byte == b'\n').count() + 1;
    let mut line = line_of(at);
    loop {
        let gap = text[at..].len() - text[at..].trim_start_matches([' ', '\t', '\r', '\n', ',']).len();
        line += text[at..at + gap].bytes().filter(|byte| *byte == b'\n').count();
        at += gap;
        if text[at..].starts_with(']') {
            return items;
        }
        let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
        match stream.next() {
            Some(Ok(value)) => {
                let end = at + stream.byte_offset();
                items.push((line, Ok(value)));
                line += text[at..end].bytes().filter(|byte| *byte == b'\n').count();
                at = end;
            }
            Some(Err(error)) => {
                let reason = format!("not JSON: {}", without_place(&error));
                items.push((
                    line + error.line().saturating_sub(1),
                    Err(BadRow { line: line + error.line().saturating_sub(1), reason }),
                ));
                return items;
            }
            None => {
                items.push((line, Err(BadRow { line, reason: "the array has no end".to_owned() })));
                return items;
            }
        }
    }
}

/// serde_json counts lines from the start of what it was given, which is not the file.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

fn example(
    path: &str,
    line: usize,
    row: &Map<String, Value>,
    shape: Format,
    group_by: Option<&str>,
) -> Result<Example, String> {
    let mut messages = match shape {
        Format::Messages => chat(row, "messages", "role", "content")?,
        Format::Sharegpt => chat(row, "conversations", "from", "value")?,
        Format::Alpaca => alpaca(row)?,
        Format::PromptCompletion => {
            let mut turns = turns(row, &["prompt"], "user")?;
            turns.extend(self::turns(row, &["completion", "answer", "response"], "assistant")?);
            turns
        }
        Format::Questions => {
            vec![message("user", text(row, &["question"])?), message("assistant", text(row, &["answer"])?)]
        }
        Format::Auto | Format::Csv => return Err("no known form".to_owned()),
    };
    if let Some(system) = optional_text(row, "system")
        && messages.first().is_none_or(|first| first.role != "system")
    {
        messages.insert(0, message("system", system));
    }
    check_turns(&messages)?;
    let id = match row.get("id") {
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => Digest::of(format!("{path}\0{}", Value::Object(row.clone())).as_bytes()).short(),
    };
    let group = match group_by {
        Some(column) => {
            scalar(row.get(column)).ok_or_else(|| format!("no `{column}`, which `group_by` names"))?
        }
        None => ["group", "fact"].iter().find_map(|key| scalar(row.get(*key))).unwrap_or_else(|| id.clone()),
    };
    let mut provenance: Provenance = row
        .get("provenance")
        .and_then(|value| serde_json::from_value(value.clone()).ok())
        .unwrap_or_default();
    if provenance.places.is_empty() {
        provenance.places = vec![format!("{path} line {line}")];
        provenance.places.extend(optional_text(row, "source"));
    }
    if provenance.generator.is_empty() {
        provenance.generator = format!("load:{}", shape.name());
    }
    if let Some(evidence) = optional_text(row, "evidence") {
        provenance.evidence = Some(evidence);
    }
    Ok(Example { id, messages, group, tags: tags(row), key_facts: key_facts(row)?, provenance })
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content }
}

/// Instruction and input as one user turn, the output as the answer.
fn alpaca(row: &Map<String, Value>) -> Result<Vec<Message>, String> {
    let mut asked = text(row, &["instruction"])?;
    if let Some(input) = optional_text(row, "input").or_else(|| optional_text(row, "context")) {
        asked = format!("{asked}\n\n{input}");
    }
    Ok(vec![message("user", asked), message("assistant", text(row, &["output", "response"])?)])
}

/// A conversation under `key`, its turns naming the speaker under `speaker` and the words under `words`.
fn chat(row: &Map<String, Value>, key: &str, speaker: &str, words: &str) -> Result<Vec<Message>, String> {
    let value = row.get(key).ok_or_else(|| format!("no `{key}`"))?;
    let Some(turns) = value.as_array() else { return Err(format!("`{key}` must be a list of turns")) };
    turns
        .iter()
        .enumerate()
        .map(|(index, turn)| {
            let field = |name: &str| {
                turn.get(name)
                    .and_then(Value::as_str)
                    .ok_or_else(|| format!("turn {} of `{key}` has no text in `{name}`", index + 1))
            };
            let role = match field(speaker)? {
                "system" | "developer" => "system",
                "user" | "human" => "user",
                "assistant" | "gpt" | "model" | "chatgpt" | "bot" => "assistant",
                other => {
                    return Err(format!("turn {} of `{key}` has the unknown speaker `{other}`", index + 1));
                }
            };
            Ok(message(role, field(words)?.to_owned()))
        })
        .collect()
}

/// A text, or messages, under the first of the keys that is there.
fn turns(row: &Map<String, Value>, keys: &[&str], role: &str) -> Result<Vec<Message>, String> {
    match keys.iter().find(|key| row.get(**key).is_some_and(Value::is_array)) {
        Some(key) => chat(row, key, "role", "content"),
        None => Ok(vec![message(role, text(row, keys)?)]),
    }
}

/// Templates of most models refuse anything but: system first, then user and assistant in turn, assistant last.
fn check_turns(messages: &[Message]) -> Result<(), String> {
    let spoken = messages.iter().skip_while(|message| message.role == "system").collect::<Vec<_>>();
    if messages.len() - spoken.len() > 1 {
        return Err("more than one `system` message".to_owned());
    }
    for (index, turn) in spoken.iter().enumerate() {
        let expected = if index % 2 == 0 { "user" } else { "assistant" };
        if turn.role != expected {
            return Err(format!("turn {} is from `{}`, where `{expected}` must speak", index + 1, turn.role));
        }
    }
    match spoken.last() {
        Some(last) if last.role == "assistant" => Ok(()),
        Some(_) => Err("the last turn is not the assistant's, so there is nothing to learn".to_owned()),
        None => Err("the conversation has no turns".to_owned()),
    }
}

fn text(row: &Map<String, Value>, keys: &[&str]) -> Result<String, String> {
    let named = || keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" or ");
    match keys.iter().find_map(|key| row.get(*key)) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(other) => Err(format!("{} is not a text but `{}`", named(), excerpt(&other.to_string(), 40))),
        None => Err(format!("no {}", named())),
    }
}

fn optional_text(row: &Map<String, Value>, key: &str) -> Option<String> {
    row.get(key).and_then(Value::as_str).filter(|text| !text.trim().is_empty()).map(str::to_owned)
}

fn scalar(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) if !text.trim().is_empty() => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// `tags` as they are, and each short extra column as `column:value`.
fn tags(row: &Map<String, Value>) -> Vec<String> {
    let listed = row.get("tags").and_then(Value::as_array).into_iter().flatten();
    let mut tags: Vec<String> = listed.filter_map(|tag| scalar(Some(tag))).collect();
    for (column, value) in row.iter().filter(|(column, _)| !KNOWN_KEYS.contains(&column.as_str())) {
        if let Some(value) = scalar(Some(value))
            && value.chars().count() <= TAG_CHARACTERS_MAX
        {
            tags.push(format!("{column}:{value}"));
        }
    }
    tags
}

/// A list of facts, each a text or a list of alternatives.
fn key_facts(row: &Map<String, Value>) -> Result<Vec<Vec<String>>, String> {
    let wrong = || "`key_facts` must be a list of texts, or of lists of alternative texts".to_owned();
    let Some(value) = row.get("key_facts").filter(|value| !value.is_null()) else { return Ok(Vec::new()) };
    let facts = value.as_array().ok_or_else(wrong)?;
    facts
        .iter()
        .map(|fact| match fact {
            Value::Array(alternatives) if !alternatives.is_empty() => {
                alternatives.iter().map(|one| scalar(Some(one)).ok_or_else(wrong)).collect()
            }
            one => Ok(vec![scalar(Some(one)).ok_or_else(wrong)?]),
        })
        .collect()
}

#[cfg(test)]
mod tests;
