//! One GGUF file's header: metadata and tensor table. Every count, length and offset is held against the file's
//! size before it is used. Knows nothing of split models or of what the entries mean.
//!
//! ```text
//! "GGUF" │ version u32 │ tensors u64 │ entries u64
//! entry:  key (u64 length, UTF-8) │ type u32 │ value            × entries
//! tensor: name │ dimensions u32 │ u64 each, innermost first │ type u32 │ offset u64   × tensors
//! padding to general.alignment (32) │ tensor data, each at its offset from here
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::block::BlockFormat;
use crate::format::gguf::{GgufError, Value};

/// Far above any real file; a corrupt count is caught here before anything is allocated for it.
const ENTRIES_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
const STRING_BYTES_MAX: u64 = 4 << 20;
/// Over all arrays of a file. The largest vocabularies have 0.3 M tokens and 0.6 M merges.
const ARRAY_VALUES_MAX: u64 = 8 << 20;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_MAX: u64 = 1 << 16;

/// All of a file but the tensor data.
#[derive(Debug, PartialEq)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorEntry>,
}

#[derive(Debug, PartialEq)]
pub(super) struct TensorEntry {
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    /// Byte range in the file.
    pub(super) range: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Blocks(BlockFormat),
}

impl Header {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
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
        no_overlap(&tensors)?;
        Ok(Self { metadata, tensors })
    }
}

/// No byte of the data belongs to two tensors.
fn no_overlap(tensors: &BTreeMap<String, TensorEntry>) -> Result<(), GgufError> {
    let mut by_place: Vec<_> = tensors.iter().map(|(name, entry)| (&entry.range, name)).collect();
    by_place.sort_by_key(|(range, _)| range.start);
    match by_place.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        None => Ok(()),
        Some(pair) => Err(GgufError::Overlap { first: pair[0].1.clone(), second: pair[1].1.clone() }),
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
            Kind::Blocks(format) => (format.block_values() as u64, format.block_bytes() as u64),
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
        10 => return Ok(Kind::Blocks(BlockFormat::Q2K)),
        11 => return Ok(Kind::Blocks(BlockFormat::Q3K)),
        12 => return Ok(Kind::Blocks(BlockFormat::Q4K)),
        13 => return Ok(Kind::Blocks(BlockFormat::Q5K)),
        14 => return Ok(Kind::Blocks(BlockFormat::Q6K)),
        20 => return Ok(Kind::Blocks(BlockFormat::Iq4Nl)),
        23 => return Ok(Kind::Blocks(BlockFormat::Iq4Xs)),
        30 => return Ok(Kind::Bf16),
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
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

/// The fewest bytes a value of a metadata type takes; 1 for codes that are refused when read.
fn least_bytes(code: u32) -> u64 {
    match code {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        _ => 1,
    }
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
        let (needed, left) = (count * least_bytes(code), self.bytes.len() - self.at);
        if needed > left as u64 {
            return Err(GgufError::Truncated { what: key.to_owned(), at: self.at, needed, left });
        }
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
