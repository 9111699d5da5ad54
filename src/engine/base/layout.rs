//! Which tensors a base has and where each of their parts lies in `model.safetensors`. Knows names, shapes and
//! byte counts, all before a single weight is read, so that tensors can be streamed into their places.
//!
//! ```text
//! header length u64 │ JSON, padded with spaces to 8 │ F32 parts │ 16-bit parts │ U8 parts
//! ```
//! Parts are sorted by size of their values, then by name, which keeps every one aligned.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, json};

use crate::base::{BaseError, Quantize, sixteen_bit};
use crate::format::{Checkpoint, TensorData};
use crate::model::{TensorSpec, tensors};
use crate::quant::BLOCK;
use crate::quant::nested::NESTED_BLOCK;

/// Suffix of the blob that tells bitsandbytes about a 4-bit tensor.
pub(super) const QUANT_STATE: &str = ".quant_state.bitsandbytes__nf4";

/// The blob's length depends on the digits of an offset known last; readers take trailing spaces.
const QUANT_STATE_BYTES: usize = 256;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    Bf16,
    F16,
    /// Quantised here, with nested scales.
    Nf4,
    /// NF4 in the source, kept.
    StoredNf4,
}

/// A tensor of the base.
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// A linear of a layer, which adapters attach to.
    pub(super) linear: bool,
    pub(super) encoding: Encoding,
}

/// A tensor of the file: what `Planned` becomes.
struct Part {
    name: String,
    dtype: &'static str,
    value_bytes: usize,
    shape: Vec<usize>,
}

impl Planned {
    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the codes and their scales, without the constant maps.
    pub(super) fn weight_bytes(&self) -> u64 {
        let constant = |name: &str| name.ends_with("quant_map") || name.ends_with(QUANT_STATE);
        self.parts().iter().filter(|part| !constant(&part.name)).map(|part| part.len() as u64).sum()
    }

    fn parts(&self) -> Vec<Part> {
        let part = |suffix: &str, dtype, value_bytes, shape: Vec<usize>| Part {
            name: format!("{}{suffix}", self.name),
            dtype,
            value_bytes,
            shape,
        };
        let packed = vec![self.len().div_ceil(2), 1];
        let blocks = self.len().div_ceil(BLOCK);
        match self.encoding {
            Encoding::F32 => vec![part("", "F32", 4, self.shape.clone())],
            Encoding::Bf16 => vec![part("", "BF16", 2, self.shape.clone())],
            Encoding::F16 => vec![part("", "F16", 2, self.shape.clone())],
            Encoding::Nf4 => vec![
                part("", "U8", 1, packed),
                part(".absmax", "U8", 1, vec![blocks]),
                part(".nested_absmax", "F32", 4, vec![blocks.div_ceil(NESTED_BLOCK)]),
                part(".nested_quant_map", "F32", 4, vec![256]),
                part(".quant_map", "F32", 4, vec![16]),
                part(QUANT_STATE, "U8", 1, vec![QUANT_STATE_BYTES]),
            ],
            Encoding::StoredNf4 => vec![
                part("", "U8", 1, packed),
                part(".absmax", "F32", 4, vec![blocks]),
                part(".quant_map", "F32", 4, vec![16]),
                part(QUANT_STATE, "U8", 1, vec![QUANT_STATE_BYTES]),
            ],
        }
    }
}

impl Part {
    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.value_bytes
    }
}

/// All tensors of the base, checked against the checkpoint: each there, each of the expected shape.
pub(super) fn plan(checkpoint: &Checkpoint, quantize: Quantize) -> Result<Vec<Planned>, BaseError> {
    let expected = tensors(checkpoint.config())?;
    let planned = expected.into_iter().map(|TensorSpec { name, shape, linear }| {
        let tensor = checkpoint.tensor(&name)?;
        if tensor.shape != shape {
            return Err(BaseError::Shape { tensor: name, got: tensor.shape, expected: shape });
        }
        let encoding = match (&tensor.data, shape.len()) {
            (TensorData::Nf4(_), _) => Encoding::StoredNf4,
            _ if linear && quantize == Quantize::Nf4 => Encoding::Nf4,
            // Norms and biases are small and sensitive; f32 ones stay exact.
            (TensorData::F32(_), 1) => Encoding::F32,
            _ => sixteen_bit(&tensor),
        };
        Ok(Planned { name, shape, linear, encoding })
    });
    planned.collect()
}

/// bitsandbytes' description of a 4-bit tensor; `nested_offset` where its scales are nested.
pub(super) fn quant_state(shape: &[usize], nested_offset: Option<f32>) -> Vec<u8> {
    let mut state = Map::new();
    state.insert("quant_type".to_owned(), json!("nf4"));
    state.insert("blocksize".to_owned(), json!(BLOCK));
    state.insert("dtype".to_owned(), json!("bfloat16"));
    state.insert("shape".to_owned(), json!(shape));
    if let Some(offset) = nested_offset {
        state.insert("nested_blocksize".to_owned(), json!(NESTED_BLOCK));
        state.insert("nested_dtype".to_owned(), json!("float32"));
        state.insert("nested_offset".to_owned(), json!(f64::from(offset)));
    }
    let mut text = serde_json::Value::Object(state).to_string().into_bytes();
    assert!(text.len() <= QUANT_STATE_BYTES, "BUG: shapes below 2^24 fit");
    text.resize(QUANT_STATE_BYTES, b' ');
    text
}

/// A safetensors file being filled in any order.
pub(super) struct TensorFile {
    file: fs_err::File,
    /// Where each part starts in the file, and its size.
    places: BTreeMap<String, (u64, usize)>,
    len: u64,
}

impl TensorFile {
    /// Writes the header for `planned` and reserves the space of the data.
    pub(super) fn create(path: &Path, planned: &[Planned]) -> Result<Self, BaseError> {
        let mut parts: Vec<Part> = planned.iter().flat_map(Planned::parts).collect();
        parts.sort_by(|a, b| b.value_bytes.cmp(&a.value_bytes).then_with(|| a.name.cmp(&b.name)));
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut offset = 0;
        for part in &parts {
            let end = offset + part.len();
            let info = json!({"dtype": part.dtype, "shape": part.shape, "data_offsets": [offset, end]});
            header.insert(part.name.clone(), info);
            offset = end;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let data_start = 8 + header.len() as u64;

        let mut places = BTreeMap::new();
        let mut start = data_start;
        for part in parts {
            let size = part.len();
            places.insert(part.name, (start, size));
            start += size as u64;
        }
        let mut file = fs_err::File::create(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        file.set_len(start)?;
        Ok(Self { file, places, len: start })
    }

    /// Writes bytes of a part, from `offset` within it.
    pub(super) fn write(&mut self, name: &str, offset: usize, bytes: &[u8]) -> Result<(), BaseError> {
        let &(start, size) = self.places.get(name).expect("BUG: every part written was planned");
        assert!(offset + bytes.len() <= size, "BUG: `{name}` overflows its place");
        self.file.seek(SeekFrom::Start(start + offset as u64))?;
        self.file.write_all(bytes)?;
        Ok(())
    }

    /// Flushes to disk; the size of the file.
    pub(super) fn finish(self) -> Result<u64, BaseError> {
        self.file.sync_all()?;
        Ok(self.len)
    }
}
