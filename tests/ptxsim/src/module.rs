//! A program: the kernels and constants of one PTX text.

use std::collections::BTreeMap;

use crate::decode::{self, Globals};
use crate::program::Kernel;
use crate::syntax::{self, ParseError, Place};

/// A PTX text, decoded once and run many times.
pub struct Module {
    kernels: BTreeMap<String, Kernel>,
    constants: Vec<u8>,
    lines: Vec<String>,
    files: BTreeMap<u32, String>,
}

/// A source file and a line in it.
type Source = Option<(Box<str>, u32)>;

impl Module {
    /// Reads PTX as NVRTC emits it. An instruction that the interpreter does not know is no error here: it faults when
    /// it is run.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        let lines: Vec<String> = ptx.lines().map(str::to_owned).collect();
        let text = syntax::parse(ptx)?;
        let globals = Globals::new(&text);
        let mut kernels = BTreeMap::new();
        for body in &text.kernels {
            let kernel = decode::kernel(body, &globals).map_err(|trouble| trouble.at(&lines))?;
            kernels.insert(kernel.name.clone(), kernel);
        }
        let constants = globals.constants;
        Ok(Self { kernels, constants, lines, files: text.files })
    }

    /// The names of the kernels, sorted.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    pub(crate) fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.get(name)
    }

    pub(crate) fn constants(&self) -> &[u8] {
        &self.constants
    }

    /// A line of the PTX, from 1.
    pub(crate) fn line(&self, line: u32) -> &str {
        self.lines.get(line as usize - 1).map_or("", |line| line.trim())
    }

    /// The line in the kernel's own file, and if it calls a function of another file that was inlined, the line there.
    pub(crate) fn source(&self, place: Option<Place>) -> (Source, Source) {
        let Some(place) = place else { return (None, None) };
        let name = |(file, line): (u32, u32)| {
            let path = self.files.get(&file).cloned().unwrap_or_else(|| format!("file {file}"));
            Some((path.into(), line))
        };
        let is_inlined = place.own != place.in_kernel_file;
        (name(place.in_kernel_file), name(place.own).filter(|_| is_inlined))
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("kernels", &self.kernels.keys()).finish_non_exhaustive()
    }
}
