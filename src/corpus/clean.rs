//! What extracted text needs before anyone should read it: one spelling of each character, no wrapped lines,
//! no broken hyphens, no running heads, one bullet. Each rule is a function of text alone; none knows a file
//! format. [`pages`](super::pages) applies them to a PDF, [`plain`](super::plain) and
//! [`markdown`](super::markdown) take the first two.

use unicode_normalization::UnicodeNormalization;

pub(crate) mod bullets;
pub(crate) mod garble;
pub(crate) mod hyphens;
pub(crate) mod running_heads;

/// Below this width a block of lines is verse, an address or a list of fields, and its breaks are meant.
const WRAP_WIDTH_MIN: usize = 40;

/// A line of this length without a mark at its end goes on, whatever follows.
const OPEN_LINE_MIN: usize = 60;

/// Nobody wraps text wider than this.
const WRAP_WIDTH_MAX: usize = 100;

/// One spelling of each character: NFC, ligatures spelled out, soft hyphens joined, line ends as `\n`, odd spaces
/// as a space, zero-width and control characters gone, symbol-font bullets as `•`. Everything else is kept: full
/// NFKC would also flatten `½`, `²` and `™`.
pub(crate) fn characters(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    let mut out = String::with_capacity(text.len());
    let mut chars = text.nfc().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\u{FB00}'..='\u{FB06}' => out.extend(char.nfkc()),
            '\u{AD}' => while chars.next_if(|next| next.is_whitespace()).is_some() {},
            '\r' | '\u{0B}' | '\u{0C}' | '\u{85}' | '\u{2028}' | '\u{2029}' => out.push('\n'),
            '\u{A0}' | '\u{2000}'..='\u{200A}' | '\u{202F}' | '\u{205F}' | '\u{3000}' => out.push(' '),
            '\u{200B}' | '\u{2060}' | '\u{FEFF}' => {}
            '\u{F0A7}' | '\u{F0B7}' | '\u{F0D8}' | '\u{F0FC}' => out.push('•'),
            _ if char.is_control() && !matches!(char, '\n' | '\t') => {}
            _ => out.push(char),
        }
    }
    out
}

/// Joins the wrapped lines of one paragraph; breaks that are meant stay. [`wraps`] tells them apart.
pub(crate) fn unwrap_lines(paragraph: &str) -> String {
    let lines = paragraph.lines().map(str::trim_end).collect::<Vec<_>>();
    let lengths = lines.iter().map(|line| line.chars().count()).collect::<Vec<_>>();
    let wraps = wraps(&lines, &lengths);
    let mut out = String::with_capacity(paragraph.len());
    for (index, line) in lines.iter().enumerate() {
        match index.checked_sub(1).map(|before| wraps[before]) {
            None => out.push_str(line),
            Some(true) => out.extend([" ", line.trim_start()]),
            Some(false) => out.extend(["\n", line]),
        }
    }
    out
}

/// For each line of a paragraph, whether the break behind it is a wrap. It is one where a sentence plainly goes on
/// (no mark at the end, and lower case after it or a long line before it), and, in a paragraph most of whose lines are full, behind every full
/// line. A line is full if the next word would not have fitted into the widest; lines over 100 characters hold
/// something that could not be broken, such as an address, and do not count as the widest.
/// Never a wrap: the break before a list item, a table row, a heading, or a field or speaker (`Ann: ...`).
///
/// `lengths` are the widths of the lines where they were wrapped, in characters.
pub(crate) fn wraps(lines: &[&str], lengths: &[usize]) -> Vec<bool> {
    let width = lengths.iter().copied().filter(|length| *length <= WRAP_WIDTH_MAX).max().unwrap_or(0);
    let is_full = |index: usize| {
        let word = lines[index + 1].split_whitespace().next().map_or(0, |word| word.chars().count());
        lengths[index] > WRAP_WIDTH_MAX || lengths[index] + 1 + word > width
    };
    let breaks = lines.len().saturating_sub(1);
    let full = (0..breaks).filter(|index| is_full(*index)).count();
    let proven = (0..breaks).any(|index| is_full(index) && lengths[index] <= WRAP_WIDTH_MAX);
    let is_wrapped = width >= WRAP_WIDTH_MIN && proven && full * 2 >= breaks;
    let is_wrap = |index: usize| {
        let is_open = goes_on(lines[index], lines[index + 1])
            || (lengths[index] >= OPEN_LINE_MIN && is_open(lines[index]));
        let is_field = starts_field(lines[index + 1], lengths[index]);
        !is_field && !starts_item(lines[index + 1]) && (is_open || (is_wrapped && is_full(index)))
    };
    (0..lines.len()).map(|index| index < breaks && is_wrap(index)).collect()
}

/// True if a sentence that stops at the end of `text` plainly goes on in `next`.
pub(crate) fn goes_on(text: &str, next: &str) -> bool {
    is_open(text) && next.trim_start().starts_with(char::is_lowercase)
}

/// True if `text` ends without a mark that ends a sentence.
fn is_open(text: &str) -> bool {
    let going_on = |char: char| char.is_alphanumeric() || matches!(char, ',' | '-' | '–' | '—' | '’' | '&');
    text.trim_end().ends_with(going_on)
}

/// True for a line that begins a field or a turn (`Ann: ...`). A word in lower case with a colon does so only behind
/// a short line; behind a long one it is a part of its sentence.
fn starts_field(line: &str, length_before: usize) -> bool {
    let mut words = line.split_whitespace();
    let is_key = words.next().is_some_and(|first| first.ends_with(':')) && words.next().is_some();
    is_key && (length_before < OPEN_LINE_MIN || line.trim_start().starts_with(char::is_uppercase))
}

/// True for a line that begins a list item, a table row, a heading or a quotation.
pub(crate) fn starts_item(line: &str) -> bool {
    let line = line.trim_start();
    let rest = line.trim_start_matches(|char: char| char.is_ascii_digit());
    let numbered = rest.len() < line.len() && line.len() - rest.len() <= 3;
    (numbered && (rest.starts_with(". ") || rest.starts_with(") ")))
        || ["- ", "* ", "+ ", "• ", "# ", "## ", "### ", "> ", "| "].iter().any(|mark| line.starts_with(mark))
}

/// Trims line ends, and leaves at most one blank line between blocks and none at the ends.
pub(crate) fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = false;
    for line in text.lines().map(str::trim_end) {
        if line.is_empty() {
            blank = true;
            continue;
        }
        if !out.is_empty() {
            out.push_str(if blank { "\n\n" } else { "\n" });
        }
        blank = false;
        out.push_str(line);
    }
    out
}

/// One space where a run of spaces and line breaks was, none at the ends.
pub(crate) fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ligatures_are_spelled_out_and_fractions_kept() {
        assert_eq!(characters("e\u{FB03}cient \u{FB01}le, ½ of 3²"), "efficient file, ½ of 3²");
    }

    #[test]
    fn soft_hyphens_join_what_they_part() {
        assert_eq!(characters("man\u{AD}age\u{AD}\nment"), "management");
    }

    #[test]
    fn odd_spaces_line_ends_and_controls_become_plain() {
        assert_eq!(characters("a\u{A0}b\r\nc\u{200B}d\u{3}\re"), "a b\ncd\ne");
        assert_eq!(characters("e\u{301}t\u{e9}"), "été");
    }

    #[test]
    fn wrapped_lines_are_joined() {
        let wrapped = "The product owner is the key person for any project,\nand must be a \
                       government employee who has the time\nfor it.";
        assert_eq!(unwrap_lines(wrapped).lines().count(), 1);
        assert!(unwrap_lines(wrapped).contains("project, and must"));
    }

    #[test]
    fn meant_breaks_stay() {
        for text in [
            "Date: 3 May\nPeople: Ann, Bo\nTopic: the budget",
            "- a first point that is rather long and goes on and on\n- second",
            "Ann: I think that we should wait for the numbers of May.\nBo: So do I.",
            "The first sentence stands on a line of its own.\nSo does this one.\nAnd this.\nEven this, the last.",
        ] {
            assert_eq!(unwrap_lines(text), text);
        }
    }

    #[test]
    fn a_sentence_that_goes_on_is_joined_whatever_the_width() {
        assert_eq!(
            unwrap_lines("See\nthe instructions for creating\na channel."),
            "See the instructions for creating a channel."
        );
    }

    #[test]
    fn tidy_leaves_one_blank_line() {
        assert_eq!(tidy("\n\na  \n\n\n\nb\nc\n\n"), "a\n\nb\nc");
    }
}
