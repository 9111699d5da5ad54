//! NVRTC, loaded from a folder at run time. No CUDA is linked, and nothing is skipped when it is missing.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

const HOW_TO_GET_IT: &str = "\
the kernels are compiled by NVRTC, a library that needs neither a GPU nor a toolkit:
    pip download --no-deps nvidia-cuda-nvrtc==13.0.*
    unzip nvidia_cuda_nvrtc-*.whl -d target/nvrtc
(any folder will do: TUNESMITH_NVRTC names the one that holds libnvrtc.so.*)";

/// What the interpreter runs: PTX that every card since sm_80 takes, with the lines of the sources.
const PORTABLE: [&str; 3] = ["--gpu-architecture=compute_80", "-lineinfo", "--std=c++17"];

/// What a program is compiled for.
#[derive(Clone, Copy, Debug)]
enum Options<'a> {
    /// PTX that every later card takes, with source lines.
    Portable,
    /// Machine code of one architecture; the log names registers and spills.
    Cubin(&'a str),
}

type Program = *mut c_void;
type Status = c_int;

struct Nvrtc {
    /// The size of the library: builds of one version differ in it.
    bytes: u64,
    create: Symbol<
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status,
    >,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> Status>,
    ptx_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    ptx: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    log_size: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    log: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status>,
    error: Symbol<unsafe extern "C" fn(Status) -> *const c_char>,
}

/// The PTX of `source`, or NVRTC's log. What was compiled before is kept in Cargo's folder for tests: the kernels take
/// longer to compile than to run.
pub(crate) fn ptx(name: &str, source: &str) -> Result<String, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx");
    let kept = folder.join(format!("{}.ptx", key(name, source)));
    if let Ok(ptx) = std::fs::read_to_string(&kept) {
        return Ok(ptx);
    }
    let (ptx, _) = run(name, source, Options::Portable)?;
    // Another test may compile the same: each writes its own file, and renames it when it is whole.
    let unfinished = kept.with_extension(format!("{:?}.{}", std::thread::current().id(), std::process::id()));
    let is_written = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&unfinished, &ptx));
    if is_written.is_ok() {
        std::fs::rename(&unfinished, &kept).map_err(|error| format!("`{}`: {error}", kept.display()))?;
    }
    Ok(ptx)
}

/// Two digests (FNV-1a from two beginnings) of all that the PTX depends on.
fn key(name: &str, source: &str) -> String {
    let compiler = format!("{} of {} bytes", version(), nvrtc().bytes);
    let mut parts = vec![compiler, PORTABLE.join(" "), name.to_owned(), source.to_owned()];
    parts.extend(super::included(source).into_iter().flat_map(|(name, text)| [name, text]));
    let digest = |beginning: u64| {
        let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
        bytes.fold(beginning, |digest, byte| (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    };
    format!("{:016x}{:016x}", digest(0xcbf2_9ce4_8422_2325), digest(0x9e37_79b9_7f4a_7c15))
}

/// NVRTC's log of compiling `source` to machine code for `arch` (`sm_80`): registers, spills, shared memory.
pub(crate) fn report(name: &str, source: &str, arch: &str) -> Result<String, String> {
    run(name, source, Options::Cubin(arch)).map(|(_, log)| log)
}

/// As in `13.0`.
pub(crate) fn version() -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC writes two numbers.
    let status = unsafe { (nvrtc().version)(&raw mut major, &raw mut minor) };
    assert_eq!(status, 0, "NVRTC does not know its version");
    format!("{major}.{minor}")
}

fn run(name: &str, source: &str, options: Options<'_>) -> Result<(String, String), String> {
    let nvrtc = nvrtc();
    let c_string = |text: &str| CString::new(text).expect("no NUL in sources");
    let (source, name) = (c_string(source), c_string(name));
    let headers: Vec<(CString, CString)> =
        super::headers().iter().map(|(name, text)| (c_string(name), c_string(text))).collect();
    let header_names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
    let header_texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
    let texts: Vec<CString> = match options {
        Options::Portable => PORTABLE.map(c_string).to_vec(),
        Options::Cubin(arch) => {
            let arch = format!("--gpu-architecture={arch}");
            [arch.as_str(), "--ptxas-options=-v", "--std=c++17"].map(c_string).to_vec()
        }
    };
    let pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
    let mut program: Program = null_mut();
    // SAFETY: all strings live to the end of this function; NVRTC copies them.
    let status = unsafe {
        (nvrtc.create)(
            &raw mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as c_int,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        )
    };
    nvrtc.check(status)?;
    // SAFETY: `program` was created above, the options are as many as said.
    let status = unsafe { (nvrtc.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
    let log = nvrtc.text(program, &nvrtc.log_size, &nvrtc.log)?;
    let result = match nvrtc.check(status) {
        Err(error) => Err(format!("{error}\n{log}")),
        Ok(()) => nvrtc.text(program, &nvrtc.ptx_size, &nvrtc.ptx).map(|ptx| (ptx, log)),
    };
    // SAFETY: destroyed once, not used after.
    unsafe { (nvrtc.destroy)(&raw mut program) };
    result
}

impl Nvrtc {
    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC returns a static string for every status.
        Err(unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy().into_owned())
    }

    fn text(
        &self,
        program: Program,
        size: &Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
        get: &Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    ) -> Result<String, String> {
        let mut bytes = 0usize;
        // SAFETY: the program lives; NVRTC writes the size.
        self.check(unsafe { size(program, &raw mut bytes) })?;
        let mut text = vec![0u8; bytes.max(1)];
        // SAFETY: the buffer has the size that NVRTC named.
        self.check(unsafe { get(program, text.as_mut_ptr().cast()) })?;
        text.truncate(text.iter().position(|&byte| byte == 0).unwrap_or(text.len()));
        String::from_utf8(text).map_err(|error| error.to_string())
    }
}

fn nvrtc() -> &'static Nvrtc {
    static NVRTC: OnceLock<Nvrtc> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    let _once = LOADING.lock();
    NVRTC.get_or_init(|| {
        let (folder, library) = find().unwrap_or_else(|| panic!("NVRTC was not found\n{HOW_TO_GET_IT}"));
        load(&folder, &library)
            .unwrap_or_else(|error| panic!("`{}`: {error}\n{HOW_TO_GET_IT}", library.display()))
    })
}

/// The folder and the library: `TUNESMITH_NVRTC`, else `nvrtc` in the folder Cargo builds into.
fn find() -> Option<(PathBuf, PathBuf)> {
    if let Some(named) = std::env::var_os("TUNESMITH_NVRTC") {
        return search(Path::new(&named), 5);
    }
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    search(&target.join("nvrtc"), 5).or_else(|| search(&workspace.join("target/nvrtc"), 5))
}

/// `libnvrtc.so.*` in `folder` or below: a wheel keeps it some folders down.
fn search(folder: &Path, depth: u32) -> Option<(PathBuf, PathBuf)> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    let library = entries.iter().find(|path| file_name(path).starts_with("libnvrtc.so"));
    if let Some(library) = library {
        return Some((folder.to_owned(), library.clone()));
    }
    entries.iter().filter(|path| depth > 0 && path.is_dir()).find_map(|path| search(path, depth - 1))
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn load(folder: &Path, library: &Path) -> Result<Nvrtc, libloading::Error> {
    // NVRTC 13.0 has no search path of its own for its built-ins: they must be there before it asks.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if file_name(&entry.path()).starts_with("libnvrtc-builtins.so") {
            std::mem::forget(open(&entry.path())?);
        }
    }
    let bytes = std::fs::metadata(library).map_or(0, |metadata| metadata.len());
    let library = open(library)?;
    // SAFETY: the signatures are those of nvrtc.h.
    let nvrtc = unsafe {
        Nvrtc {
            bytes,
            create: library.get(b"nvrtcCreateProgram\0")?,
            compile: library.get(b"nvrtcCompileProgram\0")?,
            destroy: library.get(b"nvrtcDestroyProgram\0")?,
            ptx_size: library.get(b"nvrtcGetPTXSize\0")?,
            ptx: library.get(b"nvrtcGetPTX\0")?,
            log_size: library.get(b"nvrtcGetProgramLogSize\0")?,
            log: library.get(b"nvrtcGetProgramLog\0")?,
            version: library.get(b"nvrtcVersion\0")?,
            error: library.get(b"nvrtcGetErrorString\0")?,
        }
    };
    // The library stays for as long as its symbols: to the end of the process.
    std::mem::forget(library);
    Ok(nvrtc)
}

fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: NVRTC's initialisers have no conditions.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }
}
