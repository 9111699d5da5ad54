//! Blocks of a weight as f32: the step between any encoding and a product.

use std::ops::Range;

use crate::matrix::Matrix;

/// out (rows, cols), row-major = that block of `weight`.
pub(super) fn block(weight: &Matrix, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
    let width = cols.len();
    if width == weight.cols {
        weight.decode(rows.start * weight.cols, &mut out[..rows.len() * width]);
        return;
    }
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        weight.decode(row * weight.cols + cols.start, out);
    }
}
