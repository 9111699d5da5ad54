//! One matrix product on one thread, and memory that several tasks write to in turn-free fashion. Knows
//! strides, not meanings.

use std::marker::PhantomData;
use std::ops::Range;

use super::kernel::{Kernel, PANEL, Product};
use super::{Write, panel, scratch};

/// Depth of one sweep: a panel and the rows of a tile then fit the first-level cache. Always the same, so that a
/// sum does not change where zeros follow (keys that a query does not see).
pub(super) const SWEEP: usize = 288;

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
    /// The columns `range` of the block.
    pub(super) fn columns(&mut self, range: Range<usize>) -> Output<'_> {
        assert!(range.start <= range.end && range.end <= self.cols, "BUG: columns beyond the block");
        // SAFETY: within the block, which is borrowed for as long.
        let pointer = unsafe { self.pointer.add(range.start) };
        Output { pointer, cols: range.len(), ..*self }
    }

    /// Rows, columns, values from row to row, and where the first is.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn parts(&mut self) -> (usize, usize, usize, *mut f32) {
        (self.rows, self.cols, self.stride, self.pointer)
    }

    /// The first `cols` of every `stride` values.
    pub(super) fn strided(values: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let shared = Shared::new(values);
        // SAFETY: `values` is borrowed mutably for the life of the block.
        unsafe { shared.block(0, rows, cols, stride) }
    }

    /// The first `rows * cols` values of `values`.
    pub(super) fn of(values: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(values, rows, cols, cols)
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

    /// Without its first `skipped` values.
    pub(super) fn from(self, skipped: usize) -> Self {
        Self { values: &self.values[skipped..], ..self }
    }

    fn check(&self, rows: usize, cols: usize) {
        let last = (rows - 1) * self.row + (cols - 1) * self.col;
        assert!(last < self.values.len(), "BUG: operand of a product too short");
    }
}

/// A right factor in panels.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    values: &'a [f32],
    /// Values from one step of the depth to the next.
    step: usize,
    /// Values from one panel to the next.
    panel: usize,
}

impl<'a> Panels<'a> {
    /// As `panel::decode` and `panel::pack` leave them.
    pub(super) fn packed(values: &'a [f32], depth: usize) -> Self {
        Self { values, step: PANEL, panel: PANEL * depth }
    }
}

/// A right factor (depth, cols) packed once for many products.
pub(super) struct Packed<'a> {
    values: &'a [f32],
    cols: usize,
    depth: usize,
    /// Steps that its first sweep lacks: sums are then cut into sweeps as if those had been zeros.
    skipped: usize,
}

impl<'a> Packed<'a> {
    /// Packs `b` into `out`, which has room for [`panel::size`] values.
    pub(super) fn new(
        kernel: Kernel,
        b: Operand<'_>,
        (cols, depth): (usize, usize),
        skipped: usize,
        out: &'a mut [f32],
    ) -> Self {
        b.check(depth, cols);
        let width = cols.next_multiple_of(PANEL);
        let mut start = 0;
        while start < depth {
            let steps = (SWEEP - (skipped + start) % SWEEP).min(depth - start);
            let out = &mut out[width * start..width * (start + steps)];
            panel::pack(kernel, &b.values[start * b.row..], (b.col, b.row), (cols, steps), out);
            start += steps;
        }
        Self { values: out, cols, depth, skipped }
    }

    /// c (m,n) = or += scale * a (m, steps) · the columns from `first` on, a multiple of sixteen, of these steps.
    pub(super) fn multiply(
        &self,
        kernel: Kernel,
        c: &mut Output<'_>,
        (first, steps): (usize, Range<usize>),
        scale: f32,
        write: Write,
        a: Operand<'_>,
    ) {
        let width = self.cols.next_multiple_of(PANEL);
        assert!(first.is_multiple_of(PANEL) && first + c.cols <= width, "BUG: columns beyond the factor");
        assert!(!steps.is_empty() && steps.end <= self.depth, "BUG: steps beyond the factor");
        let mut start = steps.start;
        while start < steps.end {
            let in_sweep = (self.skipped + start) % SWEEP;
            let sweep = start - in_sweep.min(start);
            let whole = (SWEEP - (self.skipped + sweep) % SWEEP).min(self.depth - sweep);
            let end = (sweep + whole).min(steps.end);
            let at = width * sweep + first * whole + PANEL * (start - sweep);
            let panels = Panels { values: &self.values[at..], step: PANEL, panel: PANEL * whole };
            let write = if start == steps.start { write } else { Write::Add };
            multiply(kernel, c, end - start, scale, write, a.from((start - steps.start) * a.col), panels);
            start = end;
        }
    }
}

/// c (m,n) = or += scale * a (m,k) · b (k,n).
pub(super) fn product(
    kernel: Kernel,
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
    b.check(depth, cols);
    for start in (0..depth).step_by(SWEEP) {
        let depth = SWEEP.min(depth - start);
        let write = if start == 0 { write } else { Write::Add };
        let (a, b) = (a.from(start * a.col), b.from(start * b.row));
        if b.col == 1 && cols % PANEL == 0 {
            let panels = Panels { values: b.values, step: b.row, panel: PANEL };
            multiply(kernel, c, depth, scale, write, a, panels);
        } else {
            scratch::with(panel::size(cols, depth), |packed| {
                panel::pack(kernel, b.values, (b.col, b.row), (cols, depth), packed);
                multiply(kernel, c, depth, scale, write, a, Panels::packed(packed, depth));
            });
        }
    }
}

/// c (m,n) = or += scale * a (m,k) · b (k,n) in one sweep.
pub(super) fn multiply(
    kernel: Kernel,
    c: &mut Output<'_>,
    depth: usize,
    scale: f32,
    write: Write,
    a: Operand<'_>,
    b: Panels<'_>,
) {
    let panels = c.cols.div_ceil(PANEL);
    a.check(c.rows, depth);
    let last = (panels - 1) * b.panel + (depth - 1) * b.step + PANEL - 1;
    assert!(last < b.values.len(), "BUG: panels of a product too short");
    let product = Product {
        rows: c.rows,
        cols: c.cols,
        depth,
        scale,
        add: write == Write::Add,
        a: a.values.as_ptr(),
        a_row: a.row,
        a_depth: a.col,
        b: b.values.as_ptr(),
        b_depth: b.step,
        b_panel: b.panel,
        c: c.pointer,
        c_row: c.stride,
    };
    // SAFETY: `c` is exclusively held and in bounds by construction; both factors were checked above.
    unsafe { kernel.multiply(&product) }
}
