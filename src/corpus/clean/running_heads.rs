//! Running heads, running feet and page numbers: lines that stand on many pages and belong to none.
//!
//! Two kinds are told from the text alone. *Margin lines* stand among the first or last three lines of most
//! pages. *Numbered heads* carry a page number that grows from page to page (`INTRODUCTION 11`); they are
//! found anywhere on a page, because two book pages printed on one sheet put one of them in the middle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use regex::Regex;

/// Lines at each end of a page that may be a head or a foot.
const MARGIN_LINES: usize = 3;
/// A margin line stands on at least this share of the pages, in per cent.
const MARGIN_SHARE_PERCENT: usize = 60;
/// A numbered head stands on at least so many pages.
const NUMBERED_PAGES_MIN: usize = 3;
/// Longer lines are text.
const HEAD_CHARS_MAX: usize = 90;
/// `Day 1`, `Day 2` are headings of the text, however regular.
const COUNTED: [&str; 16] = [
    "day", "step", "week", "chapter", "part", "section", "phase", "figure", "table", "appendix", "lesson",
    "module", "factor", "exercise", "note", "question",
];

static PAGE_NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)^(?:[-–—|\s]*(?:page|p\.|seite)?\s*\d{1,4}(?:\s*(?:of|/|von)\s*\d{1,4})?[-–—|\s]*|[a-z]{0,2}\d{1,3}-\d{1,3}|[ivxl]{2,7})$")
        .expect("a valid pattern")
});
static LEADING: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^(\d{1,4})\s+(\D.*)$").expect("a valid pattern"));
static TRAILING: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^(.*\D)\s+(?:page\s+)?(\d{1,4})$").expect("a valid pattern"));

/// The lines of a document that are heads or feet.
#[derive(Debug, Default)]
pub(crate) struct RunningHeads {
    margins: BTreeSet<String>,
    numbered: BTreeSet<(Side, String)>,
    /// How the printed numbers follow from the pages, told by the head seen most often.
    numbering: Option<Numbering>,
}

/// Printed number = `per_page` * (page index - `page_idx`) + `number`.
#[derive(Debug, Clone, Copy)]
struct Numbering {
    page_idx: i64,
    number: i64,
    per_page: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Leading,
    Trailing,
}

/// True for a line that is only a page number: `7`, `- 7 -`, `Page 3 of 7`, `3-4`, `xiv`.
pub(crate) fn is_page_number(line: &str) -> bool {
    PAGE_NUMBER.is_match(line.trim())
}

impl RunningHeads {
    /// Learns the heads of a document from its pages, each the list of its blocks (as one line each) in order.
    pub(crate) fn learn(pages: &[Vec<String>]) -> Self {
        let mut margins: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        let mut numbered: BTreeMap<(Side, String), Vec<(usize, u32)>> = BTreeMap::new();
        for (page_idx, lines) in pages.iter().enumerate() {
            for line in margin_lines(lines).filter(|line| may_be_head(line)) {
                margins.entry(normal(line)).or_default().insert(page_idx);
            }
            for line in lines.iter().filter(|line| may_be_head(line)) {
                if let Some((key, number)) = numbered_head(line) {
                    numbered.entry(key).or_default().push((page_idx, number));
                }
            }
        }
        let pages_min =
            if pages.len() == 2 { 2 } else { (pages.len() * MARGIN_SHARE_PERCENT).div_ceil(100).max(2) };
        let margins =
            margins.into_iter().filter(|(_, on)| on.len() >= pages_min).map(|(line, _)| line).collect();
        let numbered = numbered.into_iter().filter(|(_, seen)| counts_up(seen)).collect::<BTreeMap<_, _>>();
        let numbering = numbered.values().max_by_key(|seen| seen.len()).and_then(|seen| Numbering::of(seen));
        if pages.len() < 2 {
            return Self::default();
        }
        Self { margins, numbered: numbered.into_keys().collect(), numbering }
    }

    /// Which lines of the page with this index to drop: one flag a line.
    pub(crate) fn mark(&self, page_idx: usize, lines: &[String]) -> Vec<bool> {
        let mut drop = lines
            .iter()
            .enumerate()
            .map(|(index, line)| {
                self.is_head(page_idx, line) || (in_margin(index, lines.len()) && self.is_margin(line))
            })
            .collect::<Vec<_>>();
        for index in 0..lines.len() {
            let beside_number = [index.checked_sub(1), Some(index + 1)]
                .into_iter()
                .flatten()
                .any(|beside| lines.get(beside).is_some_and(|line| is_page_number(line)));
            drop[index] |= beside_number && self.is_bare_head(&lines[index]);
            let is_placed =
                in_margin(index, lines.len()) || index.checked_sub(1).is_some_and(|before| drop[before]);
            drop[index] |= is_page_number(&lines[index]) && (is_placed || self.fits(page_idx, &lines[index]));
        }
        drop
    }

    /// True for a numbered head of this document (`INTRODUCTION 11`), wherever it stands. One that is seen too seldom
    /// is told by its capitals and by a number that fits the page.
    pub(crate) fn is_head(&self, page_idx: usize, line: &str) -> bool {
        numbered_head(line).is_some_and(|(key, number)| {
            let fits = || self.numbering.is_some_and(|numbering| numbering.fits(page_idx, number));
            self.numbered.contains(&key) || (is_capitals(&key.1, line) && fits())
        })
    }

    /// True for a number that is the one this page should have.
    fn fits(&self, page_idx: usize, line: &str) -> bool {
        let number = line.trim().parse::<u32>();
        number.is_ok_and(|number| self.numbering.is_some_and(|numbering| numbering.fits(page_idx, number)))
    }

    fn is_margin(&self, line: &str) -> bool {
        may_be_head(line) && self.margins.contains(&normal(line))
    }

    /// A numbered head whose number stands in a line of its own.
    fn is_bare_head(&self, line: &str) -> bool {
        let line = line.trim().to_lowercase();
        [Side::Leading, Side::Trailing].iter().any(|side| self.numbered.contains(&(*side, line.clone())))
    }
}

impl Numbering {
    fn of(seen: &[(usize, u32)]) -> Option<Self> {
        let (first, last) = (seen.first()?, seen.last()?);
        let pages = i64::try_from(last.0 - first.0).ok().filter(|pages| *pages > 0)?;
        let per_page = (i64::from(last.1) - i64::from(first.1) + pages / 2) / pages;
        Some(Self { page_idx: i64::try_from(first.0).ok()?, number: i64::from(first.1), per_page })
    }

    fn fits(self, page_idx: usize, number: u32) -> bool {
        let Ok(page_idx) = i64::try_from(page_idx) else { return false };
        let expected = self.per_page * (page_idx - self.page_idx) + self.number;
        (i64::from(number) - expected).abs() <= 1
    }
}

/// True if most letters of `line` are capitals; `text` is its lower-case text, which must have letters.
fn is_capitals(text: &str, line: &str) -> bool {
    let letters = line.chars().filter(|char| char.is_alphabetic()).count();
    let capitals = line.chars().filter(|char| char.is_uppercase()).count();
    !text.is_empty() && letters >= 4 && capitals * 10 >= letters * 7
}

fn margin_lines(lines: &[String]) -> impl Iterator<Item = &String> {
    lines.iter().enumerate().filter(|(index, _)| in_margin(*index, lines.len())).map(|(_, line)| line)
}

fn in_margin(index: usize, len: usize) -> bool {
    index < MARGIN_LINES || index + MARGIN_LINES >= len
}

fn may_be_head(line: &str) -> bool {
    let line = line.trim();
    if line.is_empty() || line.chars().count() > HEAD_CHARS_MAX {
        return false;
    }
    let words = line.split_whitespace().collect::<Vec<_>>();
    let counted = words.len() == 2 && COUNTED.contains(&words[0].to_lowercase().as_str());
    !counted
}

/// Digits to `#`, lower case, so that `Page 3` and `Page 12` are one line.
fn normal(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    for char in line.trim().chars() {
        match char {
            '0'..='9' if out.ends_with('#') => {}
            '0'..='9' => out.push('#'),
            _ => out.extend(char.to_lowercase()),
        }
    }
    out
}

fn numbered_head(line: &str) -> Option<((Side, String), u32)> {
    let line = line.trim();
    let (side, text, number) = if let Some(found) = LEADING.captures(line) {
        (Side::Leading, found[2].to_lowercase(), found[1].to_owned())
    } else {
        let found = TRAILING.captures(line)?;
        (Side::Trailing, found[1].to_lowercase(), found[2].to_owned())
    };
    may_be_head(line).then_some(())?;
    Some(((side, text), number.parse().ok()?))
}

/// Seen on enough pages, with a number that grows with the page.
fn counts_up(seen: &[(usize, u32)]) -> bool {
    seen.len() >= NUMBERED_PAGES_MIN
        && seen.windows(2).all(|pair| pair[1].0 > pair[0].0 && pair[1].1 > pair[0].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(pages: &[&[&str]]) -> Vec<Vec<String>> {
        let pages = pages
            .iter()
            .map(|lines| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>())
            .collect::<Vec<_>>();
        let heads = RunningHeads::learn(&pages);
        pages
            .iter()
            .enumerate()
            .map(|(page_idx, lines)| {
                let drop = heads.mark(page_idx, lines);
                lines.iter().zip(drop).filter(|(_, drop)| !drop).map(|(line, _)| line.clone()).collect()
            })
            .collect()
    }

    #[test]
    fn repeated_heads_and_feet_go_and_text_stays() {
        let pages = kept(&[
            &["ACME handbook, page 1", "Alpha comes first.", "Confidential"],
            &["ACME handbook, page 2", "Beta comes next.", "Confidential"],
            &["ACME handbook, page 3", "Gamma is last.", "Confidential"],
        ]);
        assert_eq!(pages, [["Alpha comes first."], ["Beta comes next."], ["Gamma is last."]]);
    }

    #[test]
    fn a_line_of_one_page_stays() {
        let pages = kept(&[&["Summary", "Text of one."], &["Text of two."], &["Text of three."]]);
        assert_eq!(pages[0], ["Summary", "Text of one."]);
    }

    #[test]
    fn two_pages_need_the_line_on_both() {
        let pages = kept(&[&["Draft", "One."], &["Draft", "Two."]]);
        assert_eq!(pages, [["One."], ["Two."]]);
    }

    #[test]
    fn a_single_page_loses_only_its_number() {
        assert_eq!(kept(&[&["Heading", "Text.", "Page 1 of 1"]]), [["Heading", "Text."]]);
    }

    #[test]
    fn numbered_heads_go_from_the_middle_of_a_sheet() {
        let names = ["Ann", "Bo", "Cy", "Di"];
        let sheet = |sheet: usize| {
            let says = |word: &str| format!("{} says {word}.", names[sheet]);
            let before = ["one", "two", "three", "four"].map(says);
            let after = ["five", "six", "seven", "eight"].map(says);
            before
                .into_iter()
                .chain([format!("INTRODUCTION {}", 2 * sheet + 3)])
                .chain(after)
                .collect::<Vec<_>>()
        };
        let pages = (0..4).map(sheet).collect::<Vec<_>>();
        let heads = RunningHeads::learn(&pages);
        let drop = heads.mark(1, &pages[1]);
        assert_eq!(drop.iter().filter(|drop| **drop).count(), 1);
        assert!(drop[4]);
        assert!(!heads.is_head(1, "01 Introduction"));
        assert!(heads.is_head(2, "PLANNING 7") && !heads.is_head(2, "PLANNING 20"));
    }

    #[test]
    fn numbered_headings_of_the_text_stay() {
        let pages = kept(&[&["Day 1", "We meet."], &["Day 2", "We plan."], &["Day 3", "We build."]]);
        assert_eq!(pages[1], ["Day 2", "We plan."]);
    }

    #[test]
    fn page_numbers_in_every_dress_are_known() {
        for line in ["7", "- 7 -", "Page 3 of 7", "page 12", "3-4", "3 / 7", "xiv", "A3-12"] {
            assert!(is_page_number(line), "{line}");
        }
        for line in ["2020 was good", "Step 3", "I", "mix of 3", "3-4 people", "i"] {
            assert!(!is_page_number(line), "{line}");
        }
    }
}
