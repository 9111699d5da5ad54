//! Factors of AMX products: values of any encoding rounded to bfloat16 and laid out as tiles. A tile is sixteen
//! rows of the left factor, or sixteen columns of the right one, by 32 values of the depth; missing ones are 0.
//!
//! ```text
//! left    row i:        (i, 0) (i, 1) … (i, 31)                       64 bytes a row
//! right   pair p:       (2p, j) (2p + 1, j)  for columns j = 0..16    64 bytes a pair of the depth
//! ```
//!
//! Taken as 16 by 16 pairs, one is the other transposed: where the depth runs along memory, what is read is a
//! left tile, and else a right one.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::panel::{Encoding, F32, Side, Visitor, visit};
use super::super::product::Operand;
use super::super::vector::Zmm;
use super::{BLOCK, STEP};
use crate::matrix::Matrix;

/// Rows or columns of a tile.
const TILE: usize = 16;
/// Words of a tile.
const WORDS: usize = TILE * STEP;
/// Of the words of two rows, one row after the other, those that come next when they take turns.
const TURNS: [u16; STEP] = {
    let mut turns = [0; STEP];
    let mut word = 0;
    while word < STEP {
        turns[word] = (word / 2 + word % 2 * 16) as u16;
        word += 1;
    }
    turns
};

/// Which one of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Factor {
    Left,
    Right,
}

/// Values that lie `stride` apart in one direction and side by side in the other: as `side` says, the depth is
/// along memory (`Rows`) or across it (`Columns`).
#[derive(Clone, Copy)]
struct Source<E> {
    encoding: E,
    side: Side,
    start: usize,
    stride: usize,
    /// Whether sixteen values may be read from wherever a tile begins in a row.
    even: bool,
}

/// out = the rows of `values` (count, depth) as a factor; `values.col` is the way along the depth, and either
/// that or the way across it is 1.
///
/// # Safety
/// The CPU must have AMX; the values must exist.
pub(in super::super) unsafe fn pack(
    factor: Factor,
    values: Operand<'_>,
    count: usize,
    depth: usize,
    out: &mut [u8],
) {
    assert!(values.row == 1 || values.col == 1, "BUG: values that lie in no row");
    let (side, stride) = if values.col == 1 { (Side::Rows, values.row) } else { (Side::Columns, values.col) };
    let source = Source { encoding: F32(values.values.as_ptr()), side, start: 0, stride, even: true };
    let one = |place: usize, k: usize| values.values[place * values.row + k * values.col];
    // SAFETY: passed on.
    unsafe { factor_of(source, factor, count, depth, out, one) }
}

/// out = the outputs `outputs` of `weight` as a right factor: its rows over the columns `depth`, or its columns
/// over the rows `depth`.
///
/// # Safety
/// The CPU must have AMX.
pub(in super::super) unsafe fn pack_weight(
    weight: &Matrix,
    side: Side,
    outputs: Range<usize>,
    depth: Range<usize>,
    out: &mut [u8],
) {
    let (rows, cols) = if side == Side::Rows { (&outputs, &depth) } else { (&depth, &outputs) };
    assert!(rows.end <= weight.rows && cols.end <= weight.cols, "BUG: tiles beyond the weight");
    // SAFETY: passed on.
    unsafe { visit(weight, Weight { weight, side, outputs, depth, out }) }
}

struct Weight<'a> {
    weight: &'a Matrix,
    side: Side,
    outputs: Range<usize>,
    depth: Range<usize>,
    out: &'a mut [u8],
}

impl Visitor for Weight<'_> {
    unsafe fn visit<E: Encoding>(self, encoding: E) {
        let Self { weight, side, outputs, depth, out } = self;
        let stride = weight.cols;
        let (row, col) =
            if side == Side::Rows { (outputs.start, depth.start) } else { (depth.start, outputs.start) };
        let even = stride.is_multiple_of(TILE) && col.is_multiple_of(TILE);
        let source = Source { encoding, side, start: row * stride + col, stride, even };
        let one = |place: usize, k: usize| {
            let mut value = [0.0];
            let (row, col) = if side == Side::Rows { (place, k) } else { (k, place) };
            weight.decode(source.start + row * stride + col, &mut value);
            value[0]
        };
        // SAFETY: the block is within the weight, as its maker asserted.
        unsafe { factor_of(source, Factor::Right, outputs.len(), depth.len(), out, one) }
    }
}

/// All tiles of a factor: blocks of 32 rows or columns, in each the steps of the depth, in each two tiles.
/// `one` gives one value, for tiles that are not whole.
///
/// # Safety
/// The CPU must have AMX and so AVX-512; the values must exist.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vbmi,avx512bf16")]
unsafe fn factor_of<E: Encoding>(
    source: Source<E>,
    factor: Factor,
    count: usize,
    depth: usize,
    out: &mut [u8],
    one: impl Fn(usize, usize) -> f32,
) {
    let out = &mut out[..super::size(count, depth)];
    let steps = depth.div_ceil(STEP);
    for (index, out) in out.chunks_exact_mut(2 * WORDS).enumerate() {
        let first = index / (2 * steps) * BLOCK + index % 2 * TILE;
        let k = index / 2 % steps * STEP;
        // SAFETY: a whole tile's values exist; the chunk has room for sixteen registers.
        unsafe {
            let read = if source.even && first + TILE <= count && k + STEP <= depth {
                source.tile(first, k)
            } else {
                ragged(first..count.max(first), k..depth, source.side, &one)
            };
            let wanted = if factor == Factor::Left { Side::Rows } else { Side::Columns };
            let tile = if source.side == wanted { read } else { transpose(read) };
            for (row, register) in tile.into_iter().enumerate() {
                _mm512_storeu_si512(out.as_mut_ptr().add(64 * row).cast(), register);
            }
        }
    }
}

impl<E: Encoding> Source<E> {
    /// The whole tile of the rows or columns from `first` and the depth from `k`: a left one where the depth runs
    /// along memory, else a right one.
    ///
    /// # Safety
    /// As of [`factor_of`].
    #[inline(always)]
    unsafe fn tile(self, first: usize, k: usize) -> [__m512i; TILE] {
        // SAFETY: passed on.
        unsafe {
            let mut tile = [_mm512_setzero_si512(); TILE];
            match self.side {
                Side::Rows => {
                    let start = self.start + first * self.stride + k;
                    for row in 0..TILE {
                        let at = start + row * self.stride;
                        tile[row] = rounded(self.encoding.load_wide(at), self.encoding.load_wide(at + TILE));
                    }
                }
                Side::Columns => {
                    let start = self.start + k * self.stride + first;
                    let turns = _mm512_loadu_si512(TURNS.as_ptr().cast());
                    for pair in 0..TILE {
                        let at = start + 2 * pair * self.stride;
                        let even = self.encoding.load_wide(at);
                        let odd = self.encoding.load_wide(at + self.stride);
                        tile[pair] = _mm512_permutexvar_epi16(turns, rounded(even, odd));
                    }
                }
            }
            tile
        }
    }
}

/// 32 values as bfloat16, to nearest, ties to even; subnormal numbers become 0, as they are to AMX.
///
/// # Safety
/// The CPU must have AVX512-BF16.
#[inline(always)]
unsafe fn rounded(first: Zmm, second: Zmm) -> __m512i {
    // SAFETY: as the caller says; both types are 64 bytes.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second.0, first.0)) }
}

/// Pair j of row i becomes pair i of row j.
///
/// # Safety
/// The CPU must have AVX-512 F.
#[inline(always)]
unsafe fn transpose(mut rows: [__m512i; TILE]) -> [__m512i; TILE] {
    // SAFETY: as the caller says. Rows i and i + 8 in turn, four times over, is a transposition.
    unsafe {
        let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for _ in 0..4 {
            let before = rows;
            for row in 0..8 {
                rows[2 * row] = _mm512_permutex2var_epi32(before[row], low, before[row + 8]);
                rows[2 * row + 1] = _mm512_permutex2var_epi32(before[row], high, before[row + 8]);
            }
        }
        rows
    }
}

/// As [`Source::tile`], of the rows or columns and the depth that there are.
///
/// # Safety
/// The CPU must have AVX-512.
#[inline(never)]
unsafe fn ragged(
    places: Range<usize>,
    depth: Range<usize>,
    side: Side,
    one: impl Fn(usize, usize) -> f32,
) -> [__m512i; TILE] {
    let mut words = [[half::bf16::ZERO; STEP]; TILE];
    for (i, place) in places.take(TILE).enumerate() {
        for (l, k) in depth.clone().take(STEP).enumerate() {
            let value = half::bf16::from_f32(one(place, k));
            match side {
                Side::Rows => words[i][l] = value,
                Side::Columns => words[l / 2][2 * i + l % 2] = value,
            }
        }
    }
    // SAFETY: a register and a row of words are 64 bytes, and any bits are a register's.
    unsafe { std::mem::transmute(words) }
}
