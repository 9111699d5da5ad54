//! One matrix product on one thread, and memory that several tasks write to in turn-free fashion. The only
//! place that calls `gemm`. Knows strides, not meanings.

use std::marker::PhantomData;
use std::ops::Range;

use gemm::Parallelism;

use super::Write;

/// Depth of one call to `gemm`. Up to here `gemm` sums in one sweep whatever the machine's caches; beyond, its
/// split depends on them, so the split is made here.
const DEPTH: usize = 512;

/// A buffer whose disjoint parts are written by different tasks.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pointer: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through the `unsafe` methods, whose callers promise disjoint parts.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(values: &'a mut [f32]) -> Self {
        Self { pointer: values.as_mut_ptr(), len: values.len(), lifetime: PhantomData }
    }

    /// # Safety
    /// No other task may touch `range` while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "that is the purpose; see Safety")]
    pub(super) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "BUG: range beyond the buffer");
        // SAFETY: in bounds as asserted; exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }

    /// The (rows, cols) block that starts at `start` and whose rows lie `stride` apart.
    ///
    /// # Safety
    /// No other task may touch the values of the block while it lives.
    pub(super) unsafe fn block(&self, start: usize, rows: usize, cols: usize, stride: usize) -> Output<'a> {
        let end = if rows == 0 { start } else { start + (rows - 1) * stride + cols };
        assert!(end <= self.len && (cols <= stride || rows <= 1), "BUG: block beyond the buffer");
        // SAFETY: `start <= end <= len`.
        let pointer = unsafe { self.pointer.add(start) };
        Output { pointer, rows, cols, stride, lifetime: PhantomData }
    }
}

/// A row-major destination, exclusively held.
pub(super) struct Output<'a> {
    pointer: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<'a> Output<'a> {
    /// The first `rows * cols` values of `values`.
    pub(super) fn of(values: &'a mut [f32], rows: usize, cols: usize) -> Self {
        let shared = Shared::new(values);
        // SAFETY: `values` is borrowed mutably for the life of the block.
        unsafe { shared.block(0, rows, cols, cols) }
    }
}

/// A strided source: element (i,j) is `values[i * row + j * col]`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) values: &'a [f32],
    pub(super) row: usize,
    pub(super) col: usize,
}

impl<'a> Operand<'a> {
    /// Rows `stride` apart.
    pub(super) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: stride, col: 1 }
    }

    /// The transpose of rows `stride` apart.
    pub(super) fn columns(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: 1, col: stride }
    }

    fn check(&self, rows: usize, cols: usize) {
        let last = (rows - 1) * self.row + (cols - 1) * self.col;
        assert!(last < self.values.len(), "BUG: operand of a product too short");
    }
}

/// c (m,n) = or += scale * a (m,k) · b (k,n). A depth of 0 gives zeros.
pub(super) fn product(
    c: &mut Output<'_>,
    depth: usize,
    scale: f32,
    write: Write,
    a: Operand<'_>,
    b: Operand<'_>,
) {
    let (rows, cols) = (c.rows, c.cols);
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(depth > 0, "BUG: product of depth 0");
    a.check(rows, depth);
    b.check(depth, cols);
    for start in (0..depth).step_by(DEPTH) {
        let read = write == Write::Add || start > 0;
        // SAFETY: `c` is exclusively held and in bounds by construction; both operands were checked above.
        unsafe {
            gemm::gemm(
                rows,
                cols,
                DEPTH.min(depth - start),
                c.pointer,
                1,
                c.stride as isize,
                read,
                a.values.as_ptr().add(start * a.col),
                a.col as isize,
                a.row as isize,
                b.values.as_ptr().add(start * b.row),
                b.col as isize,
                b.row as isize,
                1.0,
                scale,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}
