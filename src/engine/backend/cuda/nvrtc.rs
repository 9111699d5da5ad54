//! NVIDIA's compiler of CUDA C as a library, loaded while the program runs. Knows its calls and options; not which
//! sources there are, nor what becomes of the code. Needs neither a GPU nor a driver.
//!
//! Its few symbols are looked up here rather than through cudarc, which asks the loader for `libnvrtc.so` by name
//! (so that a toolkit in the system's path hides the library that was found) and panics where a symbol is missing.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::library::{self, NVRTC_VARIABLE, Surroundings};

/// How the lines of a source are kept in what is made of it.
#[cfg(test)]
pub(crate) const LINES: &str = "-lineinfo";
/// Options of every compilation.
pub(crate) const OPTIONS: [&str; 1] = ["--std=c++17"];
/// The program whose PTX says who compiled it.
const PROBE: &str = "extern \"C\" __global__ void probe() {}";

/// Why nothing was compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NvrtcError {
    /// No library that works.
    #[error("{}", missing(named.as_deref(), unusable))]
    Missing {
        /// What `TUNESMITH_NVRTC` names.
        named: Option<PathBuf>,
        /// Libraries that were found and why they do not serve.
        unusable: Vec<String>,
    },
    /// It knows nothing of the device.
    #[error("NVRTC {version} cannot compile for {architecture}")]
    Architecture { version: String, architecture: String },
    /// It refused a source.
    #[error("NVRTC {version} does not compile `{name}` for {architecture}: {log}")]
    Source { version: String, name: String, architecture: String, log: String },
}

fn missing(named: Option<&Path>, unusable: &[String]) -> String {
    let place =
        named.map_or_else(String::new, |named| format!(" in `{}` ({NVRTC_VARIABLE})", named.display()));
    match unusable {
        [] => format!("NVRTC was not found{place}"),
        some => format!("no NVRTC that works was found{place}: {}", some.join("; ")),
    }
}

type Program = *mut c_void;
type Status = c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
type Fill = unsafe extern "C" fn(Program, *mut c_char) -> Status;
type Texts = *const *const c_char;

/// The entry points that are used.
#[derive(Debug)]
struct Calls {
    create: unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, Texts, Texts) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, Texts) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    ptx_size: Size,
    ptx: Fill,
    cubin_size: Size,
    cubin: Fill,
    log_size: Size,
    log: Fill,
    architecture_count: unsafe extern "C" fn(*mut c_int) -> Status,
    architectures: unsafe extern "C" fn(*mut c_int) -> Status,
    error: unsafe extern "C" fn(Status) -> *const c_char,
}

/// NVRTC, ready to compile.
#[derive(Debug)]
pub(crate) struct Compiler {
    calls: Calls,
    place: PathBuf,
    /// `V13.0.88`.
    version: String,
    identity: String,
    /// Compute capabilities, `90` for 9.0.
    architectures: Vec<u32>,
}

/// A source and the headers it may include.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a> {
    /// Of the file, for messages and line tables; changes no code.
    pub(crate) name: &'a str,
    pub(crate) source: &'a str,
    /// Names and contents.
    pub(crate) headers: &'a [(&'a str, &'a str)],
}

impl Compiler {
    /// The first NVRTC of [`Surroundings::nvrtc`] that works, looked for once a process.
    pub(crate) fn found() -> Result<&'static Self, NvrtcError> {
        static FOUND: OnceLock<Result<Compiler, NvrtcError>> = OnceLock::new();
        FOUND.get_or_init(|| Self::find(&Surroundings::here())).as_ref().map_err(Clone::clone)
    }

    fn find(surroundings: &Surroundings) -> Result<Self, NvrtcError> {
        let mut unusable = Vec::new();
        for path in surroundings.nvrtc() {
            match Self::load(&path) {
                Ok(compiler) => return Ok(compiler),
                // A bare name that the system's loader does not know is no finding.
                Err(why) if path.is_absolute() => unusable.push(format!("`{}`: {why}", path.display())),
                Err(_) => {}
            }
        }
        Err(NvrtcError::Missing { named: surroundings.named_nvrtc(), unusable })
    }

    /// Loads a library and compiles a first program with it.
    fn load(path: &Path) -> Result<Self, String> {
        // NVRTC 13.0 has no search path of its own for its built-ins: they must be there before it asks.
        let beside = path.parent().filter(|_| path.is_absolute()).map(library::entries).unwrap_or_default();
        for builtins in
            beside.iter().filter(|path| library::file_name(path).starts_with("libnvrtc-builtins.so"))
        {
            keep(builtins).map_err(|error| words(&error))?;
        }
        let calls = keep(path).and_then(Calls::of).map_err(|error| words(&error))?;
        let mut compiler = Self {
            calls,
            place: path.to_owned(),
            version: String::new(),
            identity: String::new(),
            architectures: Vec::new(),
        };
        compiler.architectures = compiler.known_architectures()?;
        let oldest = compiler.architectures.first().ok_or("it compiles for no device")?;
        let probe = Text { name: "probe.cu", source: PROBE, headers: &[] };
        let ptx = compiler
            .run(probe, &options(&format!("sm_{oldest}"), &[]), |program| compiler.text_of_ptx(program))?;
        let lines = ptx.lines().filter(|line| line.contains("Build ID") || line.contains("release "));
        compiler.identity =
            lines.map(|line| line.trim_start_matches("//").trim()).collect::<Vec<_>>().join(", ");
        let version = compiler.identity.split(", ").find(|part| part.starts_with('V'));
        compiler.version = version.ok_or("its PTX does not say which version made it")?.to_owned();
        Ok(compiler)
    }

    /// The file that was loaded, or the name that the system's loader knew.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// `V13.0.88`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// What tells its code from that of any other build: `Compiler Build ID: CL-…, Cuda compilation tools, …`.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// The PTX of `text` for `architecture` (`sm_80`).
    ///
    /// # Errors
    /// The architecture is unknown, or the source is refused; the message is the compiler's.
    #[cfg(test)]
    pub(crate) fn ptx(
        &self,
        text: Text<'_>,
        architecture: &str,
        extra: &[&str],
    ) -> Result<String, NvrtcError> {
        // For a virtual architecture NVRTC stops there, and no machine code is made for nothing.
        let virtual_one = architecture.replace("sm_", "compute_");
        self.compile(text, &virtual_one, extra, |program| self.text_of_ptx(program))
    }

    /// The machine code of `text` for `architecture`.
    ///
    /// # Errors
    /// The architecture is unknown, or the source is refused; the message is the compiler's.
    pub(crate) fn cubin(
        &self,
        text: Text<'_>,
        architecture: &str,
        extra: &[&str],
    ) -> Result<Vec<u8>, NvrtcError> {
        self.compile(text, architecture, extra, |program| {
            self.bytes(program, self.calls.cubin_size, self.calls.cubin)
        })
    }

    fn compile<T>(
        &self,
        text: Text<'_>,
        architecture: &str,
        extra: &[&str],
        take: impl FnOnce(Program) -> Result<T, String>,
    ) -> Result<T, NvrtcError> {
        let number = architecture.split('_').next_back().unwrap_or_default();
        let number = number.trim_end_matches(|letter: char| !letter.is_ascii_digit());
        if !self.architectures.iter().any(|known| known.to_string() == number) {
            let (version, architecture) = (self.version.clone(), architecture.to_owned());
            return Err(NvrtcError::Architecture { version, architecture });
        }
        self.run(text, &options(architecture, extra), take).map_err(|log| NvrtcError::Source {
            version: self.version.clone(),
            name: text.name.to_owned(),
            architecture: architecture.to_owned(),
            log,
        })
    }

    fn run<T>(
        &self,
        text: Text<'_>,
        options: &[String],
        take: impl FnOnce(Program) -> Result<T, String>,
    ) -> Result<T, String> {
        let c_string = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let (source, name) = (c_string(text.source)?, c_string(text.name)?);
        let headers = CStrings::new(text.headers.iter().map(|header| header.1))?;
        let header_names = CStrings::new(text.headers.iter().map(|header| header.0))?;
        let options = CStrings::new(options.iter().map(String::as_str))?;
        let mut program: Program = null_mut();
        // SAFETY: the texts end in NUL and live to the end of this function, there are as many headers as said, and
        // the program is written before it is read.
        self.check(unsafe {
            (self.calls.create)(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.count(),
                headers.pointers.as_ptr(),
                header_names.pointers.as_ptr(),
            )
        })?;
        // SAFETY: the program was created above; there are as many options as said, and they outlive the call.
        let status = unsafe { (self.calls.compile)(program, options.count(), options.pointers.as_ptr()) };
        let taken = self.check(status).and_then(|()| take(program)).map_err(|error| {
            let log =
                self.bytes(program, self.calls.log_size, self.calls.log).map(text_of).unwrap_or_default();
            format!("{error}\n{log}").trim_end().to_owned()
        });
        // SAFETY: destroyed once and not used after.
        unsafe { (self.calls.destroy)(&raw mut program) };
        taken
    }

    fn text_of_ptx(&self, program: Program) -> Result<String, String> {
        self.bytes(program, self.calls.ptx_size, self.calls.ptx).map(text_of)
    }

    /// What NVRTC writes into a buffer of the size that it names.
    fn bytes(&self, program: Program, size: Size, fill: Fill) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program lives; the size is written before it is read.
        self.check(unsafe { size(program, &raw mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: the program lives; the buffer has the size that NVRTC named.
        self.check(unsafe { fill(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn known_architectures(&self) -> Result<Vec<u32>, String> {
        let mut count = 0;
        // SAFETY: the count is written before it is read.
        self.check(unsafe { (self.calls.architecture_count)(&raw mut count) })?;
        let mut numbers = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the buffer has room for as many numbers as NVRTC named.
        self.check(unsafe { (self.calls.architectures)(numbers.as_mut_ptr()) })?;
        Ok(numbers.into_iter().filter_map(|number| u32::try_from(number).ok()).collect())
    }

    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC has a static text that ends in NUL for every status.
        Err(unsafe { CStr::from_ptr((self.calls.error)(status)) }.to_string_lossy().into_owned())
    }
}

impl Calls {
    fn of(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11.2.
        unsafe {
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                ptx_size: *library.get(b"nvrtcGetPTXSize\0")?,
                ptx: *library.get(b"nvrtcGetPTX\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                architecture_count: *library.get(b"nvrtcGetNumSupportedArchs\0")?,
                architectures: *library.get(b"nvrtcGetSupportedArchs\0")?,
                error: *library.get(b"nvrtcGetErrorString\0")?,
            })
        }
    }
}

/// Texts for a C call.
struct CStrings {
    pointers: Vec<*const c_char>,
    _texts: Vec<CString>,
}

impl CStrings {
    fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let texts: Vec<CString> =
            texts.map(CString::new).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        Ok(Self { pointers: texts.iter().map(|text| text.as_ptr()).collect(), _texts: texts })
    }

    fn count(&self) -> c_int {
        self.pointers.len() as c_int
    }
}

/// All options of a compilation for `architecture`.
pub(super) fn options(architecture: &str, extra: &[&str]) -> Vec<String> {
    let target = format!("--gpu-architecture={architecture}");
    std::iter::once(target).chain(OPTIONS.iter().chain(extra).map(|&option| option.to_owned())).collect()
}

/// Loads a library for as long as the process lives: its code may be running in any thread.
fn keep(path: &Path) -> Result<&'static Library, libloading::Error> {
    // SAFETY: NVIDIA's libraries have no conditions on when they are loaded.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?;
    Ok(Box::leak(Box::new(library)))
}

/// The loader's own words: libloading keeps them in the cause.
fn words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn text_of(mut bytes: Vec<u8>) -> String {
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text<'a>(source: &'a str, headers: &'a [(&'a str, &'a str)]) -> Text<'a> {
        Text { name: "one.cu", source, headers }
    }

    #[test]
    fn source_becomes_ptx_and_machine_code_with_a_header_from_memory() {
        let compiler = Compiler::found().unwrap();
        let header = [("one.cuh", "constexpr int ONE = 1;")];
        let source = "#include \"one.cuh\"\nextern \"C\" __global__ void one(int* x) { *x = ONE; }";
        let ptx = compiler.ptx(text(source, &header), "sm_80", &[LINES]).unwrap();
        assert!(ptx.contains(".visible .entry one(") && ptx.contains(".target sm_80"), "{ptx}");
        assert!(ptx.contains("one.cu"), "line tables name the file: {ptx}");
        let code = |name| compiler.cubin(Text { name, ..text(source, &header) }, "sm_90a", &[]).unwrap();
        assert_eq!(&code("one.cu")[1..4], b"ELF");
        assert_eq!(code("one.cu"), code("two.cu"), "a name changes no code");
    }

    #[test]
    fn build_of_the_compiler_is_told() {
        let compiler = Compiler::found().unwrap();
        assert!(compiler.version().starts_with('V') && compiler.place().exists());
        assert!(compiler.identity().contains("CL-") && compiler.identity().contains(compiler.version()));
    }

    #[test]
    fn refused_source_is_named_with_the_compilers_words() {
        let refused = Compiler::found().unwrap().ptx(text("void f( {", &[]), "sm_80", &[]).unwrap_err();
        let NvrtcError::Source { name, log, .. } = &refused else { panic!("{refused}") };
        assert!(name == "one.cu" && log.contains("one.cu(1): error"), "{log}");
    }

    #[test]
    fn unknown_architecture_is_no_fault_of_the_source() {
        let refused = Compiler::found().unwrap().cubin(text(PROBE, &[]), "sm_999", &[]).unwrap_err();
        assert!(refused.to_string().ends_with("cannot compile for sm_999"), "{refused}");
    }

    #[test]
    fn what_is_no_library_is_passed_over_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let fake = folder.path().join("libnvrtc.so.13");
        std::fs::write(&fake, "no library").unwrap();
        assert!(Compiler::load(&fake).unwrap_err().contains("libnvrtc.so.13"));
        let missing = NvrtcError::Missing { named: Some(folder.path().to_owned()), unusable: Vec::new() };
        assert!(missing.to_string().contains("(TUNESMITH_NVRTC)"), "{missing}");
    }
}
