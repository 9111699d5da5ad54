//! `model`: looking at models and at what they would learn, before anything runs.

mod inspect;
mod preview;
mod pull;

use clap::Subcommand;
use tunesmith_pipeline::stage::StageError;
use tunesmith_pipeline::store::Store;

use super::exit_code::Failure;
use super::problems;

/// What to look at.
#[derive(Subcommand)]
pub(super) enum Command {
    /// Show rows as training sees them: their tokens, and which of them are learnt
    Preview(preview::Options),
    /// Say what a model or an adapter is
    Inspect(inspect::Options),
    /// Fetch a model's files as they are
    Pull(pull::Options),
}

/// Shows it.
pub(super) fn main(command: &Command, store: impl FnOnce() -> Result<Store, Failure>) -> Result<(), Failure> {
    match command {
        Command::Preview(options) => preview::main(options, store),
        Command::Inspect(options) => inspect::main(options),
        Command::Pull(options) => pull::main(options),
    }
}

/// Shows an error of the work behind a command.
fn failed(error: &StageError) -> Failure {
    problems::show_error(error, error.hint.as_deref());
    Failure::Run
}
