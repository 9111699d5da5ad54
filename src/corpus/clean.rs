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

/// Joins the wrapped lines of one paragraph. A break is a wrap if the next word would not have fitted into the
/// widest line; every other break is meant and stays, as do breaks before list items and table rows.
pub(crate) fn unwrap_lines(paragraph: &str) -> String {
    let lines = paragraph.lines().map(str::trim_end).collect::<Vec<_>>();
    let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0);
    let mut out = String::with_capacity(paragraph.len());
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push(if is_wrap(lines[index - 1], line, width) { ' ' } else { '\n' });
        }
        out.push_str(if index > 0 && out.ends_with(' ') { line.trim_start() } else { line });
    }
    out
}

fn is_wrap(line: &str, next: &str, width: usize) -> bool {
    let Some(word) = next.split_whitespace().next() else { return false };
    width >= WRAP_WIDTH_MIN && !starts_item(next) && line.chars().count() + 1 + word.chars().count() > width
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
        let fields = "Date: 3 May\nPeople: Ann, Bo\nTopic: the budget";
        assert_eq!(unwrap_lines(fields), fields);
        let list = "- a first point that is rather long and goes on and on\n- second";
        assert_eq!(unwrap_lines(list), list);
    }

    #[test]
    fn tidy_leaves_one_blank_line() {
        assert_eq!(tidy("\n\na  \n\n\n\nb\nc\n\n"), "a\n\nb\nc");
    }
}
