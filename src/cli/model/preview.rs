//! `model preview`: rows as training sees them, token by token. Of a manifest's train stage, from the results its
//! needs left in the store; or of any model with a file of conversations.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use tunesmith_engine::tokenizer::{Piece, Tokenizer};
use tunesmith_pipeline::graph::{Pipeline, Stage};
use tunesmith_pipeline::runner;
use tunesmith_pipeline::stage::{StageError, StageKind as _};
use tunesmith_pipeline::store::Store;

use super::super::exit_code::Failure;
use super::super::print::{self, Paint};
use super::super::{ParamArgs, load, problems};
use super::failed;
use crate::corpus::Example;
use crate::stages::train::preview::{Preview, Shown};
use crate::stages::train::{Train, open_tokenizer, preview};

/// Rows named among those that cannot be trained on.
const PROBLEMS_NAMED: usize = 10;

/// Options of `model preview`.
#[derive(Args)]
pub(in crate::cli) struct Options {
    /// The manifest, YAML or TOML
    #[arg(required_unless_present = "model", conflicts_with = "model")]
    manifest: Option<PathBuf>,
    /// The train stage, where the manifest has several
    #[arg(conflicts_with = "model")]
    stage: Option<String>,
    #[command(flatten)]
    params: ParamArgs,
    /// Instead of a manifest: a GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH", requires = "data")]
    model: Option<PathBuf>,
    /// Rows for that model: messages, alpaca, ShareGPT and what else `load` reads
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Option<PathBuf>,
    /// The rows of a manifest to look at
    #[arg(long, value_enum, default_value_t = Part::Train)]
    split: Part,
    /// Rows to show; all are counted and checked
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// Show a table with the id of each token
    #[arg(long)]
    ids: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    /// `train.jsonl`
    Train,
    /// `validation.jsonl`
    Validation,
}

impl Part {
    fn table(self) -> &'static str {
        match self {
            Self::Train => "train.jsonl",
            Self::Validation => "validation.jsonl",
        }
    }
}

/// What is looked at.
struct Subject {
    tokenizer: Tokenizer,
    examples: Vec<Example>,
    max_length: Option<usize>,
    /// For people: `train.jsonl of stage split`.
    name: String,
}

/// Tokenises and shows. A row that cannot be trained on is a failure.
pub(super) fn main(options: &Options, store: impl FnOnce() -> Result<Store, Failure>) -> Result<(), Failure> {
    let subject = match (&options.manifest, &options.model, &options.data) {
        (Some(manifest), ..) => {
            let pipeline = load(manifest, &options.params, options.json)?;
            of_stage(&pipeline, &store()?, options)?
        }
        (None, Some(model), Some(data)) => {
            let tokenizer = Tokenizer::open(model).map_err(|error| {
                problems::show_error(&error, Some("`--model` takes a GGUF file or a Hugging Face folder"));
                Failure::Run
            })?;
            let examples = preview::rows_of_file(data).map_err(|error| failed(&error))?;
            Subject { tokenizer, examples, max_length: None, name: data.display().to_string() }
        }
        _ => unreachable!("BUG: the command line asks for one of them"),
    };
    let Subject { tokenizer, examples, max_length, name } = subject;
    let found = preview::preview(&tokenizer, &examples, max_length, options.rows);
    if options.json {
        let mut value = json!(found);
        value["source"] = json!(name);
        print::json(&value);
    } else {
        show(&found, &name, options.ids);
    }
    if found.problems.is_empty() { Ok(()) } else { Err(Failure::Run) }
}

/// The rows of a train stage, if all that it needs stands in the store.
fn of_stage(pipeline: &Pipeline, store: &Store, options: &Options) -> Result<Subject, Failure> {
    let stage = train_stage(pipeline, options.stage.as_deref())?;
    let mut standing = Vec::new();
    let mut missing = Vec::new();
    for slot in ["data", "base"] {
        let need =
            stage.needs.iter().find(|need| need.slot == slot).expect("a loaded manifest fills every slot");
        let name = &pipeline.stage(need.stage).name;
        let found = runner::standing(pipeline, store, name)
            .map_err(|error| problems::show_runner(&error, options.json))?;
        match found {
            Some(found) => standing.push(found),
            None => missing.push(name.as_str()),
        }
    }
    let [data, base] = standing.as_slice() else {
        let manifest = pipeline.path.display();
        let error = StageError::new(
            "preview::not_run",
            format!(
                "`{}` would learn from results that are not there yet: `{}`",
                stage.name,
                missing.join("`, `")
            ),
        );
        return Err(failed(&error.hint(format!("tunesmith run {manifest} {}", missing.join(" ")))));
    };
    let table = options.split.table();
    let open = || -> Result<Subject, StageError> {
        Ok(Subject {
            tokenizer: open_tokenizer(&base.artifact.folder)?,
            examples: preview::rows_of_table(&data.artifact.file(table)?)?,
            max_length: Some(preview::max_length(&stage.with)?),
            name: format!("{table} of stage `{}`", data.artifact.stage),
        })
    };
    open().map_err(|error| failed(&error))
}

/// The stage of this name, or the only one that trains.
fn train_stage<'p>(pipeline: &'p Pipeline, name: Option<&str>) -> Result<&'p Stage, Failure> {
    let trains: Vec<&Stage> =
        pipeline.stages.iter().filter(|stage| stage.kind.name() == Train.name()).collect();
    let names: Vec<String> = trains.iter().map(|stage| format!("`{}`", stage.name)).collect();
    let refused = |message: String| {
        let hint = match names.as_slice() {
            [] => "only what a `train` stage learns can be shown".to_owned(),
            names => format!("name one of {}", names.join(", ")),
        };
        failed(&StageError::new("preview::stage", message).hint(hint));
        Failure::Usage
    };
    match (name, trains.as_slice()) {
        (None, [only]) => Ok(only),
        (None, []) => Err(refused(format!("`{}` has no stage that trains", pipeline.name))),
        (None, _) => Err(refused(format!("`{}` has {} stages that train", pipeline.name, trains.len()))),
        (Some(name), _) => trains
            .iter()
            .find(|stage| stage.name == name)
            .copied()
            .ok_or_else(|| refused(format!("`{}` has no stage `{name}` that trains", pipeline.name))),
    }
}

fn show(found: &Preview, name: &str, ids: bool) {
    let paint = Paint::stdout();
    for row in &found.examples {
        let title = format!(
            "row `{}`: {} tokens, {} learnt",
            printable(&row.id, Lines::Escaped),
            row.tokens.len(),
            row.supervised_tokens
        );
        print::data(&paint.bold(&title));
        print::data(if ids { table(row, paint) } else { running_text(row, paint) }.trim_end());
        print::data("");
    }
    let share = 100.0 * found.supervised_tokens as f64 / found.tokens.max(1) as f64;
    print::data(&format!(
        "{name}: {} rows, {} tokens, {} learnt ({share:.1} %)",
        found.rows, found.tokens, found.supervised_tokens
    ));
    if let Some((id, tokens)) = &found.least_supervised {
        let limit = found.max_length.map(|limit| format!(" of at most {limit}")).unwrap_or_default();
        let id = printable(id, Lines::Escaped);
        print::data(&format!("longest row {}{limit}; fewest learnt {tokens}, in `{id}`", found.longest));
    }
    if found.problems.is_empty() {
        let ends = found.end_of_turn.join("` or `");
        print::data(&paint.green(&format!("every answer ends in `{ends}`, which is learnt")));
    }
    let count = found.problems.len();
    for problem in found.problems.iter().take(PROBLEMS_NAMED) {
        print::data(&paint.red(&format!(
            "row `{}` {}",
            printable(&problem.id, Lines::Escaped),
            problem.reason
        )));
    }
    if count > PROBLEMS_NAMED {
        print::data(&paint.red(&format!("and {} more", count - PROBLEMS_NAMED)));
    }
    if !found.examples.is_empty() && !ids {
        print::data(&legend(paint));
    }
}

fn legend(paint: Paint) -> String {
    if paint.is_on() {
        let (learnt, marker) = (paint.green("learnt"), paint.yellow("special token"));
        format!("{learnt}, {marker}, {}; every other token is underlined", paint.dim("only read"))
    } else {
        "[learnt] in brackets, all else is only read".to_owned()
    }
}

/// The conversation as the model reads it: what is learnt in green or in brackets, every other token underlined
/// where there are colours, so that one can see where each ends.
fn running_text(row: &Shown, paint: Paint) -> String {
    let mut text = String::new();
    let mut inside = false;
    for (index, piece) in row.tokens.iter().enumerate() {
        let shown = printable(&piece.text, Lines::Kept);
        if paint.is_on() {
            text.push_str(&paint.token(&shown, piece.supervised, piece.special, index % 2 == 1));
            continue;
        }
        if piece.supervised != inside {
            text.push(if inside { ']' } else { '[' });
            inside = piece.supervised;
        }
        text.push_str(&shown);
    }
    if inside {
        text.push(']');
    }
    text
}

/// A line for each token.
fn table(row: &Shown, paint: Paint) -> String {
    let mut lines = Vec::new();
    for (index, Piece { id, text, supervised, special }) in row.tokens.iter().enumerate() {
        let label = if *supervised { "learnt" } else { "-" };
        // A token that only goes on with a letter has no text of its own.
        let shown =
            if text.is_empty() { "…".to_owned() } else { format!("`{}`", printable(text, Lines::Escaped)) };
        let shown = paint.token(&shown, *supervised, *special, false);
        lines.push(format!("{index:>5} {id:>7}  {label:<6}  {shown}"));
    }
    lines.join("\n")
}

/// What becomes of line breaks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    Kept,
    Escaped,
}

/// The text without anything that a terminal would obey.
fn printable(text: &str, lines: Lines) -> String {
    let mut out = String::new();
    for letter in text.chars() {
        match letter {
            '\n' if lines == Lines::Kept => out.push('\n'),
            letter if letter.is_control() => out.extend(letter.escape_default()),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_cannot_command_the_terminal() {
        assert_eq!(printable("a\x1b[2J\n\tb", Lines::Kept), "a\\u{1b}[2J\n\\tb");
        assert_eq!(printable("a\nb", Lines::Escaped), "a\\nb");
    }
}
