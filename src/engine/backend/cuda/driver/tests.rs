//! The calls to the driver, in a process of its own with a staged driver in the loader's path: what is allocated is
//! freed, arguments arrive, the first failure stays. A GPU's own tests are those of the backend.

use std::process::Command;
use std::sync::Arc;

use super::super::super::Precision::{Exact, Rounded};
use super::super::device::DeviceBuffer;
use super::*;

const INNER: &str = "TUNESMITH_TEST_STAGED";

/// What the inner test does and prints, by lines, with some of the environment staged.
fn staged(variables: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/backend/cuda/driver/staged.c");
    // Stands for what NVRTC would take long to make.
    let (compiler, kept) = (Compiler::found().unwrap(), Kept::at(folder.path().join("tunesmith/cubins")));
    for program in Program::all() {
        kept.put(program.key(compiler, "sm_90"), b"\x7fELF");
    }
    let library = folder.path().join("libcuda.so");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(source).status();
    assert!(built.unwrap().success(), "a C compiler is needed, as for the build");
    let ran = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "backend::cuda::driver::tests::inner"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("XDG_CACHE_HOME", folder.path())
        .env(INNER, "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{text}\n{}", String::from_utf8_lossy(&ran.stderr));
    text
}

/// Uses a device as the backend does. Run by the others.
#[test]
fn inner() {
    if std::env::var_os(INNER).is_none() {
        return;
    }
    let device: Arc<dyn Device> = Arc::new(Driver::open(0).unwrap());
    assert_eq!(device.architecture(), "sm_90");
    let values: Vec<f32> = (0..1000).map(|value| value as f32).collect();
    let first = DeviceBuffer::of(&device, &values, Exact);
    let second = first.clone();
    device.clear(second.at_value(0), 4 * 500);
    assert_eq!(first.to_host(), values);
    assert_eq!(second.to_host(), [&[0.0; 500], &values[500..]].concat());
    assert_eq!(DeviceBuffer::of(&device, &values[..9], Rounded).to_host(), values[..9]);

    let large = Launch { grid: [1, 2, 3], block: 256, shared: 70_000 };
    device.launch("scale", large, &[Arg::Pointer(1 << 40), Arg::F32(1.5), Arg::I64(-7)]);
    let pointers = [1, 2, 3, u64::MAX].map(Arg::Pointer);
    let small = Launch { grid: [4, 1, 1], block: 128, shared: 0 };
    device.launch("rope", small, &[&pointers[..], &[Arg::I32(-5); 4]].concat());
    device.read(first.at_value(0), &mut [0; 4]);
    println!("then: {:?}", device.failure().map(|failure| failure.to_string()));
    assert_eq!(device.allocate(1 << 40), 0);
    device.launch("no_such_kernel", small, &[]);
    println!("at last: {:?}", device.failure().map(|failure| failure.to_string()));
    let mut bytes = [7; 4];
    device.read(first.at_value(1), &mut bytes);
    assert_eq!(bytes, [7; 4], "nothing is done after a failure");
}

#[track_caller]
fn says(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.contains(line), "no {line:?} in:\n{text}");
    }
}

const NO_ROOM: &str = "at last: Some(\"the device has no room for 1099511627776 more bytes";
const RELEASED: &str = "released with 0 allocations, 0 modules";

#[test]
fn kernels_are_started_with_their_arguments_and_all_is_given_back() {
    let text = staged(&[]);
    says(
        &text,
        &[
            "scale: attribute 8 = 70000",
            "scale of code: 1 2 3, 256 1 1, 70000: 1099511627776 1.5 -7",
            "rope of code: 4 1 1, 128 1 1, 0: 18446744073709551615 -5",
            "then: None",
            "trimmed",
            NO_ROOM,
            RELEASED,
        ],
    );
    assert!(!text.contains("rope: attribute") && !text.contains("plain"), "{text}");
}

#[test]
fn machine_without_pools_takes_memory_plainly() {
    says(&staged(&[("NO_POOL", "1")]), &["plain", "then: None", NO_ROOM, RELEASED]);
}

#[test]
fn driver_that_refuses_machine_code_or_has_no_compiler_beside_it_gets_the_portable_text() {
    let text = "rope of text: 4 1 1, 128 1 1, 0";
    says(&staged(&[("OLD_DRIVER", "1")]), &[text, RELEASED]);
    says(&staged(&[("TUNESMITH_NVRTC", "/nowhere")]), &[text, RELEASED]);
}

#[test]
fn failure_behind_a_launch_names_the_kernel_and_stays() {
    let text = staged(&[("BAD_KERNEL", "1")]);
    let failed = "`cuMemcpyDtoHAsync` failed on the device: as staged (CUDA_ERROR_ILLEGAL_ADDRESS); `rope` was started last";
    says(&text, &[&format!("then: Some(\"{failed}"), &format!("at last: Some(\"{failed}"), RELEASED]);
}
