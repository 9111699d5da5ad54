//! What the backend asks of a device: memory, copies, launches. The driver is one; in tests the interpreter of PTX is
//! another. Calls are in order, and may return before their work is done; [`Device::read`] waits for all of it.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;

use super::super::Precision;

/// Why a device cannot go on. The first failure sticks: whatever follows it does nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No room left.
    #[error(
        "the device has no room for {asked} more bytes; lower `pack_tokens`, `max_length` or `rank`, or set `memory_budget_mib` \
         so that layers are computed twice"
    )]
    OutOfMemory { asked: usize },
    /// A kernel or a call failed.
    #[error("{call} failed on the device: {why}")]
    Failed { call: String, why: String },
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Arg {
    Pointer(u64),
    I32(i32),
    I64(i64),
    U64(u64),
    F32(f32),
}

/// How a kernel is started: blocks, threads a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared: u32,
}

/// A device with the kernels of `kernels/` on it.
pub(crate) trait Device: Debug + Send + Sync {
    /// `bytes` bytes that nobody has written; 0 where there are none.
    fn allocate(&self, bytes: usize) -> u64;
    fn free(&self, address: u64);
    fn write(&self, address: u64, bytes: &[u8]);
    fn read(&self, address: u64, bytes: &mut [u8]);
    /// Copies between addresses that do not overlap.
    fn copy(&self, to: u64, from: u64, bytes: usize);
    fn clear(&self, address: u64, bytes: usize);
    /// Starts the kernel of that name.
    fn launch(&self, kernel: &'static str, launch: Launch, args: &[Arg]);
    /// The first failure so far.
    fn failure(&self) -> Option<DeviceError>;
    /// What tells its results from those of other kinds of device: `sm_90`.
    fn architecture(&self) -> String;
    /// What buffers take of its memory.
    fn usage(&self) -> &Usage;
    /// Bytes that nobody uses.
    fn free_bytes(&self) -> u64;
}

/// Bytes that buffers take, now and at most.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Usage {
    pub(super) fn take(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: usize) {
        self.now.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

/// Values in the memory of a device.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    device: Arc<dyn Device>,
    address: u64,
    len: usize,
    /// In bytes.
    capacity: usize,
    precision: Precision,
}

impl Precision {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Rounded => 2,
            Self::Exact => 4,
        }
    }
}

impl DeviceBuffer {
    /// Room for `len` values that nobody has written.
    pub(super) fn new(device: &Arc<dyn Device>, len: usize, precision: Precision) -> Self {
        let capacity = (len * precision.bytes()).max(1);
        device.usage().take(capacity);
        Self { device: device.clone(), address: device.allocate(capacity), len, capacity, precision }
    }

    /// Values from host memory.
    pub(super) fn of(device: &Arc<dyn Device>, values: &[f32], precision: Precision) -> Self {
        let mut buffer = Self::new(device, values.len(), precision);
        buffer.write(values);
        buffer
    }

    /// Changes the length; contents are left over where the capacity suffices.
    pub(super) fn resize(&mut self, len: usize) {
        if len * self.precision.bytes() > self.capacity {
            // The old memory goes first, for the new may not fit beside it.
            self.device.free(std::mem::take(&mut self.address));
            self.device.usage().give_back(self.capacity);
            self.capacity = len * self.precision.bytes();
            self.device.usage().take(self.capacity);
            self.address = self.device.allocate(self.capacity);
        }
        self.len = len;
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// Where the values begin, for a kernel that reads or writes them as `precision`.
    pub(super) fn at(&self, precision: Precision) -> u64 {
        assert_eq!(self.precision, precision, "BUG: a buffer of another precision");
        self.address
    }

    /// The address of value `index`.
    pub(super) fn at_value(&self, index: usize) -> u64 {
        self.address + (index * self.precision.bytes()) as u64
    }

    pub(crate) fn to_host(&self) -> Vec<f32> {
        let mut bytes = vec![0; self.len * self.precision.bytes()];
        self.device.read(self.address, &mut bytes);
        match self.precision {
            Precision::Rounded => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Precision::Exact => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
        }
    }

    pub(crate) fn write(&mut self, values: &[f32]) {
        self.resize(values.len());
        let bytes: Vec<u8> = match self.precision {
            Precision::Rounded => {
                values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
            }
            Precision::Exact => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        };
        self.device.write(self.address, &bytes);
    }
}

impl Clone for DeviceBuffer {
    fn clone(&self) -> Self {
        let copy = Self::new(&self.device, self.len, self.precision);
        self.device.copy(copy.address, self.address, self.len * self.precision.bytes());
        copy
    }
}

impl PartialEq for DeviceBuffer {
    fn eq(&self, other: &Self) -> bool {
        self.to_host() == other.to_host()
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        self.device.usage().give_back(self.capacity);
        self.device.free(self.address);
    }
}
