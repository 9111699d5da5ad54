//! `doctor`: what this machine has for the engine, what it lacks, and what to install next. Changes nothing but the
//! folder of compiled kernels.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use tunesmith_engine::backend::{self, Compute, Gpu, Toolkit, cuda_version};
use tunesmith_engine::process::machine_memory;

use super::device::automatic;
use super::exit_code::Failure;
use super::{print, problems};

/// How to get NVRTC without a toolkit.
const GET_NVRTC: &str =
    "`pip install -U nvidia-cuda-nvrtc`, or name the folder of libnvrtc.so.* with TUNESMITH_NVRTC";

/// Options of `doctor`.
#[derive(Args)]
pub(super) struct Options {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// All that was found.
#[derive(Serialize)]
struct Findings {
    /// What `--device auto` takes: `cpu`, `cuda:0`.
    device: String,
    cpu: Cpu,
    cuda: Cuda,
    nvrtc: Nvrtc,
    kernels: Kernels,
    /// Where cuBLASLt is; nothing uses it.
    cublaslt: Option<String>,
    /// The store's folder.
    store: String,
    /// What to do next, the most useful first.
    next: Vec<String>,
}

#[derive(Serialize)]
struct Cpu {
    instruction_sets: Vec<&'static str>,
    /// The one whose products are taken.
    kernels: &'static str,
    numerics: String,
    threads: usize,
    memory_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Cuda {
    /// The CUDA version of the driver.
    driver: Option<String>,
    gpus: Vec<Device>,
    /// Why no GPU is taken.
    problem: Option<String>,
}

#[derive(Serialize)]
struct Device {
    device: String,
    name: String,
    architecture: String,
    memory_bytes: u64,
    memory_free_bytes: Option<u64>,
    problem: Option<String>,
}

#[derive(Serialize)]
struct Nvrtc {
    place: Option<String>,
    version: Option<&'static str>,
    problem: Option<String>,
}

#[derive(Serialize)]
struct Kernels {
    architecture: String,
    /// `nvrtc`, or the `driver` from the portable PTX.
    compiled_by: &'static str,
    files: Vec<File>,
}

#[derive(Serialize)]
struct File {
    file: &'static str,
    /// Why NVRTC does not compile it.
    problem: Option<String>,
}

/// Looks, and shows.
pub(super) fn main(options: &Options, store: &Path) -> Result<(), Failure> {
    let cpu = cpu().map_err(|error| {
        problems::show_error(&error, Some(error.hint()));
        Failure::Usage
    })?;
    let findings = look(cpu, store);
    if options.json {
        print::json(&findings);
    } else {
        print::data(&lines(&findings).join("\n"));
    }
    Ok(())
}

fn look(cpu: Cpu, store: &Path) -> Findings {
    let taken = automatic();
    let mut next: Vec<String> =
        taken.as_ref().err().map(|error| error.hint().to_owned()).into_iter().collect();
    let devices = Gpu::all().unwrap_or_default().iter().map(device).collect();
    let cuda = Cuda {
        driver: cuda_version().ok().map(|(major, minor)| format!("{major}.{minor}")),
        gpus: devices,
        problem: taken.as_ref().err().map(ToString::to_string),
    };
    let architecture = taken
        .as_ref()
        .map_or_else(|_| Toolkit::PORTABLE.to_owned(), tunesmith_engine::backend::Gpu::architecture);
    let toolkit = Toolkit::found();
    let files: Vec<File> =
        toolkit.iter().flat_map(|toolkit| toolkit.compile(&architecture)).map(file).collect();
    let refused = files.iter().any(|file| file.problem.is_some());
    let compiled_by = if toolkit.is_ok() && !refused { "nvrtc" } else { "driver" };
    // Without a GPU nothing has to be compiled.
    if compiled_by == "driver" && taken.is_ok() {
        next.push(format!("for kernels made for this GPU: {GET_NVRTC}"));
    }
    let nvrtc = match &toolkit {
        Ok(toolkit) => Nvrtc {
            place: Some(toolkit.place().display().to_string()),
            version: Some(toolkit.version()),
            problem: None,
        },
        Err(missing) => Nvrtc { place: None, version: None, problem: Some(missing.to_string()) },
    };
    Findings {
        device: taken.map_or_else(|_| "cpu".to_owned(), |gpu| format!("cuda:{}", gpu.ordinal)),
        cpu,
        cuda,
        nvrtc,
        kernels: Kernels { architecture, compiled_by, files },
        cublaslt: Toolkit::cublaslt().map(|path| path.display().to_string()),
        store: store.display().to_string(),
        next,
    }
}

fn cpu() -> Result<Cpu, backend::BackendError> {
    let (instruction_sets, kernels) = backend::instruction_sets()?;
    let memory = machine_memory();
    Ok(Cpu {
        instruction_sets,
        kernels,
        numerics: Compute::cpu(1).numerics()?,
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        memory_bytes: memory.map(|(all, _)| all),
        memory_available_bytes: memory.map(|(_, available)| available),
    })
}

fn device(gpu: &Gpu) -> Device {
    let (checked, free) = (gpu.check(), gpu.free_bytes());
    let problem = checked.err().or(free.as_ref().err().cloned());
    Device {
        device: format!("cuda:{}", gpu.ordinal),
        name: gpu.name.clone(),
        architecture: gpu.architecture(),
        memory_bytes: gpu.memory_bytes,
        memory_free_bytes: free.ok(),
        problem: problem.map(|error| error.to_string()),
    }
}

fn file((file, compiled): (&'static str, Result<(), backend::NvrtcError>)) -> File {
    File { file, problem: compiled.err().map(|error| error.to_string()) }
}

fn lines(findings: &Findings) -> Vec<String> {
    let Findings { device, cpu, cuda, nvrtc, kernels, cublaslt, store, next } = findings;
    let row = |name: &str, text: String| format!("{name:9} {text}");
    let mut lines = vec![row("device", format!("{device}  (what `--device auto` takes)"))];
    lines.push(row(
        "cpu",
        format!(
            "{} of {}; {} threads; {} of {} memory available; {}",
            cpu.kernels,
            cpu.instruction_sets.join(", "),
            cpu.threads,
            gib(cpu.memory_available_bytes),
            gib(cpu.memory_bytes),
            cpu.numerics,
        ),
    ));
    let driver = cuda.driver.as_ref().map(|version| format!("CUDA {version}"));
    lines.push(row("driver", driver.or_else(|| cuda.problem.clone()).unwrap_or_default()));
    for gpu in &cuda.gpus {
        let memory = format!("{} of {} memory free", gib(gpu.memory_free_bytes), gib(Some(gpu.memory_bytes)));
        let problem = gpu.problem.as_ref().map(|problem| format!("; {problem}")).unwrap_or_default();
        lines.push(row(&gpu.device, format!("{}, {}; {memory}{problem}", gpu.name, gpu.architecture)));
    }
    let found = nvrtc.version.zip(nvrtc.place.as_ref()).map(|(version, place)| format!("{version}, {place}"));
    lines.push(row("nvrtc", found.or_else(|| nvrtc.problem.clone()).unwrap_or_default()));
    let compiled = kernels.files.iter().filter(|file| file.problem.is_none()).count();
    let text = match kernels.compiled_by {
        "nvrtc" => format!("{compiled} files compiled for {}", kernels.architecture),
        _ => format!("the driver compiles the portable ones ({})", Toolkit::PORTABLE),
    };
    lines.push(row("kernels", text));
    for File { file, problem } in &kernels.files {
        // The compiler's log runs over many lines; the JSON has them all.
        let first = problem.as_ref().and_then(|problem| problem.lines().next());
        lines.extend(first.map(|first| row("", format!("{file}: {first}"))));
    }
    lines.push(row("cublaslt", cublaslt.clone().unwrap_or_else(|| "not found; nothing needs it".to_owned())));
    lines.push(row("store", store.clone()));
    lines.extend(next.iter().map(|next| row("next", next.clone())));
    lines
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)))
}
