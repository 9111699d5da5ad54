//! The pieces a passage is packed from: headings, blocks, and where a block is over the budget its lines,
//! sentences or words. Each is a byte range without spaces at its ends; together they hold all that is no space.

use std::ops::Range;

use super::sentences;
use super::tokens::TokenCounter;

/// What a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnitKind {
    /// A heading of level 1-6.
    Heading(u8),
    /// Anything else.
    Text,
}

/// One piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) kind: UnitKind,
    pub(super) span: Range<usize>,
}

/// The units of `text`, in order, none over `tokens_max` but single words and headings.
pub(super) fn of(text: &str, tokens_max: usize, counter: &TokenCounter) -> Vec<Unit> {
    let splitter = Splitter { text, tokens_max, counter };
    let mut units = Vec::new();
    for (kind, span) in blocks(text) {
        splitter.split(kind, span, Cut::Lines, &mut units);
    }
    units
}

/// Headings, and what stands between blank lines; a fenced block is one, blank lines in it or not.
fn blocks(text: &str) -> Vec<(UnitKind, Range<usize>)> {
    let mut blocks: Vec<(UnitKind, Range<usize>)> = Vec::new();
    let mut open: Option<Range<usize>> = None;
    let mut fence: Option<&str> = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let span = trimmed(text, at..at + line.len());
        at += line.len();
        let content = &text[span.clone()];
        let level = heading_level(content).filter(|_| fence.is_none());
        let ends_block = level.is_some() || (content.is_empty() && fence.is_none());
        if ends_block {
            blocks.extend(open.take().map(|span| (UnitKind::Text, span)));
        }
        if let Some(level) = level {
            blocks.push((UnitKind::Heading(level), span));
        } else if !content.is_empty() {
            let start = open.map_or(span.start, |open| open.start);
            open = Some(start..span.end);
            fence = match (fence, fence_of(content)) {
                (None, mark) => mark,
                (Some(open), Some(mark)) if mark == open && content == mark => None,
                (fence, _) => fence,
            };
        }
    }
    blocks.extend(open.map(|span| (UnitKind::Text, span)));
    blocks
}

fn heading_level(line: &str) -> Option<u8> {
    let hashes = line.bytes().take_while(|byte| *byte == b'#').count();
    let is_heading =
        (1..=6).contains(&hashes) && line[hashes..].starts_with(' ') && !line[hashes..].trim().is_empty();
    is_heading.then(|| u8::try_from(hashes).expect("at most 6"))
}

fn fence_of(line: &str) -> Option<&str> {
    let run = line.bytes().take_while(|byte| *byte == b'`').count();
    (run >= 3).then(|| &line[..run])
}

fn trimmed(text: &str, span: Range<usize>) -> Range<usize> {
    let part = &text[span.clone()];
    let start = span.start + part.len() - part.trim_start().len();
    start..start + part.trim().len()
}

/// How to cut a span that is over the budget; each next is finer.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Lines,
    Sentences,
    Words,
}

struct Splitter<'a> {
    text: &'a str,
    tokens_max: usize,
    counter: &'a TokenCounter,
}

impl Splitter<'_> {
    fn split(&self, kind: UnitKind, span: Range<usize>, cut: Cut, units: &mut Vec<Unit>) {
        let is_heading = kind != UnitKind::Text;
        if is_heading || self.counter.count(&self.text[span.clone()]) <= self.tokens_max {
            units.push(Unit { kind, span });
            return;
        }
        let text = &self.text[span.clone()];
        let (parts, finer) = match cut {
            Cut::Lines => (lines(text), Cut::Sentences),
            Cut::Sentences => (sentences::split(text), Cut::Words),
            // Words are packed here: as units each would be counted anew for every word before it.
            Cut::Words => return self.split_words(kind, span, units),
        };
        for part in parts {
            self.split(kind, span.start + part.start..span.start + part.end, finer, units);
        }
    }

    fn split_words(&self, kind: UnitKind, span: Range<usize>, units: &mut Vec<Unit>) {
        let mut open: Option<Range<usize>> = None;
        for word in words(&self.text[span.clone()]) {
            let word = span.start + word.start..span.start + word.end;
            open = Some(match open.take() {
                None => word,
                Some(open) if self.counter.count(&self.text[open.start..word.end]) <= self.tokens_max => {
                    open.start..word.end
                }
                Some(open) => {
                    units.push(Unit { kind, span: open });
                    word
                }
            });
        }
        units.extend(open.map(|span| Unit { kind, span }));
    }
}

fn lines(text: &str) -> Vec<Range<usize>> {
    let mut at = 0;
    let spans = text.split_inclusive('\n').map(|line| {
        at += line.len();
        trimmed(text, at - line.len()..at)
    });
    spans.filter(|span| !span.is_empty()).collect()
}

fn words(text: &str) -> Vec<Range<usize>> {
    let start = text.as_ptr() as usize;
    text.split_whitespace()
        .map(|word| word.as_ptr() as usize - start..word.as_ptr() as usize - start + word.len())
        .collect()
}
