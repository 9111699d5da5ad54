//! Words and marks, each with its line.

use super::ParseError;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Token<'a> {
    /// An identifier, opcode, directive, register or number: letters, digits and `_ $ % . ::`.
    Word(&'a str),
    /// What stands between quotes.
    Text(&'a str),
    Mark(char),
}

/// The tokens of a PTX text, read from the front.
pub(super) struct Tokens<'a> {
    lines: Vec<&'a str>,
    tokens: Vec<(Token<'a>, u32)>,
    next: usize,
}

impl<'a> Tokens<'a> {
    pub(super) fn new(text: &'a str) -> Result<Self, ParseError> {
        let lines: Vec<&str> = text.lines().collect();
        let mut tokens = Vec::new();
        let mut in_comment = false;
        for (number, &line) in (1u32..).zip(&lines) {
            let mut rest = line;
            loop {
                if in_comment {
                    let Some(end) = rest.find("*/") else { break };
                    rest = &rest[end + 2..];
                    in_comment = false;
                }
                rest = rest.trim_start();
                let Some(first) = rest.chars().next() else { break };
                if rest.starts_with("//") {
                    break;
                }
                if rest.starts_with("/*") {
                    in_comment = true;
                    rest = &rest[2..];
                    continue;
                }
                let (token, used) = if first == '"' {
                    let Some(end) = rest[1..].find('"') else {
                        return Err(error(&lines, number, "a text without its end"));
                    };
                    (Token::Text(&rest[1..=end]), end + 2)
                } else if is_word(first) {
                    let end = word_end(rest);
                    (Token::Word(&rest[..end]), end)
                } else {
                    (Token::Mark(first), first.len_utf8())
                };
                tokens.push((token, number));
                rest = &rest[used..];
            }
        }
        Ok(Self { lines, tokens, next: 0 })
    }

    pub(super) fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.next).map(|token| token.0)
    }

    /// The token after the next one.
    pub(super) fn peek_second(&self) -> Option<Token<'a>> {
        self.tokens.get(self.next + 1).map(|token| token.0)
    }

    /// The line of the next token.
    pub(super) fn line(&self) -> u32 {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(1, |token| token.1)
    }

    pub(super) fn take(&mut self) -> Option<Token<'a>> {
        let token = self.peek()?;
        self.next += 1;
        Some(token)
    }

    /// Takes `mark` if it is next.
    pub(super) fn takes(&mut self, mark: char) -> bool {
        let is_next = self.peek() == Some(Token::Mark(mark));
        self.next += usize::from(is_next);
        is_next
    }

    pub(super) fn expect(&mut self, mark: char) -> Result<(), ParseError> {
        if self.takes(mark) { Ok(()) } else { Err(self.error(&format!("`{mark}` is missing"))) }
    }

    pub(super) fn word(&mut self) -> Result<&'a str, ParseError> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.next += 1;
                Ok(word)
            }
            _ => Err(self.error("a name is missing")),
        }
    }

    /// The bits of a number, with its sign.
    pub(super) fn number(&mut self) -> Result<u64, ParseError> {
        let negative = self.takes('-');
        let word = self.word()?;
        let number = number(word).ok_or_else(|| self.error(&format!("`{word}` is not a number")))?;
        Ok(if negative { number.wrapping_neg() } else { number })
    }

    /// The rest of the line of the token just taken.
    pub(super) fn rest_of_line(&mut self) -> Vec<Token<'a>> {
        let line = self.tokens[self.next - 1].1;
        let start = self.next;
        while self.tokens.get(self.next).is_some_and(|token| token.1 == line) {
            self.next += 1;
        }
        self.tokens[start..self.next].iter().map(|token| token.0).collect()
    }

    /// Skips from the next `{` to the `}` that closes it.
    pub(super) fn skip_braces(&mut self) -> Result<(), ParseError> {
        let mut depth = 0;
        while let Some(token) = self.take() {
            match token {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => {
                    depth -= 1;
                    if depth == 0 {
                        return Ok(());
                    }
                }
                _ => {}
            }
        }
        Err(self.error("`}` is missing"))
    }

    /// An error at the next token.
    pub(super) fn error(&self, detail: &str) -> ParseError {
        error(&self.lines, self.line(), detail)
    }
}

fn error(lines: &[&str], line: u32, detail: &str) -> ParseError {
    let text = lines.get(line as usize - 1).map_or("", |line| line.trim());
    ParseError { line, text: text.to_owned(), detail: detail.to_owned() }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.')
}

/// A word ends before a lone colon, but `shared::cta` is one word.
fn word_end(text: &str) -> usize {
    let mut end = 0;
    loop {
        end += text[end..].find(|c| !is_word(c)).unwrap_or(text.len() - end);
        let joined = text[end..]
            .strip_prefix("::")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric()));
        if !joined {
            return end;
        }
        end += 2;
    }
}

/// An unsigned number: decimal, `0x`, or a float by its bits, `0f` (32) and `0d` (64).
pub(super) fn number(word: &str) -> Option<u64> {
    if word == "WARP_SZ" {
        return Some(32);
    }
    let lower = word.to_ascii_lowercase();
    for prefix in ["0f", "0d", "0x"] {
        if let Some(digits) = lower.strip_prefix(prefix) {
            return u64::from_str_radix(digits.trim_end_matches('u'), 16).ok();
        }
    }
    if let Some(digits) = lower.strip_prefix("0b") {
        return u64::from_str_radix(digits, 2).ok();
    }
    lower.trim_end_matches('u').parse().ok()
}
