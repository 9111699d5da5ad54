//! A device for tests where there is none: runs the PTX that NVRTC makes of `kernels/` in the interpreter of
//! `tests/ptxsim`, which stops at the first access out of bounds, race or value that nobody wrote.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use ptxsim::Module;

use super::device::{Arg, Device, DeviceError, Launch, Usage};
use super::nvrtc::{Compiler, LINES};
use super::program::{PORTABLE_ARCHITECTURE, Program};

/// The interpreter and what was asked of it.
#[derive(Debug)]
pub(crate) struct Simulator {
    memory: Mutex<Memory>,
    usage: Usage,
}

struct Memory {
    device: ptxsim::Device,
    failure: Option<DeviceError>,
    traffic: Traffic,
}

/// What went between host and device, and what was started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) bytes_written: usize,
    pub(crate) bytes_read: usize,
    pub(crate) launches: BTreeMap<&'static str, usize>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("failure", &self.failure).finish_non_exhaustive()
    }
}

/// The modules of all files, by the names of their kernels: of NVRTC as it is here, with the lines of the sources.
static MODULES: LazyLock<BTreeMap<&'static str, Module>> = LazyLock::new(|| {
    let compiler = Compiler::found().unwrap_or_else(|error| panic!("{error}"));
    let parsed = |program: &'static Program| {
        let ptx = program.ptx(compiler, PORTABLE_ARCHITECTURE, &[LINES]);
        let ptx = ptx.unwrap_or_else(|error| panic!("`{}`: {error}", program.name));
        let module = Module::parse(&ptx).unwrap_or_else(|error| panic!("`{}`: {error}", program.name));
        (program.name.as_str(), module)
    };
    Program::all().iter().map(parsed).collect()
});

fn module(kernel: &str) -> &'static Module {
    let module = MODULES.values().find(|module| module.kernels().any(|name| name == kernel));
    module.unwrap_or_else(|| panic!("no file of `kernels/` has `{kernel}`"))
}

thread_local! {
    static LATEST: RefCell<Option<Arc<Simulator>>> = const { RefCell::new(None) };
}

impl Simulator {
    pub(crate) fn new() -> Arc<Self> {
        let memory = Memory { device: ptxsim::Device::new(), failure: None, traffic: Traffic::default() };
        let simulator = Arc::new(Self { memory: Mutex::new(memory), usage: Usage::default() });
        LATEST.set(Some(simulator.clone()));
        simulator
    }

    /// The one that was made last by this thread.
    pub(crate) fn latest() -> Arc<Self> {
        LATEST.with_borrow(Clone::clone).expect("a device was made")
    }

    /// What happened since the last call.
    pub(crate) fn traffic(&self) -> Traffic {
        std::mem::take(&mut self.memory().traffic)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Device for Simulator {
    fn allocate(&self, bytes: usize) -> u64 {
        self.memory().device.allocate(bytes)
    }

    fn free(&self, address: u64) {
        if address != 0 {
            self.memory().device.free(address);
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let mut memory = self.memory();
        memory.traffic.bytes_written += bytes.len();
        if !bytes.is_empty() {
            memory.device.write(address, bytes);
        }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        let mut memory = self.memory();
        memory.traffic.bytes_read += bytes.len();
        if !bytes.is_empty() {
            bytes.copy_from_slice(memory.device.read(address, bytes.len()));
        }
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) {
        let mut memory = self.memory();
        let values = memory.device.read(from, bytes).to_vec();
        memory.device.write(to, &values);
    }

    fn clear(&self, address: u64, bytes: usize) {
        self.memory().device.fill(address, 0, bytes);
    }

    fn launch(&self, kernel: &'static str, launch: Launch, args: &[Arg]) {
        let mut memory = self.memory();
        if memory.failure.is_some() {
            return;
        }
        *memory.traffic.launches.entry(kernel).or_default() += 1;
        let args: Vec<ptxsim::Arg> = args
            .iter()
            .map(|arg| match *arg {
                Arg::Pointer(address) => ptxsim::Arg::Pointer(address),
                Arg::I32(value) => ptxsim::Arg::I32(value),
                Arg::I64(value) => ptxsim::Arg::I64(value),
                Arg::U64(value) => ptxsim::Arg::U64(value),
                Arg::F32(value) => ptxsim::Arg::F32(value),
            })
            .collect();
        let size = ptxsim::Launch { grid: launch.grid, block: [launch.block, 1, 1], shared: launch.shared };
        let module = module(kernel);
        if let Err(fault) = memory.device.launch(module, kernel, &size, &args) {
            panic!("`{kernel}` {launch:?}: {fault}");
        }
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn free_bytes(&self) -> u64 {
        1 << 30
    }

    fn failure(&self) -> Option<DeviceError> {
        self.memory().failure.clone()
    }

    fn architecture(&self) -> String {
        "sm_80".to_owned()
    }
}
