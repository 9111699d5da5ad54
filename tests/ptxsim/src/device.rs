//! A device as a driver shows it: global memory, and launches of kernels with their limits.

use crate::block;
use crate::counts::{Counts, Tally};
use crate::execute::Machine;
use crate::fault::{Fault, FaultKind};
use crate::global::Global;
use crate::module::Module;
use crate::program::Kernel;
use crate::shared::Shared;
use crate::warp::{Position, Warp};

/// Shared memory that a kernel may declare.
const STATIC_SHARED_MAX: usize = 48 << 10;
/// Shared memory that a block may have when its kernel opts in (compute capability 9.0).
const SHARED_MAX: usize = 227 << 10;
const THREADS_MAX: u64 = 1024;
/// Warp instructions of a launch, unless the device is told otherwise: about a minute.
const BUDGET: u64 = 1 << 27;

/// The size of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// An argument of a kernel.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Arg {
    /// An address that `Device::allocate` gave, or one inside; 0 for null.
    Pointer(u64),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    F32(f32),
}

impl Arg {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Pointer(value) | Self::U64(value) => value.to_le_bytes().to_vec(),
            Self::I64(value) => value.to_le_bytes().to_vec(),
            Self::I32(value) => value.to_le_bytes().to_vec(),
            Self::U32(value) => value.to_le_bytes().to_vec(),
            Self::F32(value) => value.to_le_bytes().to_vec(),
        }
    }
}

/// In which order the warps of a block, and the blocks of a grid, run. A kernel that depends on it has a race, even
/// if none was reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// First to last.
    Forward,
    /// Last to first.
    Reverse,
}

/// Global memory, and how launches on it run.
pub struct Device {
    global: Global,
    order: Order,
    budget: u64,
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

impl Device {
    /// A device with nothing allocated that runs warps in order.
    pub fn new() -> Self {
        Self { global: Global::new(), order: Order::Forward, budget: BUDGET }
    }

    /// The address of `bytes` bytes, a multiple of 256. They are uninitialised: reading them in a kernel is a fault.
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        self.global.allocate(bytes)
    }

    /// Frees an allocation; using it afterwards is a fault. Its address is not given out again.
    ///
    /// # Panics
    /// If `address` is not that of a living allocation.
    #[track_caller]
    pub fn free(&mut self, address: u64) {
        assert!(self.global.free(address), "no allocation begins at {address:#x}");
    }

    /// Writes to an allocation, or inside one.
    ///
    /// # Panics
    /// If the bytes do not lie in one allocation.
    #[track_caller]
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        if let Err(mistake) = self.global.host_write(address, bytes) {
            panic!("the host writes {} at {address:#x}", mistake.0.detail);
        }
    }

    /// Sets `length` bytes.
    ///
    /// # Panics
    /// If the bytes do not lie in one allocation.
    #[track_caller]
    pub fn fill(&mut self, address: u64, byte: u8, length: usize) {
        self.write(address, &vec![byte; length]);
    }

    /// `length` bytes as they are, written or not: unwritten ones are 0xa5.
    ///
    /// # Panics
    /// If the bytes do not lie in one allocation.
    #[track_caller]
    pub fn read(&self, address: u64, length: usize) -> &[u8] {
        match self.global.host_read(address, length) {
            Ok(bytes) => bytes,
            Err(mistake) => panic!("the host reads {} at {address:#x}", mistake.0.detail),
        }
    }

    /// Whether each of `length` bytes has been written, by the host or by a kernel.
    ///
    /// # Panics
    /// If the bytes do not lie in one allocation.
    #[track_caller]
    pub fn is_written(&self, address: u64, length: usize) -> bool {
        match self.global.host_written(address, length) {
            Ok(is_written) => is_written,
            Err(mistake) => panic!("the host asks for {} at {address:#x}", mistake.0.detail),
        }
    }

    /// The order of warps and blocks in launches from now on.
    pub fn order(&mut self, order: Order) {
        self.order = order;
    }

    /// Lets each launch from now on run so many warp instructions at most; more is a `Runaway`.
    pub fn budget(&mut self, warp_instructions: u64) {
        self.budget = warp_instructions;
    }

    /// Runs a kernel to its end, or to its first fault.
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        launch: &Launch,
        arguments: &[Arg],
    ) -> Result<Counts, Fault> {
        let refused = |(kind, detail): (FaultKind, String)| Fault::before_launch(kind, kernel, detail);
        let Some(kernel) = module.kernel(kernel) else {
            let names: Vec<&str> = module.kernels().collect();
            let detail = format!("the module has no such kernel, but `{}`", names.join("`, `"));
            return Err(refused((FaultKind::Arguments, detail)));
        };
        let parameters = parameters(kernel, arguments).map_err(refused)?;
        let shared_bytes = check_limits(kernel, launch).map_err(refused)?;

        let blocks: u64 = launch.grid.iter().map(|size| u64::from(*size)).product();
        let threads: usize = launch.block.iter().map(|size| *size as usize).product();
        let mut warps: Vec<Warp> = (0..threads.div_ceil(32)).map(|index| Warp::new(index, kernel)).collect();
        self.global.begin_launch(blocks);
        let mut machine = Machine {
            module,
            kernel,
            parameters: &parameters,
            global: &mut self.global,
            shared: Shared::default(),
            tally: Tally::new(kernel),
            position: Position { grid: launch.grid, block_size: launch.block, block: [0; 3], shared_bytes },
            budget: self.budget,
            arrivals: Vec::new(),
        };
        for step in 0..blocks {
            let number = if self.order == Order::Forward { step } else { blocks - 1 - step };
            let [width, height, _] = launch.grid.map(u64::from);
            machine.position.block =
                [number % width, number / width % height, number / width / height].map(|at| at as u32);
            machine.global.begin_block(number);
            block::run(&mut machine, &mut warps, self.order)?;
        }
        Ok(machine.tally.finish(kernel))
    }
}

/// The bytes of the arguments where the kernel looks for its parameters.
fn parameters(kernel: &Kernel, arguments: &[Arg]) -> Result<Vec<u8>, (FaultKind, String)> {
    if arguments.len() != kernel.parameters.len() {
        let (wanted, given) = (kernel.parameters.len(), arguments.len());
        return Err((FaultKind::Arguments, format!("{wanted} parameters, but {given} arguments")));
    }
    let mut bytes = vec![0; kernel.parameter_bytes];
    for (argument, parameter) in arguments.iter().zip(&kernel.parameters) {
        let value = argument.bytes();
        if value.len() != parameter.bytes {
            let (name, wanted, given) = (&parameter.name, parameter.bytes, value.len());
            let detail = format!("parameter `{name}` has {wanted} bytes, its argument {argument:?} {given}");
            return Err((FaultKind::Arguments, detail));
        }
        bytes[parameter.offset..parameter.offset + value.len()].copy_from_slice(&value);
    }
    Ok(bytes)
}

/// The bytes of shared memory of a block, if the launch is one that a device takes.
fn check_limits(kernel: &Kernel, launch: &Launch) -> Result<u32, (FaultKind, String)> {
    let refuse = |detail: String| Err((FaultKind::LaunchLimits, detail));
    if launch.grid.contains(&0) || launch.block.contains(&0) {
        return refuse(format!("a grid of {:?} blocks of {:?} threads", launch.grid, launch.block));
    }
    let threads: u64 = launch.block.iter().map(|size| u64::from(*size)).product();
    let most = u64::from(kernel.threads_max.unwrap_or(THREADS_MAX as u32)).min(THREADS_MAX);
    if threads > most || launch.block[2] > 64 {
        return refuse(format!("a block of {:?} threads; at most {most}, and 64 in z", launch.block));
    }
    if launch.grid[0] > i32::MAX as u32 || launch.grid[1] > 65_535 || launch.grid[2] > 65_535 {
        return refuse(format!("a grid of {:?} blocks; at most 65535 in y and z", launch.grid));
    }
    if kernel.static_shared > STATIC_SHARED_MAX {
        let bytes = kernel.static_shared;
        return refuse(format!("{bytes} bytes of static shared memory, more than {STATIC_SHARED_MAX}"));
    }
    let shared = kernel.static_shared + launch.shared as usize;
    if shared > SHARED_MAX {
        return refuse(format!("{shared} bytes of shared memory, more than {SHARED_MAX}"));
    }
    Ok(shared as u32)
}
