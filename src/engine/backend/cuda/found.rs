//! What there is of CUDA on this machine: the driver, its GPUs, and what is in the way of using them. Nothing here
//! panics where a library is missing, and nothing is left open.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use cudarc::driver::result::{self, DriverError, ctx, device, primary_ctx};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use libloading::os::unix::{Library, RTLD_LAZY};

/// Folders that hold the driver but that the loader may not know: WSL, containers, NixOS.
const DRIVER_FOLDERS: [&str; 3] = ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64", "/run/opengl-driver/lib"];
const DRIVER_NAME: &str = "libcuda.so.1";
/// The first compute capability that computes in bfloat16.
const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// The first CUDA version whose drivers read the portable PTX.
const CUDA_MIN: (u32, u32) = (11, 4);

/// Why no GPU computes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// Nothing of NVIDIA's is installed.
    #[error("there is no NVIDIA driver: `libcuda.so.1` was not found")]
    NoDriver,
    /// A library for linkers stands where the driver should.
    #[error("the `libcuda.so` that was found is the toolkit's stub, not the driver")]
    Stub,
    /// There is a driver, but no GPU for it.
    #[error("the NVIDIA driver finds no GPU")]
    NoGpu,
    /// Fewer GPUs than that.
    #[error("there is no GPU {ordinal}; the driver has {count}, counted from 0")]
    NoSuchGpu { ordinal: usize, count: usize },
    /// It cannot compute in bfloat16.
    #[error("the GPU {ordinal} ({name}) has compute capability {}.{}; at least {}.{} is needed",
        capability.0, capability.1, CAPABILITY_MIN.0, CAPABILITY_MIN.1)]
    OldGpu { ordinal: usize, name: String, capability: (u32, u32) },
    /// It cannot read the kernels.
    #[error("the NVIDIA driver is for CUDA {}.{}; at least {}.{} is needed",
        cuda.0, cuda.1, CUDA_MIN.0, CUDA_MIN.1)]
    OldDriver { cuda: (u32, u32) },
    /// A call failed.
    #[error("the NVIDIA driver fails in {call}: {why}")]
    Driver { call: &'static str, why: String },
    /// Kernels cannot be brought to the device.
    #[error("the NVIDIA driver refuses the kernels of `{file}`: {why}")]
    Kernels { file: String, why: String },
}

impl CudaError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDriver => {
                "install NVIDIA's driver (in a container, start it with `--gpus all`), or take `--device cpu`"
            }
            Self::Stub => "take the folder `stubs` out of LD_LIBRARY_PATH, or take `--device cpu`",
            Self::NoGpu => "look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or take `--device cpu`",
            Self::NoSuchGpu { .. } => "`tunesmith doctor` lists the GPUs; `--device cuda:0` is the first",
            Self::OldGpu { .. } => {
                "take another GPU with `--device cuda:N` (Ampere or newer), or `--device cpu`"
            }
            Self::OldDriver { .. } => "install a newer NVIDIA driver, or take `--device cpu`",
            Self::Driver { .. } | Self::Kernels { .. } => {
                "look at `nvidia-smi`; a newer driver or a restart may help; `--device cpu` needs neither"
            }
        }
    }
}

/// A GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// What `cuda:N` calls it.
    pub ordinal: usize,
    pub name: String,
    /// 9.0 as (9, 0).
    pub capability: (u32, u32),
    pub memory_bytes: u64,
}

impl Gpu {
    /// All GPUs.
    ///
    /// # Errors
    /// There is no driver, or none that works.
    pub fn all() -> Result<Vec<Self>, CudaError> {
        guarded(|| (0..count()?).map(Self::described).collect())
    }

    /// The GPU `ordinal`.
    ///
    /// # Errors
    /// As [`Gpu::all`], or there is none of that number.
    pub fn of(ordinal: usize) -> Result<Self, CudaError> {
        guarded(|| match count()? {
            0 => Err(CudaError::NoGpu),
            count if ordinal >= count => Err(CudaError::NoSuchGpu { ordinal, count }),
            _ => Self::described(ordinal),
        })
    }

    /// Whether it can run the kernels.
    ///
    /// # Errors
    /// It is too old, or its driver is.
    pub fn check(&self) -> Result<(), CudaError> {
        if self.capability < CAPABILITY_MIN {
            let Self { ordinal, name, capability, .. } = self.clone();
            return Err(CudaError::OldGpu { ordinal, name, capability });
        }
        let cuda = cuda_version()?;
        if cuda < CUDA_MIN { Err(CudaError::OldDriver { cuda }) } else { Ok(()) }
    }

    /// As [`Gpu::check`], and whether it wakes: it may be broken, or another process may have it for itself.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn usable(&self) -> Result<(), CudaError> {
        self.check()?;
        self.free_bytes().map(|_| ())
    }

    /// What its machine code is compiled for: `sm_90`.
    pub fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    /// Bytes of its memory that nobody uses. Takes a moment: the device is woken for it.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        guarded(|| {
            initialise()?;
            let device = device::get(self.ordinal as i32).map_err(|error| worded("cuDeviceGet", error))?;
            // SAFETY: the driver named the device, its context is retained while it is asked, and no longer current
            // when it is released.
            unsafe {
                let context = primary_ctx::retain(device);
                let context = context.map_err(|error| worded("cuDevicePrimaryCtxRetain", error))?;
                let free = ctx::set_current(context).and_then(|()| result::mem_get_info());
                let left = ctx::set_current(std::ptr::null_mut()).and_then(|()| primary_ctx::release(device));
                let (free, _) = free.map_err(|error| worded("cuMemGetInfo", error))?;
                left.map(|()| free as u64).map_err(|error| worded("cuDevicePrimaryCtxRelease", error))
            }
        })
    }

    fn described(ordinal: usize) -> Result<Self, CudaError> {
        let device = device::get(ordinal as i32).map_err(|error| worded("cuDeviceGet", error))?;
        let attribute = |which| {
            // SAFETY: the driver is initialised and named the device.
            let value = unsafe { device::get_attribute(device, which) };
            value.map(|value| value as u32).map_err(|error| worded("cuDeviceGetAttribute", error))
        };
        // SAFETY: as above.
        let memory = unsafe { device::total_mem(device) };
        Ok(Self {
            ordinal,
            name: device::get_name(device).map_err(|error| worded("cuDeviceGetName", error))?,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            memory_bytes: memory.map_err(|error| worded("cuDeviceTotalMem", error))? as u64,
        })
    }
}

/// The numerics class of devices of an architecture. The number is raised with every change of bits.
pub(in super::super) fn numerics(architecture: &str) -> String {
    format!("cuda:{architecture}-bf16.1")
}

/// The CUDA version that the driver is for: 13.0 as (13, 0).
///
/// # Errors
/// There is no driver, or none that works.
pub fn cuda_version() -> Result<(u32, u32), CudaError> {
    guarded(|| {
        initialise()?;
        let mut version = 0;
        // SAFETY: the driver is there; the version is written before it is read.
        let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
        asked.map_err(|error| worded("cuDriverGetVersion", error))?;
        let version = version as u32;
        Ok((version / 1000, version % 1000 / 10))
    })
}

fn count() -> Result<usize, CudaError> {
    initialise()?;
    let count = device::get_count().map_err(|error| worded("cuDeviceGetCount", error))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Loads the driver and starts it, once a process.
pub(super) fn initialise() -> Result<(), CudaError> {
    static STARTED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    let start = || {
        if !driver_is_here() {
            return Err(CudaError::NoDriver);
        }
        result::init().map_err(|error| worded("cuInit", error))
    };
    STARTED.get_or_init(start).clone()
}

/// Whether the loader finds the driver, by itself or after it was loaded from a folder that the loader does not know.
fn driver_is_here() -> bool {
    // SAFETY: the driver's initialisers have no conditions.
    let known = || unsafe { sys::is_culib_present() };
    known()
        || DRIVER_FOLDERS.iter().map(|folder| Path::new(folder).join(DRIVER_NAME)).any(|path| {
            // SAFETY: as above. Kept for the life of the process, so that it is found by its name from now on.
            let library = unsafe { Library::open(Some(&path), RTLD_LAZY) };
            library.map(std::mem::forget).is_ok() && known()
        })
}

/// Turns a panic of cudarc into an error: it panics where a library lacks a symbol.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, CudaError>) -> Result<T, CudaError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let why = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(CudaError::Driver { call: "a library that does not fit", why: why.to_owned() })
    })
}

/// The error of a call in words.
pub(super) fn worded(call: &'static str, error: DriverError) -> CudaError {
    match error.0 {
        CUresult::CUDA_ERROR_STUB_LIBRARY => CudaError::Stub,
        CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoGpu,
        _ => CudaError::Driver { call, why: error_words(error) },
    }
}

/// What the driver says of an error, with its name.
pub(super) fn error_words(error: DriverError) -> String {
    let words = error.error_string().map(|words| words.to_string_lossy().into_owned());
    words.map_or_else(|_| format!("{:?}", error.0), |words| format!("{words} ({:?})", error.0))
}
