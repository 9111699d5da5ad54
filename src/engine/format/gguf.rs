//! The GGUF container, versions 2 and 3: metadata and tensors of a mapped file, or of all files of a split
//! model. Knows nothing of model families (see `gguf_model`).
//!
//! `header` reads one file's metadata and tensor table; `split` finds and checks the parts.

mod header;
mod split;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use thiserror::Error;

use crate::format::gguf::header::{Header, Kind, TensorEntry};
use crate::format::tensor::{Tensor, TensorData};
use crate::format::{FormatError, map};
use crate::matrix::Bytes;
use crate::model::config::ConfigError;

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
        "tensor `{tensor}` has the type {kind}, which is not supported; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS; hint: take the Q4_K_M, Q8_0 or F16 file of the same model"
    )]
    UnsupportedType { tensor: String, kind: String },
    #[error("tensors `{first}` and `{second}` overlap; hint: the file is corrupt")]
    Overlap { first: String, second: String },
    #[error(
        "is part {part} of a model split into {count} files, but its name does not end in `-{part:05}-of-{count:05}.gguf`; hint: give the parts the names they were made with"
    )]
    PartName { part: u64, count: u64 },
    #[error(
        "part {part} of {count} is missing: there is no file `{name}` beside it; hint: put all parts into one folder"
    )]
    MissingPart { part: u64, count: u64, name: String },
    #[error(
        "`{key}` is {got}, but {expected} is expected here; hint: the parts are not of one model, or one was renamed"
    )]
    PartMismatch { key: &'static str, got: u64, expected: u64 },
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

/// An open GGUF model: one file, or all files of a split one.
pub struct Gguf {
    maps: Vec<Arc<Mmap>>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Place>,
}

/// A tensor and the file it is in.
struct Place {
    map: usize,
    entry: TensorEntry,
}

impl Gguf {
    /// Maps a file and reads its header; where it is a part of a split model, all parts.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (map, mut header) = open_file(path)?;
        let fail = |path: &Path, cause| FormatError::Gguf { path: path.to_owned(), cause };
        let Some(split) = split::take(&mut header.metadata).map_err(|cause| fail(path, cause))? else {
            let mut whole = Self { maps: Vec::new(), metadata: header.metadata, tensors: BTreeMap::new() };
            whole.add(map, header.tensors).map_err(|cause| fail(path, cause))?;
            return Ok(whole);
        };
        let mut whole = Self { maps: Vec::new(), metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for (number, part) in split.parts(path).map_err(|cause| fail(path, cause))?.iter().enumerate() {
            let (map, mut header) = open_file(part)?;
            let check = |header: &mut Header| -> Result<(), GgufError> {
                split.check_part(number as u64, split::take(&mut header.metadata)?)
            };
            check(&mut header).map_err(|cause| fail(part, cause))?;
            if number == 0 {
                whole.metadata = header.metadata;
            }
            whole.add(map, header.tensors).map_err(|cause| fail(part, cause))?;
        }
        split.check_tensors(whole.tensors.len() as u64).map_err(|cause| fail(path, cause))?;
        Ok(whole)
    }

    /// Takes in the tensors of one file.
    fn add(&mut self, map: Arc<Mmap>, tensors: BTreeMap<String, TensorEntry>) -> Result<(), GgufError> {
        for (name, entry) in tensors {
            if self.tensors.insert(name.clone(), Place { map: self.maps.len(), entry }).is_some() {
                return Err(GgufError::Duplicate { name });
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The dimensions of a tensor, outermost first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| place.entry.shape.as_slice())
    }

    /// A tensor under the name it has in the file.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let Place { map, entry } = self.tensors.get(name)?;
        let bytes = Bytes::mapped(self.maps[*map].clone(), entry.range.clone());
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
        self.metadata.get(key)
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

fn open_file(path: &Path) -> Result<(Arc<Mmap>, Header), FormatError> {
    let map = map(path)?;
    let header = Header::parse(&map).map_err(|cause| FormatError::Gguf { path: path.to_owned(), cause })?;
    Ok((map, header))
}

impl Value {
    /// For errors: short, whatever the value.
    pub(crate) fn describe(&self) -> String {
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

#[cfg(test)]
mod tests;
