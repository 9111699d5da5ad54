//! The block of metadata at the head of a note: YAML between `---` lines, TOML between `+++` lines.
//! Knows nothing of Markdown; a block it cannot parse is reported, and the note goes on below it.

use serde_json::{Map, Value};

/// A note parted into its metadata and its body.
#[derive(Debug, PartialEq)]
pub(crate) struct Parted<'a> {
    /// The metadata; empty without a block or with a broken one.
    pub(crate) meta: Map<String, Value>,
    /// What is wrong with the block.
    pub(crate) problem: Option<String>,
    /// Everything below the block.
    pub(crate) body: &'a str,
}

/// Parts `text`, whose lines end in `\n`.
pub(crate) fn part(text: &str) -> Parted<'_> {
    let whole = Parted { meta: Map::new(), problem: None, body: text };
    let Some((block, body, is_toml)) = find(text) else { return whole };
    let parsed = if is_toml {
        toml::from_str::<Value>(block).map_err(|error| first_line(&error.to_string()))
    } else {
        serde_yaml::from_str::<Value>(block).map_err(|error| first_line(&error.to_string()))
    };
    match parsed {
        Ok(Value::Object(meta)) => Parted { meta, problem: None, body },
        Ok(Value::Null) => Parted { meta: Map::new(), problem: None, body },
        // Text between two rules is no metadata.
        Ok(_) => whole,
        Err(problem) => Parted { meta: Map::new(), problem: Some(problem), body },
    }
}

/// The block, what follows it, and whether it is TOML. It starts in the first line and has an end.
fn find(text: &str) -> Option<(&str, &str, bool)> {
    let (first, rest) = text.split_once('\n')?;
    let is_toml = match first.trim_end() {
        "---" => false,
        "+++" => true,
        _ => return None,
    };
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        let mark = line.trim_end();
        if (is_toml && mark == "+++") || (!is_toml && matches!(mark, "---" | "...")) {
            return Some((&rest[..at], &rest[at + line.len()..], is_toml));
        }
        at += line.len();
    }
    None
}

fn first_line(message: &str) -> String {
    let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unreadable");
    line.trim_start_matches("error: ").to_owned()
}

/// The tags of the metadata, `tags: [a, b]`, `tags: a, b` or `tag: a`, without `#`.
pub(crate) fn tags(meta: &Map<String, Value>) -> Vec<String> {
    let mut tags = Vec::new();
    for key in ["tags", "tag"] {
        match meta.get(key) {
            Some(Value::Array(list)) => tags.extend(list.iter().filter_map(Value::as_str).map(str::to_owned)),
            Some(Value::String(text)) => tags.extend(text.split([',', ' ']).map(str::to_owned)),
            _ => {}
        }
    }
    tags.into_iter()
        .map(|tag| tag.trim().trim_start_matches('#').to_owned())
        .filter(|tag| !tag.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn yaml_and_toml_become_metadata() {
        let parted = part("---\ntitle: One on one\ndate: 2024-05-03\ntags: [lead, \"#people\"]\n---\nBody\n");
        assert_eq!(
            Value::Object(parted.meta.clone()),
            json!({"title": "One on one", "date": "2024-05-03", "tags": ["lead", "#people"]})
        );
        assert_eq!(parted.body, "Body\n");
        assert_eq!(tags(&parted.meta), ["lead", "people"]);
        let parted = part("+++\ntitle = \"T\"\n+++\nBody");
        assert_eq!((parted.meta["title"].as_str(), parted.body), (Some("T"), "Body"));
    }

    #[test]
    fn a_broken_block_is_reported_and_left_out() {
        let parted = part("---\ntitle: [open\nx: : y\n---\nBody\n");
        assert!(parted.problem.is_some());
        assert!(parted.meta.is_empty());
        assert_eq!(parted.body, "Body\n");
    }

    #[test]
    fn rules_and_open_blocks_are_text() {
        for text in ["---\nbut no end", "---\nJust a sentence\n---\nMore", "No block\n---\na: b\n---\n", ""] {
            let parted = part(text);
            assert_eq!((parted.body, parted.problem), (text, None));
        }
    }
}
