//! What `train` would learn from rows, without training: their tokens, which of them count, and every row that it
//! would refuse. The same tokenizer and the same checks as the stage itself. Knows no terminal and no store.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use tunesmith_engine::tokenizer::{Piece, Tokenizer};
use tunesmith_engine::trainer::{self, TokenizedExample};
use tunesmith_pipeline::stage::StageError;

use super::params::Params;
use super::turns;
use crate::corpus::formats::{Format, read_examples};
use crate::corpus::{Example, read_table};

/// Rows as `train` sees them.
#[derive(Debug, Serialize)]
pub(crate) struct Preview {
    /// All rows.
    pub(crate) rows: usize,
    /// Tokens of the rows that can be trained on.
    pub(crate) tokens: usize,
    /// Those of them that the loss counts.
    pub(crate) supervised_tokens: usize,
    /// Most tokens of a row.
    pub(crate) longest: usize,
    /// Most tokens a row may have.
    pub(crate) max_length: Option<usize>,
    /// The row with the fewest tokens that count, and how many.
    pub(crate) least_supervised: Option<(String, usize)>,
    /// The tokens that end an answer; every row that is not among `problems` ends its answers in one of them.
    pub(crate) end_of_turn: Vec<String>,
    /// Rows that cannot be trained on.
    pub(crate) problems: Vec<Problem>,
    /// The first rows, token by token.
    pub(crate) examples: Vec<Shown>,
}

/// A row that cannot be trained on.
#[derive(Debug, Serialize)]
pub(crate) struct Problem {
    pub(crate) id: String,
    pub(crate) reason: String,
}

/// A row, token by token.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    pub(crate) id: String,
    pub(crate) supervised_tokens: usize,
    pub(crate) tokens: Vec<Piece>,
}

/// Tokenises all of `examples` and shows the first `shown` of them.
pub(crate) fn preview(
    tokenizer: &Tokenizer,
    examples: &[Example],
    max_length: Option<usize>,
    shown: usize,
) -> Preview {
    let (mut rows, mut problems) = (Vec::<TokenizedExample>::new(), Vec::new());
    for example in examples {
        let row = [(example.id.clone(), turns(&example.messages))];
        match trainer::prepare(tokenizer, &row, max_length.unwrap_or(usize::MAX)) {
            Ok(prepared) => rows.extend(prepared),
            Err(found) => problems.extend(found.into_iter().map(|problem| {
                let reason = problem.reason.to_string();
                Problem { id: problem.id, reason }
            })),
        }
    }
    let show = |example: &Example| {
        // A row that the template refuses is among the problems, with the reason.
        let tokens = tokenizer.pieces(&turns(&example.messages)).ok()?;
        let supervised_tokens = tokens.iter().filter(|piece| piece.supervised).count();
        Some(Shown { id: example.id.clone(), supervised_tokens, tokens })
    };
    let least = rows.iter().min_by_key(|row| row.supervised_tokens());
    Preview {
        rows: examples.len(),
        tokens: rows.iter().map(|row| row.tokens.len()).sum(),
        supervised_tokens: rows.iter().map(TokenizedExample::supervised_tokens).sum(),
        longest: rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0),
        max_length,
        least_supervised: least.map(|row| (row.id.clone(), row.supervised_tokens())),
        end_of_turn: tokenizer.end_of_turn_ids().iter().filter_map(|&id| tokenizer.token(id)).collect(),
        problems,
        examples: examples.iter().filter_map(show).take(shown).collect(),
    }
}

/// Most tokens of one row of a `train` stage with these parameters.
pub(crate) fn max_length(with: &Value) -> Result<usize, StageError> {
    let params: Params = serde_json::from_value(with.clone()).map_err(|error| {
        StageError::new("stage::params", format!("parameters do not fit the stage: {error}"))
    })?;
    Ok(params.max_length())
}

/// The rows of a table that a stage wrote.
pub(crate) fn rows_of_table(table: &Path) -> Result<Vec<Example>, StageError> {
    Ok(read_table(table)?)
}

/// The rows of a file in any format that `load` reads.
pub(crate) fn rows_of_file(file: &Path) -> Result<Vec<Example>, StageError> {
    let bytes = fs_err::read(file)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    read_examples(&name, &bytes, Format::Auto, None).map_err(|bad| {
        let first = bad.first().map_or((0, ""), |row| (row.line, row.reason.as_str()));
        let text = format!("{} rows cannot be read, the first because {}", bad.len(), first.1);
        StageError::new("load::rows", text).at(file, Some(first.0))
    })
}
