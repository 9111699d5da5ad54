//! A weight matrix as it rests in memory: f32, 16-bit or NF4. Knows how to decode any run of its values to
//! f32; knows nothing of products (see `backend`) or of files (see `format`).

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::DeviceMatrix;
use crate::quant::Nf4;

/// Bytes that outlive their user: owned, or a range of a mapped file.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    mapped: bool,
}

impl Bytes {
    /// Takes ownership of `bytes`.
    pub fn owned(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range, mapped: false }
    }

    /// A range of a shared mapping.
    pub fn mapped(map: Arc<memmap2::Mmap>, range: Range<usize>) -> Self {
        assert!(range.end <= map.len(), "BUG: range beyond the mapping");
        Self { owner: Arc::new(SharedMap(map)), range, mapped: true }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

struct SharedMap(Arc<memmap2::Mmap>);

impl AsRef<[u8]> for SharedMap {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A (rows, cols) weight matrix, row-major.
#[derive(Clone)]
pub struct Matrix {
    /// Output features of a linear layer, or vocabulary size of an embedding.
    pub rows: usize,
    /// Input features of a linear layer, or channels of an embedding.
    pub cols: usize,
    /// The values.
    pub values: Values,
}

/// The values of a matrix in one of the supported encodings; little-endian where more than a byte.
#[derive(Clone)]
pub enum Values {
    /// 32-bit floats.
    F32(Bytes),
    /// bfloat16.
    Bf16(Bytes),
    /// IEEE half precision.
    F16(Bytes),
    /// NF4 blocks of 64 consecutive values across row ends, as bitsandbytes stores them.
    Nf4(Nf4),
    /// In the memory of a device, whose operations alone can read it.
    Device(DeviceMatrix),
}

impl Matrix {
    /// The weight in host memory, wherever it is.
    pub fn on_host(&self) -> Self {
        match &self.values {
            Values::Device(values) => Self { values: values.to_host(self.rows * self.cols), ..*self },
            _ => self.clone(),
        }
    }

    /// A matrix of owned f32 values.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols, "BUG: shape does not fit the values");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { rows, cols, values: Values::F32(Bytes::owned(bytes)) }
    }

    /// Decodes `out.len()` consecutive values, starting at flat index `start`, to f32.
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        match &self.values {
            Values::F32(bytes) => {
                let bytes = &bytes.as_slice()[start * 4..(start + out.len()) * 4];
                for (value, chunk) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
                }
            }
            Values::Bf16(bytes) => {
                let bytes = &bytes.as_slice()[start * 2..(start + out.len()) * 2];
                for (value, chunk) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = bf16::from_le_bytes([chunk[0], chunk[1]]).to_f32();
                }
            }
            Values::F16(bytes) => {
                let bytes = &bytes.as_slice()[start * 2..(start + out.len()) * 2];
                for (value, chunk) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f16::from_le_bytes([chunk[0], chunk[1]]).to_f32();
                }
            }
            Values::Nf4(nf4) => nf4.decode(start, out),
            Values::Device(_) => Self::elsewhere(),
        }
    }

    /// All values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.decode(0, &mut out);
        out
    }

    /// What host memory does with a device's weight.
    pub(crate) fn elsewhere() -> ! {
        unreachable!("BUG: a device's weight read as if it were in host memory")
    }

    /// Those of [`Matrix::size_bytes`] that are pages of a file, read when they are first touched.
    pub fn mapped_bytes(&self) -> usize {
        match &self.values {
            Values::F32(bytes) | Values::Bf16(bytes) | Values::F16(bytes) if bytes.mapped => {
                bytes.as_slice().len()
            }
            Values::Nf4(nf4) if nf4.packed.mapped => nf4.packed.as_slice().len(),
            _ => 0,
        }
    }

    /// Bytes the values take in memory.
    pub fn size_bytes(&self) -> usize {
        match &self.values {
            Values::F32(bytes) | Values::Bf16(bytes) | Values::F16(bytes) => bytes.as_slice().len(),
            Values::Nf4(nf4) => nf4.size_bytes(),
            Values::Device(values) => values.size_bytes(self.rows * self.cols),
        }
    }
}
