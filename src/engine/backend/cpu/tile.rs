//! The innermost loops of every f32 product: a tile of rows by columns whose sums stay in registers while the
//! depth passes by. The left factor is read where it lies, a value at a time; the right one comes in panels of
//! sixteen columns (see `panel`).
//!
//! Each value of the result is one chain of additions over the depth, in order, whatever the tile around it: so
//! results depend neither on how work is cut into tasks, nor on how many rows are multiplied together, nor on the
//! width of a register.

use super::kernel::{PANEL, Product, Work};
use super::vector::{Lanes, Vector};

/// The tallest tile where sixteen registers of eight lanes hold it: twelve sums, two vectors of the panel and a
/// value of the left.
const TALLEST: usize = 6;
/// Rows that pass by all panels before the next ones do: at 288 deep they fill half the second-level cache.
const ROWS: usize = 32 * TALLEST;
/// The tallest tile where 32 registers of sixteen lanes hold it: 28 sums, two vectors, up to two values.
const TALLEST_WIDE: usize = 14;
/// Rows that pass by all panels before the next ones do, in whole tiles.
const ROWS_WIDE: usize = 14 * TALLEST_WIDE;
/// Values of the largest tile.
const LARGEST: usize = TALLEST_WIDE * 2 * PANEL;

/// The product on eight lanes.
pub(super) struct Multiply<'a>(pub(super) &'a Product);

impl Work for Multiply<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let product = self.0;
        let panels = product.cols.div_ceil(PANEL);
        for first in (0..product.rows).step_by(ROWS) {
            let rows = ROWS.min(product.rows - first);
            let mut panel = 0;
            while panel < panels {
                // Few rows leave registers free, and need more sums in flight than one panel has.
                let whole = whole_panels(product, panel);
                // SAFETY: rows and panels are within the product's.
                panel += unsafe {
                    match (rows, whole) {
                        (1, 4..) => tile::<V, 1, 8>(product, first, panel),
                        (1, 3) => tile::<V, 1, 6>(product, first, panel),
                        (1, 2) => tile::<V, 1, 4>(product, first, panel),
                        (2, 2..) => tile::<V, 2, 4>(product, first, panel),
                        (3, 2..) => tile::<V, 3, 4>(product, first, panel),
                        _ => column::<V>(product, first, rows, panel),
                    }
                };
            }
        }
    }
}

/// The product on sixteen lanes and 32 registers.
///
/// # Safety
/// As [`super::kernel::Kernel::multiply`], where the CPU has L's instructions.
#[inline(always)]
pub(super) unsafe fn multiply_wide<L: Lanes>(product: &Product) {
    let panels = product.cols.div_ceil(PANEL);
    for first in (0..product.rows).step_by(ROWS_WIDE) {
        let rows = ROWS_WIDE.min(product.rows - first);
        let mut panel = 0;
        while panel < panels {
            // SAFETY: rows and panels are within the product's.
            panel += unsafe {
                match (rows, whole_panels(product, panel)) {
                    (1, 8..) => tile::<L, 1, 8>(product, first, panel),
                    (1, 4..) => tile::<L, 1, 4>(product, first, panel),
                    (2, 4..) => tile::<L, 2, 4>(product, first, panel),
                    (3, 4..) => tile::<L, 3, 4>(product, first, panel),
                    (4, 4..) => tile::<L, 4, 4>(product, first, panel),
                    (_, 2..) => column_wide::<L, 2>(product, first, rows, panel),
                    _ => column_wide::<L, 1>(product, first, rows, panel),
                }
            };
        }
    }
}

/// Panels from `panel` on that are not cut short by the product's last column.
#[inline(always)]
fn whole_panels(product: &Product, panel: usize) -> usize {
    (product.cols / PANEL).saturating_sub(panel)
}

/// `rows` rows as tiles of at most `tallest`, as even in height as can be: the rows before each and its height.
#[inline(always)]
fn even(rows: usize, tallest: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = rows.div_ceil(tallest);
    let (height, taller) = (rows / tiles, rows % tiles);
    (0..tiles).map(move |tile| (tile * height + tile.min(taller), height + usize::from(tile < taller)))
}

/// All tiles of `rows` rows from `first` in one panel. Gives the panels done.
#[inline(always)]
unsafe fn column<V: Vector>(product: &Product, first: usize, rows: usize, panel: usize) -> usize {
    for (row, height) in even(rows, TALLEST) {
        let row = first + row;
        // SAFETY: the tile's rows are among those given.
        unsafe {
            match height {
                6 => tile::<V, 6, 2>(product, row, panel),
                5 => tile::<V, 5, 2>(product, row, panel),
                4 => tile::<V, 4, 2>(product, row, panel),
                3 => tile::<V, 3, 2>(product, row, panel),
                2 => tile::<V, 2, 2>(product, row, panel),
                _ => tile::<V, 1, 2>(product, row, panel),
            };
        }
    }
    1
}

/// All tiles of `rows` rows from `first` in N panels. Gives the panels done.
#[inline(always)]
unsafe fn column_wide<L: Lanes, const N: usize>(
    product: &Product,
    first: usize,
    rows: usize,
    panel: usize,
) -> usize {
    for (row, height) in even(rows, TALLEST_WIDE) {
        let row = first + row;
        // SAFETY: the tile's rows are among those given.
        unsafe {
            match height {
                14 => tile::<L, 14, N>(product, row, panel),
                13 => tile::<L, 13, N>(product, row, panel),
                12 => tile::<L, 12, N>(product, row, panel),
                11 => tile::<L, 11, N>(product, row, panel),
                10 => tile::<L, 10, N>(product, row, panel),
                9 => tile::<L, 9, N>(product, row, panel),
                8 => tile::<L, 8, N>(product, row, panel),
                7 => tile::<L, 7, N>(product, row, panel),
                6 => tile::<L, 6, N>(product, row, panel),
                5 => tile::<L, 5, N>(product, row, panel),
                4 => tile::<L, 4, N>(product, row, panel),
                3 => tile::<L, 3, N>(product, row, panel),
                2 => tile::<L, 2, N>(product, row, panel),
                _ => tile::<L, 1, N>(product, row, panel),
            };
        }
    }
    N
}

/// M rows from `row` by N vectors from `panel`. Gives the panels done.
#[inline(always)]
unsafe fn tile<L: Lanes, const M: usize, const N: usize>(
    product: &Product,
    row: usize,
    panel: usize,
) -> usize {
    // SAFETY: the caller's tile is within the product, whose bounds its maker promised.
    unsafe {
        let a = product.a.add(row * product.a_row);
        let b = product.b.add(panel * product.b_panel);
        let (a_row, a_depth, b_depth) = (product.a_row, product.a_depth, product.b_depth);
        let across = PANEL / L::LANES;
        let offset = |j: usize| j / across * product.b_panel + j % across * L::LANES;
        let c = product.c.wrapping_add(row * product.c_row + panel * PANEL);
        for i in 0..M {
            // Sixteen values lie across at most two lines.
            for place in (0..N * L::LANES).step_by(PANEL) {
                L::prefetch(c.wrapping_add(i * product.c_row + place).cast());
            }
            L::prefetch(c.wrapping_add(i * product.c_row + N * L::LANES - 1).cast());
        }
        let mut sums = [[L::splat(0.0); N]; M];
        for k in 0..product.depth {
            let (a, b) = (a.add(k * a_depth), b.add(k * b_depth));
            let mut right = [L::splat(0.0); N];
            for j in 0..N {
                right[j] = L::load(b.add(offset(j)));
            }
            for i in 0..M {
                let left = L::splat(*a.add(i * a_row));
                for j in 0..N {
                    sums[i][j] = left.mul_add(right[j], sums[i][j]);
                }
            }
        }
        let scale = L::splat(product.scale);
        let width = (product.cols - panel * PANEL).min(N * L::LANES);
        // By way of a whole tile where the last column cuts through a register, for it writes all its lanes.
        let mut whole = std::mem::MaybeUninit::<[f32; LARGEST]>::uninit();
        let whole = whole.as_mut_ptr().cast::<f32>();
        let cut = width < N * L::LANES;
        let (to, stride) = if cut { (whole, N * L::LANES) } else { (c, product.c_row) };
        if cut && product.add {
            std::ptr::write_bytes(whole, 0, LARGEST);
            for i in 0..M {
                std::ptr::copy_nonoverlapping(c.add(i * product.c_row), to.add(i * stride), width);
            }
        }
        finish(product, to, stride, &sums, scale);
        if cut {
            for i in 0..M {
                std::ptr::copy_nonoverlapping(to.add(i * stride), c.add(i * product.c_row), width);
            }
        }
    }
    N * L::LANES / PANEL
}

/// c (M rows, `stride` apart) = or += scale * sums.
#[inline(always)]
unsafe fn finish<L: Lanes, const M: usize, const N: usize>(
    product: &Product,
    c: *mut f32,
    stride: usize,
    sums: &[[L; N]; M],
    scale: L,
) {
    // Loops short enough to be unrolled: sums that are looked at by index do not stay in registers.
    let mut c = c;
    for row in sums {
        for j in 0..N {
            // SAFETY: M rows of N registers are there, says the caller.
            unsafe {
                let place = c.wrapping_add(j * L::LANES);
                if product.add {
                    row[j].mul_add(scale, L::load(place)).store(place);
                } else {
                    row[j].mul(scale).store(place);
                }
            }
        }
        c = c.wrapping_add(stride);
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::Kernel;
    use super::super::product::{Operand, Output, product};
    use crate::backend::Write;

    /// Neither whole numbers nor sums that are exact.
    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.3).collect()
    }

    #[test]
    fn wide_registers_change_no_bit() {
        let here = |name| Kernel::here().into_iter().find(|kernel| kernel.name() == name);
        let (Some(avx2), Some(avx512)) = (here("avx2"), here("avx512")) else {
            return eprintln!("skipped: this CPU lacks AVX-512");
        };
        for (rows, cols, depth) in (1..=43)
            .flat_map(|rows| [1, 15, 16, 17, 40, 48, 64, 97, 160].map(|cols| (rows, cols, 33)))
            .chain([(197, 50, 289), (400, 128, 600)])
        {
            let (a, b) = (values(rows * depth), values(depth * cols));
            for write in [Write::Overwrite, Write::Add] {
                let run = |kernel| {
                    let mut c = values(rows * cols);
                    let mut out = Output::of(&mut c, rows, cols);
                    let (a, b) = (Operand::rows(&a, depth), Operand::rows(&b, cols));
                    product(kernel, &mut out, depth, 0.7, write, a, b);
                    c
                };
                assert!(run(avx2) == run(avx512), "{rows}x{cols}x{depth} {write:?}");
            }
        }
    }
}
