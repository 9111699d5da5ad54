//! `ldmatrix` and `mma.sync`: a matrix spread over the lanes of a warp.

use super::Machine;
use super::access::{Seen, resolve};
use crate::fault::{FaultKind, Mistake};
use crate::lanes::Mask;
use crate::number::{BF16, TF32, bf16_value};
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

/// a (16,K) by rows, at most 16 values each.
type Left = [[f32; 16]; 16];
/// b (K,8) by rows.
type Right = [[f32; 8]; 16];

/// d (16,8) = a (16,K) · b (K,8) + c, products and sums in f32, in the order of K.
pub(super) fn multiply(warp: &mut Warp, multiply: &Multiply) {
    let Multiply { depth, format, d, a, b, c } = multiply;
    let (left, right) = match *format {
        BF16 => halves(warp, a, b, bf16_value),
        TF32 => singles(warp, a, b),
        format => halves(warp, a, b, |bits| format.value(bits.into()) as f32),
    };
    let mut sums = [[0f32; 8]; 16];
    for (sums, row) in sums.iter_mut().zip(&left) {
        for (a, column) in row[..*depth].iter().zip(&right) {
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

/// Factors of 16-bit values. A register holds two of them, next to each other in a row of a or in a column of b. Those
/// of a go down eight rows first, then to the next columns.
fn halves(warp: &Warp, a: &[Register], b: &[Register], value: impl Fn(u16) -> f32) -> (Left, Right) {
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for (part, register) in a.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            let (row, column) = (lane / 4 + part % 2 * 8, lane % 4 * 2 + part / 2 * 8);
            left[row][column] = value(*bits as u16);
            left[row][column + 1] = value((bits >> 16) as u16);
        }
    }
    for (part, register) in b.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            let (row, column) = (lane % 4 * 2 + part * 8, lane / 4);
            right[row][column] = value(*bits as u16);
            right[row + 1][column] = value((bits >> 16) as u16);
        }
    }
    (left, right)
}

/// Factors of tf32, one a register. The tensor cores do not see the low 13 bits.
fn singles(warp: &Warp, a: &[Register], b: &[Register]) -> (Left, Right) {
    let value = |bits: u64| f32::from_bits(bits as u32 & !0x1fff);
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for (part, register) in a.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            left[lane / 4 + part % 2 * 8][lane % 4 + part / 2 * 4] = value(*bits);
        }
    }
    for (part, register) in b.iter().enumerate() {
        for (lane, bits) in warp.register(*register).iter().enumerate() {
            right[lane % 4 + part * 4][lane / 4] = value(*bits);
        }
    }
    (left, right)
}
