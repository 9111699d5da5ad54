//! safetensors files, single or sharded, and the bitsandbytes 4-bit tensors some of them hold. Knows nothing
//! of model families.
//!
//! ```text
//! header length u64 │ header: JSON {name: {dtype, shape, data_offsets: [start, end]}} │ data
//! ```
//! The header is parsed here rather than by the safetensors crate, whose errors name neither tensor nor place
//! and whose sums can overflow on hostile offsets.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use thiserror::Error;

use crate::format::tensor::{Tensor, TensorData};
use crate::format::{FormatError, map};
use crate::matrix::Bytes;
use crate::quant::nested::{DoubleQuantized, NESTED_BLOCK};
use crate::quant::{BLOCK, CODE, Nf4};

/// The limit the format itself sets.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Suffix of the blob that describes a 4-bit tensor.
const QUANT_STATE: &str = ".quant_state.bitsandbytes__nf4";

/// A file that is not sound safetensors, or holds what this build cannot read.
#[derive(Debug, Error, PartialEq)]
pub enum SafetensorsError {
    #[error(
        "the header needs {needed} bytes, but the file has {len}; hint: the file is cut short or corrupt"
    )]
    Truncated { needed: u64, len: usize },
    #[error("the header is not JSON of the expected form: {cause}")]
    Header { cause: String },
    #[error(
        "tensor `{tensor}` lies at bytes {start} to {end}, but the file has {len}; hint: the file is cut short or corrupt"
    )]
    OutOfFile { tensor: String, start: u64, end: u64, len: usize },
    #[error("tensor `{tensor}` of shape {shape:?} and dtype {dtype} does not fit its {bytes} bytes")]
    Size { tensor: String, shape: Vec<u64>, dtype: String, bytes: u64 },
    #[error(
        "tensor `{tensor}` has dtype {dtype}, which is not supported; supported: F32, F16, BF16, and NF4 of bitsandbytes"
    )]
    Dtype { tensor: String, dtype: String },
    #[error("4-bit tensor `{tensor}`: {what}")]
    QuantState { tensor: String, what: String },
    #[error("tensors `{first}` and `{second}` overlap; hint: the file is corrupt")]
    Overlap { first: String, second: String },
    #[error("the header names `{tensor}` twice")]
    NamedTwice { tensor: String },
    #[error("tensor `{tensor}` is also in `{other}`")]
    Duplicate { tensor: String, other: PathBuf },
    #[error("index names `{file}`, which is no plain file name")]
    ShardName { file: String },
    #[error("index names the file `{file}`, which is not there; hint: put all shards into one folder")]
    MissingShard { file: String },
    #[error("index names tensor `{tensor}`, which none of its files has")]
    MissingFromShards { tensor: String },
}

/// The tensors of one or more files.
pub struct TensorFiles {
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    file: Arc<OpenFile>,
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

struct OpenFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

impl TensorFiles {
    /// Opens a single file.
    pub fn open_file(path: &Path) -> Result<Self, FormatError> {
        let mut tensors = BTreeMap::new();
        add_file(path, &mut tensors)?;
        Ok(Self { tensors })
    }

    /// Opens `model.safetensors`, or the files `model.safetensors.index.json` names.
    pub fn open_folder(folder: &Path) -> Result<Self, FormatError> {
        let index = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        if !index.exists() {
            if !single.exists() {
                return Err(FormatError::NotAModel {
                    path: folder.to_owned(),
                    hint: "the folder has neither `model.safetensors` nor `model.safetensors.index.json`",
                });
            }
            return Self::open_file(&single);
        }
        Self::open_shards(folder, &index)
    }

    fn open_shards(folder: &Path, index_path: &Path) -> Result<Self, FormatError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let fail = |cause| FormatError::Safetensors { path: index_path.to_owned(), cause };
        let len = fs_err::metadata(index_path)?.len();
        if len > HEADER_BYTES_MAX {
            let cause = format!("it has {len} bytes, more than the limit of {HEADER_BYTES_MAX}");
            return Err(fail(SafetensorsError::Header { cause }));
        }
        let text = fs_err::read_to_string(index_path)?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|error| fail(SafetensorsError::Header { cause: error.to_string() }))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort();
        files.dedup();
        let mut tensors = BTreeMap::new();
        for file in files {
            let mut components = Path::new(file).components();
            if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
                return Err(fail(SafetensorsError::ShardName { file: file.clone() }));
            }
            let path = folder.join(file);
            if !path.exists() {
                return Err(fail(SafetensorsError::MissingShard { file: file.clone() }));
            }
            add_file(&path, &mut tensors)?;
        }
        match index.weight_map.keys().find(|name| !tensors.contains_key(*name)) {
            Some(tensor) => Err(fail(SafetensorsError::MissingFromShards { tensor: tensor.clone() })),
            None => Ok(Self { tensors }),
        }
    }

    /// Names of all tensors, sorted, without the parts of 4-bit tensors.
    pub fn names(&self) -> Vec<&str> {
        let is_part = |name: &str| {
            let (base, part) = match name.find(".quant_state.") {
                Some(at) => name.split_at(at),
                None => name.rsplit_once('.').unwrap_or((name, "")),
            };
            let parts = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset"];
            (part.starts_with(".quant_state.") || parts.contains(&part)) && self.tensors.contains_key(base)
        };
        self.tensors.keys().map(String::as_str).filter(|name| !is_part(name)).collect()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor; `None` where there is none of this name.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>, FormatError> {
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        let fail = |cause| FormatError::Safetensors { path: entry.file.path.clone(), cause };
        if self.tensors.contains_key(&format!("{name}{QUANT_STATE}")) {
            return self.nf4(name, entry).map(Some).map_err(fail);
        }
        let bytes = entry.bytes();
        let data = match entry.dtype.as_str() {
            "F32" => TensorData::F32(bytes),
            "F16" => TensorData::F16(bytes),
            "BF16" => TensorData::Bf16(bytes),
            other => {
                return Err(fail(SafetensorsError::Dtype {
                    tensor: name.to_owned(),
                    dtype: other.to_owned(),
                }));
            }
        };
        Ok(Some(Tensor { shape: entry.shape.clone(), data, interleaved: None }))
    }

    /// A bitsandbytes 4-bit tensor, its scales decoded, its codes left as they are.
    fn nf4(&self, name: &str, entry: &Entry) -> Result<Tensor, SafetensorsError> {
        let bad =
            |what: &str| SafetensorsError::QuantState { tensor: name.to_owned(), what: what.to_owned() };
        let part = |suffix: &str| {
            let part = self.tensors.get(&format!("{name}{suffix}"));
            part.ok_or_else(|| bad(&format!("`{name}{suffix}` is missing")))
        };
        let state: QuantState = serde_json::from_slice(part(QUANT_STATE)?.bytes().as_slice())
            .map_err(|error| bad(&format!("its quant_state is unreadable: {error}")))?;
        if state.quant_type != "nf4" || state.blocksize != BLOCK {
            return Err(bad("only nf4 in blocks of 64 is read"));
        }
        let code = part(".quant_map")?.floats().ok_or_else(|| bad("quant_map is not F32"))?;
        if code != CODE {
            return Err(bad("quant_map is not the NF4 code"));
        }
        let absmax = part(".absmax")?;
        let absmax = match absmax.dtype.as_str() {
            "F32" => absmax.floats().ok_or_else(|| bad("absmax is not F32"))?,
            "U8" => {
                let floats = |suffix: &str| -> Result<Vec<f32>, SafetensorsError> {
                    part(suffix)?.floats().ok_or_else(|| bad("a nested part is not F32"))
                };
                let map = floats(".nested_quant_map")?;
                let map: [f32; 256] =
                    map.try_into().map_err(|_| bad("nested_quant_map does not have 256 values"))?;
                let codes = absmax.bytes().as_slice().to_vec();
                let scales = floats(".nested_absmax")?;
                let sound = state.nested_blocksize == Some(NESTED_BLOCK)
                    && scales.len() == codes.len().div_ceil(NESTED_BLOCK);
                let offset = state.nested_offset.filter(|_| sound);
                let offset = offset.ok_or_else(|| bad("its nested scales are not in blocks of 256"))?;
                DoubleQuantized { codes, absmax: scales, offset: offset as f32 }.decode(&map)
            }
            other => return Err(bad(&format!("absmax has dtype {other}"))),
        };
        if let Some(block) = absmax.iter().position(|scale| !scale.is_finite()) {
            return Err(bad(&format!("the scale of its block {block} is no finite number")));
        }
        let len = state.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let nf4 = len.and_then(|len| Nf4::from_parts(entry.bytes(), absmax.into(), len));
        let nf4 = nf4.ok_or_else(|| bad(&format!("its parts do not fit the shape {:?}", state.shape)))?;
        Ok(Tensor { shape: state.shape, data: TensorData::Nf4(nf4), interleaved: None })
    }
}

/// What bitsandbytes writes about a 4-bit tensor.
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl Entry {
    fn bytes(&self) -> Bytes {
        Bytes::mapped(self.file.map.clone(), self.range.clone())
    }

    /// The values of a small F32 tensor.
    fn floats(&self) -> Option<Vec<f32>> {
        let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        (self.dtype == "F32").then(|| self.bytes().as_slice().chunks_exact(4).map(float).collect())
    }
}

fn add_file(path: &Path, tensors: &mut BTreeMap<String, Entry>) -> Result<(), FormatError> {
    let map = map(path)?;
    let fail = |cause| FormatError::Safetensors { path: path.to_owned(), cause };
    let parsed = parse(&map).map_err(fail)?;
    let file = Arc::new(OpenFile { path: path.to_owned(), map });
    for (tensor, dtype, shape, range) in parsed {
        let entry = Entry { file: file.clone(), dtype, shape, range };
        if let Some(other) = tensors.insert(tensor.clone(), entry) {
            return Err(fail(SafetensorsError::Duplicate { tensor, other: other.file.path.clone() }));
        }
    }
    Ok(())
}

type Parsed = (String, String, Vec<usize>, Range<usize>);

/// Name, dtype, shape and byte range of every tensor.
fn parse(file: &[u8]) -> Result<Vec<Parsed>, SafetensorsError> {
    let truncated = |needed| SafetensorsError::Truncated { needed, len: file.len() };
    let length = u64::from_le_bytes(*file.first_chunk().ok_or_else(|| truncated(8))?);
    if length > HEADER_BYTES_MAX {
        let cause = format!("its length is given as {length} bytes, more than the format allows");
        return Err(SafetensorsError::Header { cause });
    }
    let data_start = 8 + length as usize;
    let header = file.get(8..data_start).ok_or_else(|| truncated(8 + length))?;
    let Entries(mut header) = serde_json::from_slice(header)
        .map_err(|error| SafetensorsError::Header { cause: error.to_string() })?;
    header.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = header.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(SafetensorsError::NamedTwice { tensor: pair[0].0.clone() });
    }
    let parsed = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, info)| parse_tensor(name, info, data_start, file.len()))
        .collect::<Result<Vec<Parsed>, _>>()?;
    let mut by_place: Vec<_> = parsed.iter().map(|(name, _, _, range)| (range, name)).collect();
    by_place.retain(|(range, _)| !range.is_empty());
    by_place.sort_by_key(|(range, _)| range.start);
    match by_place.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        Some(pair) => Err(SafetensorsError::Overlap { first: pair[0].1.clone(), second: pair[1].1.clone() }),
        None => Ok(parsed),
    }
}

/// The header's entries in its own order; a map would let a name that comes twice pass.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

fn parse_tensor(
    tensor: String,
    info: Value,
    data_start: usize,
    len: usize,
) -> Result<Parsed, SafetensorsError> {
    #[derive(Deserialize)]
    struct Info {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: (u64, u64),
    }
    let info: Info = serde_json::from_value(info)
        .map_err(|error| SafetensorsError::Header { cause: format!("tensor `{tensor}`: {error}") })?;
    let (start, end) = info.data_offsets;
    if start > end || end > (len - data_start) as u64 {
        let base = data_start as u64;
        let (start, end) = (start.saturating_add(base), end.saturating_add(base));
        return Err(SafetensorsError::OutOfFile { tensor, start, end, len });
    }
    let value_bytes = match info.dtype.as_str() {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "U8" | "I8" | "BOOL" => 1,
        _ => return Err(SafetensorsError::Dtype { tensor, dtype: info.dtype }),
    };
    let size = info.shape.iter().try_fold(value_bytes, |product: u64, &size| product.checked_mul(size));
    if size != Some(end - start) {
        let Info { shape, dtype, .. } = info;
        return Err(SafetensorsError::Size { tensor, shape, dtype, bytes: end - start });
    }
    let shape = info.shape.iter().map(|&size| size as usize).collect();
    Ok((tensor, info.dtype, shape, data_start + start as usize..data_start + end as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[track_caller]
    fn refused(header: &str, data: usize, expected: &str) {
        let error = parse(&file(header, data)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    const TWO_FLOATS: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn hostile_headers_are_refused_with_the_culprit() {
        assert_eq!(parse(&file(TWO_FLOATS, 8)).unwrap().len(), 1);
        refused(TWO_FLOATS, 7, "tensor `a` lies at bytes");
        refused(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8, "does not fit its 8 bytes");
        refused(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "tensor `a` lies");
        refused(
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,8]}}"#,
            8,
            "does not fit",
        );
        refused(
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
            8,
            "tensor `a` lies",
        );
        refused(r#"{"a":{"dtype":"F8","shape":[8],"data_offsets":[0,8]}}"#, 8, "tensor `a` has dtype F8");
        refused(r#"{"a":{"dtype":"F32"}}"#, 8, "tensor `a`: missing field");
        refused("[", 8, "header is not JSON");
        refused(&format!("{{\"a\":{}", "[".repeat(100_000)), 8, "recursion limit");
        let two = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        refused(two, 12, "tensors `a` and `b` overlap");
        refused(&two.replace("\"b\"", "\"a\"").replace("[4,12]", "[8,16]"), 16, "names `a` twice");
        assert_eq!(parse(&[1, 2, 3]), Err(SafetensorsError::Truncated { needed: 8, len: 3 }));
        let mut huge = file(TWO_FLOATS, 8);
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&huge).unwrap_err().to_string().contains("more than the format allows"));
    }

    #[test]
    fn a_file_cut_short_anywhere_is_an_error() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/llama/model.safetensors");
        let whole = std::fs::read(path).unwrap();
        assert!(parse(&whole).is_ok());
        for eighth in 0..8 {
            let error = parse(&whole[..whole.len() * eighth / 8]).unwrap_err().to_string();
            assert!(error.contains("cut short"), "{eighth}/8: {error}");
        }
    }

    #[test]
    fn shards_are_joined_and_their_names_checked() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("x-1.safetensors"), file(TWO_FLOATS, 8)).unwrap();
        std::fs::write(at("x-2.safetensors"), file(&TWO_FLOATS.replace("\"a\"", "\"b\""), 8)).unwrap();
        let index = |map: &str| {
            std::fs::write(at("model.safetensors.index.json"), format!("{{\"weight_map\":{map}}}")).unwrap();
            TensorFiles::open_folder(folder.path())
        };
        let files = index(r#"{"a":"x-1.safetensors","b":"x-2.safetensors"}"#).unwrap();
        assert_eq!(files.names(), ["a", "b"]);
        let error = |map: &str| index(map).err().unwrap().to_string();
        assert!(error(r#"{"a":"../x-1.safetensors"}"#).contains("no plain file name"));
        assert!(error(r#"{"c":"x-1.safetensors"}"#).contains("names tensor `c`"));
        assert!(
            error(r#"{"a":"x-3.safetensors"}"#).contains("the file `x-3.safetensors`, which is not there")
        );
        std::fs::write(at("x-2.safetensors"), file(TWO_FLOATS, 8)).unwrap();
        assert!(error(r#"{"a":"x-1.safetensors","b":"x-2.safetensors"}"#).contains("is also in"));
    }

    #[test]
    fn broken_4bit_parts_are_named() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/linear4bit_state_dict.safetensors");
        let name = "model.layers.0.self_attn.q_proj.weight";
        let broken = |change: &dyn Fn(&mut BTreeMap<String, Entry>)| {
            let mut files = TensorFiles::open_file(Path::new(path)).unwrap();
            change(&mut files.tensors);
            files.tensor(name).err().expect("must be refused").to_string()
        };
        let remove = |suffix: &'static str| {
            broken(&move |tensors| {
                tensors.remove(&format!("{name}{suffix}"));
            })
        };
        assert!(remove(".absmax").contains("absmax` is missing"));
        assert!(remove(".nested_absmax").contains("nested_absmax` is missing"));
        let swapped = broken(&|tensors| {
            let part = tensors.remove(&format!("{name}.nested_quant_map")).unwrap();
            tensors.insert(format!("{name}.quant_map"), part);
        });
        assert!(swapped.contains("not the NF4 code"), "{swapped}");
        let short = broken(&|tensors| {
            let range = &mut tensors.get_mut(name).unwrap().range;
            range.end -= 1;
        });
        assert!(short.contains("do not fit the shape [128, 192]"), "{short}");
    }
}
