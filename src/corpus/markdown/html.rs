//! The words of an HTML fragment inside a note. Not a browser: tags go, breaks and list items stay, the handful of
//! entities that people write by hand are decoded.

use std::sync::LazyLock;

use regex::Regex;

static HIDDEN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?is)<!--.*?(?:-->|$)|<script\b.*?(?:</script\s*>|$)|<style\b.*?(?:</style\s*>|$)|<svg\b.*?(?:</svg\s*>|$)")
        .expect("a valid pattern")
});
static ITEM: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?i)\s*<li\b[^>]*>\s*").expect("a valid pattern"));
static BREAK: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)\s*</?(?:br|p|div|tr|ul|ol|table|section|h[1-6]|details|summary|dt|dd)\b[^>]*>\s*")
        .expect("a valid pattern")
});
static CELL: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?i)\s*</t[dh]\s*>\s*<t[dh]\b[^>]*>\s*").expect("a valid pattern"));
static TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?s)</?[A-Za-z][^>]*>").expect("a valid pattern"));
/// Markdown links inside HTML blocks, which Markdown leaves alone.
static LINK: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[([^\[\]]+)\]\([^()\s]*\)").expect("a valid pattern"));

const ENTITIES: [(&str, &str); 15] = [
    ("&nbsp;", " "),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", "\""),
    ("&#39;", "'"),
    ("&bull;", "•"),
    ("&copy;", "©"),
    ("&hellip;", "…"),
    ("&ldquo;", "“"),
    ("&rdquo;", "”"),
    ("&lsquo;", "‘"),
    ("&rsquo;", "’"),
    ("&mdash;", "—"),
    ("&ndash;", "–"),
    // Last, so that `&amp;lt;` is decoded once.
    ("&amp;", "&"),
];

/// The text of a fragment, a line for each block in it.
pub(super) fn text(html: &str) -> String {
    let html = HIDDEN.replace_all(html, "");
    let html = ITEM.replace_all(&html, "\n- ");
    let html = CELL.replace_all(&html, " | ");
    let html = BREAK.replace_all(&html, "\n");
    let html = TAG.replace_all(&html, "");
    let mut text = LINK.replace_all(&html, "$1").into_owned();
    for (entity, char) in ENTITIES {
        text = text.replace(entity, char);
    }
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// True for `<br>` in any spelling.
pub(super) fn is_break(tag: &str) -> bool {
    tag.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("<br"))
}
