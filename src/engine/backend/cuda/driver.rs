//! A GPU through NVIDIA's driver: its primary context, one stream, memory from the stream's pool. The driver is
//! loaded while the program runs and may be missing: whatever goes wrong is an error that says what to do next.
//! Knows no operation; it starts kernels by name.
//!
//! One stream makes order: memory that is freed while a kernel uses it goes to whoever asks after that kernel.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{
    self, DriverError, ctx, device, function, mem_pool, module, primary_ctx, stream,
};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUmemPool_attribute, CUresult};
use rayon::prelude::*;

use super::Cuda;
use super::device::{Arg, Device, DeviceError, Launch, Usage};
use super::found::{CudaError, Gpu, error_words, guarded, initialise, worded};
use super::nvrtc::Compiler;
use super::program::{Kept, Program};

/// Dynamic shared memory that a kernel may use without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// A GPU, ready to compute.
#[derive(Debug)]
pub(crate) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Where memory comes from; without one, from calls that wait for the device.
    pool: Option<sys::CUmemoryPool>,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<&'static str, sys::CUfunction>,
    architecture: String,
    progress: Mutex<Progress>,
    usage: Usage,
}

/// How far the device has come.
#[derive(Debug, Default)]
struct Progress {
    /// The kernel that was started last.
    latest: Option<&'static str>,
    failure: Option<DeviceError>,
}

// SAFETY: the handles are the driver's own, which takes calls from any thread in which the context is current;
// `Driver::attempt` makes it so before each call.
unsafe impl Send for Driver {}
// SAFETY: as above; what changes on this side is behind a mutex.
unsafe impl Sync for Driver {}

impl Cuda {
    /// The backend on the GPU `ordinal`.
    ///
    /// # Errors
    /// The GPU cannot be used.
    pub(crate) fn open(ordinal: usize) -> Result<Self, CudaError> {
        Ok(Self::new(Arc::new(Driver::open(ordinal)?)))
    }
}

impl Driver {
    /// Opens the GPU `ordinal` and brings the kernels there.
    ///
    /// # Errors
    /// There is no such GPU, it cannot compute in bfloat16, or the driver refuses.
    pub(crate) fn open(ordinal: usize) -> Result<Self, CudaError> {
        guarded(|| {
            let gpu = Gpu::of(ordinal)?;
            gpu.check()?;
            Self::bare(&gpu)?.with_kernels()
        })
    }

    /// Context and stream, no kernels yet.
    fn bare(gpu: &Gpu) -> Result<Self, CudaError> {
        initialise()?;
        let device = device::get(gpu.ordinal as i32).map_err(|error| worded("cuDeviceGet", error))?;
        // SAFETY: the driver is initialised and the device was named by it; released when this is dropped.
        let context = unsafe { primary_ctx::retain(device) };
        let context = context.map_err(|error| worded("cuDevicePrimaryCtxRetain", error))?;
        let mut driver = Self {
            device,
            context,
            stream: stream::null(),
            pool: None,
            modules: Vec::new(),
            kernels: HashMap::new(),
            architecture: gpu.architecture(),
            progress: Mutex::default(),
            usage: Usage::default(),
        };
        driver.bind().map_err(|error| worded("cuCtxSetCurrent", error))?;
        driver.stream = stream::create(stream::StreamKind::NonBlocking)
            .map_err(|error| worded("cuStreamCreate", error))?;
        driver.pool = driver.growing_pool();
        Ok(driver)
    }

    /// The device's pool, told to keep what it has: a step asks for what the last step gave back.
    fn growing_pool(&self) -> Option<sys::CUmemoryPool> {
        let supported = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut keep = u64::MAX;
        // SAFETY: the context is current; the attribute is a u64, which lives through the call.
        unsafe {
            if device::get_attribute(self.device, supported).ok()? == 0 {
                return None;
            }
            let pool = device::get_default_mem_pool(self.device).ok()?;
            mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast()).ok()?;
            Some(pool)
        }
    }

    /// Loads every file of `kernels/`: machine code of this GPU where NVRTC can make it, else the portable PTX, which
    /// the driver compiles.
    fn with_kernels(mut self) -> Result<Self, CudaError> {
        let (compiler, kept) = (Compiler::found(), Kept::here());
        if let Err(missing) = &compiler {
            tracing::info!("the driver compiles the kernels: {missing}");
        }
        let compiler = compiler.ok();
        let loaded: Result<Vec<Loaded>, CudaError> =
            Program::all().par_iter().map(|program| self.load(program, compiler, &kept)).collect();
        for Loaded { module, kernels } in loaded? {
            self.modules.push(module);
            self.kernels.extend(kernels);
        }
        Ok(self)
    }

    fn load(&self, program: &Program, compiler: Option<&Compiler>, kept: &Kept) -> Result<Loaded, CudaError> {
        self.bind().map_err(|error| worded("cuCtxSetCurrent", error))?;
        let code = compiler.map(|compiler| program.cubin(compiler, &self.architecture, kept));
        let module = match code {
            Some(Ok(code)) => load_image(&code).or_else(|error| {
                // A driver older than the compiler refuses its code, not that of the portable text.
                tracing::warn!("the driver refuses `{}` as compiled: {error}", program.name);
                load_portable(program)
            }),
            Some(Err(error)) => {
                tracing::warn!("the driver compiles `{}`: {error}", program.name);
                load_portable(program)
            }
            None => load_portable(program),
        };
        let refused = |error| CudaError::Kernels { file: program.name.clone(), why: error_words(error) };
        let module = module.map_err(refused)?;
        let mut kernels = Vec::new();
        for name in program.entries() {
            let text = CString::new(name).expect("names in PTX have no NUL");
            // SAFETY: the module was loaded above and its context is current.
            kernels.push((name, unsafe { module::get_function(module, text) }.map_err(refused)?));
        }
        Ok(Loaded { module, kernels })
    }

    fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained for as long as `self` lives.
        unsafe { ctx::set_current(self.context) }
    }

    /// Makes a call unless one has failed before; what fails first is kept.
    fn attempt<T>(&self, call: &str, make: impl FnOnce() -> Result<T, DriverError>) -> Option<T> {
        if self.progress().failure.is_some() {
            return None;
        }
        self.bind().and_then(|()| make()).map_err(|error| self.fail(call, error)).ok()
    }

    /// Kernels run behind the calls: an error may come from one started before.
    fn fail(&self, call: &str, error: DriverError) {
        let mut progress = self.progress();
        let latest = progress.latest.filter(|latest| *latest != call);
        let before = latest.map_or_else(String::new, |latest| {
            format!("; `{latest}` was started last, and CUDA_LAUNCH_BLOCKING=1 tells the culprit")
        });
        let why = error_words(error) + &before;
        progress.failure.get_or_insert(DeviceError::Failed { call: format!("`{call}`"), why });
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Result<u64, DriverError> {
        // SAFETY: the context is current and the stream is its own.
        unsafe {
            match self.pool {
                Some(_) => result::malloc_async(self.stream, bytes),
                None => result::malloc_sync(bytes),
            }
        }
    }

    /// Gives what the pool holds and nobody uses back to the device.
    fn trim(&self) -> Result<(), DriverError> {
        // SAFETY: the context is current; stream and pool are its own.
        unsafe {
            stream::synchronize(self.stream)?;
            self.pool.map_or(Ok(()), |pool| mem_pool::trim_to(pool, 0))
        }
    }
}

/// A file of kernels on the device.
struct Loaded {
    module: sys::CUmodule,
    kernels: Vec<(&'static str, sys::CUfunction)>,
}

// SAFETY: handles of the driver, valid in every thread in which their context is current.
unsafe impl Send for Loaded {}

fn load_portable(program: &Program) -> Result<sys::CUmodule, DriverError> {
    let text = CString::new(program.portable()).expect("PTX has no NUL");
    load_image(text.as_bytes_with_nul())
}

/// Loads machine code, or PTX that ends in NUL, into the current context.
fn load_image(image: &[u8]) -> Result<sys::CUmodule, DriverError> {
    // SAFETY: the driver reads an image to the end that it has itself: the ELF's sections, or the NUL.
    unsafe { module::load_data(image.as_ptr().cast()) }
}

impl Device for Driver {
    fn allocate(&self, bytes: usize) -> u64 {
        if bytes == 0 {
            return 0;
        }
        let full = |error: &DriverError| error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let address = self.attempt("cuMemAlloc", || match self.take(bytes) {
            Err(error) if full(&error) => {
                self.trim()?;
                self.take(bytes).map(Some).or_else(|error| if full(&error) { Ok(None) } else { Err(error) })
            }
            taken => taken.map(Some),
        });
        match address {
            Some(Some(address)) => address,
            Some(None) => {
                self.progress().failure.get_or_insert(DeviceError::OutOfMemory { asked: bytes });
                0
            }
            None => 0,
        }
    }

    fn free(&self, address: u64) {
        // Memory is given back even after a failure; what then fails adds nothing to it.
        if address != 0 && self.bind().is_ok() {
            // SAFETY: the address was allocated in this context and is freed once.
            let freed = unsafe {
                match self.pool {
                    Some(_) => result::free_async(address, self.stream),
                    None => result::free_sync(address),
                }
            };
            if let Err(error) = freed {
                self.fail("cuMemFree", error);
            }
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if !bytes.is_empty() {
            // SAFETY: the caller has allocated so much at the address. The driver has copied pageable memory before
            // the call returns, so `bytes` may go.
            self.attempt("cuMemcpyHtoDAsync", || unsafe {
                result::memcpy_htod_async(address, bytes, self.stream)
            });
        }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        // SAFETY: the caller has allocated so much at the address; `bytes` lives until the stream has come so far.
        self.attempt("cuMemcpyDtoHAsync", || unsafe {
            if !bytes.is_empty() {
                result::memcpy_dtoh_async(bytes, address, self.stream)?;
            }
            stream::synchronize(self.stream)
        });
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes > 0 {
            // SAFETY: the caller has allocated so much at both addresses.
            self.attempt("cuMemcpyDtoDAsync", || unsafe {
                result::memcpy_dtod_async(to, from, bytes, self.stream)
            });
        }
    }

    fn clear(&self, address: u64, bytes: usize) {
        if bytes > 0 {
            // SAFETY: the caller has allocated so much at the address.
            self.attempt("cuMemsetD8Async", || unsafe {
                result::memset_d8_async(address, 0, bytes, self.stream)
            });
        }
    }

    fn launch(&self, kernel: &'static str, launch: Launch, args: &[Arg]) {
        let Some(&handle) = self.kernels.get(kernel) else {
            let failure = DeviceError::Failed {
                call: format!("`{kernel}`"),
                why: "no file has this kernel".to_owned(),
            };
            self.progress().failure.get_or_insert(failure);
            return;
        };
        let mut values: Vec<u64> = args.iter().map(bits).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| (&raw mut *value).cast()).collect();
        let [x, y, z] = launch.grid;
        self.attempt(kernel, || {
            if launch.shared > SHARED_UNASKED {
                let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the kernel's module lives as long as `self`.
                unsafe { function::set_function_attribute(handle, most, launch.shared as i32) }?;
            }
            // SAFETY: the arguments are those of the kernel, as the backend promises; each pointer is to a value at
            // least as large as the parameter, copied before the call returns.
            unsafe {
                let block = (launch.block, 1, 1);
                result::launch_kernel(handle, (x, y, z), block, launch.shared, self.stream, &mut pointers)
            }
        });
        self.progress().latest = Some(kernel);
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn free_bytes(&self) -> u64 {
        self.attempt("cuMemGetInfo", result::mem_get_info).map_or(0, |(free, _)| free as u64)
    }

    fn failure(&self) -> Option<DeviceError> {
        self.progress().failure.clone()
    }

    fn architecture(&self) -> String {
        self.architecture.clone()
    }
}

/// The bytes of an argument, first in memory; a parameter of four bytes takes the first four.
fn bits(arg: &Arg) -> u64 {
    let four = |bytes: [u8; 4]| u64::from_ne_bytes([bytes, [0; 4]].concat().try_into().expect("eight bytes"));
    match *arg {
        Arg::Pointer(value) | Arg::U64(value) => value,
        Arg::I64(value) => u64::from_ne_bytes(value.to_ne_bytes()),
        Arg::I32(value) => four(value.to_ne_bytes()),
        Arg::F32(value) => four(value.to_ne_bytes()),
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: all are this driver's own and used no more; buffers hold the driver, so none is left. A call that
        // fails leaves something to the end of the process, which is all that can be done about it.
        unsafe {
            let _ = stream::synchronize(self.stream);
            for &module in &self.modules {
                let _ = module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = stream::destroy(self.stream);
            }
            let _ = primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests;
