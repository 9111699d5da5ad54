//! A folder with a project in it, and the binary run inside: a test says what stands there, runs, and looks at
//! exit code, stdout, stderr and files at once.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A temporary project with a store of its own.
pub(crate) struct Project {
    folder: tempfile::TempDir,
}

/// What a run of the binary left behind.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Project {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.write(name, content);
        self
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The binary with `arguments`, not started yet.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("TUNESMITH_CACHE", self.path("cache"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::from(self.command(arguments).output().unwrap())
    }

    /// Runs, expects success, and returns the JSON on stdout.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        self.run(arguments).success().json()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    #[track_caller]
    pub(crate) fn success(self) -> Self {
        self.code(0)
    }

    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no {text:?} in stderr:\n{}", self.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.stdout.trim())
            .unwrap_or_else(|error| panic!("{error}\nstdout:\n{}\nstderr:\n{}", self.stdout, self.stderr))
    }
}

/// The folder of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The entry of stage `name` in the JSON of `run` or `plan`.
#[track_caller]
pub(crate) fn stage<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["stages"]
        .as_array()
        .and_then(|stages| stages.iter().find(|stage| stage["name"] == name))
        .unwrap_or_else(|| panic!("no stage {name} in {report:#}"))
}

/// The states of all stages, `name=state`, in order.
pub(crate) fn states(report: &Value) -> Vec<String> {
    report["stages"]
        .as_array()
        .expect("a report has stages")
        .iter()
        .map(|stage| format!("{}={}", stage["name"].as_str().unwrap(), stage["state"].as_str().unwrap()))
        .collect()
}

/// The digest of output `path` of stage `name`.
#[track_caller]
pub(crate) fn digest(report: &Value, name: &str, path: &str) -> String {
    stage(report, name)["outputs"]
        .as_array()
        .and_then(|outputs| outputs.iter().find(|output| output["path"] == path))
        .and_then(|output| output["digest"].as_str())
        .unwrap_or_else(|| panic!("no output {path} of {name} in {report:#}"))
        .to_owned()
}
