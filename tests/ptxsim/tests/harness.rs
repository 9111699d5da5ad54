//! What a test of a kernel needs: the kernel compiled, arrays on the device, random numbers, a comparison.
//!
//! ```ignore
//! let mut device = Device::new();
//! let x = upload_bf16(&mut device, &Random::new(1).normals(64));
//! let y = device.allocate(64 * 2);
//! let launch = Launch { grid: [1, 1, 1], block: [64, 1, 1], shared: 0 };
//! device.launch(kernels("norm.cu"), "rms_norm", &launch, &[Arg::Pointer(y), Arg::Pointer(x)]).unwrap();
//! assert_close("rms_norm", &download_bf16(&device, y, 64), &expected, Tolerance::bf16(1e-5));
//! ```
// Each module of kernels uses its part of this.
#![allow(dead_code, unused_imports, reason = "not every helper is used by every set of kernels")]

mod compare;
mod memory;
mod nvrtc;
mod random;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use ptxsim::Module;

pub(crate) use compare::{Tolerance, assert_close};
pub(crate) use memory::{
    Element, bf16_bits, bf16_value, download, download_bf16, round_bf16, round_bf16s, upload, upload_bf16,
};
pub(crate) use nvrtc::version as nvrtc_version;
pub(crate) use random::Random;

/// The folder of the kernels.
pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../kernels")
}

/// The text of a file of `kernels/`.
pub(crate) fn source(file: &str) -> String {
    let path = folder().join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("`{}`: {error}", path.display()))
}

/// Every header of `kernels/` with its name.
pub(crate) fn headers() -> Vec<(String, String)> {
    let entries = std::fs::read_dir(folder()).expect("the folder of the kernels is there");
    let names = entries.map(|entry| entry.expect("the folder can be read").file_name());
    let headers = names.filter_map(|name| name.into_string().ok()).filter(|name| name.ends_with(".cuh"));
    headers.map(|name| (name.clone(), source(&name))).collect()
}

/// The program of a file of `kernels/`, compiled once a test run.
pub(crate) fn kernels(file: &str) -> &'static Module {
    compile(file, &source(file))
}

/// The program of a file of `kernels/` with a mistake planted: `from`, which must be there exactly once, is
/// replaced by `to`.
pub(crate) fn planted(file: &str, from: &str, to: &str) -> &'static Module {
    let source = source(file);
    let found = source.matches(from).count();
    assert!(found == 1, "`{from}` is {found} times in `{file}`, not once");
    compile(file, &source.replacen(from, to, 1))
}

/// The program of any source text that may include `common.cuh`. `name` is what faults call it. The same text is
/// compiled once.
pub(crate) fn compile(name: &str, source: &str) -> &'static Module {
    static MODULES: OnceLock<Mutex<BTreeMap<String, &'static Module>>> = OnceLock::new();
    let modules = MODULES.get_or_init(Mutex::default);
    let key = format!("{name}\n{source}");
    if let Some(module) = modules.lock().expect("no test panics while it holds the map").get(&key) {
        return module;
    }
    let ptx = nvrtc::ptx(name, source).unwrap_or_else(|log| panic!("NVRTC refuses `{name}`:\n{log}"));
    let module = Module::parse(&ptx).unwrap_or_else(|error| panic!("`{name}`: {error}"));
    let module: &'static Module = Box::leak(Box::new(module));
    modules.lock().expect("no test panics while it holds the map").insert(key, module);
    module
}

/// The headers that `source` includes, and those that they do, by name.
pub(crate) fn included(source: &str) -> Vec<(String, String)> {
    let mut rest = headers();
    rest.sort();
    let mut found: Vec<(String, String)> = Vec::new();
    loop {
        let is_included = |(name, _): &(String, String)| {
            let line = format!("#include \"{name}\"");
            source.contains(&line) || found.iter().any(|(_, text)| text.contains(&line))
        };
        let (new, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_included);
        if new.is_empty() {
            return found;
        }
        found.extend(new);
        rest = others;
    }
}

/// The assembler's report on a file of `kernels/` for an architecture (`sm_80`): registers, stack, spills, shared memory.
pub(crate) fn resources(file: &str, architecture: &str) -> String {
    let report = nvrtc::report(file, &source(file), architecture);
    report.unwrap_or_else(|log| panic!("NVRTC refuses `{file}` for {architecture}:\n{log}"))
}
