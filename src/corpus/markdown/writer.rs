//! Writes the events of the Markdown parser as clean text. Each leaf block (paragraph, heading, code, table) is
//! collected and then written with the marks of the lists and quotes it stands in.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::LazyLock;

use pulldown_cmark::{CodeBlockKind, Event, LinkType, Tag, TagEnd};
use regex::Regex;

use super::super::clean::{starts_item, wraps};
use super::html;

/// What came of a note's body.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) text: String,
    pub(super) title: Option<String>,
    pub(super) tags: Vec<String>,
}

/// A break that is meant, while a paragraph is collected; control characters were removed from the source.
const HARD_BREAK: char = '\u{1}';

/// Spaces, and the line end, that a break in the source may have.
const BREAK_BYTES_MAX: usize = 4;

/// Fenced blocks that draw something in Obsidian and hold no text.
const WIDGETS: [&str; 6] = ["dataview", "dataviewjs", "query", "base", "tasks", "button"];

const MEDIA: [&str; 18] = [
    "png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "avif", "pdf", "mp3", "wav", "m4a", "ogg", "mp4",
    "mov", "webm", "canvas", "base",
];

static CALLOUT: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\[![\w-]+\][+-]?\s*").expect("a valid pattern"));
static BLOCK_ID: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?:^|\s+)\^[A-Za-z0-9-]+$").expect("a valid pattern"));
/// A link, or the part of it in one line, or a mark of emphasis or code.
static MARKUP: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\[([^\[\]]*)\]\([^()]*\)?|\]\([^()]*\)?|[\[\]*_`]").expect("a valid pattern")
});
static HIGHLIGHT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"==([^=\n]+)==").expect("a valid pattern"));
static SPACES: LazyLock<Regex> = LazyLock::new(|| Regex::new(" {2,}").expect("a valid pattern"));
static CODE_SPAN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"`[^`]*`").expect("a valid pattern"));
static TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?:^|\s)#([\p{L}\p{N}_][\p{L}\p{N}\p{So}_/-]*)").expect("a valid pattern"));

/// Writes a whole note.
pub(super) fn write<'a>(source: &str, events: impl Iterator<Item = (Event<'a>, Range<usize>)>) -> Written {
    let mut writer = Writer::default();
    for (event, range) in events {
        match event {
            Event::Start(Tag::Paragraph | Tag::Item) => writer.wraps = Wraps::of(source, range.clone()),
            Event::SoftBreak => {
                writer.leaf.push(if writer.wraps.is_wrap(range.start) { ' ' } else { HARD_BREAK });
                continue;
            }
            _ => {}
        }
        writer.take(event);
    }
    writer.flush("");
    writer.written
}

#[derive(Default)]
struct Writer {
    written: Written,
    /// The lists and quotes around the current place.
    around: Vec<Around>,
    /// The numbers of the open lists; `None` for bullets.
    lists: Vec<Option<u64>>,
    /// The text of the leaf block being collected.
    leaf: String,
    /// Where open links and images began in `leaf`.
    spans: Vec<Span>,
    /// The table being collected: the cells of each row.
    rows: Vec<Vec<String>>,
    /// The language of the fenced block being collected.
    code: Option<String>,
    /// The last block written stood in a list.
    after_item: bool,
    /// Which line breaks of the paragraph being collected are wraps.
    wraps: Wraps,
}

/// The line breaks of one paragraph of the source that are wraps, by their place. Told from the source, because
/// there the lines have the width at which they were wrapped.
#[derive(Default)]
struct Wraps(BTreeSet<usize>);

impl Wraps {
    fn of(source: &str, paragraph: Range<usize>) -> Self {
        let mut ends = Vec::new();
        let mut lines = Vec::new();
        let mut at = paragraph.start;
        for line in source[paragraph].split_inclusive('\n') {
            at += line.len();
            let line = line.trim_start_matches([' ', '\t', '>']).trim_end();
            if line.is_empty() || (!lines.is_empty() && starts_item(line)) {
                break;
            }
            ends.push(at);
            lines.push(line);
        }
        let lengths = lines.iter().map(|line| line.chars().count()).collect::<Vec<_>>();
        // Whether a sentence goes on is told by its words, not by the marks around them.
        let words = lines.iter().map(|line| MARKUP.replace_all(line, "$1")).collect::<Vec<_>>();
        let words = words.iter().map(|line| line.trim()).collect::<Vec<_>>();
        let mut wraps = wraps(&words, &lengths);
        // The title of a callout is a line of its own.
        if lines.first().is_some_and(|line| CALLOUT.is_match(line)) {
            wraps[0] = false;
        }
        Self(ends.into_iter().zip(wraps).filter(|(_, is_wrap)| *is_wrap).map(|(end, _)| end).collect())
    }

    /// True if the break that begins at `start` is a wrap; its line ends a little further on, at its `\n`.
    fn is_wrap(&self, start: usize) -> bool {
        self.0.range(start..).next().is_some_and(|end| *end <= start + BREAK_BYTES_MAX)
    }
}

enum Around {
    Quote,
    Item { mark: String, fresh: bool },
}

struct Span {
    start: usize,
    link: LinkType,
    target: String,
}

impl Writer {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.open(tag),
            Event::End(tag) => self.close(tag),
            Event::Text(text) if self.code.is_some() => self.leaf.push_str(&text),
            Event::Text(text) => self.leaf.push_str(&HIGHLIGHT.replace_all(&text, "$1")),
            Event::Code(code) => {
                let fence = if code.contains('`') { "``" } else { "`" };
                self.leaf.extend([fence, &code, fence]);
            }
            Event::InlineMath(math) => self.leaf.extend(["$", &math, "$"]),
            Event::DisplayMath(math) => self.leaf.extend(["$$", &math, "$$"]),
            Event::Html(html) => self.leaf.push_str(&html),
            Event::InlineHtml(tag) if html::is_break(&tag) => self.leaf.push(HARD_BREAK),
            Event::InlineHtml(_) => {}
            Event::FootnoteReference(label) => self.leaf.extend(["[^", &label, "]"]),
            Event::SoftBreak | Event::HardBreak => self.leaf.push(HARD_BREAK),
            Event::Rule => self.flush(""),
            Event::TaskListMarker(done) => self.leaf.push_str(if done { "[x] " } else { "[ ] " }),
        }
    }

    fn open(&mut self, tag: Tag<'_>) {
        match tag {
            Tag::Link { link_type: link, dest_url, .. } | Tag::Image { link_type: link, dest_url, .. } => {
                self.spans.push(Span { start: self.leaf.len(), link, target: dest_url.into_string() });
                return;
            }
            Tag::Emphasis | Tag::Strong | Tag::Strikethrough | Tag::Superscript | Tag::Subscript => return,
            Tag::TableRow | Tag::TableHead => self.rows.push(Vec::new()),
            _ => {}
        }
        self.flush("");
        match tag {
            Tag::BlockQuote(_) => self.around.push(Around::Quote),
            Tag::List(number) => self.lists.push(number),
            Tag::Item => {
                let mark = match self.lists.last_mut() {
                    Some(Some(number)) => {
                        *number += 1;
                        format!("{}. ", *number - 1)
                    }
                    _ => "- ".to_owned(),
                };
                self.around.push(Around::Item { mark, fresh: true });
            }
            Tag::FootnoteDefinition(label) => {
                self.around.push(Around::Item { mark: format!("[^{label}]: "), fresh: true });
            }
            Tag::CodeBlock(kind) => {
                let info =
                    if let CodeBlockKind::Fenced(info) = kind { info.into_string() } else { String::new() };
                self.code = Some(info.split_whitespace().next().unwrap_or("").to_owned());
            }
            _ => {}
        }
    }

    fn close(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Link | TagEnd::Image => self.close_span(tag == TagEnd::Image),
            TagEnd::Heading(level) => {
                if self.written.title.is_none() && level as u8 == 1 {
                    self.written.title = Some(self.leaf.trim().to_owned()).filter(|title| !title.is_empty());
                }
                self.flush(&format!("{} ", "#".repeat(level as usize)));
            }
            TagEnd::CodeBlock => self.close_code(),
            TagEnd::HtmlBlock => {
                let text = html::text(&std::mem::take(&mut self.leaf));
                self.block(&text);
            }
            TagEnd::TableCell => {
                let cell = std::mem::take(&mut self.leaf).replace(HARD_BREAK, " ");
                self.rows.last_mut().expect("a cell stands in a row").push(cell.trim().to_owned());
            }
            TagEnd::Table => {
                let rows = std::mem::take(&mut self.rows);
                self.block(&table_text(&rows));
            }
            TagEnd::BlockQuote(_) | TagEnd::Item | TagEnd::FootnoteDefinition => {
                self.flush("");
                self.around.pop();
            }
            TagEnd::List(_) => {
                self.flush("");
                self.lists.pop();
            }
            TagEnd::Paragraph => self.flush(""),
            _ => {}
        }
    }

    fn close_span(&mut self, is_image: bool) {
        let Some(span) = self.spans.pop() else { return };
        let LinkType::WikiLink { has_pothole } = span.link else { return };
        let text = self.leaf.split_off(span.start.min(self.leaf.len()));
        let path = span.target.split('#').next().unwrap_or("").trim_end();
        let extension = path.rsplit_once('.').map_or("", |(_, extension)| extension);
        let is_media = MEDIA.iter().any(|kind| extension.eq_ignore_ascii_case(kind));
        let is_size = text.chars().all(|char| char.is_ascii_digit() || char == 'x');
        if has_pothole && !(is_image && is_size) {
            self.leaf.push_str(text.trim());
        } else if !(is_image && is_media) {
            self.leaf.push_str(&shown_name(&span.target));
        }
    }

    fn close_code(&mut self) {
        let language = self.code.take().unwrap_or_default();
        let code = std::mem::take(&mut self.leaf);
        if WIDGETS.contains(&language.as_str()) || code.trim().is_empty() {
            return;
        }
        let fence = if code.contains("```") { "````" } else { "```" };
        self.block(&format!("{fence}{language}\n{}\n{fence}", code.trim_end_matches('\n')));
    }

    /// Writes the collected paragraph, after `mark`.
    fn flush(&mut self, mark: &str) {
        let leaf = std::mem::take(&mut self.leaf);
        if leaf.trim().is_empty() {
            return;
        }
        self.collect_tags(&leaf);
        let text = leaf.split(HARD_BREAK).map(str::trim).collect::<Vec<_>>().join("\n");
        // A comment cut from a sentence leaves two spaces.
        let text = SPACES.replace_all(&text, " ");
        let text = BLOCK_ID.replace(text.trim(), "");
        let text = match self.around.last() {
            Some(Around::Quote) => CALLOUT.replace(&text, "").into_owned(),
            _ => text.into_owned(),
        };
        if mark.is_empty() {
            self.block(&text);
        } else {
            self.block(&format!("{mark}{}", text.replace('\n', " ")));
        }
    }

    fn collect_tags(&mut self, leaf: &str) {
        let prose = CODE_SPAN.replace_all(leaf, " ");
        let tags = TAG.captures_iter(&prose).map(|found| found[1].trim_end_matches(['/', '-']).to_owned());
        self.written.tags.extend(tags.filter(|tag| tag.chars().any(|char| !char.is_ascii_digit())));
    }

    /// Writes one block, each line behind the marks of the lists and quotes around it.
    fn block(&mut self, text: &str) {
        let text = text.trim_matches('\n');
        if text.trim().is_empty() {
            return;
        }
        let is_item = self.around.iter().any(|around| matches!(around, Around::Item { fresh: true, .. }));
        let out = &mut self.written.text;
        if !out.is_empty() {
            out.push_str(if is_item && self.after_item { "\n" } else { "\n\n" });
        }
        for (index, line) in text.lines().enumerate() {
            if index > 0 {
                out.push('\n');
            }
            for around in &mut self.around {
                match around {
                    Around::Quote => out.push_str("> "),
                    Around::Item { mark, fresh: true } => out.push_str(mark),
                    Around::Item { mark, fresh: false } => out.extend(mark.chars().map(|_| ' ')),
                }
                if let Around::Item { fresh, .. } = around {
                    *fresh = false;
                }
            }
            out.push_str(line);
        }
        self.after_item = self.around.iter().any(|around| matches!(around, Around::Item { .. }));
    }
}

/// How Obsidian shows a link without an alias, less the folder: `People/Ann#Goals` as `Ann > Goals`.
fn shown_name(target: &str) -> String {
    let (path, heading) = target.split_once('#').unwrap_or((target, ""));
    let name = path.rsplit('/').next().unwrap_or(path).trim();
    let name = name.strip_suffix(".md").unwrap_or(name);
    match (name, heading.trim()) {
        (name, "") => name.to_owned(),
        (name, heading) if heading.starts_with('^') => name.to_owned(),
        ("", heading) => heading.to_owned(),
        (name, heading) => format!("{name} > {}", heading.replace('#', " > ")),
    }
}

/// A table as one line a row, each cell behind its column's name, so that a row means something alone.
fn table_text(rows: &[Vec<String>]) -> String {
    let Some((head, body)) = rows.split_first() else { return String::new() };
    if body.is_empty() || head.iter().any(String::is_empty) {
        let lines =
            rows.iter().map(|row| row.iter().filter(|cell| !cell.is_empty()).cloned().collect::<Vec<_>>());
        return lines.filter(|row| !row.is_empty()).map(|row| row.join(" | ")).collect::<Vec<_>>().join("\n");
    }
    let line = |row: &Vec<String>| {
        let cells = head.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
        cells
            .map(|(name, cell)| format!("{}: {cell}", name.trim_end_matches(':')))
            .collect::<Vec<_>>()
            .join(" | ")
    };
    body.iter().map(line).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}
