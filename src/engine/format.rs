//! Checkpoints on disk: GGUF files, safetensors files and Hugging Face folders, behind one type that speaks
//! Hugging Face tensor names. Knows nothing of what the tensors are for, beyond how llama files name them.
//!
//! ```text
//! x.gguf ──────────────── gguf ── gguf_llama (names, row order, config) ──┐
//! x.safetensors, folder ─ safetensors (shards, bnb-4bit) ── config.json ──┴─► Checkpoint ─► Tensor ─► Matrix
//! ```
//! Files are mapped, never read whole, and every offset and count in them is checked before it is used: a
//! hostile file is an error that names the culprit, never a panic or an unbounded allocation.

pub mod block;
pub mod gguf;
pub mod gguf_llama;
pub mod safetensors;
pub mod tensor;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use thiserror::Error;

use crate::format::gguf::{Gguf, GgufError};
use crate::format::safetensors::{SafetensorsError, TensorFiles};
pub use crate::format::tensor::{Tensor, TensorData};
use crate::matrix::Matrix;
use crate::model::ModelConfig;
use crate::model::config::ConfigError;

/// A checkpoint that cannot be read.
#[derive(Debug, Error)]
pub enum FormatError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("`{path}` is not a model; hint: {hint}")]
    NotAModel { path: PathBuf, hint: &'static str },
    #[error("config of `{path}`: {cause}")]
    Config { path: PathBuf, cause: ConfigError },
    #[error("gguf file `{path}`: {cause}")]
    Gguf { path: PathBuf, cause: GgufError },
    #[error("safetensors file `{path}`: {cause}")]
    Safetensors { path: PathBuf, cause: SafetensorsError },
    #[error("`{path}` has no tensor `{tensor}`")]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("tensor `{tensor}` of `{path}` has shape {shape:?}, expected {expected}")]
    Shape { path: PathBuf, tensor: String, shape: Vec<usize>, expected: String },
}

/// An open model: its description and its tensors under Hugging Face names
/// (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    source: Source,
}

enum Source {
    /// A GGUF file, and the name each tensor has in it.
    Gguf {
        file: Gguf,
        names: BTreeMap<String, String>,
    },
    Safetensors(TensorFiles),
}

impl Checkpoint {
    /// Opens a `.gguf` file, a `.safetensors` file with a `config.json` beside it, or a Hugging Face folder.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if fs_err::metadata(path)?.is_dir() {
            return Self::open_safetensors(path, path, TensorFiles::open_folder(path)?);
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("gguf") => Self::open_gguf(path),
            Some("safetensors") => {
                let folder = path.parent().unwrap_or(Path::new("."));
                Self::open_safetensors(path, folder, TensorFiles::open_file(path)?)
            }
            _ => Err(FormatError::NotAModel {
                path: path.to_owned(),
                hint: "give a .gguf file, a .safetensors file or a folder with config.json and safetensors",
            }),
        }
    }

    fn open_safetensors(path: &Path, folder: &Path, files: TensorFiles) -> Result<Self, FormatError> {
        let config_path = folder.join("config.json");
        let text = fs_err::read_to_string(&config_path)?;
        let config = ModelConfig::from_json(&text)
            .map_err(|cause| FormatError::Config { path: config_path, cause })?;
        Ok(Self { path: path.to_owned(), config, source: Source::Safetensors(files) })
    }

    fn open_gguf(path: &Path) -> Result<Self, FormatError> {
        let file = Gguf::open(path)?;
        let fail = |cause| FormatError::Gguf { path: path.to_owned(), cause };
        let config = gguf_llama::config(&file).map_err(fail)?;
        let names = gguf_llama::names(&file).map_err(fail)?;
        Ok(Self { path: path.to_owned(), config, source: Source::Gguf { file, names } })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Names of all tensors, sorted. The scales of a quantised tensor are part of it, and not listed.
    pub fn names(&self) -> Vec<&str> {
        match &self.source {
            Source::Gguf { names, .. } => names.keys().map(String::as_str).collect(),
            Source::Safetensors(files) => files.names(),
        }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf { names, .. } => names.contains_key(name),
            Source::Safetensors(files) => files.has(name),
        }
    }

    /// A tensor, still encoded as in the file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, FormatError> {
        let missing = || FormatError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        match &self.source {
            Source::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(missing)?;
                let tensor = file.tensor(stored).ok_or_else(missing)?;
                Ok(gguf_llama::reorder(name, tensor, &self.config))
            }
            Source::Safetensors(files) => files.tensor(name)?.ok_or_else(missing),
        }
    }

    /// A tensor of two dimensions. Encodings `Matrix` has are mapped as they are (NF4 too, never quantised
    /// anew); GGUF's block formats are decoded to f32, exactly as llama.cpp does.
    pub fn matrix(&self, name: &str) -> Result<Matrix, FormatError> {
        let tensor = self.tensor(name)?;
        match tensor.shape[..] {
            [rows, cols] => Ok(Matrix { rows, cols, values: tensor.into_values() }),
            _ => Err(self.shape_error(name, &tensor, "two dimensions")),
        }
    }

    /// A tensor of one dimension, as f32.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        let tensor = self.tensor(name)?;
        match tensor.shape[..] {
            [len] => {
                let mut out = vec![0.0; len];
                tensor.decode_rows(0, &mut out);
                Ok(out)
            }
            _ => Err(self.shape_error(name, &tensor, "one dimension")),
        }
    }

    fn shape_error(&self, name: &str, tensor: &Tensor, expected: &str) -> FormatError {
        FormatError::Shape {
            path: self.path.clone(),
            tensor: name.to_owned(),
            shape: tensor.shape.clone(),
            expected: expected.to_owned(),
        }
    }
}

/// Maps a whole file.
fn map(path: &Path) -> Result<Arc<Mmap>, FormatError> {
    let file = fs_err::File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Err(FormatError::NotAModel { path: path.to_owned(), hint: "the file is empty" });
    }
    // SAFETY: the mapping is read-only and all reads are within its length. Truncating the file while it is
    // mapped would end the process (SIGBUS), not corrupt it; models are not rewritten in place.
    let map = unsafe { Mmap::map(file.file())? };
    Ok(Arc::new(map))
}
