//! `ldmatrix` and `mma.sync`: a matrix spread over the lanes of a warp.

use super::Machine;
use super::access::{Seen, resolve};
use crate::fault::{FaultKind, Mistake};
use crate::lanes::Mask;
use crate::number::{Format, TF32};
use crate::program::{Address, Multiply, Register};
use crate::shared::{TOGETHER, Thread};
use crate::syntax::Space;
use crate::warp::Warp;

/// Rows of an 8x8 matrix of 16-bit values, and the bytes of a row.
const ROWS: usize = 8;
const ROW_BYTES: usize = 16;

impl Machine<'_> {
    /// Matrix `i` has its rows where lanes `8i..8i + 8` say; lane `l` gets the values 2(l % 4) and the next of row
    /// l / 4, or of column l / 4 if transposed.
    pub(super) fn load_matrices(
        &mut self,
        warp: &mut Warp,
        parts: &[Register],
        address: &Address,
        transposed: bool,
    ) -> Result<(), Mistake> {
        let bases = *warp.register(address.base);
        let whole = Thread { warp: warp.index, lane: TOGETHER };
        for (matrix, part) in parts.iter().enumerate() {
            let mut values = [[0u16; 8]; ROWS];
            let mut seen = Seen::default();
            for (row, values) in values.iter_mut().enumerate() {
                let lane = matrix * ROWS + row;
                let (_, at) = resolve(Space::Shared, address.of(bases[lane]));
                if at % ROW_BYTES as u64 != 0 {
                    let detail = "a row of a matrix at an address that is no multiple of 16";
                    return Err(Mistake::at(FaultKind::Misaligned, at, detail).in_lane(lane));
                }
                let read = self.shared.read::<ROW_BYTES>(whole, at, false);
                let read = read.map_err(|mistake| mistake.in_lane(lane))?;
                for (value, bytes) in values.iter_mut().zip(read.chunks_exact(2)) {
                    *value = u16::from_le_bytes([bytes[0], bytes[1]]);
                }
                seen.add(Space::Shared, row, at);
            }
            self.tally.matrix(&seen, ROW_BYTES);
            let result = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, lane % 4 * 2);
                let [low, high] = if transposed {
                    [values[column][row], values[column + 1][row]]
                } else {
                    [values[row][column], values[row][column + 1]]
                };
                u64::from(high) << 16 | u64::from(low)
            });
            warp.set(*part, &result, Mask::MAX);
        }
        self.tally.counts.shared_accesses += 1;
        Ok(())
    }
}

/// d (16,8) = a (16,K) · b (K,8) + c, products and sums in f32, in the order of K.
pub(super) fn multiply(warp: &mut Warp, multiply: &Multiply) {
    let Multiply { depth, format, d, a, b, c } = multiply;
    let rows = left(warp, a, *format);
    let columns = right(warp, b, *format);
    let mut sums = [[0f32; 8]; 16];
    for (sums, row) in sums.iter_mut().zip(&rows) {
        for (a, column) in row.iter().zip(&columns).take(*depth) {
            for (sum, b) in sums.iter_mut().zip(column) {
                *sum += a * b;
            }
        }
    }
    // Registers 0, 1: row l / 4; registers 2, 3: eight rows below. Columns 2(l % 4) and the next.
    let results: [_; 4] = std::array::from_fn(|part| {
        let added = warp.register(c[part]);
        std::array::from_fn(|lane| {
            let sum = sums[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
            u64::from((sum + f32::from_bits(added[lane] as u32)).to_bits())
        })
    });
    for (register, result) in d.iter().zip(&results) {
        warp.set(*register, result, Mask::MAX);
    }
}

/// a by rows. A register holds two 16-bit values next to each other in a row, or one tf32; registers go down eight
/// rows first, then to the next columns.
fn left(warp: &Warp, a: &[Register], format: Format) -> [[f32; 16]; 16] {
    let mut rows = [[0.0; 16]; 16];
    for (part, register) in a.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            let row = lane / 4 + part % 2 * 8;
            if format == TF32 {
                rows[row][lane % 4 + part / 2 * 4] = tensor(*bits);
            } else {
                let column = lane % 4 * 2 + part / 2 * 8;
                rows[row][column] = half(*bits, format);
                rows[row][column + 1] = half(bits >> 16, format);
            }
        }
    }
    rows
}

/// b by its rows: the values that one column of a meets.
fn right(warp: &Warp, b: &[Register], format: Format) -> [[f32; 8]; 16] {
    let mut rows = [[0.0; 8]; 16];
    for (part, register) in b.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            let column = lane / 4;
            if format == TF32 {
                rows[lane % 4 + part * 4][column] = tensor(*bits);
            } else {
                let row = lane % 4 * 2 + part * 8;
                rows[row][column] = half(*bits, format);
                rows[row + 1][column] = half(bits >> 16, format);
            }
        }
    }
    rows
}

fn half(bits: u64, format: Format) -> f32 {
    if format == crate::number::BF16 {
        crate::number::bf16_value(bits as u16)
    } else {
        format.value(bits as u16 as u32) as f32
    }
}

/// The tensor cores do not see the low 13 bits.
fn tensor(bits: u64) -> f32 {
    f32::from_bits(bits as u32 & !0x1fff)
}
