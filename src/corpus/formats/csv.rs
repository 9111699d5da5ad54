//! RFC 4180: fields between commas, quoted where they hold commas, quotes or line ends. The first record names
//! the columns. Knows no column by name.

use serde_json::{Map, Value};

use super::{BadRow, Located};

/// Each record as an object of texts, with the line it starts on; empty fields are left out.
pub(super) fn objects(text: &str) -> Vec<Located> {
    let mut records = records(text).into_iter();
    let header = match records.next() {
        Some((_, Ok(header))) => header,
        Some((line, Err(reason))) => return vec![Err(BadRow { line, reason })],
        None => return Vec::new(),
    };
    records
        .map(|(line, record)| {
            let record = record.map_err(|reason| BadRow { line, reason })?;
            if record.len() != header.len() {
                let reason = format!("{} fields, but the header has {}", record.len(), header.len());
                return Err(BadRow { line, reason });
            }
            let fields = header.iter().zip(record).filter(|(_, field)| !field.is_empty());
            let row: Map<String, Value> =
                fields.map(|(name, field)| (name.trim().to_owned(), Value::String(field))).collect();
            Ok((line, row))
        })
        .collect()
}

/// Where the reader stands in a field.
enum Position {
    /// Before its first character.
    Start,
    /// In a field without quotes.
    Bare,
    /// Between quotes.
    Quoted,
    /// After a quote inside quotes: the end, or the first half of a doubled quote.
    AfterQuote,
}

type Record = (usize, Result<Vec<String>, String>);

fn records(text: &str) -> Vec<Record> {
    let mut records = Vec::new();
    let (mut record, mut field, mut position) = (Vec::new(), String::new(), Position::Start);
    let (mut line, mut started, mut broken) = (1, 1, None);
    // A last record without a line end is ended by the one added here.
    let text = text.strip_suffix('\n').unwrap_or(text);
    for character in text.chars().chain(['\n']) {
        position = match (position, character) {
            (Position::Quoted, '"') => Position::AfterQuote,
            (Position::Quoted, other) => {
                field.push(other);
                Position::Quoted
            }
            (Position::AfterQuote, '"') => {
                field.push('"');
                Position::Quoted
            }
            (Position::Start, '"') => Position::Quoted,
            (_, ',') => {
                record.push(std::mem::take(&mut field));
                Position::Start
            }
            (position, '\n') => {
                if !matches!(position, Position::AfterQuote) && field.ends_with('\r') {
                    field.pop();
                }
                record.push(std::mem::take(&mut field));
                let whole = std::mem::take(&mut record);
                if whole.iter().any(|field| !field.is_empty()) || broken.is_some() {
                    records.push((started, broken.take().map_or(Ok(whole), Err)));
                }
                started = line + 1;
                Position::Start
            }
            (Position::AfterQuote, '\r') => Position::AfterQuote,
            (Position::AfterQuote, other) => {
                broken.get_or_insert_with(|| format!("`{other}` after the closing quote of a field"));
                Position::AfterQuote
            }
            (_, other) => {
                field.push(other);
                Position::Bare
            }
        };
        line += usize::from(character == '\n');
    }
    if matches!(position, Position::Quoted) {
        records.push((started, Err("a quoted field has no end".to_owned())));
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&[&str]]) {
        let found: Vec<Vec<String>> = records(text).into_iter().map(|(_, record)| record.unwrap()).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn quotes_commas_and_line_ends() {
        check("a,b\r\n1,2\r\n", &[&["a", "b"], &["1", "2"]]);
        check("\"x,\"\"y\"\"\",\"two\nlines\"\n,", &[&["x,\"y\"", "two\nlines"]]);
        check("a,,c", &[&["a", "", "c"]]);
        check("", &[]);
        check("it \"is\",fine", &[&["it \"is\"", "fine"]]);
    }

    #[test]
    fn bad_records_name_their_line() {
        let rows = objects("question,answer\n\"multi\nline\",x\nonly one\n\"a\"b,c\nok,ok\n\"open,\n");
        let lines: Vec<_> =
            rows.iter().map(|row| row.as_ref().map(|(line, _)| *line).map_err(|bad| bad.line)).collect();
        assert_eq!(lines, [Ok(2), Err(4), Err(5), Ok(6), Err(7)]);
    }
}
