//! What must go before Markdown is parsed, because Markdown does not know it: `%%comments%%` of Obsidian and
//! `{% tags %}` of site generators. Code, fenced or inline, is left as it is.

use std::sync::LazyLock;

use regex::{Captures, Regex};

static HIDDEN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?s)(?<code>``[^\n]*?``|`[^`\n]+`)|%%.*?%%|\{%-?\s*comment\b.*?endcomment\s*-?%\}|\{%(?<tag>[^%]*)%\}")
        .expect("a valid pattern")
});
static QUOTED: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#""([^"/.]+)""#).expect("a valid pattern"));

/// Removes comments and template tags. A quoted argument of a tag that is no path stays: it is a title or a name.
pub(super) fn strip(text: &str) -> String {
    if !text.contains("%%") && !text.contains("{%") {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    let mut prose = String::new();
    let mut fence: Option<String> = None;
    for line in text.split_inclusive('\n') {
        let mark = fence_mark(line);
        match (&fence, mark) {
            (None, Some(mark)) => {
                out.push_str(&strip_prose(&prose));
                prose.clear();
                out.push_str(line);
                fence = Some(mark);
            }
            (Some(open), mark) => {
                out.push_str(line);
                let closes = mark.is_some_and(|mark| mark.starts_with(open.as_str()))
                    && line.trim().chars().all(|char| open.starts_with(char));
                if closes {
                    fence = None;
                }
            }
            (None, None) => prose.push_str(line),
        }
    }
    out.push_str(&strip_prose(&prose));
    out
}

fn strip_prose(text: &str) -> String {
    HIDDEN
        .replace_all(text, |found: &Captures<'_>| {
            if let Some(code) = found.name("code") {
                return code.as_str().to_owned();
            }
            let tag = found.name("tag").map_or("", |tag| tag.as_str());
            QUOTED.captures(tag).map_or(String::new(), |quoted| quoted[1].to_owned())
        })
        .into_owned()
}

/// The run of backticks or tildes that opens or closes a fence.
fn fence_mark(line: &str) -> Option<String> {
    let line = line.trim_start_matches([' ', '\t', '>']);
    let first = line.chars().next().filter(|char| matches!(char, '`' | '~'))?;
    let run = line.chars().take_while(|char| *char == first).collect::<String>();
    (run.len() >= 3).then_some(run)
}
