//! The command line: one file a command, one enum variant each. This file parses, opens the store and the
//! manifest, and hands over; `exit_code` says what the shell sees.

mod bench;
mod cache;
mod check;
mod device;
mod doctor;
mod exit_code;
mod explain;
mod graph;
mod model;
mod plan;
mod print;
mod problems;
mod progress;
mod run;
mod runs;
mod schema;
mod sweep;
mod watch;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tunesmith_pipeline::graph::Pipeline;
use tunesmith_pipeline::manifest::{self, Loaded, ManifestErrors, Overrides};
use tunesmith_pipeline::store::Store;

use crate::stages::STAGES;
use exit_code::Failure;

/// Turns a person's own notes into their own assistant model.
#[derive(Parser)]
#[command(name = "tunesmith", version, about, disable_help_subcommand = true)]
struct Cli {
    /// Folder of the store [default: $TUNESMITH_CACHE, else `cache`]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a manifest and say everything that is wrong with it
    Check(check::Options),
    /// Show what a run would do, and why
    Plan(plan::Options),
    /// Run what is not in the store yet
    Run(run::Options),
    /// Run the trials of a sweep and compare them
    Sweep(sweep::Options),
    /// Say why a stage would run again
    Explain(explain::Options),
    /// Draw the graph of stages
    Graph(graph::Options),
    /// Print the JSON Schema of the manifest, for editors
    Schema(schema::Options),
    /// Look at past runs
    #[command(subcommand)]
    Runs(runs::Command),
    /// Look after the store
    #[command(subcommand)]
    Cache(cache::Command),
    /// Look at models and at what they would learn
    #[command(subcommand)]
    Model(model::Command),
    /// Measure how fast the engine is here
    #[command(subcommand)]
    Bench(bench::Command),
    /// Say what this machine has for the engine, what it lacks, and what to install next
    Doctor(doctor::Options),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Extract the text of one PDF as JSON (the child process of `ingest`)
    #[command(hide = true)]
    ExtractPdf {
        /// The file
        path: PathBuf,
    },
}

/// What every command that reads a manifest takes.
#[derive(Args)]
struct ManifestArgs {
    /// The manifest, YAML or TOML
    manifest: PathBuf,
    #[command(flatten)]
    params: ParamArgs,
}

/// What changes the params of a manifest.
#[derive(Args)]
struct ParamArgs {
    /// Take the params of this profile
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Set a param, `--set rank=32`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
    /// Take params from a YAML, TOML or JSON file; may be repeated
    #[arg(long = "params", value_name = "FILE")]
    params: Vec<PathBuf>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, as in `--set rank=32`".to_owned()),
    }
}

impl ManifestArgs {
    /// Loads the manifest, and shows nothing.
    fn read(&self) -> Result<Loaded, ManifestErrors> {
        manifest::load(&self.manifest, &self.params.overrides(), STAGES)
    }

    /// Loads the manifest; what is wrong with it is shown here.
    fn load(&self, json: bool) -> Result<Pipeline, Failure> {
        load(&self.manifest, &self.params, json)
    }
}

impl ParamArgs {
    /// Whether the params are those of the manifest.
    fn is_empty(&self) -> bool {
        self.profile.is_none() && self.set.is_empty() && self.params.is_empty()
    }

    fn overrides(&self) -> Overrides {
        Overrides { profile: self.profile.clone(), set: self.set.clone(), params_files: self.params.clone() }
    }
}

/// Loads a manifest; what is wrong with it is shown here.
fn load(manifest: &Path, params: &ParamArgs, json: bool) -> Result<Pipeline, Failure> {
    match manifest::load(manifest, &params.overrides(), STAGES) {
        Ok(loaded) => {
            problems::show_warnings(&loaded.warnings);
            Ok(loaded.pipeline)
        }
        Err(errors) => {
            problems::show(&errors, json);
            Err(Failure::Usage)
        }
    }
}

/// Parses the command line and runs the command.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(missing) = tunesmith_engine::backend::check_instruction_set() {
        problems::show_error(&missing, Some("unset `TUNESMITH_CPU`: the fastest set is then taken"));
        return Failure::Usage.into();
    }
    let store = || open_store(cli.cache.clone());
    let ended = match cli.command {
        Command::Check(options) => check::main(&options),
        Command::Plan(options) => store().and_then(|store| plan::main(&options, &store)),
        Command::Run(options) => store().and_then(|store| run::main(&options, &store)),
        Command::Sweep(options) => store().and_then(|store| sweep::main(&options, &store)),
        Command::Explain(options) => store().and_then(|store| explain::main(&options, &store)),
        Command::Graph(options) => graph::main(&options),
        Command::Schema(options) => {
            schema::main(&options);
            Ok(())
        }
        Command::Runs(command) => store().and_then(|store| runs::main(&command, &store)),
        Command::Cache(command) => store().and_then(|store| cache::main(&command, &store)),
        Command::Model(command) => model::main(&command, store),
        Command::Bench(command) => bench::main(&command),
        Command::Doctor(options) => {
            let folder = store_folder(cli.cache.clone());
            if folder.is_dir() {
                keep_kernels(&folder);
            }
            doctor::main(&options, &folder)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(
                shell,
                &mut <Cli as clap::CommandFactory>::command(),
                "tunesmith",
                &mut script,
            );
            print::data(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
        Command::ExtractPdf { path } => return crate::corpus::pdf::extract_pdf_main(&path),
    };
    ended.map_or_else(ExitCode::from, |()| exit_code::OK)
}

fn open_store(folder: Option<PathBuf>) -> Result<Store, Failure> {
    let folder = store_folder(folder);
    keep_kernels(&folder);
    Store::open(&folder).map_err(|error| {
        let hint = error.hint().unwrap_or("name another folder with `--cache DIR` or TUNESMITH_CACHE");
        problems::show_error(&error, Some(hint));
        Failure::Run
    })
}

fn store_folder(named: Option<PathBuf>) -> PathBuf {
    named
        .or_else(|| std::env::var_os("TUNESMITH_CACHE").filter(|value| !value.is_empty()).map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("cache"))
}

fn keep_kernels(store: &Path) {
    tunesmith_engine::backend::keep_kernels_in(store.join("cubins"));
}
