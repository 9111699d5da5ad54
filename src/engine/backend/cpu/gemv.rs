//! Few rows of activations times a weight, as in decoding: bands of 32 outputs whose weights are decoded in
//! registers and used at once, so that a weight costs its bytes and its decoding and is never stored. Knows
//! encodings and products of few rows; cuts no sums other than the panels' product does.
//!
//! Each output is the same chain over the depth, sweep by sweep, as in `linear` and `kernel`: a row's outputs do
//! not depend on how many rows come with it, nor on which of the two ways they took.

use super::kernel::Work;
use super::product::{SWEEP, Shared};
use super::vector::{BAND, Code, GROUPS, LANES, Vector, block_dot};
use super::{Cpu, Write};
use crate::matrix::{Matrix, Values};
use crate::quant;

/// Most rows at which this is faster than panels.
const ROWS: usize = 4;
/// Steps of a code's block that are decoded together.
const CODES: usize = 32;
/// Steps between prefetches: a line of 16-bit values.
const LINE_STEPS: usize = 32;
/// Bytes of weights worth a task of their own.
const TASK_BYTES: usize = 1 << 16;

/// Outputs of `weight` that [`forward`] can compute for `rows` rows: all bands, or none.
pub(super) fn outputs(weight: &Matrix, rows: usize) -> usize {
    let step = if matches!(weight.values, Values::Nf4(_)) { CODES } else { LANES };
    if rows > ROWS || !weight.cols.is_multiple_of(step) { 0 } else { weight.rows / BAND * BAND }
}

/// The first [`outputs`] of each row: y (M,N) = or += x (M,K) · Wᵀ.
pub(super) fn forward(cpu: &Cpu, y: Shared<'_>, x: &[f32], weight: &Matrix, write: Write) {
    match x.len() / weight.cols {
        1 => of_rows::<1>(cpu, y, x, weight, write),
        2 => of_rows::<2>(cpu, y, x, weight, write),
        3 => of_rows::<3>(cpu, y, x, weight, write),
        ROWS => of_rows::<ROWS>(cpu, y, x, weight, write),
        rows => unreachable!("BUG: {rows} rows are no thin product"),
    }
}

fn of_rows<const M: usize>(cpu: &Cpu, y: Shared<'_>, x: &[f32], weight: &Matrix, write: Write) {
    let (shape, values) = ((weight.rows, weight.cols), weight.rows * weight.cols);
    match &weight.values {
        Values::F32(bytes) => {
            assert!(bytes.as_slice().len() >= values * 4, "BUG: a weight lacks values");
            bands::<F32<'_>, M>(cpu, y, x, shape, F32(bytes.as_slice()), write);
        }
        Values::Bf16(bytes) => {
            assert!(bytes.as_slice().len() >= values * 2, "BUG: a weight lacks values");
            bands::<Bf16<'_>, M>(cpu, y, x, shape, Bf16(bytes.as_slice()), write);
        }
        Values::F16(bytes) => {
            assert!(bytes.as_slice().len() >= values * 2, "BUG: a weight lacks values");
            bands::<F16<'_>, M>(cpu, y, x, shape, F16(bytes.as_slice()), write);
        }
        Values::Device(_) => Matrix::elsewhere(),
        Values::Nf4(nf4) => {
            let packed = nf4.packed.as_slice();
            assert!(packed.len() * 2 >= values, "BUG: a weight lacks codes");
            assert!(nf4.absmax.len() * quant::BLOCK >= values, "BUG: a weight lacks scales");
            bands::<Nf4<'_>, M>(cpu, y, x, shape, Nf4(packed, &nf4.absmax), write);
        }
    }
}

/// Every band of a weight (N,K), whose values are all there.
fn bands<E: Encoding, const M: usize>(
    cpu: &Cpu,
    y: Shared<'_>,
    x: &[f32],
    (n, k): (usize, usize),
    weight: E,
    write: Write,
) {
    assert!(x.len() == M * k && k.is_multiple_of(E::STEPS), "BUG: shape of a thin product");
    let bands = n / BAND;
    let bytes = weight.place(n * k) as usize - weight.place(0) as usize;
    let tasks = (bytes / TASK_BYTES).next_multiple_of(cpu.threads()).clamp(1, bands);
    cpu.run(tasks, |task| {
        for band in bands * task / tasks..bands * (task + 1) / tasks {
            let at = |m: usize| m * n + band * BAND;
            // SAFETY: bands of different tasks do not overlap.
            let y = std::array::from_fn(|m| unsafe { y.slice(at(m)..at(m) + BAND) });
            // SAFETY: the band is within the weight, which is all there; x has M rows of K values, and K is a
            // multiple of the encoding's steps.
            unsafe { cpu.kernel.run(Band::<E, M> { weight, start: band * BAND * k, k, x, y, write }) };
        }
    });
}

/// The outputs of a band, for M rows.
struct Band<'a, E, const M: usize> {
    weight: E,
    /// Flat index of the band's first value.
    start: usize,
    k: usize,
    /// (M,K)
    x: &'a [f32],
    /// (M, 32)
    y: [&'a mut [f32]; M],
    write: Write,
}

impl<E: Encoding, const M: usize> Work for Band<'_, E, M> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { weight, start, k, x, y, write } = self;
        for sweep in (0..k).step_by(SWEEP) {
            // SAFETY: all within x, y and the band, as this value's maker promised.
            unsafe {
                let mut sums = [[V::splat(0.0); GROUPS]; M];
                for step in (sweep..k.min(sweep + SWEEP)).step_by(E::STEPS) {
                    weight.dot::<V, M>(start + step, k, (x.as_ptr().add(step), k), &mut sums);
                }
                for m in 0..M {
                    for group in 0..GROUPS {
                        let (sum, place) = (sums[m][group], y[m].as_mut_ptr().add(group * LANES));
                        let sum = match write {
                            Write::Overwrite if sweep == 0 => sum,
                            _ => sum.mul_add(V::splat(1.0), V::load(place)),
                        };
                        sum.store(place);
                    }
                }
            }
        }
    }
}

/// Multiplies some steps of a band at a time.
trait Encoding: Copy + Send + Sync {
    /// Steps at a time.
    const STEPS: usize;

    /// Where the value `at` is stored, if it exists.
    fn place(self, at: usize) -> *const u8;

    /// sums (M,32) += x (M, steps) · the values of 32 rows from flat index `start`, `stride` values apart. Rows of
    /// x lie `x.1` apart.
    ///
    /// # Safety
    /// All must exist, and `start` and `stride` be multiples of the steps; and as for [`Vector`].
    unsafe fn dot<V: Vector, const M: usize>(
        self,
        start: usize,
        stride: usize,
        x: (*const f32, usize),
        sums: &mut [[V; GROUPS]; M],
    );
}

/// Reads eight values at a time.
trait Plain: Encoding {
    /// # Safety
    /// The values `at..at + 8` must exist; and as for [`Vector`].
    unsafe fn load<V: Vector>(self, at: usize) -> V;
}

#[derive(Clone, Copy)]
struct F32<'a>(&'a [u8]);
#[derive(Clone, Copy)]
struct Bf16<'a>(&'a [u8]);
#[derive(Clone, Copy)]
struct F16<'a>(&'a [u8]);
/// Codes, and the scale of each block.
#[derive(Clone, Copy)]
struct Nf4<'a>(&'a [u8], &'a [f32]);

impl Code for Nf4<'_> {
    const VALUES: [f32; 16] = quant::CODE;
}

impl Encoding for F32<'_> {
    const STEPS: usize = LANES;

    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(4 * at)
    }

    #[inline(always)]
    unsafe fn dot<V: Vector, const M: usize>(
        self,
        start: usize,
        stride: usize,
        x: (*const f32, usize),
        sums: &mut [[V; GROUPS]; M],
    ) {
        // SAFETY: passed on.
        unsafe { plain_dot(self, start, stride, x, sums) }
    }
}

impl Plain for F32<'_> {
    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f32(self.place(at)) }
    }
}

impl Encoding for F16<'_> {
    const STEPS: usize = LANES;

    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(2 * at)
    }

    #[inline(always)]
    unsafe fn dot<V: Vector, const M: usize>(
        self,
        start: usize,
        stride: usize,
        x: (*const f32, usize),
        sums: &mut [[V; GROUPS]; M],
    ) {
        // SAFETY: passed on.
        unsafe { plain_dot(self, start, stride, x, sums) }
    }
}

impl Plain for F16<'_> {
    #[inline(always)]
    unsafe fn load<V: Vector>(self, at: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(self.place(at)) }
    }
}

impl Encoding for Bf16<'_> {
    const STEPS: usize = LANES;

    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(2 * at)
    }

    #[inline(always)]
    unsafe fn dot<V: Vector, const M: usize>(
        self,
        start: usize,
        stride: usize,
        x: (*const f32, usize),
        sums: &mut [[V; GROUPS]; M],
    ) {
        // SAFETY: passed on.
        unsafe {
            prefetch::<V, Self>(self, start, stride);
            V::bf16_dot(self.place(start), 2 * stride, x, sums);
        }
    }
}

impl Encoding for Nf4<'_> {
    const STEPS: usize = CODES;

    #[inline(always)]
    fn place(self, at: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(at / 2)
    }

    #[inline(always)]
    unsafe fn dot<V: Vector, const M: usize>(
        self,
        start: usize,
        stride: usize,
        x: (*const f32, usize),
        sums: &mut [[V; GROUPS]; M],
    ) {
        let mut scales = [0.0; BAND];
        // SAFETY: passed on; 32 steps from a multiple of 32 share a block of 64.
        unsafe {
            prefetch::<V, Self>(self, start, stride);
            for (row, scale) in scales.iter_mut().enumerate() {
                *scale = *self.1.get_unchecked((start + row * stride) / quant::BLOCK);
            }
            V::codes_dot::<Self, M>(self.place(start), stride / 2, &scales, x, sums);
        }
    }
}

/// Asks for the same steps of the next band, once a line: too few of a row are read at once for the CPU to foresee
/// it.
#[inline(always)]
unsafe fn prefetch<V: Vector, E: Encoding>(weight: E, start: usize, stride: usize) {
    if !(start / E::STEPS).is_multiple_of(LINE_STEPS / E::STEPS) {
        return;
    }
    for row in BAND..2 * BAND {
        // SAFETY: a prefetch needs nothing but the CPU's instructions.
        unsafe { V::prefetch(weight.place(start + row * stride)) };
    }
}

/// Eight steps of a band.
///
/// # Safety
/// As for [`Encoding::dot`].
#[inline(always)]
unsafe fn plain_dot<V: Vector, E: Plain, const M: usize>(
    weight: E,
    start: usize,
    stride: usize,
    x: (*const f32, usize),
    sums: &mut [[V; GROUPS]; M],
) {
    for group in 0..GROUPS {
        // SAFETY: as the caller promises.
        unsafe {
            let mut block = [V::splat(0.0); LANES];
            for lane in 0..LANES {
                block[lane] = weight.load(start + (group * LANES + lane) * stride);
            }
            block_dot(V::transpose(block), x, group, sums);
        }
    }
}
