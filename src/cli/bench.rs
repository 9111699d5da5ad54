//! `bench`: how fast the engine is on this machine with a given model.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use tunesmith_engine::adapter::Targets;
use tunesmith_engine::base::Quantize;

use super::device::{DeviceArgs, Talk};
use super::exit_code::Failure;
use super::{print, problems};
use crate::bench::{
    self, Base, BenchError, Checked, Generation, GenerationFigures, KernelFigures, Kernels, SelfTest,
    Training, TrainingFigures,
};

/// What to measure.
#[derive(Subcommand)]
pub(super) enum Command {
    /// Training steps: tokens a second, memory, losses
    Train(TrainOptions),
    /// Generation: prompt tokens and generated tokens a second
    Generate(GenerateOptions),
    /// Operations one by one, against what the machine gives at most
    Kernels(KernelOptions),
    /// Whether every operation is right on this machine, against plain loops
    Selftest(SelftestOptions),
}

/// The model, and the machine.
#[derive(Args)]
pub(super) struct ModelArgs {
    /// A GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// How the linear layers rest in memory
    #[arg(long, value_enum, default_value_t = Stored::Nf4)]
    base: Stored,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// The machine, and where figures go.
#[derive(Args)]
pub(super) struct MachineArgs {
    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Write the figures as JSON to this file, `-` for stdout
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    /// 4 bits, as training uses it
    Nf4,
    /// 16 bits
    Bf16,
    /// Exactly the values of the file, which block formats keep as 32 bits
    Source,
}

#[derive(Clone, Copy, ValueEnum)]
enum Adapted {
    /// The projections of attention
    Attn,
    /// Every linear layer
    All,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Recompute {
    /// What the trainer does without a memory budget: nothing is computed twice
    Auto,
    /// Every layer is computed twice, which takes the least memory
    All,
    /// Nothing is computed twice
    None,
}

/// Options of `bench train`.
#[derive(Args)]
pub(super) struct TrainOptions {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of a step
    #[arg(long, value_name = "B", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens of a row
    #[arg(long, value_name = "T", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    seq: u32,
    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Which linear layers are adapted
    #[arg(long, value_enum, default_value_t = Adapted::All)]
    targets: Adapted,
    /// Steps that are measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Steps before them that are not
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: u16,
    /// Learning rate
    #[arg(long, default_value_t = 2e-4)]
    lr: f64,
    /// Largest norm of the gradients
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Begin with this PEFT adapter instead of a fresh one
    #[arg(long, value_name = "DIR")]
    adapter_init: Option<PathBuf>,
    /// Take tokens from this file of little-endian 32-bit integers
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Which layers are computed twice instead of kept
    #[arg(long, value_enum, default_value_t = Recompute::Auto)]
    recompute: Recompute,
}

/// Options of `bench generate`.
#[derive(Args)]
pub(super) struct GenerateOptions {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..))]
    prompt: u16,
    /// Tokens generated after it
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    tokens: u16,
    /// Sequences generated together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Times the whole is measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Measure nothing: go on greedily with each line of this file, and show each token's lead over the next
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "batch", "rounds"])]
    text: Option<PathBuf>,
}

/// Options of `bench kernels`.
#[derive(Args)]
pub(super) struct KernelOptions {
    #[command(flatten)]
    machine: MachineArgs,
    /// Rows of activations
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(1..))]
    tokens: u16,
    /// Times each operation is measured
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

/// Options of `bench selftest`.
#[derive(Args)]
pub(super) struct SelftestOptions {
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Measures and shows.
pub(super) fn main(command: &Command) -> Result<(), Failure> {
    let shown = match command {
        Command::Train(options) => train(options),
        Command::Generate(options) => generate(options),
        Command::Kernels(options) => kernels(options),
        Command::Selftest(options) => selftest(options),
    };
    shown.map_err(|error| {
        let hint = match &error {
            BenchError::Base { .. } => Some(
                "`--model` takes a GGUF file, or a folder with config.json, *.safetensors and tokenizer.json",
            ),
            BenchError::Tokens { .. } => Some("take fewer steps, or a longer file"),
            BenchError::Backend(missing) => Some(missing.hint()),
            _ => None,
        };
        problems::show_error(&error, hint);
        if matches!(error, BenchError::Backend(_)) { Failure::Usage } else { Failure::Run }
    })
}

fn train(options: &TrainOptions) -> Result<(), BenchError> {
    let base = open(&options.model)?;
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map(str::to_owned);
    let figures = bench::train(
        &base,
        &Training {
            batch: options.batch.into(),
            seq: options.seq as usize,
            rank: options.rank.into(),
            targets: match options.targets {
                Adapted::All => Targets::Auto,
                Adapted::Attn => Targets::Names(attention.into()),
            },
            steps: options.steps.into(),
            warmup: options.warmup.into(),
            learning_rate: options.lr,
            clip: options.clip,
            adapter_init: options.adapter_init.clone(),
            tokens: options.tokens.clone(),
            recompute: options.recompute == Recompute::All,
        },
    )?;
    let TrainingFigures { tok_s, step_ms, spread, peak_percent, peak_rss_bytes, .. } = &figures;
    let of_peak =
        peak_percent.map(|percent| format!(", {percent:.0} % of the machine's peak")).unwrap_or_default();
    let first = figures.losses.first().copied().unwrap_or_default();
    let last = figures.losses.last().copied().unwrap_or_default();
    show(
        &options.model.machine,
        &figures,
        &format!(
            "training: {tok_s:.0} tokens/s, {step_ms:.0} ms a step (spread {:.0} %){of_peak}, peak memory {} MiB, loss {first:.4} to {last:.4}",
            spread * 100.0,
            peak_rss_bytes >> 20,
        ),
    )
}

fn generate(options: &GenerateOptions) -> Result<(), BenchError> {
    let base = open(&options.model)?;
    if let Some(file) = &options.text {
        let texts = bench::go_on(&base, file, options.tokens.into())?;
        let lines: Vec<String> = texts.iter().map(|one| format!("{}{}", one.prompt, one.text)).collect();
        return show(&options.model.machine, &texts, &lines.join("\n---\n"));
    }
    let figures = bench::generate(
        &base,
        &Generation {
            prompt: options.prompt.into(),
            tokens: options.tokens.into(),
            batch: options.batch.into(),
            rounds: options.rounds.into(),
        },
    )?;
    let GenerationFigures { prefill_tok_s, decode_tok_s, spread, peak_rss_bytes, .. } = &figures;
    show(
        &options.model.machine,
        &figures,
        &format!(
            "generation: {prefill_tok_s:.0} prompt tokens/s, {decode_tok_s:.1} generated tokens/s (spread {:.0} %), peak memory {} MiB",
            spread * 100.0,
            peak_rss_bytes >> 20,
        ),
    )
}

fn kernels(options: &KernelOptions) -> Result<(), BenchError> {
    let (tokens, rounds) = (options.tokens.into(), options.rounds.into());
    let figures = bench::kernels(&Kernels { threads: options.machine.threads(), tokens, rounds })?;
    show(&options.machine, &figures, &kernel_lines(&figures))
}

fn selftest(options: &SelftestOptions) -> Result<(), BenchError> {
    let compute = options.device.compute(options.machine.threads(), Talk::On)?;
    let test = bench::selftest(&compute)?;
    let SelfTest { numerics, ok, operations } = &test;
    let line = |operation: &Checked| {
        let Checked { name, shape, error, allowed, ok, ms } = operation;
        let verdict = if *ok { "ok" } else { "WRONG" };
        format!("{verdict:6} {name:14} {shape:46} off by {error:.1e} of {allowed:.1e} {ms:8.2} ms")
    };
    let lines: Vec<String> = operations.iter().map(line).collect();
    show(&options.machine, &test, &format!("{numerics}\n{}", lines.join("\n")))?;
    let wrong = operations.iter().filter(|operation| !operation.ok).count();
    if *ok { Ok(()) } else { Err(BenchError::Wrong { wrong, operations: operations.len() }) }
}

/// A line for the machine and one for each operation.
fn kernel_lines(figures: &KernelFigures) -> String {
    let KernelFigures { numerics, threads, tokens, peak, kernels } = figures;
    let mut lines = vec![format!(
        "{numerics}, {threads} threads, {tokens} rows; at most {:.0} GFLOP/s ({:.0} a thread), {:.1} GB/s ({:.1} a thread)",
        peak.gflop_s, peak.thread_gflop_s, peak.gb_s, peak.thread_gb_s,
    )];
    lines.extend(kernels.iter().map(|figure| {
        let bench::KernelFigure { name, shape, ms, rate, unit, spread, peak_percent, .. } = figure;
        format!(
            "{name:20} {shape:22} {ms:9.3} ms {rate:7.1} {:8} {peak_percent:5.1} %  (spread {:.0} %)",
            unit.text(),
            spread * 100.0,
        )
    }));
    lines.join("\n")
}

fn open(model: &ModelArgs) -> Result<Base, BenchError> {
    let compute = model.device.compute(model.machine.threads(), Talk::On)?;
    let quantize = match model.base {
        Stored::Nf4 => Some(Quantize::Nf4),
        Stored::Bf16 => Some(Quantize::None),
        Stored::Source => None,
    };
    Base::new(&model.model, quantize, compute)
}

impl MachineArgs {
    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.map_or_else(cores, usize::from)
    }
}

fn show(machine: &MachineArgs, figures: &impl Serialize, line: &str) -> Result<(), BenchError> {
    match machine.json.as_deref() {
        None => print::data(line),
        Some(file) if file == Path::new("-") => print::json(figures),
        Some(file) => {
            print::note(line);
            let text = serde_json::to_string(figures).map_err(std::io::Error::from)?;
            fs_err::write(file, text + "\n")?;
        }
    }
    Ok(())
}
