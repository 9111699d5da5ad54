//! Bytes of a text file to clean paragraphs: finds the encoding, joins wrapped lines, mends hyphens at line ends.
//! Knows no markup: a line that looks like a list item or a heading is only left on a line of its own.

use super::clean::hyphens::{Break, Vocabulary, dehyphenate};
use super::clean::{characters, tidy, unwrap_lines};

/// A text and how it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub(crate) text: String,
    /// `utf-8`, `utf-16le`, `utf-16be` or `windows-1252`.
    pub(crate) encoding: &'static str,
}

/// More NUL bytes than this share of a file (1 in 1000) make it binary.
const NUL_SHARE: usize = 1000;

/// Decodes a text file: a byte-order mark decides; without one it is UTF-8 if it is valid UTF-8, else
/// Windows-1252, the superset of Latin-1 that such files really use. `None` for binary data.
pub(crate) fn decode(bytes: &[u8]) -> Option<Decoded> {
    if let Some((encoding, mark)) = encoding_rs::Encoding::for_bom(bytes) {
        let (text, _) = encoding.decode_without_bom_handling(&bytes[mark..]);
        let encoding = match encoding.name() {
            "UTF-16LE" => "utf-16le",
            "UTF-16BE" => "utf-16be",
            _ => "utf-8",
        };
        return Some(Decoded { text: text.into_owned(), encoding });
    }
    if bytes.iter().filter(|byte| **byte == 0).count() * NUL_SHARE > bytes.len() {
        return None;
    }
    Some(match std::str::from_utf8(bytes) {
        Ok(text) => Decoded { text: text.to_owned(), encoding: "utf-8" },
        Err(_) => {
            Decoded { text: encoding_rs::WINDOWS_1252.decode(bytes).0.into_owned(), encoding: "windows-1252" }
        }
    })
}

/// The clean text of a plain text file: paragraphs parted by one blank line.
pub(crate) fn paragraphs(text: &str) -> String {
    let text = tidy(&characters(text));
    let mut vocabulary = Vocabulary::default();
    vocabulary.add(&text);
    let text = dehyphenate(&text, &vocabulary, Break::Line);
    text.split("\n\n").map(unwrap_lines).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latin1_note_comes_out_right() {
        let decoded = decode(b"Gespr\xE4ch mit J\xF6rg: 5 \x80 pro Caf\xE9").unwrap();
        assert_eq!(decoded.text, "Gespräch mit Jörg: 5 € pro Café");
        assert_eq!(decoded.encoding, "windows-1252");
    }

    #[test]
    fn byte_order_marks_decide_and_vanish() {
        assert_eq!(decode(b"\xEF\xBB\xBFnote").unwrap(), Decoded { text: "note".into(), encoding: "utf-8" });
        assert_eq!(
            decode(b"\xFF\xFEn\0\xF6\0").unwrap(),
            Decoded { text: "nö".into(), encoding: "utf-16le" }
        );
        assert_eq!(decode(b"\xFE\xFF\0n\0o").unwrap(), Decoded { text: "no".into(), encoding: "utf-16be" });
    }

    #[test]
    fn binary_data_is_refused() {
        assert_eq!(decode(b"\x7FELF\0\0\0\x01\0\0"), None);
    }

    #[test]
    fn wrapped_paragraphs_are_joined_and_hyphens_mended() {
        let text = "Minutes of the meeting about the yearly manage-\r\nment review, held in Boston with every lead\r\npresent.\r\n\r\n\r\nNext: May";
        assert_eq!(
            paragraphs(text),
            "Minutes of the meeting about the yearly management review, held in Boston with every lead present.\n\nNext: May"
        );
    }
}
