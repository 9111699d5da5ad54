//! One tensor of a checkpoint, still encoded as its file has it. Knows how to decode any run of rows; knows
//! nothing of files or names.

use half::{bf16, f16};

use crate::format::block::BlockFormat;
use crate::matrix::{Bytes, Values};
use crate::quant::Nf4;

/// A tensor and where its values lie.
#[derive(Clone)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The encoded values, row-major.
    pub data: TensorData,
    /// Rows per head where the file interleaves the two halves of each head's rows (see `gguf_tensors`):
    /// row (head, half, i) of this tensor is row (head, i, half) of the file.
    pub interleaved: Option<usize>,
}

/// The values of a tensor in the encoding of its file; little-endian where more than a byte.
#[derive(Clone)]
pub enum TensorData {
    F32(Bytes),
    Bf16(Bytes),
    F16(Bytes),
    /// One of GGUF's block formats; a row is a whole number of blocks.
    Blocks(BlockFormat, Bytes),
    Nf4(Nf4),
}

impl Tensor {
    /// All dimensions but the last, multiplied; 1 for a vector without interleaving.
    pub fn rows(&self) -> usize {
        match self.interleaved {
            Some(_) => self.shape[0],
            None => self.shape[..self.shape.len().saturating_sub(1)].iter().product(),
        }
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        match (self.interleaved, self.shape.as_slice()) {
            (Some(_), [_]) => 1,
            (_, shape) => shape.last().copied().unwrap_or(1),
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Decodes whole rows from `first_row` to f32; `out` holds a whole number of rows.
    pub fn decode_rows(&self, first_row: usize, out: &mut [f32]) {
        let cols = self.cols();
        assert!(out.len().is_multiple_of(cols), "BUG: part of a row");
        if self.interleaved.is_none() {
            return self.data.decode(first_row * cols, out);
        }
        for (row, out) in (first_row..).zip(out.chunks_exact_mut(cols)) {
            self.data.decode(self.stored_row(row) * cols, out);
        }
    }

    /// The values as a matrix holds them: plain encodings and NF4 are shared, block formats decoded.
    pub fn into_values(self) -> Values {
        match (&self.data, self.interleaved) {
            (TensorData::F32(bytes), None) => Values::F32(bytes.clone()),
            (TensorData::Bf16(bytes), None) => Values::Bf16(bytes.clone()),
            (TensorData::F16(bytes), None) => Values::F16(bytes.clone()),
            (TensorData::Nf4(nf4), None) => Values::Nf4(nf4.clone()),
            (TensorData::F32(bytes), Some(_)) => Values::F32(self.reordered(bytes, 4)),
            (TensorData::Bf16(bytes), Some(_)) => Values::Bf16(self.reordered(bytes, 2)),
            (TensorData::F16(bytes), Some(_)) => Values::F16(self.reordered(bytes, 2)),
            (TensorData::Blocks(..) | TensorData::Nf4(_), _) => {
                let cols = self.cols();
                let mut row = vec![0.0; cols];
                let mut bytes = Vec::with_capacity(self.len() * 4);
                for index in 0..self.rows() {
                    self.decode_rows(index, &mut row);
                    bytes.extend(row.iter().flat_map(|value| value.to_le_bytes()));
                }
                Values::F32(Bytes::owned(bytes))
            }
        }
    }

    /// A copy of plain values with the rows in the order of this tensor.
    fn reordered(&self, bytes: &Bytes, value_bytes: usize) -> Bytes {
        let row_bytes = self.cols() * value_bytes;
        let stored = bytes.as_slice();
        let rows = (0..self.rows()).map(|row| self.stored_row(row) * row_bytes);
        Bytes::owned(rows.flat_map(|start| &stored[start..start + row_bytes]).copied().collect())
    }

    fn stored_row(&self, row: usize) -> usize {
        let Some(head_dim) = self.interleaved else { return row };
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, i) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + i * 2 + half
    }
}

impl TensorData {
    /// The name of the encoding: `BF16`, `Q4_K`, `NF4`.
    pub fn encoding(&self) -> &'static str {
        match self {
            Self::F32(_) => "F32",
            Self::Bf16(_) => "BF16",
            Self::F16(_) => "F16",
            Self::Blocks(format, _) => format.name(),
            Self::Nf4(_) => "NF4",
        }
    }

    /// Bytes of the values with their scales.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::F32(bytes) | Self::Bf16(bytes) | Self::F16(bytes) | Self::Blocks(_, bytes) => {
                bytes.as_slice().len()
            }
            Self::Nf4(nf4) => nf4.size_bytes(),
        }
    }

    /// Decodes `out.len()` values from flat index `start`. For block formats both are multiples of the block.
    fn decode(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::F32(bytes) => {
                let bytes = bytes.as_slice()[start * 4..].chunks_exact(4);
                for (value, chunk) in out.iter_mut().zip(bytes) {
                    *value = f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
                }
            }
            Self::Bf16(bytes) => {
                let bytes = bytes.as_slice()[start * 2..].chunks_exact(2);
                for (value, chunk) in out.iter_mut().zip(bytes) {
                    *value = bf16::from_le_bytes([chunk[0], chunk[1]]).to_f32();
                }
            }
            Self::F16(bytes) => {
                let bytes = bytes.as_slice()[start * 2..].chunks_exact(2);
                for (value, chunk) in out.iter_mut().zip(bytes) {
                    *value = f16::from_le_bytes([chunk[0], chunk[1]]).to_f32();
                }
            }
            Self::Blocks(format, bytes) => format.decode(bytes.as_slice(), start, out),
            Self::Nf4(nf4) => nf4.decode(start, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// convert_hf_to_gguf's `LlamaModel.permute`: reshape (heads, 2, d/2, cols), swap axes 1 and 2.
    fn permuted(rows: &[[f32; 2]], head_dim: usize) -> Vec<f32> {
        let mut out = Vec::new();
        for head in rows.chunks(head_dim) {
            for i in 0..head_dim / 2 {
                for half in 0..2 {
                    out.extend(head[half * head_dim / 2 + i]);
                }
            }
        }
        out
    }

    #[test]
    fn interleaved_rows_come_back_in_hugging_face_order() {
        let rows: Vec<[f32; 2]> = (0..16).map(|row| [row as f32, -(row as f32)]).collect();
        let stored = permuted(&rows, 8);
        let bytes: Vec<u8> = stored.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor =
            Tensor { shape: vec![16, 2], data: TensorData::F32(Bytes::owned(bytes)), interleaved: Some(8) };
        let mut out = [0.0; 6];
        tensor.decode_rows(5, &mut out);
        assert_eq!(out, [5.0, -5.0, 6.0, -6.0, 7.0, -7.0]);
        let Values::F32(bytes) = tensor.into_values() else { panic!("plain values stay plain") };
        let expected: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(bytes.as_slice(), expected);
    }

    #[test]
    fn interleaved_bias_has_rows_of_one_value() {
        let stored = [0.0f32, 2.0, 1.0, 3.0];
        let bytes: Vec<u8> = stored.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor =
            Tensor { shape: vec![4], data: TensorData::F32(Bytes::owned(bytes)), interleaved: Some(4) };
        let mut out = [9.0; 4];
        tensor.decode_rows(0, &mut out);
        assert_eq!(out, [0.0, 1.0, 2.0, 3.0]);
    }
}
