//! The base artifact: a model made ready for training, as a plain Hugging Face folder that other tools load
//! too. Reads any checkpoint, quantises its linears to NF4 with double quantisation, and writes bitsandbytes'
//! key layout. Knows files and codes; nothing of training.
//!
//! ```text
//! config.json              the model's description + quantization_config
//! model.safetensors        linears NF4 (weight, absmax, nested_*, quant_*), the rest 16-bit, norms as they were
//! tokenizer.json, tokenizer_config.json (with the chat template)
//! ```
//! Tensors are streamed a few megabytes at a time, and the bytes depend on the source alone.

mod layout;

use std::io;
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Value, json};
use thiserror::Error;

use crate::base::layout::{Encoding, Planned, TensorFile, plan, quant_state};
use crate::format::{Checkpoint, FormatError, Tensor, TensorData};
use crate::matrix::Values;
use crate::model::ModelError;
use crate::quant::nested::{DoubleQuantized, dynamic_map};
use crate::quant::{BLOCK, CODE, encode_blocks};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Values decoded at a time; 4 MiB as f32.
const CHUNK_VALUES: usize = 1 << 20;

/// How the linears of the base are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// NF4 with double quantisation, 4.127 bits a weight.
    Nf4,
    /// 16 bits, as the source has them; f32 and GGUF's block formats become bf16.
    None,
}

/// What was built.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseSummary {
    /// All weights, tied embeddings once.
    pub parameters: u64,
    /// Weights of the linears that adapters attach to.
    pub linear_parameters: u64,
    /// Size of `model.safetensors`; of an outlook, without its header.
    pub bytes: u64,
    /// Of the linears, with their scales.
    pub bits_per_weight: f64,
    pub model_type: String,
    pub layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// Tokens the model was made for.
    pub context_length: usize,
}

/// A base that cannot be built.
#[derive(Debug, Error)]
pub enum BaseError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("tensor `{tensor}` has shape {got:?}, but config.json asks for {expected:?}")]
    Shape { tensor: String, got: Vec<usize>, expected: Vec<usize> },
    #[error(
        "tensor `{tensor}` holds a value that is no finite number, in row {row}; hint: the source is corrupt"
    )]
    NotFinite { tensor: String, row: usize },
}

/// Builds the base of `source` (a `.gguf` file, a `.safetensors` file or a Hugging Face folder) in the folder
/// `out`, which is made if missing. `progress` gets the weights done and their total.
pub fn build_base(
    source: &Path,
    out: &Path,
    quantize: Quantize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<BaseSummary, BaseError> {
    let checkpoint = Checkpoint::open(source)?;
    let tokenizer = Tokenizer::open(source)?;
    tokenizer.check_fits(checkpoint.config())?;
    let planned = plan(&checkpoint, quantize)?;
    fs_err::create_dir_all(out)?;

    let parameters = planned.iter().map(|tensor| tensor.len() as u64).sum();
    let mut file = TensorFile::create(&out.join("model.safetensors"), &planned)?;
    let mut done = 0;
    progress(done, parameters);
    for tensor in &planned {
        write_tensor(tensor, &checkpoint.tensor(&tensor.name)?, &mut file, &mut |values| {
            done += values as u64;
            progress(done, parameters);
        })?;
    }
    let bytes = file.finish()?;
    write_config(&checkpoint, &planned, out)?;
    tokenizer.save(out)?;
    Ok(summary(&checkpoint, &planned, parameters, bytes))
}

/// What [`build_base`] would build of `checkpoint`, with nothing read but names and shapes.
///
/// # Errors
/// A tensor is missing or of another shape.
pub fn outlook(checkpoint: &Checkpoint, quantize: Quantize) -> Result<BaseSummary, BaseError> {
    let planned = plan(checkpoint, quantize)?;
    let parameters = planned.iter().map(|tensor| tensor.len() as u64).sum();
    let bytes = planned.iter().map(Planned::weight_bytes).sum();
    Ok(summary(checkpoint, &planned, parameters, bytes))
}

fn summary(checkpoint: &Checkpoint, planned: &[Planned], parameters: u64, bytes: u64) -> BaseSummary {
    let linears = planned.iter().filter(|tensor| tensor.linear);
    let linear_parameters: u64 = linears.clone().map(|tensor| tensor.len() as u64).sum();
    let linear_bytes: u64 = linears.map(Planned::weight_bytes).sum();
    let config = checkpoint.config();
    BaseSummary {
        parameters,
        linear_parameters,
        bytes,
        bits_per_weight: linear_bytes as f64 * 8.0 / linear_parameters as f64,
        model_type: config.model_type.clone(),
        layers: config.num_hidden_layers(),
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        context_length: config.max_position_embeddings,
    }
}

fn write_config(checkpoint: &Checkpoint, planned: &[Planned], out: &Path) -> Result<(), BaseError> {
    let mut config = checkpoint.config().to_json();
    if planned.iter().any(|tensor| matches!(tensor.encoding, Encoding::Nf4 | Encoding::StoredNf4)) {
        config.insert(
            "quantization_config".to_owned(),
            json!({
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": planned.iter().any(|tensor| tensor.encoding == Encoding::Nf4),
                "llm_int8_skip_modules": ["lm_head"],
                "load_in_4bit": true,
                "load_in_8bit": false,
                "quant_method": "bitsandbytes",
            }),
        );
    }
    fs_err::write(out.join("config.json"), format!("{:#}\n", Value::Object(config)))?;
    Ok(())
}

fn write_tensor(
    planned: &Planned,
    tensor: &Tensor,
    file: &mut TensorFile,
    advance: &mut dyn FnMut(usize),
) -> Result<(), BaseError> {
    match planned.encoding {
        Encoding::F32 => write_plain(planned, tensor, file, advance, |value| value.to_le_bytes()),
        Encoding::Bf16 => {
            write_plain(planned, tensor, file, advance, |value| bf16::from_f32(value).to_le_bytes())
        }
        Encoding::F16 => {
            write_plain(planned, tensor, file, advance, |value| f16::from_f32(value).to_le_bytes())
        }
        Encoding::Nf4 => write_nf4(planned, tensor, file, advance),
        Encoding::StoredNf4 => write_stored_nf4(planned, tensor, file, advance),
    }
}

fn write_plain<const N: usize>(
    planned: &Planned,
    tensor: &Tensor,
    file: &mut TensorFile,
    advance: &mut dyn FnMut(usize),
    encode: impl Fn(f32) -> [u8; N],
) -> Result<(), BaseError> {
    for_each_chunk(planned, tensor, |start, values| {
        let bytes: Vec<u8> = values.iter().flat_map(|&value| encode(value)).collect();
        file.write(&planned.name, start * N, &bytes)?;
        advance(values.len());
        Ok(())
    })
}

fn write_nf4(
    planned: &Planned,
    tensor: &Tensor,
    file: &mut TensorFile,
    advance: &mut dyn FnMut(usize),
) -> Result<(), BaseError> {
    let name = &planned.name;
    let mut absmax = Vec::with_capacity(planned.len().div_ceil(BLOCK));
    for_each_chunk(planned, tensor, |start, values| {
        let (packed, scales) = encode_blocks(values);
        file.write(name, start / 2, &packed)?;
        absmax.extend(scales);
        advance(values.len());
        Ok(())
    })?;
    let nested = DoubleQuantized::encode(&absmax);
    file.write(&format!("{name}.absmax"), 0, &nested.codes)?;
    file.write(&format!("{name}.nested_absmax"), 0, &floats(&nested.absmax))?;
    file.write(&format!("{name}.nested_quant_map"), 0, &floats(&dynamic_map(true)))?;
    file.write(&format!("{name}.quant_map"), 0, &floats(&CODE))?;
    let state = quant_state(&planned.shape, Some(nested.offset));
    file.write(&format!("{name}{}", layout::QUANT_STATE), 0, &state)?;
    Ok(())
}

/// A source that is NF4 already keeps its codes; its scales are written as the f32 they decode to, so that no
/// value changes.
fn write_stored_nf4(
    planned: &Planned,
    tensor: &Tensor,
    file: &mut TensorFile,
    advance: &mut dyn FnMut(usize),
) -> Result<(), BaseError> {
    let name = &planned.name;
    let Values::Nf4(nf4) = tensor.clone().into_values() else {
        unreachable!("BUG: planned as NF4 because the source is");
    };
    file.write(name, 0, nf4.packed.as_slice())?;
    file.write(&format!("{name}.absmax"), 0, &floats(&nf4.absmax))?;
    file.write(&format!("{name}.quant_map"), 0, &floats(&CODE))?;
    file.write(&format!("{name}{}", layout::QUANT_STATE), 0, &quant_state(&planned.shape, None))?;
    advance(planned.len());
    Ok(())
}

/// Calls `take` with runs of whole rows: their flat start, always a multiple of 64, and their finite values.
fn for_each_chunk(
    planned: &Planned,
    tensor: &Tensor,
    mut take: impl FnMut(usize, &[f32]) -> Result<(), BaseError>,
) -> Result<(), BaseError> {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let rows_chunk = (CHUNK_VALUES / cols).next_multiple_of(BLOCK).max(BLOCK);
    let mut buffer = vec![0.0; rows_chunk.min(rows) * cols];
    for first in (0..rows).step_by(rows_chunk) {
        let values = &mut buffer[..rows_chunk.min(rows - first) * cols];
        tensor.decode_rows(first, values);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(BaseError::NotFinite { tensor: planned.name.clone(), row: first + at / cols });
        }
        take(first * cols, values)?;
    }
    Ok(())
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The 16-bit encoding nearest to how the source has a tensor.
fn sixteen_bit(tensor: &Tensor) -> Encoding {
    match tensor.data {
        TensorData::F16(_) => Encoding::F16,
        _ => Encoding::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::format::gguf_writer::{BF16, F16, F32, GgufWriter, Q4_1, tiny_llama};
    use crate::quant::Nf4;

    fn source(folder: &Path, file: &GgufWriter) -> PathBuf {
        let path = folder.join("tiny.gguf");
        std::fs::write(&path, file.finish()).unwrap();
        path
    }

    fn build(file: &GgufWriter, quantize: Quantize) -> (tempfile::TempDir, BaseSummary) {
        let folder = tempfile::tempdir().unwrap();
        let mut last = (0, 1);
        let summary = build_base(
            &source(folder.path(), file),
            &folder.path().join("base"),
            quantize,
            &mut |done, total| {
                assert!(done >= last.0 && done <= total);
                last = (done, total);
            },
        );
        assert_eq!(last.0, last.1, "progress reaches its end");
        (folder, summary.unwrap())
    }

    fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
        let tensor = checkpoint.tensor(name).unwrap();
        let mut out = vec![0.0; tensor.len()];
        tensor.decode_rows(0, &mut out);
        out
    }

    #[test]
    fn base_holds_the_source_within_its_encoding() {
        let (folder, summary) = build(&tiny_llama(Q4_1), Quantize::Nf4);
        let original = Checkpoint::open(&folder.path().join("tiny.gguf")).unwrap();
        let base = Checkpoint::open(&folder.path().join("base")).unwrap();
        assert_eq!(base.config(), original.config());
        assert_eq!(base.names(), original.names());
        for name in base.names() {
            let (ours, theirs) = (values(&base, name), values(&original, name));
            if name.contains("_proj") {
                assert!(matches!(base.tensor(name).unwrap().data, TensorData::Nf4(_)), "{name}");
                let mut expected = vec![0.0; theirs.len()];
                Nf4::encode(&theirs).decode(0, &mut expected);
                let largest = theirs.iter().fold(0.0f32, |max, value| max.max(value.abs()));
                for (ours, expected) in ours.iter().zip(&expected) {
                    // The codes are equal; the scales went through 8 bits.
                    assert!((ours - expected).abs() <= largest * 0.01, "{name}: {ours} {expected}");
                }
            } else if name.contains("norm") {
                assert_eq!(ours, theirs, "{name}");
            } else {
                let rounded: Vec<f32> = theirs.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
                assert_eq!(ours, rounded, "{name}");
            }
        }
        let linears = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 3);
        assert_eq!(summary.linear_parameters, linears);
        assert_eq!(summary.parameters, linears + 270 * 64 + 64 * 5);
        assert!((4.12..4.16).contains(&summary.bits_per_weight), "{}", summary.bits_per_weight);
        let size = std::fs::metadata(folder.path().join("base/model.safetensors")).unwrap().len();
        assert_eq!(summary.bytes, size);
        assert_eq!((summary.layers, summary.context_length), (2, 512));
    }

    #[test]
    fn base_is_a_file_the_safetensors_crate_accepts() {
        let (folder, _) = build(&tiny_llama(F32), Quantize::Nf4);
        let bytes = std::fs::read(folder.path().join("base/model.safetensors")).unwrap();
        let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let name = "model.layers.1.mlp.down_proj.weight";
        for (suffix, shape) in [
            ("", vec![4096, 1]),
            (".absmax", vec![128]),
            (".nested_absmax", vec![1]),
            (".nested_quant_map", vec![256]),
            (".quant_map", vec![16]),
        ] {
            assert_eq!(file.tensor(&format!("{name}{suffix}")).unwrap().shape(), shape, "{suffix}");
        }
        let state = file.tensor(&format!("{name}.quant_state.bitsandbytes__nf4")).unwrap();
        let state: Value = serde_json::from_slice(state.data()).unwrap();
        assert_eq!((&state["shape"], &state["quant_type"]), (&json!([64, 128]), &json!("nf4")));
        let config = std::fs::read_to_string(folder.path().join("base/config.json")).unwrap();
        assert!(config.contains("bnb_4bit_use_double_quant"), "{config}");
    }

    #[test]
    fn same_source_gives_the_same_bytes() {
        let [first, second] = [0, 1].map(|_| build(&tiny_llama(Q4_1), Quantize::Nf4).0);
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            let read =
                |folder: &tempfile::TempDir| std::fs::read(folder.path().join("base").join(name)).unwrap();
            assert!(read(&first) == read(&second), "{name}");
        }
    }

    #[test]
    fn unquantised_base_keeps_16_bit_weights_exactly() {
        for code in [BF16, F16] {
            let (folder, summary) = build(&tiny_llama(code), Quantize::None);
            let original = Checkpoint::open(&folder.path().join("tiny.gguf")).unwrap();
            let base = Checkpoint::open(&folder.path().join("base")).unwrap();
            for name in base.names().into_iter().filter(|name| name.contains("_proj")) {
                assert_eq!(values(&base, name), values(&original, name), "{name}");
            }
            assert_eq!(summary.bits_per_weight, 16.0);
        }
    }

    #[test]
    fn base_of_a_base_changes_no_value() {
        let (folder, _) = build(&tiny_llama(F32), Quantize::Nf4);
        let base = folder.path().join("base");
        for quantize in [Quantize::Nf4, Quantize::None] {
            let again = folder.path().join("again");
            build_base(&base, &again, quantize, &mut |_, _| {}).unwrap();
            let (first, second) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&again).unwrap());
            for name in first.names() {
                assert_eq!(values(&first, name), values(&second, name), "{name}");
            }
        }
    }

    #[test]
    fn unfit_sources_are_refused_with_the_culprit() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |file: &GgufWriter, part: &str| {
            let out = folder.path().join("base");
            let result = build_base(&source(folder.path(), file), &out, Quantize::Nf4, &mut |_, _| {});
            let error = result.expect_err("must be refused").to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(
            tiny_llama(F32).remove("blk.1.ffn_up.weight"),
            "no tensor `model.layers.1.mlp.up_proj.weight`",
        );
        refused(
            tiny_llama(F32).floats("blk.0.attn_v.weight", &[64, 32], &[0.0; 2048]),
            "`model.layers.0.self_attn.v_proj.weight` has shape [64, 32]",
        );
        let mut values = [0.5; 2048];
        values[100] = f32::NAN;
        refused(
            tiny_llama(F32).floats("blk.0.attn_v.weight", &[32, 64], &values),
            "no finite number, in row 1",
        );
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama");
        let error =
            build_base(&golden, folder.path(), Quantize::Nf4, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json` is missing"), "{error}");
    }
}
