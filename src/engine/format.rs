//! Checkpoints on disk: GGUF files, safetensors files and Hugging Face folders, behind one type that speaks
//! Hugging Face tensor names. Knows nothing of what the tensors are for, beyond how GGUF files name them.
//!
//! ```text
//! x.gguf ──────────────── gguf ── gguf_model (config), gguf_tensors (names) ─┐
//! x.safetensors, folder ─ safetensors (shards, bnb-4bit) ── config.json ─────┴─► Checkpoint ─► Tensor ─► Matrix
//! ```
//! Files are mapped, never read whole, and every offset and count in them is checked before it is used: a
//! hostile file is an error that names the culprit, never a panic or an unbounded allocation.

pub mod block;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod gguf;
pub mod gguf_model;
pub mod gguf_tensors;
#[cfg(test)]
pub(crate) mod gguf_writer;
pub mod safetensors;
mod superblock;
pub mod tensor;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use thiserror::Error;

use crate::format::gguf::{Gguf, GgufError};
use crate::format::gguf_tensors::Stored;
use crate::format::safetensors::{SafetensorsError, TensorFiles};
pub use crate::format::tensor::{Tensor, TensorData};
use crate::matrix::{Matrix, Values};
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
    #[error(
        "tensor `{tensor}` of `{path}` holds a value that is no finite number, in row {row}; hint: the file is corrupt"
    )]
    NotFinite { path: PathBuf, tensor: String, row: usize },
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
    /// A GGUF file, and where each tensor is in it.
    Gguf { file: Gguf, names: BTreeMap<String, Stored> },
    /// Safetensors files, and what stands before each name of the language model.
    Safetensors { files: TensorFiles, prefix: &'static str },
}

/// Before the names of a language model that is part of a multimodal one.
const PART_PREFIX: &str = "language_model.";

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
        let is_part = files.has(&format!("{PART_PREFIX}model.embed_tokens.weight"));
        let prefix = if is_part { PART_PREFIX } else { "" };
        Ok(Self { path: path.to_owned(), config, source: Source::Safetensors { files, prefix } })
    }

    fn open_gguf(path: &Path) -> Result<Self, FormatError> {
        let file = Gguf::open(path)?;
        let fail = |cause| FormatError::Gguf { path: path.to_owned(), cause };
        let config = gguf_model::config(&file).map_err(fail)?;
        let names = gguf_tensors::names(&file, &config).map_err(fail)?;
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
            Source::Safetensors { files, prefix } => {
                files.names().into_iter().filter_map(|name| name.strip_prefix(prefix)).collect()
            }
        }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf { names, .. } => names.contains_key(name),
            Source::Safetensors { files, prefix } => files.has(&format!("{prefix}{name}")),
        }
    }

    /// A tensor, still encoded as in the file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, FormatError> {
        let missing = || FormatError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        match &self.source {
            Source::Gguf { file, names } => {
                let stored = names.get(name).ok_or_else(missing)?;
                let fail = |cause| FormatError::Gguf { path: self.path.clone(), cause };
                gguf_tensors::read(file, stored).map_err(fail)?.ok_or_else(missing)
            }
            Source::Safetensors { files, prefix } => {
                files.tensor(&format!("{prefix}{name}"))?.ok_or_else(missing)
            }
        }
    }

    /// A tensor of two dimensions. Encodings `Matrix` has are mapped as they are (NF4 too, never quantised
    /// anew); GGUF's block formats are decoded to f32, exactly as llama.cpp does.
    pub fn matrix(&self, name: &str) -> Result<Matrix, FormatError> {
        let tensor = self.tensor(name)?;
        match tensor.shape[..] {
            [rows, cols] => {
                let blocks = matches!(tensor.data, TensorData::Blocks(..));
                let matrix = Matrix { rows, cols, values: tensor.into_values() };
                if let (true, Values::F32(bytes)) = (blocks, &matrix.values) {
                    let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    self.ensure_finite(name, cols, bytes.as_slice().chunks_exact(4).map(float))?;
                }
                Ok(matrix)
            }
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
                self.ensure_finite(name, 1, out.iter().copied())?;
                Ok(out)
            }
            _ => Err(self.shape_error(name, &tensor, "one dimension")),
        }
    }

    fn ensure_finite(
        &self,
        name: &str,
        cols: usize,
        mut values: impl Iterator<Item = f32>,
    ) -> Result<(), FormatError> {
        match values.position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (path, tensor) = (self.path.clone(), name.to_owned());
                Err(FormatError::NotFinite { path, tensor, row: at / cols })
            }
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

#[cfg(test)]
mod tests {
    use super::gguf_writer::{BF16, F16, F32, GgufWriter, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, tiny_llama};
    use super::*;
    use crate::format::gguf::Value;
    use crate::model::RopeScaling;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");

    fn open_gguf(file: &GgufWriter) -> Result<Checkpoint, FormatError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, file.finish()).unwrap();
        Checkpoint::open(&path)
    }

    #[track_caller]
    fn refused(file: &GgufWriter, part: &str) {
        let error = open_gguf(file).err().expect("the file must be refused").to_string();
        assert!(error.contains(part) && error.contains("tiny.gguf"), "{error}");
    }

    #[test]
    fn every_encoding_opens_and_decodes() {
        for code in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
            let checkpoint = open_gguf(&tiny_llama(code)).unwrap();
            assert_eq!(checkpoint.names().len(), 2 + 2 * 9);
            let config = checkpoint.config();
            assert_eq!((config.head_dim, config.vocab_size, config.tie_word_embeddings), (16, 270, true));
            for name in checkpoint.names() {
                if checkpoint.tensor(name).unwrap().shape.len() == 1 {
                    assert_eq!(checkpoint.vector(name).unwrap().len(), 64, "{name}");
                    assert!(matches!(checkpoint.matrix(name), Err(FormatError::Shape { .. })));
                    continue;
                }
                let matrix = checkpoint.matrix(name).unwrap();
                let values = matrix.to_f32();
                assert_eq!(values.len(), matrix.rows * matrix.cols);
                assert!(
                    values.iter().all(|value| value.abs() < 1.0) && values.iter().any(|&value| value != 0.0)
                );
            }
        }
    }

    #[test]
    fn gguf_of_a_hugging_face_model_gives_its_tensors_back() {
        let original = Checkpoint::open(&Path::new(GOLDEN).join("llama")).unwrap();
        let mut file = tiny_llama(F32);
        for name in tiny_llama_names() {
            file.remove(&name);
        }
        file.unsigned("llama.embedding_length", 64).unsigned("llama.feed_forward_length", 128);
        // convert_hf_to_gguf: reshape (heads, 2, d/2, cols), swap axes 1 and 2.
        for name in original.names() {
            let tensor = original.tensor(name).unwrap();
            let (rows, cols) = (tensor.rows(), tensor.cols());
            let mut values = vec![0.0; rows * cols];
            tensor.decode_rows(0, &mut values);
            if name.contains("q_proj") || name.contains("k_proj") {
                let source = values.clone();
                for row in 0..rows {
                    let (head, i, half) = (row / 16, row % 16 / 2, row % 2);
                    let from = head * 16 + half * 8 + i;
                    values[row * cols..(row + 1) * cols]
                        .copy_from_slice(&source[from * cols..(from + 1) * cols]);
                }
            }
            file.floats(&gguf_name(name), &tensor.shape, &values);
        }
        let converted = open_gguf(&file).unwrap();
        assert_eq!(converted.names(), original.names());
        for name in original.names() {
            let [ours, theirs] = [&converted, &original].map(|checkpoint| {
                let tensor = checkpoint.tensor(name).unwrap();
                let mut values = vec![0.0; tensor.len()];
                tensor.decode_rows(0, &mut values);
                values
            });
            assert!(ours == theirs, "{name}");
        }
        assert!(!converted.config().tie_word_embeddings);
    }

    fn tiny_llama_names() -> Vec<String> {
        let checkpoint = open_gguf(&tiny_llama(F32)).unwrap();
        checkpoint.names().into_iter().map(gguf_name).collect()
    }

    fn gguf_name(name: &str) -> String {
        let mut name = name.replace("model.layers.", "blk.");
        for (theirs, ours) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            name = name.replace(theirs, ours);
        }
        name
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        refused(tiny_llama(F32).text("general.architecture", "bert"), "`bert` is not supported yet");
        refused(tiny_llama(F32).unsigned("llama.expert_count", 8), "mixture of experts");
        refused(tiny_llama(F32).unsigned("split.count", 3), "is part 1 of a model split into 3 files");
        refused(tiny_llama(F32).unsigned("llama.rope.dimension_count", 8), "rotating 8 of 16");
        refused(tiny_llama(F32).text("llama.rope.scaling.type", "yarn"), "rope scaling `yarn`");
        refused(tiny_llama(F32).remove("llama.block_count"), "`llama.block_count` is missing");
        refused(tiny_llama(F32).text("llama.block_count", "two"), "`llama.block_count` is a text");
        refused(tiny_llama(F32).unsigned("llama.attention.head_count", 0), "num_attention_heads");
        refused(tiny_llama(F32).floats("blk.0.odd.weight", &[1], &[0.0]), "`blk.0.odd.weight`");
        refused(tiny_llama(F32).tensor("output.weight", &[270, 256], 16, vec![0; 270 * 66]), "IQ2_XXS");
        refused(
            tiny_llama(F32).tensor("output.weight", &[2, 20], Q8_0, vec![0; 64]),
            "no whole number of blocks",
        );
        refused(tiny_llama(F32).floats("rope_freqs.weight", &[8], &[3.0; 8]), "rope_freqs.weight");
    }

    #[test]
    fn scales_that_are_no_numbers_name_the_tensor_and_row() {
        let mut bytes = vec![0; 270 * 2 * 34];
        bytes[3 * 2 * 34..][..2].copy_from_slice(&0x7c00u16.to_le_bytes());
        bytes[3 * 2 * 34 + 2] = 1;
        let mut file = tiny_llama(F32);
        file.tensor("output.weight", &[270, 64], Q8_0, bytes);
        file.floats("output_norm.weight", &[64], &[f32::NAN; 64]);
        let checkpoint = open_gguf(&file).unwrap();
        let error = checkpoint.matrix("lm_head.weight").err().unwrap().to_string();
        assert!(error.contains("`lm_head.weight`") && error.contains("row 3"), "{error}");
        assert!(matches!(checkpoint.vector("model.norm.weight"), Err(FormatError::NotFinite { row: 0, .. })));
    }

    #[test]
    fn llama3_scaling_is_recognised_by_its_factors() {
        // transformers' modeling_rope_utils for theta 100,000, head dim 16, factor 8, bands 1 and 4 over 8192.
        let factor = |i: i32| {
            let wavelength = std::f64::consts::TAU * 100_000f64.powf(f64::from(2 * i) / 16.0);
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            match smooth {
                smooth if smooth < 0.0 => 8.0,
                smooth if smooth > 1.0 => 1.0,
                smooth => (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32,
            }
        };
        let factors: Vec<f32> = (0..8).map(factor).collect();
        let checkpoint = open_gguf(tiny_llama(F32).floats("rope_freqs.weight", &[8], &factors)).unwrap();
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        assert_eq!(checkpoint.config().rope.scaling, expected);
        let mut linear = tiny_llama(F32);
        linear.set("llama.rope.scaling.factor", Value::Float(2.0)).text("llama.rope.scaling.type", "linear");
        assert_eq!(open_gguf(&linear).unwrap().config().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn bnb_4bit_tensors_are_read_without_quantising_anew() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(Path::new(GOLDEN).join("llama/config.json"), folder.path().join("config.json"))
            .unwrap();
        let stored = Path::new(GOLDEN).join("linear4bit_state_dict.safetensors");
        std::fs::copy(&stored, folder.path().join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        assert_eq!(checkpoint.names(), [name]);
        let matrix = checkpoint.matrix(name).unwrap();
        assert_eq!((matrix.rows, matrix.cols), (128, 192));
        assert!(matches!(matrix.values, Values::Nf4(_)));
        let golden = std::fs::read(Path::new(GOLDEN).join("nf4.safetensors")).unwrap();
        let golden = ::safetensors::SafeTensors::deserialize(&golden).unwrap();
        let expected = golden.tensor("normal_128x192.float32.nested.dequant").unwrap();
        let ours: Vec<u8> = matrix.to_f32().iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(ours == expected.data(), "decoded values differ from bitsandbytes");
    }

    #[test]
    fn folders_without_weights_and_unknown_files_get_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let error = Checkpoint::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("neither `model.safetensors`"), "{error}");
        let other = folder.path().join("model.bin");
        std::fs::write(&other, b"x").unwrap();
        let error = Checkpoint::open(&other).err().unwrap().to_string();
        assert!(error.contains("give a .gguf file"), "{error}");
        let empty = folder.path().join("empty.gguf");
        std::fs::write(&empty, b"").unwrap();
        assert!(Checkpoint::open(&empty).err().unwrap().to_string().contains("empty"));
    }
}
