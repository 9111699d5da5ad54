//! Runs the PTX that NVRTC really emits on the CPU, warp by warp and block by block, and finds what
//! compute-sanitizer would: accesses out of bounds, races, reads of what was never written, copies that were
//! not waited for, diverged barriers. Knows nothing of the engine or its kernels.

mod counts;
mod exec;
mod fault;
mod parse;

use std::fmt;

pub use counts::Counts;
pub use fault::{Fault, FaultKind};

/// A program: the kernels and constants of one PTX text.
#[derive(Debug)]
pub struct Module(parse::Module);

/// A line of PTX that cannot be read.
#[derive(Debug, Clone)]
pub struct ParseError {
    pub line: u32,
    pub text: String,
    pub detail: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in PTX line {} `{}`", self.detail, self.line, self.text)
    }
}

impl std::error::Error for ParseError {}

impl Module {
    /// Whether there is a kernel of that name.
    pub fn has(&self, kernel: &str) -> bool {
        self.0.kernels.contains_key(kernel)
    }

    /// Reads PTX as NVRTC emits it.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        parse::module(ptx).map(Self).map_err(|detail| ParseError { line: 0, text: String::new(), detail })
    }
}

/// The size of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// A kernel's argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Pointer(u64),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    F32(f32),
}

/// In which order the warps of a block, and the blocks of a grid, run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Forward,
    Reverse,
}

/// A device's global memory.
pub struct Device {
    gpu: exec::Gpu,
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

impl Device {
    pub fn new() -> Self {
        Self { gpu: exec::Gpu::new() }
    }

    /// The address of `bytes` bytes, uninitialised, a multiple of 256.
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        self.gpu.bufs.push(vec![0xa5; bytes]);
        (self.gpu.bufs.len() as u64) << 36
    }

    pub fn free(&mut self, address: u64) {
        self.gpu.bufs[(address >> 36) as usize - 1] = Vec::new();
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let at = (address & ((1 << 36) - 1)) as usize;
        self.gpu.bufs[(address >> 36) as usize - 1][at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn fill(&mut self, address: u64, byte: u8, len: usize) {
        let at = (address & ((1 << 36) - 1)) as usize;
        self.gpu.bufs[(address >> 36) as usize - 1][at..at + len].fill(byte);
    }

    pub fn read(&self, address: u64, len: usize) -> &[u8] {
        let at = (address & ((1 << 36) - 1)) as usize;
        &self.gpu.bufs[(address >> 36) as usize - 1][at..at + len]
    }

    pub fn order(&mut self, order: Order) {
        self.gpu.reverse = order == Order::Reverse;
    }

    /// Runs a kernel to its end, or to its first fault.
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        launch: &Launch,
        arguments: &[Arg],
    ) -> Result<Counts, Fault> {
        let fault = |kind, detail: String| Fault {
            kind,
            detail,
            kernel: kernel.to_owned(),
            ptx_line: 0,
            instruction: String::new(),
            source: None,
            block: [0; 3],
            warp: 0,
            lane: None,
            address: None,
        };
        let Some(found) = module.0.kernels.get(kernel) else {
            return Err(fault(FaultKind::Arguments, format!("no kernel `{kernel}`")));
        };
        self.gpu.stats = exec::Stats::default();
        self.gpu.consts.clone_from(&module.0.consts);
        if let Err(error) =
            self.gpu.launch(found, launch.grid, launch.block, launch.shared as usize, arguments)
        {
            let kind = if error.contains("deadlock") {
                FaultKind::Deadlock
            } else if error.contains("arg") || error.contains("param") {
                FaultKind::Arguments
            } else {
                FaultKind::UnknownInstruction
            };
            return Err(fault(kind, error));
        }
        if let Some(problem) = self.gpu.stats.problems.keys().next() {
            let kind = if problem.contains("race") {
                FaultKind::SharedRace
            } else if problem.contains("misaligned") {
                FaultKind::Misaligned
            } else if problem.contains("out of bounds global") {
                FaultKind::OutOfBounds
            } else if problem.contains("before it is written") {
                FaultKind::PendingCopy
            } else if problem.contains("bar.sync") {
                FaultKind::BarrierDivergence
            } else if problem.contains("shfl") {
                FaultKind::InactiveLane
            } else {
                FaultKind::SharedOutOfBounds
            };
            let mut fault = fault(kind, problem.clone());
            let line = problem.split("line ").nth(1).and_then(|x| x.split(':').next()?.parse().ok());
            fault.source = line.map(|line| (String::new(), line));
            return Err(fault);
        }
        let stats = &self.gpu.stats;
        Ok(Counts {
            warp_instructions: stats.instrs,
            lane_instructions: stats.lane_instrs,
            mma: stats.mma,
            global_load_bytes: stats.gl_bytes,
            global_load_sectors: stats.gl_sectors,
            global_store_bytes: stats.gs_bytes,
            global_store_sectors: stats.gs_sectors,
            shared_accesses: stats.shared_acc,
            bank_conflicts: stats.bank_extra,
            barriers: 0,
            opcodes: stats.ops.clone(),
        })
    }
}
