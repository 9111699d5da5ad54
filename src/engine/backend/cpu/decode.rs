//! Blocks of a weight as f32: the step between any encoding and a product.

use std::ops::Range;

use super::rows;
use crate::matrix::{Matrix, Values};

/// out (rows, cols), row-major = that block of `weight`.
pub(super) fn block(weight: &Matrix, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
    let width = cols.len();
    if width == weight.cols {
        return run(weight, rows.start * weight.cols, &mut out[..rows.len() * width]);
    }
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        run(weight, row * weight.cols + cols.start, out);
    }
}

/// Consecutive values from flat index `start`.
fn run(weight: &Matrix, start: usize, out: &mut [f32]) {
    match &weight.values {
        // An embedding is large enough for the plain loop to show.
        Values::Bf16(bytes) => rows::widen_bf16(out, &bytes.as_slice()[start * 2..(start + out.len()) * 2]),
        _ => weight.decode(start, out),
    }
}
