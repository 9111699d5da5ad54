//! Where CUDA's shared libraries are: in the folder a variable names, beside the binary, in a Python environment, in
//! a toolkit, or where the system's loader looks. Knows paths and names; what is in a library, it does not.
//!
//! Folders are asked in this order and the first library that works is taken, so that what stands nearer to the
//! person wins over what the system brought. A toolkit's `stubs` are never looked at: they only satisfy linkers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Folders that a wheel may put between the named one and its libraries: `nvidia/cu13/lib`, and one to spare.
const DEPTH_MAX: usize = 4;
/// Folders above the binary in which `nvrtc` may stand: `target/nvrtc` of `target/release/deps/engine`.
const ABOVE_BINARY: usize = 3;
/// Major versions that the system's loader is asked for.
const MAJORS: std::ops::RangeInclusive<u32> = 12..=13;
/// What [`Surroundings`] takes from the environment.
const VARIABLES: [&str; 6] =
    [NVRTC_VARIABLE, "VIRTUAL_ENV", "CONDA_PREFIX", "HOME", "CUDA_PATH", "CUDA_HOME"];

/// Names the one folder in which NVRTC is looked for.
pub(crate) const NVRTC_VARIABLE: &str = "TUNESMITH_NVRTC";

/// What decides where libraries are looked for.
#[derive(Debug)]
pub(crate) struct Surroundings {
    variables: BTreeMap<&'static str, OsString>,
    binary: Option<PathBuf>,
    /// `/`, but in tests.
    root: PathBuf,
}

impl Surroundings {
    /// Those of this process.
    pub(crate) fn here() -> Self {
        let variables = VARIABLES
            .iter()
            .filter_map(|&name| Some((name, std::env::var_os(name).filter(|value| !value.is_empty())?)))
            .collect();
        Self { variables, binary: std::env::current_exe().ok(), root: PathBuf::from("/") }
    }

    /// Candidates for NVRTC, best first. `TUNESMITH_NVRTC` is the person's word: with it nothing else is asked.
    pub(crate) fn nvrtc(&self) -> Vec<PathBuf> {
        match self.path(NVRTC_VARIABLE) {
            Some(named) => below(&named, "nvrtc", DEPTH_MAX),
            None => {
                let beside =
                    self.above_binary().flat_map(|folder| below(&folder.join("nvrtc"), "nvrtc", DEPTH_MAX));
                beside.chain(self.anywhere("nvrtc")).collect()
            }
        }
    }

    /// Candidates for cuBLASLt, best first.
    pub(crate) fn cublaslt(&self) -> Vec<PathBuf> {
        self.anywhere("cublasLt")
    }

    /// The folder that `TUNESMITH_NVRTC` names.
    pub(crate) fn named_nvrtc(&self) -> Option<PathBuf> {
        self.path(NVRTC_VARIABLE)
    }

    fn path(&self, variable: &str) -> Option<PathBuf> {
        self.variables.get(variable).map(PathBuf::from)
    }

    /// The binary's folder and those above it.
    fn above_binary(&self) -> impl Iterator<Item = &Path> {
        self.binary.iter().flat_map(|binary| binary.ancestors().skip(1).take(ABOVE_BINARY))
    }

    /// Beside the binary, in Python environments, in toolkits; last the bare names, for the system's loader.
    fn anywhere(&self, stem: &str) -> Vec<PathBuf> {
        let beside = self.above_binary().take(1).map(Path::to_owned);
        let folders = beside.chain(self.python_folders()).chain(self.toolkit_folders());
        let names = MAJORS.rev().map(|major| PathBuf::from(format!("lib{stem}.so.{major}")));
        folders.filter_map(|folder| newest(&folder, stem)).chain(names).collect()
    }

    /// Folders of libraries that NVIDIA's wheels and conda's packages make.
    fn python_folders(&self) -> impl Iterator<Item = PathBuf> {
        let conda = self.path("CONDA_PREFIX");
        let prefixes = [
            self.path("VIRTUAL_ENV"),
            conda.clone(),
            self.path("HOME").map(|home| home.join(".local")),
            Some(self.root.join("usr/local")),
            Some(self.root.join("usr")),
        ];
        let wheels = prefixes.into_iter().flatten().flat_map(|prefix| {
            let lib = prefix.join("lib");
            entries(&lib).into_iter().filter(|path| file_name(path).starts_with("python3")).flat_map(
                |python| {
                    let packages =
                        ["site-packages", "dist-packages"].map(|name| python.join(name).join("nvidia"));
                    packages.into_iter().flat_map(|nvidia| entries(&nvidia)).map(|part| part.join("lib"))
                },
            )
        });
        wheels.chain(conda.map(|prefix| prefix.join("lib")))
    }

    /// Folders of libraries of CUDA's toolkits.
    fn toolkit_folders(&self) -> impl Iterator<Item = PathBuf> {
        let roots = [
            self.path("CUDA_PATH"),
            self.path("CUDA_HOME"),
            Some(self.root.join("usr/local/cuda")),
            Some(self.root.join("opt/cuda")),
        ];
        let machine = match std::env::consts::ARCH {
            "aarch64" => "targets/sbsa-linux/lib",
            _ => "targets/x86_64-linux/lib",
        };
        let parts = ["lib64".to_owned(), "lib".to_owned(), machine.to_owned()];
        roots.into_iter().flatten().flat_map(move |root| parts.clone().map(|part| root.join(part)))
    }
}

/// The newest `lib{stem}.so…` of each folder in `folder` or up to `depth` below it, in the folders' order.
fn below(folder: &Path, stem: &str, depth: usize) -> Vec<PathBuf> {
    let deeper = entries(folder)
        .into_iter()
        .filter(|path| depth > 0 && path.is_dir() && file_name(path) != "stubs")
        .flat_map(|path| below(&path, stem, depth - 1));
    newest(folder, stem).into_iter().chain(deeper).collect()
}

/// The `lib{stem}.so…` of the highest version in `folder`.
fn newest(folder: &Path, stem: &str) -> Option<PathBuf> {
    let prefix = format!("lib{stem}.so");
    let version = |path: &PathBuf| -> Option<Vec<u32>> {
        let numbers = file_name(path).strip_prefix(&prefix)?;
        numbers.split('.').skip(1).map(|number| number.parse().ok()).collect()
    };
    let found = entries(folder).into_iter().filter_map(|path| Some((version(&path)?, path)));
    found.max().map(|(_, path)| path)
}

/// What stands in a folder, by name; nothing where it cannot be read.
pub(super) fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    paths
}

pub(super) fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with empty files in it.
    fn staged(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        root
    }

    /// Candidates under `root`, with variables that name folders under it.
    fn candidates(root: &Path, variables: &[(&'static str, &str)]) -> Vec<String> {
        let variables =
            variables.iter().map(|(name, folder)| (*name, root.join(folder).into_os_string())).collect();
        let surroundings = Surroundings {
            variables,
            binary: Some(root.join("bin/release/tunesmith")),
            root: root.to_owned(),
        };
        let relative = |path: PathBuf| path.strip_prefix(root).unwrap_or(&path).display().to_string();
        surroundings.nvrtc().into_iter().map(relative).collect()
    }

    const SYSTEM: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

    #[test]
    fn nearer_places_come_first_and_the_systems_names_last() {
        let files = [
            "usr/local/cuda/lib64/libnvrtc.so.12",
            "usr/lib/python3.12/dist-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "home/.local/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "venv/lib/python3.13/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "conda/lib/libnvrtc.so.12",
            "toolkit/lib64/libnvrtc.so.11.2",
            "bin/release/libnvrtc.so.13",
            "bin/nvrtc/nvidia/cu13/lib/libnvrtc.so.13",
        ];
        let root = staged(&files);
        let variables =
            [("VIRTUAL_ENV", "venv"), ("CONDA_PREFIX", "conda"), ("HOME", "home"), ("CUDA_PATH", "toolkit")];
        let order = [files[7], files[6], files[3], files[2], files[1], files[4], files[5], files[0]];
        assert_eq!(candidates(root.path(), &variables), [&order[..], &SYSTEM].concat());
    }

    #[test]
    fn named_folder_is_the_only_one_asked() {
        let root = staged(&["w/nvidia/cu13/lib/libnvrtc.so.13", "bin/release/libnvrtc.so.13"]);
        let named = |folder| candidates(root.path(), &[(NVRTC_VARIABLE, folder)]);
        assert_eq!(named("w"), ["w/nvidia/cu13/lib/libnvrtc.so.13"]);
        assert!(named("empty").is_empty());
    }

    #[test]
    fn newest_of_a_folder_is_taken_and_stubs_never() {
        let files = ["a/libnvrtc.so", "a/libnvrtc.so.9", "a/libnvrtc.so.13", "a/libnvrtc.alt.so.14"];
        let root = staged(&[&files[..], &["a/stubs/libnvrtc.so.15", "a/libnvrtc-builtins.so.16"]].concat());
        assert_eq!(candidates(root.path(), &[(NVRTC_VARIABLE, "a")]), ["a/libnvrtc.so.13"]);
    }
}
