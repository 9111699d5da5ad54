//! What of CUDA's toolkit is here, for those who want to know what to install. Only NVRTC is used; nothing is needed.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LAZY};
use rayon::prelude::*;

use super::library::Surroundings;
use super::nvrtc::Compiler;
pub use super::nvrtc::NvrtcError;
use super::program::{Kept, PORTABLE_ARCHITECTURE, Program};

/// A working NVRTC.
#[derive(Debug)]
pub struct Toolkit(&'static Compiler);

impl Toolkit {
    /// What the portable kernels in this program are compiled for.
    pub const PORTABLE: &'static str = PORTABLE_ARCHITECTURE;

    /// The one that is found first.
    ///
    /// # Errors
    /// None works; each that was found is named.
    pub fn found() -> Result<Self, NvrtcError> {
        Compiler::found().map(Self)
    }

    /// Its file, or its name where the system's loader found it.
    pub fn place(&self) -> &'static Path {
        self.0.place()
    }

    /// `V13.0.88`
    pub fn version(&self) -> &'static str {
        self.0.version()
    }

    /// Each file of `kernels/` by name, compiled for `architecture` (`sm_90`) and kept as a training would.
    pub fn compile(&self, architecture: &str) -> Vec<(&'static str, Result<(), NvrtcError>)> {
        let kept = Kept::here();
        let compile = |program: &'static Program| {
            (program.name.as_str(), program.cubin(self.0, architecture, &kept).map(|_| ()))
        };
        Program::all().par_iter().map(compile).collect()
    }

    /// Where cuBLASLt is, if it is here.
    pub fn cublaslt() -> Option<PathBuf> {
        let here = |path: &PathBuf| {
            // SAFETY: NVIDIA's libraries have no conditions on when they are loaded.
            path.is_absolute() || unsafe { Library::open(Some(path), RTLD_LAZY) }.is_ok()
        };
        Surroundings::here().cublaslt().into_iter().find(here)
    }
}
