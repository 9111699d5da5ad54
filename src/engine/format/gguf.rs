//! The GGUF container, versions 2 and 3: metadata and tensors of a mapped file. Knows nothing of model
//! families (see `gguf_model`).
//!
//! ```text
//! "GGUF" │ version u32 │ tensors u64 │ entries u64
//! entry:  key (u64 length, UTF-8) │ type u32 │ value            × entries
//! tensor: name │ dimensions u32 │ u64 each, innermost first │ type u32 │ offset u64   × tensors
//! padding to general.alignment (32) │ tensor data, each at its offset from here
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use thiserror::Error;

use crate::format::block::{BLOCK, BlockFormat};
use crate::format::tensor::{Tensor, TensorData};
use crate::format::{FormatError, map};
use crate::matrix::Bytes;
use crate::model::config::ConfigError;

/// Far above any real file; a corrupt count is caught here before anything is allocated for it.
const ENTRIES_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
const STRING_BYTES_MAX: u64 = 4 << 20;
/// Over all arrays of a file. The largest vocabularies have 0.3 M tokens and 0.6 M merges.
const ARRAY_VALUES_MAX: u64 = 8 << 20;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_MAX: u64 = 1 << 16;

/// A file that is not sound GGUF, or holds what this build cannot read.
#[derive(Debug, Error, PartialEq)]
pub enum GgufError {
    #[error("does not start with `GGUF`")]
    Magic,
    #[error("version {version} is not supported; supported: 2, 3 (little-endian)")]
    Version { version: u32 },
    #[error(
        "ends within {what}: {needed} bytes needed at byte {at}, {left} left; hint: the file is cut short or corrupt"
    )]
    Truncated { what: String, at: usize, needed: u64, left: usize },
    #[error("{what} is {got}, more than the limit of {limit}; hint: the file is corrupt")]
    TooMany { what: String, got: u64, limit: u64 },
    #[error("{what} at byte {at} is not UTF-8")]
    NotUtf8 { what: String, at: usize },
    #[error("{what} has the unknown type {code}")]
    UnknownType { what: String, code: u32 },
    #[error("`{name}` appears twice")]
    Duplicate { name: String },
    #[error("metadata `{key}` is {got}, expected {expected}")]
    Metadata { key: String, got: String, expected: &'static str },
    #[error("metadata `{key}` is missing")]
    MissingMetadata { key: String },
    #[error("tensor `{tensor}`: {what}")]
    BadTensor { tensor: String, what: String },
    #[error(
        "tensor `{tensor}` has the type {kind}, which is not supported; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; hint: take the Q8_0 or F16 file of the same model"
    )]
    UnsupportedType { tensor: String, kind: String },
    #[error("{what} is not supported; hint: {hint}")]
    Unsupported { what: String, hint: &'static str },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Self>),
}

/// An open GGUF file.
pub struct Gguf {
    map: Arc<Mmap>,
    header: Header,
}

/// All of a file but the tensor data.
#[derive(Debug, PartialEq)]
struct Header {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorEntry>,
}

#[derive(Debug, PartialEq)]
struct TensorEntry {
    shape: Vec<usize>,
    kind: Kind,
    /// Byte range in the file.
    range: std::ops::Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
    Blocks(BlockFormat),
}

impl Gguf {
    /// Maps a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let map = map(path)?;
        let header =
            Header::parse(&map).map_err(|cause| FormatError::Gguf { path: path.to_owned(), cause })?;
        Ok(Self { map, header })
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The dimensions of a tensor, outermost first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// A tensor under the name it has in the file.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let entry = self.header.tensors.get(name)?;
        let bytes = Bytes::mapped(self.map.clone(), entry.range.clone());
        let data = match entry.kind {
            Kind::F32 => TensorData::F32(bytes),
            Kind::F16 => TensorData::F16(bytes),
            Kind::Bf16 => TensorData::Bf16(bytes),
            Kind::Blocks(format) => TensorData::Blocks(format, bytes),
        };
        Some(Tensor { shape: entry.shape.clone(), data, interleaved: None })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    /// A text, if present.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A whole number from 0, if present.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a whole number from 0", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A float, if present.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            _ => None,
        })
    }

    /// A flag, if present.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A list, if present.
    pub fn list(&self, key: &str) -> Result<Option<&[Value]>, GgufError> {
        self.typed(key, "a list", |value| match value {
            Value::List(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn typed<'value, T>(
        &'value self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'value Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let read = read(value);
        read.map(Some).ok_or_else(|| GgufError::Metadata {
            key: key.to_owned(),
            got: value.describe(),
            expected,
        })
    }
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Self::Unsigned(number) => format!("`{number}`"),
            Self::Signed(number) => format!("`{number}`"),
            Self::Float(number) => format!("`{number}`"),
            Self::Bool(flag) => format!("`{flag}`"),
            Self::Text(_) => "a text".to_owned(),
            Self::List(values) => format!("a list of {}", values.len()),
        }
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader { bytes, at: 0, array_values: 0 };
        if reader.take(4, "the magic")? != b"GGUF" {
            return Err(GgufError::Magic);
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { version });
        }
        let tensors = limited("number of tensors", reader.u64("the number of tensors")?, TENSORS_MAX)?;
        let entries =
            limited("number of metadata entries", reader.u64("the number of entries")?, ENTRIES_MAX)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = reader.string("a metadata key")?;
            let code = reader.u32(&key)?;
            let value = reader.value(code, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::Duplicate { name: key });
            }
        }
        let alignment = alignment(&metadata)?;
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(reader.tensor_info()?);
        }
        let data_start = reader.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for info in infos {
            let (name, entry) = info.place(data_start, alignment, bytes.len())?;
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(GgufError::Duplicate { name });
            }
        }
        Ok(Self { metadata, tensors })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<usize, GgufError> {
    let key = "general.alignment";
    match metadata.get(key) {
        None => Ok(32),
        Some(Value::Unsigned(value)) if value.is_power_of_two() && *value <= ALIGNMENT_MAX => {
            Ok(*value as usize)
        }
        Some(other) => Err(GgufError::Metadata {
            key: key.to_owned(),
            got: other.describe(),
            expected: "a power of two up to 65536",
        }),
    }
}

/// A tensor's entry before its place in the file is known.
struct TensorInfo {
    name: String,
    /// Outermost first.
    shape: Vec<u64>,
    code: u32,
    offset: u64,
}

impl TensorInfo {
    fn place(
        self,
        data_start: usize,
        alignment: usize,
        file_len: usize,
    ) -> Result<(String, TensorEntry), GgufError> {
        let Self { name, shape, code, offset } = self;
        let bad = |what: String| GgufError::BadTensor { tensor: name.clone(), what };
        let kind = kind(code).map_err(|kind| GgufError::UnsupportedType { tensor: name.clone(), kind })?;
        let cols = shape.last().copied().unwrap_or(0);
        let values = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let (block, block_bytes) = match kind {
            Kind::F32 => (1, 4),
            Kind::F16 | Kind::Bf16 => (1, 2),
            Kind::Blocks(format) => (BLOCK as u64, format.block_bytes() as u64),
        };
        if cols == 0 || !cols.is_multiple_of(block) {
            return Err(bad(format!("rows of {cols} values are no whole number of blocks of {block}")));
        }
        let size = values
            .filter(|&values| values > 0)
            .and_then(|values| (values / block).checked_mul(block_bytes))
            .ok_or_else(|| bad(format!("the shape {shape:?} is impossible")))?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(bad(format!("offset {offset} is no multiple of the alignment {alignment}")));
        }
        let start = (data_start as u64).checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len as u64 => {
                let shape = shape.iter().map(|&size| size as usize).collect();
                Ok((name, TensorEntry { shape, kind, range: start as usize..end as usize }))
            }
            _ => Err(bad(format!(
                "needs {size} bytes at offset {offset} of the data, which starts at byte {data_start}, but the file has {file_len} bytes; hint: the file is cut short or corrupt"
            ))),
        }
    }
}

/// The encoding of a tensor type code, or the name of one that is not read.
fn kind(code: u32) -> Result<Kind, String> {
    let name = match code {
        0 => return Ok(Kind::F32),
        1 => return Ok(Kind::F16),
        2 => return Ok(Kind::Blocks(BlockFormat::Q4_0)),
        3 => return Ok(Kind::Blocks(BlockFormat::Q4_1)),
        6 => return Ok(Kind::Blocks(BlockFormat::Q5_0)),
        7 => return Ok(Kind::Blocks(BlockFormat::Q5_1)),
        8 => return Ok(Kind::Blocks(BlockFormat::Q8_0)),
        30 => return Ok(Kind::Bf16),
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Err(format!("{code} (unknown)")),
    };
    Err(name.to_owned())
}

fn limited(what: &str, got: u64, limit: u64) -> Result<u64, GgufError> {
    if got <= limit {
        return Ok(got);
    }
    Err(GgufError::TooMany { what: what.to_owned(), got, limit })
}

/// A bounds-checked walk over the header.
struct Reader<'file> {
    bytes: &'file [u8],
    at: usize,
    array_values: u64,
}

impl<'file> Reader<'file> {
    fn take(&mut self, count: u64, what: &str) -> Result<&'file [u8], GgufError> {
        let left = self.bytes.len() - self.at;
        if count > left as u64 {
            return Err(GgufError::Truncated { what: what.to_owned(), at: self.at, needed: count, left });
        }
        let taken = &self.bytes[self.at..self.at + count as usize];
        self.at += count as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        Ok(self.take(N as u64, what)?.try_into().expect("take returns as many bytes as asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let at = self.at;
        let length = limited(&format!("length of {what}"), self.u64(what)?, STRING_BYTES_MAX)?;
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| GgufError::NotUtf8 { what: what.to_owned(), at })
    }

    fn value(&mut self, code: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match code {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array(key)?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)? != [0]),
            8 => Value::Text(self.string(key)?),
            9 => self.list(key)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            code => return Err(GgufError::UnknownType { what: format!("metadata `{key}`"), code }),
        })
    }

    /// An array of any type but arrays, which no known file nests.
    fn list(&mut self, key: &str) -> Result<Value, GgufError> {
        let code = self.u32(key)?;
        if code == 9 {
            return Err(GgufError::UnknownType { what: format!("array within array `{key}`"), code });
        }
        let count = self.u64(key)?;
        self.array_values = self.array_values.saturating_add(count);
        limited(&format!("number of array values up to `{key}`"), self.array_values, ARRAY_VALUES_MAX)?;
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.value(code, key)?);
        }
        Ok(Value::List(values))
    }

    fn tensor_info(&mut self) -> Result<TensorInfo, GgufError> {
        let name = self.string("a tensor name")?;
        let dimensions = self.u32(&name)?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            let what = format!("{dimensions} dimensions, expected 1 to {DIMENSIONS_MAX}");
            return Err(GgufError::BadTensor { tensor: name, what });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&name)?);
        }
        shape.reverse();
        let code = self.u32(&name)?;
        let offset = self.u64(&name)?;
        Ok(TensorInfo { name, shape, code, offset })
    }
}

#[cfg(test)]
mod tests;
