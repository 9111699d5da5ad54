//! `--device` and `doctor` on machines that lack this or that. What is missing is staged: a library search that finds
//! nothing, a file that is no library, and a driver of fifty lines that describes whatever GPU a test asks for (it
//! computes nothing).

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Project, Ran, repository, stage};
use crate::tiny_model;

const MANIFEST: &str = r"
name: device
stages:
  rows: { uses: load, with: { paths: [rows.jsonl] } }
  split: { uses: split, needs: rows, with: { validation: 0.25, test: 0.25 } }
  base: { uses: model, with: { source: model } }
  adapter:
    uses: train
    needs: { data: split, base: base }
    with: { rank: 2, epochs: 1, batch_examples: 4, checkpoint_every: 0, max_length: 100, stop_probe: warn }
";

const DRIVER: &str = r#"
#include <stdlib.h>
#include <string.h>
static int staged(const char* name, int otherwise) { const char* is = getenv(name); return is ? atoi(is) : otherwise; }
int cuInit(unsigned flags) { return staged("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) { *version = staged("FAKE_VERSION", 13000); return 0; }
int cuDeviceGetCount(int* count) { *count = staged("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int len, int device) { strncpy(name, "Staged GPU", len); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)8 << 30; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    const int capability = staged("FAKE_CAPABILITY", 90);
    *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : 0;
    return 0;
}
int cuGetErrorString(int error, const char** words) { *words = "as staged"; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &staged; return staged("FAKE_CONTEXT", 0); }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { *free = (size_t)6 << 30; *total = (size_t)8 << 30; return 0; }
"#;

fn project() -> Project {
    let rows: Vec<String> = (0..12)
        .map(|n| format!(r#"{{"question": "When does berth {n} open?", "answer": "At {n}."}}"#))
        .collect();
    let project =
        Project::new().file("device.yaml", MANIFEST).file("rows.jsonl", &rows.join("\n")).file("none/x", "");
    tiny_model::write(&project);
    project
}

/// The binary where no GPU is to be seen, NVRTC is not found and nothing is kept outside the project.
fn bare(project: &Project, arguments: &[&str]) -> Command {
    let mut command = project.command(arguments);
    command
        .env("CUDA_VISIBLE_DEVICES", "-1")
        .env("TUNESMITH_NVRTC", project.path("none"))
        .env("HOME", project.path("home"))
        .env_remove("XDG_CACHE_HOME");
    command
}

/// The same with the staged driver.
fn with_driver(project: &Project, staged: &[(&str, &str)], arguments: &[&str]) -> Command {
    let folder = project.path("driver");
    if !folder.exists() {
        project.write("driver.c", DRIVER);
        std::fs::create_dir_all(&folder).unwrap();
        let library = folder.join("libcuda.so");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .args([&library, &project.path("driver.c")])
            .status();
        assert!(built.unwrap().success(), "a C compiler is needed, as for the build");
    }
    let mut command = bare(project, arguments);
    command.env("LD_LIBRARY_PATH", folder).envs(staged.iter().copied());
    command
}

fn ran(mut command: Command) -> Ran {
    let ran = Ran::from(command.output().unwrap());
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    ran
}

#[test]
fn gpu_asked_for_where_none_is_ends_before_anything_runs() {
    let project = project();
    for arguments in [
        &["run", "device.yaml", "--device", "cuda"][..],
        &["plan", "device.yaml", "--device", "cuda:1"],
        &["bench", "train", "--model", "model", "--device", "cuda"],
        &["bench", "generate", "--model", "model", "--device", "cuda:0"],
    ] {
        let ran = ran(bare(&project, arguments)).code(2).says("NVIDIA driver").says("hint:");
        assert!(ran.stderr.contains("`--device cpu`"), "{}", ran.stderr);
    }
    assert!(!project.path("cache/out/device").exists());
    let report = ran(bare(&project, &["run", "device.yaml", "--device", "cuda", "--json"])).code(2).json();
    assert_eq!((&report["ok"], &report["errors"][0]["code"]), (&json!(false), &json!("device")));
    project.run(&["run", "device.yaml", "--device", "gpu"]).code(2).says("`cuda:N`");
}

#[test]
fn cpu_computes_where_no_gpu_is_and_the_reason_is_said_once() {
    let project = project();
    let auto = ran(bare(&project, &["run", "device.yaml"])).success();
    assert_eq!(auto.stderr.matches("device: the CPU (").count(), 1, "{}", auto.stderr);
    let again = ran(bare(&project, &["run", "device.yaml", "--device", "cpu", "--json"])).success();
    assert!(!again.stderr.contains("device:"), "{}", again.stderr);
    assert_eq!(stage(&again.json(), "adapter")["state"], "cached", "the CPU is the CPU");
}

#[test]
fn device_is_part_of_the_key_of_what_computes_and_of_nothing_else() {
    let project = project();
    ran(bare(&project, &["run", "device.yaml", "-q"])).success();
    let plan = ran(with_driver(&project, &[], &["plan", "device.yaml", "--json"])).success().json();
    let reasons = &stage(&plan, "adapter")["reasons"];
    assert!(reasons.to_string().contains("cuda:sm_90-bf16."), "{reasons}");
    for name in ["rows", "split", "base"] {
        assert_eq!(stage(&plan, name)["state"], "cached", "{name}");
    }
}

#[test]
fn what_is_in_the_way_of_a_gpu_is_named_with_the_next_step() {
    let project = project();
    let cases = [
        (("FAKE_INIT", "34"), ["the toolkit's stub", "LD_LIBRARY_PATH"]),
        (("FAKE_INIT", "100"), ["finds no GPU", "CUDA_VISIBLE_DEVICES"]),
        (("FAKE_COUNT", "0"), ["finds no GPU", "nvidia-smi"]),
        (("FAKE_CAPABILITY", "75"), ["compute capability 7.5; at least 8.0", "cuda:N"]),
        (("FAKE_VERSION", "11020"), ["for CUDA 11.2; at least 11.4", "newer NVIDIA driver"]),
        (("FAKE_INIT", "999"), ["fails in cuInit: as staged (CUDA_ERROR_UNKNOWN)", "restart"]),
        // Fine until it is woken.
        (("FAKE_CONTEXT", "2"), ["fails in cuDevicePrimaryCtxRetain: as staged", "nvidia-smi"]),
    ];
    let bench = ["bench", "generate", "--model", "model", "--tokens", "1", "--rounds", "1", "--device"];
    for (staged, [why, next]) in cases {
        ran(with_driver(&project, &[staged], &[&bench[..], &["cuda"]].concat())).code(2).says(why).says(next);
        ran(with_driver(&project, &[staged], &[&bench[..], &["auto"]].concat())).success().says(why);
    }
    ran(with_driver(&project, &[], &[&bench[..], &["cuda:1"]].concat())).code(2).says("there is no GPU 1");
}

#[test]
fn doctor_says_what_is_missing_and_what_to_do() {
    let project = project();
    let found = ran(bare(&project, &["doctor", "--json"])).success().json();
    assert_eq!((&found["device"], &found["cuda"]["gpus"]), (&json!("cpu"), &json!([])));
    assert!(found["cuda"]["problem"].as_str().unwrap().contains("NVIDIA driver"));
    assert!(found["nvrtc"]["problem"].as_str().unwrap().contains("(TUNESMITH_NVRTC)"), "{found}");
    assert!(found["cpu"]["instruction_sets"].as_array().unwrap().contains(&found["cpu"]["kernels"]));
    assert!(
        found["next"].to_string().contains("install NVIDIA's driver") || found["cuda"]["driver"].is_string()
    );
    assert_eq!(found["kernels"]["compiled_by"], "driver");

    // A file that is no library is passed over, and said.
    project.write("none/libnvrtc.so.13", "no library");
    let text = ran(bare(&project, &["doctor"])).success().stdout;
    assert!(
        text.contains("no NVRTC that works was found") && text.contains("none/libnvrtc.so.13`"),
        "{text}"
    );

    // A GPU, but nothing to compile with: the driver does it, and doctor says how to get better kernels.
    let staged = [("FAKE_CAPABILITY", "120")];
    let found = ran(with_driver(&project, &staged, &["doctor", "--json"])).success().json();
    let gpu = &found["cuda"]["gpus"][0];
    assert_eq!(
        (&found["device"], &found["cuda"]["driver"], &gpu["architecture"], &gpu["memory_free_bytes"]),
        (&json!("cuda:0"), &json!("13.0"), &json!("sm_120"), &json!(6_u64 << 30))
    );
    assert!(found["next"].to_string().contains("pip install -U nvidia-cuda-nvrtc"), "{found}");
}

/// Where the set-up of the tests has put NVRTC.
fn nvrtc() -> PathBuf {
    std::env::var_os("TUNESMITH_NVRTC").map_or_else(
        || {
            let target = std::env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| repository().join("target"), PathBuf::from);
            target.join("nvrtc")
        },
        PathBuf::from,
    )
}

fn ran_with_nvrtc(command: &mut Command) -> Value {
    assert!(nvrtc().exists(), "no `{}`: run `sh tests/ptxsim/fetch-nvrtc.sh`", nvrtc().display());
    Ran::from(command.env("TUNESMITH_NVRTC", nvrtc()).output().unwrap()).success().json()
}

#[test]
fn nvrtc_older_than_the_gpu_is_named_and_the_driver_compiles() {
    let project = project();
    let mut command = with_driver(&project, &[("FAKE_CAPABILITY", "990")], &["doctor", "--json"]);
    let found = ran_with_nvrtc(&mut command);
    let problem = found["kernels"]["files"][0]["problem"].as_str().unwrap();
    assert!(problem.starts_with("NVRTC V") && problem.ends_with("cannot compile for sm_990"), "{problem}");
    assert_eq!((&found["device"], &found["kernels"]["compiled_by"]), (&json!("cuda:0"), &json!("driver")));
    assert!(found["next"].to_string().contains("pip install -U nvidia-cuda-nvrtc"), "{found}");
}

#[test]
fn doctor_compiles_every_kernel_where_nvrtc_is() {
    let project = project();
    std::fs::create_dir_all(project.path("cache")).unwrap();
    let found = ran_with_nvrtc(&mut bare(&project, &["doctor", "--json"]));
    assert!(found["nvrtc"]["version"].as_str().unwrap().starts_with('V'), "{found}");
    let files = found["kernels"]["files"].as_array().unwrap();
    assert!(files.len() > 10 && files.iter().all(|file| file["problem"].is_null()), "{found}");
    assert_eq!(found["kernels"]["compiled_by"], "nvrtc");
    assert_eq!(
        std::fs::read_dir(project.path("cache/cubins")).unwrap().count(),
        files.len(),
        "kept for a training"
    );
}
