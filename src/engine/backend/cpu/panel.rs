//! Right factors as panels: sixteen columns side by side, step of the depth after step, the form the kernel
//! reads. Weights are decoded from their encoding straight into panels, so that they never stand anywhere as
//! plain f32 rows. Knows encodings and layouts; multiplies nothing.

use std::ops::Range;

use super::kernel::{Kernel, PANEL, Work};
use super::vector::{Code, LANES, Vector};
#[cfg(target_arch = "x86_64")]
use super::vector::{Lanes, Zmm};
use crate::matrix::{Matrix, Values};
use crate::quant;

/// Columns of a panel.
pub(super) const WIDTH: usize = PANEL;

/// Values that panels of `cols` columns and `depth` steps take.
pub(super) fn size(cols: usize, depth: usize) -> usize {
    cols.next_multiple_of(PANEL) * depth
}

/// Which way a matrix becomes panels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Columns of the panels are the matrix' rows, their depth its columns: for x · Wᵀ.
    Rows,
    /// Columns are columns, depth is rows: for dy · W.
    Columns,
}

/// out = the panels of a block of `weight`. `cols` and `depth` index rows or columns of it as `side` says.
/// Missing columns of the last panel are 0.
pub(super) fn decode(
    kernel: Kernel,
    weight: &Matrix,
    side: Side,
    cols: Range<usize>,
    depth: Range<usize>,
    out: &mut [f32],
) {
    let (rows_end, cols_end) = match side {
        Side::Rows => (cols.end, depth.end),
        Side::Columns => (depth.end, cols.end),
    };
    assert!(rows_end <= weight.rows && cols_end <= weight.cols, "BUG: panels beyond the weight");
    assert!(out.len() >= size(cols.len(), depth.len()), "BUG: no room for panels");
    let in_row = if side == Side::Rows { &depth } else { &cols };
    if [weight.cols, in_row.start, in_row.len()].iter().any(|number| !number.is_multiple_of(LANES)) {
        return ragged(weight, side, cols, depth, out);
    }
    // SAFETY: the block is within the matrix; runs of eight do not cross a row's end, for a row is a multiple of
    // eight.
    unsafe { visit(weight, (kernel, Pack { encoding: (), stride: weight.cols, side, cols, depth, out })) }
}

/// What is to be done with the values of a matrix, whatever their encoding.
pub(super) trait Visitor {
    /// # Safety
    /// As the implementor says.
    unsafe fn visit<E: Encoding>(self, encoding: E);
}

/// Hands `visitor` the encoding of `weight`, whose values are all there, as each arm asserts.
///
/// # Safety
/// What `visitor` asks for besides.
pub(super) unsafe fn visit(weight: &Matrix, visitor: impl Visitor) {
    let values = weight.rows * weight.cols;
    let checked = |bytes: &[u8], size: usize| {
        assert!(bytes.len() >= values * size, "BUG: a weight lacks values");
        bytes.as_ptr()
    };
    // SAFETY: passed on.
    unsafe {
        match &weight.values {
            Values::F32(bytes) => visitor.visit(F32Bytes(checked(bytes.as_slice(), 4))),
            Values::Bf16(bytes) => visitor.visit(Bf16(checked(bytes.as_slice(), 2))),
            Values::F16(bytes) => visitor.visit(F16(checked(bytes.as_slice(), 2))),
            Values::Device(_) => Matrix::elsewhere(),
            Values::Nf4(nf4) => {
                let packed = nf4.packed.as_slice();
                assert!(packed.len() * 2 >= values, "BUG: a weight lacks codes");
                assert!(nf4.absmax.len() * quant::BLOCK >= values, "BUG: a weight lacks scales");
                visitor.visit(Nf4(packed.as_ptr(), nf4.absmax.as_ptr()));
            }
        }
    }
}

/// out = the panels whose column j and step k are `values[j * col + k * step]`; either distance is 1.
pub(super) fn pack(
    kernel: Kernel,
    values: &[f32],
    (col, step): (usize, usize),
    (cols, depth): (usize, usize),
    out: &mut [f32],
) {
    assert!(out.len() >= size(cols, depth), "BUG: no room for panels");
    assert!(col == 1 || step == 1, "BUG: values that lie in no row");
    assert!((cols - 1) * col + (depth - 1) * step < values.len(), "BUG: panels beyond the values");
    let (side, stride) = if step == 1 { (Side::Rows, col) } else { (Side::Columns, step) };
    let whole = if side == Side::Rows { depth } else { cols } / LANES * LANES;
    let out = &mut out[..size(cols, depth)];
    if whole < if side == Side::Rows { depth } else { cols } {
        for (panel, out) in out.chunks_exact_mut(PANEL * depth).enumerate() {
            for (k, out) in out.chunks_exact_mut(PANEL).enumerate() {
                for (lane, out) in out.iter_mut().enumerate() {
                    let j = panel * PANEL + lane;
                    *out = if j < cols { values[j * col + k * step] } else { 0.0 };
                }
            }
        }
        return;
    }
    let encoding = F32(values.as_ptr());
    // SAFETY: the last value was found in bounds, and runs of eight end there.
    unsafe { kernel.run(Pack { encoding, stride, side, cols: 0..cols, depth: 0..depth, out }) }
}

/// Any shape: run by run through a buffer.
fn ragged(weight: &Matrix, side: Side, cols: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
    let out = &mut out[..size(cols.len(), depth.len())];
    out.fill(0.0);
    let at = |j: usize, k: usize| j / PANEL * PANEL * depth.len() + k * PANEL + j % PANEL;
    let (rows, in_row) = if side == Side::Rows { (&cols, &depth) } else { (&depth, &cols) };
    let mut buffer = vec![0.0; in_row.len()];
    for (index, row) in rows.clone().enumerate() {
        weight.decode(row * weight.cols + in_row.start, &mut buffer);
        for (place, value) in buffer.iter().enumerate() {
            let (j, k) = if side == Side::Rows { (index, place) } else { (place, index) };
            out[at(j, k)] = *value;
        }
    }
}

/// Reads eight values at a time.
pub(super) trait Encoding: Copy {
    /// # Safety
    /// The values `at..at + 8` must exist; `at` is a multiple of eight for the encodings of a [`Matrix`].
    unsafe fn load<V: Vector>(self, at: usize) -> V;

    /// # Safety
    /// The values `at..at + 16` must exist, `at` be a multiple of sixteen for the encodings of a [`Matrix`], and the
    /// CPU have AVX-512 with VBMI.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_wide(self, at: usize) -> Zmm;

    /// Where the value `at` is stored, if it exists.
    fn place(self, at: usize) -> *const u8;

    /// out (depth, 16) = sixteen rows from flat index `start`, `stride` apart, transposed as far as this
    /// encoding has a way faster than value by value. Gives the steps done.
    ///
    /// # Safety
    /// The rows must exist and `out` have room.
    #[inline(always)]
    unsafe fn transpose<V: Vector>(
        self,
        _start: usize,
        _stride: usize,
        _depth: usize,
        _out: *mut f32,
    ) -> usize {
        0
    }
}

#[derive(Clone, Copy)]
pub(super) struct F32(pub(super) *const f32);
#[derive(Clone, Copy)]
struct F32Bytes(*const u8);
#[derive(Clone, Copy)]
struct Bf16(*const u8);
#[derive(Clone, Copy)]
struct F16(*const u8);
/// Codes, and the scale of each block.
#[derive(Clone, Copy)]
struct Nf4(*const u8, *const f32);

impl Code for Nf4 {
    const VALUES: [f32; 16] = quant::CODE;
}

impl Encoding for F32 {
    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.wrapping_add(at).cast()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_wide(self, at: usize) -> Zmm {
        // SAFETY: passed on.
        unsafe { Zmm::load(self.0.add(at)) }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load(self.0.add(at)) }
    }
}

impl Encoding for F32Bytes {
    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.wrapping_add(4 * at)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_wide(self, at: usize) -> Zmm {
        // SAFETY: passed on; x86 is little-endian.
        unsafe { Zmm::load(self.0.add(4 * at).cast()) }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f32(self.0.add(4 * at)) }
    }
}

impl Encoding for Bf16 {
    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.wrapping_add(2 * at)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_wide(self, at: usize) -> Zmm {
        // SAFETY: passed on.
        unsafe { Zmm::load_bf16(self.0.add(2 * at)) }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_bf16(self.0.add(2 * at)) }
    }
}

impl Encoding for F16 {
    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.wrapping_add(2 * at)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_wide(self, at: usize) -> Zmm {
        // SAFETY: passed on.
        unsafe { Zmm::load_f16(self.0.add(2 * at)) }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(self.0.add(2 * at)) }
    }
}

impl Encoding for Nf4 {
    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.wrapping_add(at / 2)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_wide(self, at: usize) -> Zmm {
        // SAFETY: passed on; sixteen values from a multiple of sixteen share a block of 64.
        unsafe {
            Zmm::load_codes(self.0.add(at / 2), &quant::CODE).mul(Zmm::splat(*self.1.add(at / quant::BLOCK)))
        }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on; eight values from a multiple of eight share a block of 64.
        unsafe {
            V::load_codes(self.0.add(at / 2), &quant::CODE).mul(V::splat(*self.1.add(at / quant::BLOCK)))
        }
    }

    #[inline(always)]
    unsafe fn transpose<V: Vector>(self, start: usize, stride: usize, depth: usize, out: *mut f32) -> usize {
        // 32 steps share a block in every row only where rows and start are multiples of 32.
        if !start.is_multiple_of(32) || !stride.is_multiple_of(32) {
            return 0;
        }
        let whole = depth / 32 * 32;
        for k in (0..whole).step_by(32) {
            let mut scales = [0.0; PANEL];
            // SAFETY: as promised; the steps k..k + 32 of a row share a block of 64.
            unsafe {
                for (row, scale) in scales.iter_mut().enumerate() {
                    V::prefetch(self.place(start + (row + PANEL) * stride + k));
                    *scale = *self.1.add((start + row * stride + k) / quant::BLOCK);
                }
                let from = self.0.add((start + k) / 2);
                V::codes_transposed::<Self>(from, stride / 2, &scales, out.add(k * PANEL));
            }
        }
        whole
    }
}

/// Packs a block of a row-major matrix whose runs along a row are multiples of eight.
struct Pack<'a, E> {
    encoding: E,
    /// Values from row to row.
    stride: usize,
    side: Side,
    cols: Range<usize>,
    depth: Range<usize>,
    out: &'a mut [f32],
}

impl Visitor for (Kernel, Pack<'_, ()>) {
    unsafe fn visit<E: Encoding>(self, encoding: E) {
        let (kernel, Pack { stride, side, cols, depth, out, .. }) = self;
        // SAFETY: passed on.
        unsafe { kernel.run(Pack { encoding, stride, side, cols, depth, out }) }
    }
}

impl<E: Encoding> Work for Pack<'_, E> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let depth = self.depth.len();
        let panels = self.out.chunks_exact_mut(PANEL * depth).zip(self.cols.clone().step_by(PANEL));
        for (out, first) in panels {
            let width = PANEL.min(self.cols.end - first);
            // SAFETY: the panel's block is within that of the packing, in bounds as its maker promised.
            unsafe {
                match self.side {
                    Side::Rows => {
                        let start = first * self.stride + self.depth.start;
                        match width {
                            PANEL => rows::<V, E, true>(self.encoding, start, self.stride, width, depth, out),
                            _ => rows::<V, E, false>(self.encoding, start, self.stride, width, depth, out),
                        }
                    }
                    Side::Columns => {
                        let start = self.depth.start * self.stride + first;
                        columns::<V, E>(self.encoding, start, self.stride, width, out);
                    }
                }
            }
        }
    }
}

/// One panel of `width` rows from `start`, sixteen if `FULL`, transposed eight by eight.
#[inline(always)]
unsafe fn rows<V: Vector, E: Encoding, const FULL: bool>(
    encoding: E,
    start: usize,
    stride: usize,
    width: usize,
    depth: usize,
    out: &mut [f32],
) {
    let done = match FULL {
        // SAFETY: the panel has sixteen rows, and `out` room for its depth.
        true => unsafe { encoding.transpose::<V>(start, stride, depth, out.as_mut_ptr()) },
        false => 0,
    };
    for half in [0, LANES] {
        for k in (done..depth).step_by(LANES) {
            // SAFETY: rows beyond the width are not read; eight steps of sixteen are within the panel.
            unsafe {
                let mut block = [V::splat(0.0); LANES];
                for row in 0..LANES {
                    if FULL || half + row < width {
                        // The next rows' weights: too few of a row are read at once for the CPU to foresee it.
                        if k % 32 == 0 {
                            V::prefetch(encoding.place(start + (half + row + LANES) * stride + k));
                        }
                        block[row] = encoding.load(start + (half + row) * stride + k);
                    }
                }
                let block = V::transpose(block);
                for step in 0..LANES {
                    block[step].store(out.as_mut_ptr().add((k + step) * PANEL + half));
                }
            }
        }
    }
}

/// One panel of `width` columns from `start`: runs of each row.
#[inline(always)]
unsafe fn columns<V: Vector, E: Encoding>(
    encoding: E,
    start: usize,
    stride: usize,
    width: usize,
    out: &mut [f32],
) {
    for (k, out) in out.chunks_exact_mut(PANEL).enumerate() {
        for half in [0, LANES] {
            // SAFETY: the width is a multiple of eight; columns beyond it are not read.
            unsafe {
                let value =
                    if half < width { encoding.load(start + k * stride + half) } else { V::splat(0.0) };
                value.store(out.as_mut_ptr().add(half));
            }
        }
    }
}
