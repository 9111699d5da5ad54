//! The base artifact: a model made ready for training, as a plain Hugging Face folder that other tools load
//! too. Reads any checkpoint, quantises its linears to NF4 with double quantisation, and writes bitsandbytes'
//! key layout. Knows files and codes; nothing of training.
//!
//! ```text
//! config.json              the llama description + quantization_config
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
    /// Size of `model.safetensors`.
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
        layers: config.num_hidden_layers,
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
