//! `--device`: where the engine computes. `auto` takes a GPU that can, else the CPU, and says which and why; a GPU that
//! was asked for by name and cannot compute is bad usage.

use std::str::FromStr;

use clap::Args;
use tunesmith_engine::backend::{BackendError, Compute, CudaError, Gpu};

use tunesmith_pipeline::graph::Pipeline;

use super::exit_code::Failure;
use super::{print, problems};
use crate::stages;

/// Where to compute.
#[derive(Args)]
pub(super) struct DeviceArgs {
    /// Where the engine computes: `auto` (a GPU that can, else the CPU), `cpu`, `cuda` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = text.strip_prefix("cuda").map(|rest| match rest.strip_prefix(':') {
            None if rest.is_empty() => Some(0),
            None => None,
            Some(number) => number.parse().ok(),
        });
        match (text, cuda) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(Some(number))) => Ok(Self::Cuda(number)),
            _ => Err("write `auto`, `cpu`, `cuda` or `cuda:N`, as in `cuda:1`".to_owned()),
        }
    }
}

/// A GPU, or why none is taken.
pub(super) type Taken = Result<Gpu, CudaError>;

/// What `auto` takes.
pub(super) fn automatic() -> Taken {
    let gpus = Gpu::all()?;
    let checked: Vec<Taken> = gpus.into_iter().map(|gpu| gpu.usable().map(|()| gpu)).collect();
    let first = checked.iter().position(Result::is_ok).unwrap_or(0);
    checked.into_iter().nth(first).unwrap_or(Err(CudaError::NoGpu))
}

impl DeviceArgs {
    /// Lets the stages of the pipeline compute there, if any does. A device that cannot be used is shown here.
    pub(super) fn choose(&self, pipeline: &Pipeline, talk: Talk, as_json: bool) -> Result<(), Failure> {
        if self.device == Wanted::Auto && !stages::device::is_used_by(pipeline) {
            return Ok(());
        }
        self.compute(1, talk).and_then(stages::device::compute_on).map_err(|error| {
            problems::show_usage("device", &error, error.hint(), as_json);
            Failure::Usage
        })
    }

    /// The choice, with `threads` where it is the CPU. With [`Talk::On`], what `auto` takes is said on stderr.
    pub(super) fn compute(&self, threads: usize, talk: Talk) -> Result<Compute, BackendError> {
        let taken = match self.device {
            Wanted::Cpu => return Ok(Compute::cpu(threads)),
            Wanted::Cuda(ordinal) => {
                let gpu = Gpu::of(ordinal)?;
                gpu.usable()?;
                return Ok(Compute::cuda(ordinal));
            }
            Wanted::Auto => automatic(),
        };
        if talk == Talk::On {
            print::note(&match &taken {
                Ok(gpu) => format!("device: cuda:{} ({}, {})", gpu.ordinal, gpu.name, gpu.architecture()),
                Err(why) => format!("device: the CPU ({why})"),
            });
        }
        Ok(taken.map_or_else(|_| Compute::cpu(threads), |gpu| Compute::cuda(gpu.ordinal)))
    }
}

/// Whether a choice is talked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Talk {
    On,
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_kind_and_number() {
        let parsed = |text: &str| text.parse::<Wanted>();
        assert_eq!(parsed("auto"), Ok(Wanted::Auto));
        assert_eq!(parsed("cpu"), Ok(Wanted::Cpu));
        assert_eq!(parsed("cuda"), Ok(Wanted::Cuda(0)));
        assert_eq!(parsed("cuda:3"), Ok(Wanted::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda3", "cuda:x", "cuda:-1", ""] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
