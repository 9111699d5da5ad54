//! From the raw blocks of a PDF to clean text, one text a page. Applies the rules of [`clean`](super::clean) in
//! the one order that works: running heads first (they part sentences), then characters, then hyphens, then
//! bullets, and at last sentences that a head had parted are joined. Knows no file and no limit.

use super::clean::bullets;
use super::clean::garble::{self, GARBLED_SCORE};
use super::clean::hyphens::{Break, Vocabulary, dehyphenate, mend_ligatures};
use super::clean::running_heads::RunningHeads;
use super::clean::{characters, goes_on, one_line, tidy};
use super::pdf::{Block, Extraction, RawPage};

/// Cells longer than this are passages; a row of them is written as paragraphs.
const CELL_CHARS_MAX: usize = 200;

/// What became of one page.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Page {
    /// Clean text, and the heading it stands under if that is on an earlier page.
    Text { number: u32, section: Option<String>, text: String },
    /// Nothing to read, and no sign that there should be.
    Empty { number: u32 },
    /// An image and no text.
    Scanned { number: u32 },
    /// The share of words that are none.
    Garbled { number: u32, score: f64 },
}

/// Cleans every page of a document.
pub(crate) fn clean(extraction: &Extraction) -> Vec<Page> {
    let mut vocabulary = Vocabulary::default();
    for block in extraction.pages.iter().flat_map(|page| &page.blocks) {
        block_texts(block).into_iter().for_each(|text| vocabulary.add(text));
    }
    let lines =
        extraction.pages.iter().map(|page| page.blocks.iter().map(block_line).collect()).collect::<Vec<_>>();
    let heads = RunningHeads::learn(&lines);
    let mut section = None;
    let mut pages = Vec::with_capacity(extraction.pages.len());
    for (page_idx, (page, lines)) in extraction.pages.iter().zip(&lines).enumerate() {
        let above = section.clone();
        let blocks = page
            .blocks
            .iter()
            .zip(heads.mark(page_idx, lines))
            .filter(|(_, drop)| !drop)
            .map(|(block, _)| block);
        let blocks = blocks
            .flat_map(|block| clean_block(block, &|line| heads.is_head(page_idx, line), &vocabulary))
            .collect::<Vec<_>>();
        if let Some(Piece::Heading(_, text)) =
            blocks.iter().rfind(|piece| matches!(piece, Piece::Heading(..)))
        {
            section = Some(text.clone());
        }
        pages.push(judge(page, above, &write(&join_parted(blocks))));
    }
    pages
}

fn judge(page: &RawPage, section: Option<String>, text: &str) -> Page {
    let number = page.number;
    let text = tidy(text);
    let score = garble::score(&text);
    if text.is_empty() {
        let lost = page.unreadable_runs > 0;
        return match (lost, page.images) {
            (true, _) => Page::Garbled { number, score: 1.0 },
            (false, 0) => Page::Empty { number },
            (false, _) => Page::Scanned { number },
        };
    }
    if score > GARBLED_SCORE { Page::Garbled { number, score } } else { Page::Text { number, section, text } }
}

/// A cleaned block.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Heading(u8, String),
    Item(u8, String, String),
    Text(String),
    /// Lines to keep as they are: code, table rows.
    Lines(String),
}

fn block_texts(block: &Block) -> Vec<&str> {
    match block {
        Block::Heading { text, .. }
        | Block::Item { text, .. }
        | Block::Text { text }
        | Block::Code { text } => {
            vec![text]
        }
        Block::Table { rows } => rows.iter().flatten().map(String::as_str).collect(),
    }
}

/// A block as one line, for telling heads. Only text blocks can be heads.
fn block_line(block: &Block) -> String {
    match block {
        Block::Heading { text, .. } | Block::Text { text } => one_line(&characters(text)),
        Block::Table { rows } if rows.len() == 1 => one_line(&rows[0].join(" ")),
        Block::Item { .. } | Block::Code { .. } | Block::Table { .. } => String::new(),
    }
}

fn clean_block(block: &Block, is_head: &dyn Fn(&str) -> bool, vocabulary: &Vocabulary) -> Vec<Piece> {
    let prose = |text: &str| {
        let text = characters(&mend_ligatures(text, vocabulary));
        one_line(&dehyphenate(&text, vocabulary, Break::Space))
    };
    match block {
        Block::Heading { level, text } => vec![Piece::Heading(*level, prose(text))],
        Block::Code { text } => vec![Piece::Lines(characters(text).trim_end().to_owned())],
        Block::Text { text } => split_items(&prose(text), None),
        Block::Item { depth, marker, text } => split_items(&prose(text), Some((*depth, marker))),
        Block::Table { rows } => {
            let cell = |cell: &String| {
                if is_head(&characters(cell)) { String::new() } else { cell.trim().to_owned() }
            };
            let rows = rows.iter().map(|row| row.iter().map(cell).collect()).collect::<Vec<Vec<_>>>();
            table_pieces(&rows, &prose)
        }
    }
    .into_iter()
    .filter(|piece| !matches!(piece, Piece::Text(text) | Piece::Heading(_, text) if text.is_empty()))
    .collect()
}

/// The bullets inside a block become items; `item` is what the extractor already knew of the block.
fn split_items(text: &str, item: Option<(u8, &String)>) -> Vec<Piece> {
    let (lead, items) = bullets::split(text);
    let (depth, lead_piece) = match item {
        Some((depth, marker)) => (depth + 1, Piece::Item(depth, marker.clone(), lead.clone())),
        None => (0, Piece::Text(lead.clone())),
    };
    let depth = if lead.is_empty() { depth.saturating_sub(1) } else { depth };
    let lead = (!lead.is_empty()).then_some(lead_piece);
    lead.into_iter().chain(items.into_iter().map(|text| Piece::Item(depth, "-".to_owned(), text))).collect()
}

/// A table as readable text: one line a row, cells parted by ` | `, long cells as paragraphs. A *table* whose cells
/// go on in the next row is columns of prose that the extractor mistook, and is read column by column.
fn table_pieces(rows: &[Vec<String>], prose: &dyn Fn(&str) -> String) -> Vec<Piece> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let column = |index: usize| {
        rows.iter().filter_map(move |row| row.get(index)).filter(|cell| !cell.is_empty()).collect::<Vec<_>>()
    };
    if (0..columns).any(|index| is_prose_column(&column(index))) {
        let joined =
            |index: usize| column(index).into_iter().map(String::as_str).collect::<Vec<_>>().join(" ");
        return (0..columns).flat_map(|index| split_items(&prose(&joined(index)), None)).collect();
    }
    let mut pieces = Vec::new();
    for row in rows {
        let cells = row
            .iter()
            .filter(|cell| !cell.is_empty())
            .map(|cell| cell_text(&prose(cell)))
            .collect::<Vec<_>>();
        let is_long = cells.iter().any(|cell| cell.chars().count() > CELL_CHARS_MAX);
        match pieces.last_mut() {
            _ if cells.is_empty() => {}
            _ if is_long => pieces.extend(cells.into_iter().map(Piece::Text)),
            Some(Piece::Lines(lines)) => lines.extend(["\n", &cells.join(" | ")].map(str::to_owned)),
            _ => pieces.push(Piece::Lines(cells.join(" | "))),
        }
    }
    pieces
}

/// The bullets inside a cell become semicolons, so that a row stays a line.
fn cell_text(cell: &str) -> String {
    let (lead, items) = bullets::split(cell);
    match (lead.as_str(), items.len()) {
        (_, 0) => lead,
        ("", _) => items.join("; "),
        (lead, _) => format!("{lead} {}", items.join("; ")),
    }
}

/// Half of the cells or more go on, in lower case, where the one above stopped without an end.
fn is_prose_column(cells: &[&String]) -> bool {
    let pairs = cells.len().saturating_sub(1);
    let going_on = cells.windows(2).filter(|pair| goes_on(pair[0], pair[1])).count();
    pairs >= 2 && going_on * 2 >= pairs
}

/// Joins a paragraph or item with the paragraph that goes on after it.
fn join_parted(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if let (Piece::Text(next), Some(Piece::Text(text) | Piece::Item(_, _, text))) =
            (&piece, out.last_mut())
            && goes_on(text, next)
        {
            text.push(' ');
            text.push_str(next);
            continue;
        }
        out.push(piece);
    }
    out
}

fn write(pieces: &[Piece]) -> String {
    let mut out = String::new();
    let mut before: Option<&Piece> = None;
    for piece in pieces {
        let in_list = matches!((before, piece), (Some(Piece::Item(..)), Piece::Item(..)));
        if before.is_some() {
            out.push_str(if in_list { "\n" } else { "\n\n" });
        }
        match piece {
            Piece::Heading(level, text) => {
                out.extend(std::iter::repeat_n('#', usize::from((*level).clamp(1, 6))));
                out.push(' ');
                out.push_str(text);
            }
            Piece::Item(depth, marker, text) => {
                out.extend(std::iter::repeat_n("  ", usize::from((*depth).min(6))));
                out.push_str(marker);
                out.push(' ');
                out.push_str(text);
            }
            Piece::Text(text) | Piece::Lines(text) => out.push_str(text),
        }
        before = Some(piece);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32, blocks: &[Block]) -> RawPage {
        RawPage { number, blocks: blocks.to_vec(), images: 0, unreadable_runs: 0 }
    }

    fn text(text: &str) -> Block {
        Block::Text { text: text.to_owned() }
    }

    fn heading(text: &str) -> Block {
        Block::Heading { level: 2, text: text.to_owned() }
    }

    fn texts(pages: Vec<RawPage>) -> Vec<String> {
        let extraction = Extraction { title: None, page_count: 1, pages, failed: vec![] };
        clean(&extraction)
            .into_iter()
            .map(|page| match page {
                Page::Text { text, .. } => text,
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn a_sentence_parted_by_a_running_head_is_whole_again() {
        let sheet = |number: u32| {
            page(
                number,
                &[
                    text("One thing is true."),
                    text("Two things are true."),
                    text("Three things are true."),
                    text("Much relies on years of costly"),
                    heading(&format!("PLANNING {}", number * 2)),
                    text("planning and on agen- cies that wait."),
                    text("Five things are true."),
                    text("Six things are true."),
                    text("Seven things are true."),
                ],
            )
        };
        let pages = texts(vec![sheet(1), sheet(2), sheet(3)]);
        assert!(pages[1].contains("years of costly planning and on agencies that wait."), "{}", pages[1]);
        assert!(!pages[1].contains("PLANNING"));
    }

    #[test]
    fn columns_of_prose_are_read_column_by_column() {
        let rows = [
            ["for in a good proposal. If you do", "Primary"],
            ["research to find this kind of", "• Vendors"],
            ["team, then ask.", "• Buyers"],
        ];
        let rows = rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect();
        let pages = texts(vec![page(1, &[Block::Table { rows }])]);
        assert_eq!(
            pages,
            [
                "for in a good proposal. If you do research to find this kind of team, then ask.\n\nPrimary\n\n- Vendors\n- Buyers"
            ]
        );
    }

    #[test]
    fn rows_of_a_table_are_lines_with_bars() {
        let rows = vec![vec!["Name".into(), "Role".into()], vec!["Ann".into(), "• lead • boss".into()]];
        assert_eq!(texts(vec![page(1, &[Block::Table { rows }])]), ["Name | Role\nAnn | lead; boss"]);
    }

    #[test]
    fn items_are_a_list() {
        let item = |text: &str| Block::Item { depth: 0, marker: "-".to_owned(), text: text.to_owned() };
        let pages = texts(vec![page(1, &[text("They are:"), item("one"), item("two • three"), item("• •")])]);
        assert_eq!(pages, ["They are:\n\n- one\n- two\n  - three"]);
    }

    #[test]
    fn scans_blanks_and_garble_are_told_apart() {
        let scan = RawPage { images: 1, ..page(1, &[]) };
        let lost = RawPage { unreadable_runs: 9, ..page(3, &[]) };
        let garbled =
            page(4, &[text("1RYHPEHU 'HYHORSLQJ /HDGHUV )0\u{3}\u{19}\u{10}\u{15}\u{15} 6WDWHV $UP\\")]);
        let extraction = Extraction {
            title: None,
            page_count: 4,
            pages: vec![scan, page(2, &[]), lost, garbled],
            failed: vec![],
        };
        let pages = clean(&extraction);
        assert_eq!(
            pages[..3],
            [Page::Scanned { number: 1 }, Page::Empty { number: 2 }, Page::Garbled { number: 3, score: 1.0 }]
        );
        assert!(matches!(pages[3], Page::Garbled { number: 4, .. }));
    }

    #[test]
    fn a_page_knows_the_heading_of_the_page_before() {
        let extraction = Extraction {
            title: None,
            page_count: 2,
            pages: vec![page(1, &[heading("Leave"), text("How to ask.")]), page(2, &[text("It goes on.")])],
            failed: vec![],
        };
        let Page::Text { section, .. } = &clean(&extraction)[1] else { panic!("no text") };
        assert_eq!(section.as_deref(), Some("Leave"));
    }
}
