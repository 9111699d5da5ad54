//! `tunesmith`: one binary that turns a person's notes into their own assistant model.

mod bench;
mod cli;
mod corpus;
mod evaluate;
mod inspect;
mod llm;
mod report;
mod stages;

use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TUNESMITH_LOG").unwrap_or_else(|_| "error".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    cli::main()
}
