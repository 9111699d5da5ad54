//! Which implementation of the operations computes, and where: what a caller chooses before there is a backend.

use std::sync::Arc;

use super::{Backend, Cpu, CudaError, Gpu, NoSuchSet, Reference, cpu, cuda};

/// Which implementation of [`Backend`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Plain loops, one thread: the oracle of tests.
    Reference,
    /// The fast path on a CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// That in f32, where it would round the factors of products.
    #[cfg(test)]
    CpuExact,
    /// Plain loops that round these factors.
    #[cfg(test)]
    Naive,
    /// [`BackendKind::Cuda`] in the interpreter of PTX.
    #[cfg(test)]
    Simulated,
}

/// Where and how wide to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// The implementation.
    pub kind: BackendKind,
    /// Threads of the `Cpu` backend; 0 means 1. Changes no result.
    pub threads: usize,
    /// Which GPU of the `Cuda` backend, counted from 0.
    pub device: usize,
}

/// Why there is no such backend here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    #[error(transparent)]
    InstructionSet(#[from] NoSuchSet),
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl BackendError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::InstructionSet(_) => "unset `TUNESMITH_CPU`: the fastest set is then taken",
            Self::Cuda(error) => error.hint(),
        }
    }
}

impl Compute {
    /// The fast path on a CPU.
    pub const fn cpu(threads: usize) -> Self {
        Self { kind: BackendKind::Cpu, threads, device: 0 }
    }

    /// An NVIDIA GPU.
    pub const fn cuda(device: usize) -> Self {
        Self { kind: BackendKind::Cuda, threads: 0, device }
    }

    /// The device of tests: the interpreter of PTX, or a GPU where `TUNESMITH_TEST_GPU` is set.
    #[cfg(test)]
    pub(crate) fn test_device() -> Self {
        match std::env::var_os("TUNESMITH_TEST_GPU") {
            Some(_) => Self::cuda(0),
            None => Self { kind: BackendKind::Simulated, threads: 1, device: 0 },
        }
    }

    /// The backend this describes.
    ///
    /// # Errors
    /// `TUNESMITH_CPU` names an instruction set that this CPU lacks, or the GPU cannot be used.
    pub fn backend(&self) -> Result<Arc<dyn Backend>, BackendError> {
        Ok(match self.kind {
            BackendKind::Reference => Arc::new(Reference::EXACT),
            BackendKind::Cpu => Arc::new(Cpu::new(self.threads)?),
            BackendKind::Cuda => Arc::new(cuda::Cuda::open(self.device)?),
            #[cfg(test)]
            BackendKind::CpuExact => Arc::new(Cpu::exact(self.threads)),
            #[cfg(test)]
            BackendKind::Naive => Arc::new(Reference::BF16),
            #[cfg(test)]
            BackendKind::Simulated => Arc::new(cuda::Cuda::new(cuda::simulator::Simulator::new())),
        })
    }

    /// What [`Backend::numerics`] will say, without making the backend.
    ///
    /// # Errors
    /// As [`Compute::backend`], as far as can be told.
    pub fn numerics(&self) -> Result<String, BackendError> {
        Ok(match self.kind {
            BackendKind::Cpu => cpu::numerics()?,
            BackendKind::Cuda => cuda::numerics(&Gpu::of(self.device)?.architecture()),
            _ => self.backend()?.numerics(),
        })
    }
}
