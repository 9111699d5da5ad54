//! NF4: to be completed (encode, double quantisation, golden tests).

use crate::matrix::Bytes;

/// A tensor in NF4 with blocks of 64 values, scales as bitsandbytes stores them.
#[derive(Clone)]
pub struct Nf4 {
    /// Two codes a byte, the first value in the high nibble.
    pub packed: Bytes,
    /// absmax of each block of 64, already decoded to f32 (from nested 8-bit codes where the file has them).
    pub absmax: std::sync::Arc<[f32]>,
    /// Number of values.
    pub len: usize,
}

impl Nf4 {
    /// Decodes `out.len()` values from flat index `start`: code[nibble] * absmax, in f32.
    pub fn decode(&self, _start: usize, _out: &mut [f32]) {
        unimplemented!()
    }

    /// Bytes held in memory.
    pub fn size_bytes(&self) -> usize {
        self.packed.as_slice().len() + self.absmax.len() * 4
    }
}
