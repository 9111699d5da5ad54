//! The innermost loops of every product: a tile of up to six rows by sixteen columns whose sums stay in
//! registers while the depth passes by. The left factor is read where it lies, a value at a time; the right one
//! comes in panels of sixteen columns (see `panel`).
//!
//! Each value of the result is one chain of additions over the depth, in order, whatever the tile around it: so
//! results depend neither on how work is cut into tasks nor on how many rows are multiplied together.

use super::vector::{LANES, Portable, Vector};

/// Columns of a panel.
pub(super) const PANEL: usize = 16;
/// Vectors across a panel.
const ACROSS: usize = PANEL / LANES;
/// Rows of the tallest tile: twelve sums, two vectors of the panel and a value of the left fill 16 registers.
const TALLEST: usize = 6;
/// Steps of the depth between two tests for its end.
const STEPS: usize = 4;
/// Rows that pass by all panels before the next ones do: at 288 deep they fill half the second-level cache.
const ROWS: usize = 32 * TALLEST;

/// The instruction set of a backend's products. Exists only where the CPU has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

/// One product: c (rows, cols) = or += scale * a (rows, depth) · b (depth, cols). Distances in values.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) depth: usize,
    pub(super) scale: f32,
    /// Whether to add to c.
    pub(super) add: bool,
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_depth: usize,
    /// Panels of sixteen columns, the last padded: value (k, j) is `b[j / 16 * b_panel + k * b_depth + j % 16]`.
    pub(super) b: *const f32,
    pub(super) b_depth: usize,
    pub(super) b_panel: usize,
    pub(super) c: *mut f32,
    pub(super) c_row: usize,
}

impl Kernel {
    /// The fastest one here.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let has = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if has {
                return Self(Set::Avx2);
            }
        }
        Self::portable()
    }

    /// Plain Rust.
    pub(super) fn portable() -> Self {
        Self(Set::Portable)
    }

    /// `avx2`, `neon` or `portable`: what the bits of a product depend on.
    pub(super) fn name(self) -> &'static str {
        match self.0 {
            Set::Portable if cfg!(target_arch = "aarch64") => "neon",
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
        }
    }

    /// Computes `product`.
    ///
    /// # Safety
    /// All its pointers and distances must be in bounds, c exclusively held, and every panel of b sixteen wide.
    pub(super) unsafe fn multiply(self, product: &Product) {
        // SAFETY: as promised by the caller; a kernel exists only where its instructions do.
        unsafe { self.run(Multiply(product)) }
    }

    /// Runs `work` compiled for this instruction set.
    ///
    /// # Safety
    /// What `work` asks for.
    #[inline]
    pub(super) unsafe fn run(self, work: impl Work) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(work: impl Work) {
            // SAFETY: passed on.
            unsafe { work.run::<super::vector::Avx2>() }
        }
        match self.0 {
            // SAFETY: passed on.
            Set::Portable => unsafe { work.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: passed on; this value exists only where the CPU has the instructions.
            Set::Avx2 => unsafe { avx2(work) },
        }
    }
}

/// A loop written over any vector.
pub(super) trait Work {
    /// # Safety
    /// The CPU must have V's instructions; the implementor may ask for more. Must be `inline(always)`, or the
    /// body is compiled without them.
    unsafe fn run<V: Vector>(self);
}

struct Multiply<'a>(&'a Product);

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
                let whole = product.cols / PANEL - panel.min(product.cols / PANEL);
                // SAFETY: rows and panels are within the product's.
                panel += unsafe {
                    match (rows, whole) {
                        (1, 4..) => tile::<V, 1, { 4 * ACROSS }>(product, first, panel),
                        (1, 3) => tile::<V, 1, { 3 * ACROSS }>(product, first, panel),
                        (1, 2) => tile::<V, 1, { 2 * ACROSS }>(product, first, panel),
                        (2, 2..) => tile::<V, 2, { 2 * ACROSS }>(product, first, panel),
                        (3, 2..) => tile::<V, 3, { 2 * ACROSS }>(product, first, panel),
                        _ => column::<V>(product, first, rows, panel),
                    }
                };
            }
        }
    }
}

/// All tiles of `rows` rows from `first` in one panel, as even in height as can be. Gives the panels
/// done.
#[inline(always)]
unsafe fn column<V: Vector>(product: &Product, first: usize, rows: usize, panel: usize) -> usize {
    let tiles = rows.div_ceil(TALLEST);
    let (height, taller) = (rows / tiles, rows % tiles);
    let mut row = first;
    for tile_index in 0..tiles {
        let height = height + usize::from(tile_index < taller);
        // SAFETY: the tile's rows are among those given.
        unsafe {
            match height {
                6 => tile::<V, 6, ACROSS>(product, row, panel),
                5 => tile::<V, 5, ACROSS>(product, row, panel),
                4 => tile::<V, 4, ACROSS>(product, row, panel),
                3 => tile::<V, 3, ACROSS>(product, row, panel),
                2 => tile::<V, 2, ACROSS>(product, row, panel),
                _ => tile::<V, 1, ACROSS>(product, row, panel),
            };
        }
        row += height;
    }
    1
}

/// M rows from `row` by N vectors from `panel`. Gives the panels done.
#[inline(always)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(
    product: &Product,
    row: usize,
    panel: usize,
) -> usize {
    // SAFETY: the caller's tile is within the product, whose bounds its maker promised.
    unsafe {
        let a = product.a.add(row * product.a_row);
        let b = product.b.add(panel * product.b_panel);
        let (a_row, a_depth, b_depth) = (product.a_row, product.a_depth, product.b_depth);
        let c = product.c.wrapping_add(row * product.c_row + panel * PANEL);
        for i in 0..M {
            // A row of the tile lies across at most two lines.
            V::prefetch(c.wrapping_add(i * product.c_row).cast());
            V::prefetch(c.wrapping_add(i * product.c_row + PANEL - 1).cast());
        }
        let depth = product.depth;
        // Distances that the compiler knows leave its instructions for the sums: with those it does not know, the
        // CPU would decode more of them a step than it can.
        let sums = match (a_depth, b_depth) {
            (1, PANEL) => steps::<V, M, N>((a, a_row, 1), (b, PANEL, product.b_panel), depth),
            (1, _) => steps::<V, M, N>((a, a_row, 1), (b, b_depth, product.b_panel), depth),
            _ => steps::<V, M, N>((a, a_row, a_depth), (b, b_depth, product.b_panel), depth),
        };
        let scale = V::splat(product.scale);
        if product.cols - panel * PANEL < N * LANES {
            narrow(product, c, product.cols - panel * PANEL, &sums, scale);
            return 1;
        }
        for i in 0..M {
            for j in 0..N {
                let c = c.add(i * product.c_row + j * LANES);
                let value = match product.add {
                    true => sums[i][j].mul_add(scale, V::load(c)),
                    false => sums[i][j].mul(scale),
                };
                value.store(c);
            }
        }
    }
    N / ACROSS
}

/// The sums of a tile over all of the depth, several steps of it at a time.
#[inline(always)]
unsafe fn steps<V: Vector, const M: usize, const N: usize>(
    (mut a, a_row, a_depth): (*const f32, usize, usize),
    (mut b, b_depth, b_panel): (*const f32, usize, usize),
    depth: usize,
) -> [[V; N]; M] {
    // SAFETY: as in `tile`.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for _ in 0..depth / STEPS {
            for k in 0..STEPS {
                let place = (a.add(k * a_depth), b.add(k * b_depth));
                step(&mut sums, place, a_row, b_panel);
            }
            a = a.add(STEPS * a_depth);
            b = b.add(STEPS * b_depth);
        }
        for k in 0..depth % STEPS {
            step(&mut sums, (a.add(k * a_depth), b.add(k * b_depth)), a_row, b_panel);
        }
        sums
    }
}

/// One step of the depth.
#[inline(always)]
unsafe fn step<V: Vector, const M: usize, const N: usize>(
    sums: &mut [[V; N]; M],
    (a, b): (*const f32, *const f32),
    a_row: usize,
    b_panel: usize,
) {
    // SAFETY: as in `tile`.
    unsafe {
        let mut right = [V::splat(0.0); N];
        for j in 0..N {
            right[j] = V::load(b.add(j / ACROSS * b_panel + j % ACROSS * LANES));
        }
        for i in 0..M {
            let left = V::splat(*a.add(i * a_row));
            for j in 0..N {
                sums[i][j] = left.mul_add(right[j], sums[i][j]);
            }
        }
    }
}

/// Writes the first `width` columns of a tile.
#[inline(always)]
unsafe fn narrow<V: Vector, const M: usize, const N: usize>(
    product: &Product,
    c: *mut f32,
    width: usize,
    sums: &[[V; N]; M],
    scale: V,
) {
    let mut row = [0.0; 4 * PANEL];
    for i in 0..M {
        // SAFETY: `width` columns of the row are within c; the buffer holds the widest tile.
        unsafe {
            let c = c.add(i * product.c_row);
            if product.add {
                std::ptr::copy_nonoverlapping(c, row.as_mut_ptr(), width);
            }
            for j in 0..N {
                let place = row.as_mut_ptr().add(j * LANES);
                let value = match product.add {
                    true => sums[i][j].mul_add(scale, V::load(place)),
                    false => sums[i][j].mul(scale),
                };
                value.store(place);
            }
            std::ptr::copy_nonoverlapping(row.as_ptr(), c, width);
        }
    }
}
