//! Products on AMX: both factors rounded to bfloat16, sums in f32. Decides whether this process may use the
//! tiles, configures them and multiplies packed factors (`tiles` makes these); knows nothing of layers.
//!
//! A value of the result is one chain over the depth, 32 steps an instruction, from the first step on: blocks of
//! the depth only put the sums down and take them up again. It depends on its own row and column alone, so
//! neither on threads nor on the rows computed with it.
//!
//! ```text
//!   left (32 rows)              right (32 columns)
//!   ┌──────┬──────┬─            ┌──────┬──────┬─     a step of the depth is 32 values: 1 KiB for sixteen rows,
//!   │ 0-15 │ 0-15 │             │ 0-15 │ 0-15 │      1 KiB for sixteen columns in pairs of steps
//!   │16-31 │16-31 │ …           │16-31 │16-31 │ …
//!   └──────┴──────┴─ steps      └──────┴──────┴─
//! ```
//!
//! The intrinsics and the detection of AMX are not stable Rust; the instructions are, through `asm!`.

use std::arch::asm;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

use super::product::Output;
use super::{Write, scratch};

pub(super) mod linear;
mod tiles;

use tiles::{Factor, pack, pack_weight};

/// Rows of a block of the left factor, columns of one of the right.
const BLOCK: usize = 32;
/// Values of the depth in a step.
const STEP: usize = 32;
/// Bytes of a block in one step.
const STEP_BYTES: usize = 2 * BLOCK * STEP;
/// Most steps of a sweep: so much of the right factor stays in the first-level cache while the left one passes.
const SWEEP: usize = 18;
/// Bytes of the left factor that pass by all columns before the next do: they stay in the second-level cache.
const LEFT_BYTES: usize = 600_000;

/// Whether the CPU has AMX with bfloat16 and AVX-512 with it, and the system lets this process use them: asked
/// once.
pub(super) fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bf16");
        wide && has_tiles() && is_permitted()
    })
}

/// Whether the CPU has AMX-TILE and AMX-BF16, and the system saves the tiles' state.
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    /// # Safety
    /// The CPU must have XSAVE, and the system use it.
    #[target_feature(enable = "xsave")]
    unsafe fn saved() -> u64 {
        // SAFETY: passed on.
        unsafe { _xgetbv(0) }
    }
    const TILES: u32 = 1 << 24 | 1 << 22;
    const STATES: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILES != TILES {
        return false;
    }
    // SAFETY: AVX-512, which was found first, needs XSAVE.
    is_x86_feature_detected!("xsave") && unsafe { saved() } & STATES == STATES
}

/// Asks Linux for the tiles' 8 KiB of state; it holds for every thread of the process.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// This thread's eight tiles, of sixteen rows of 64 bytes each, until it is dropped.
struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Configures them.
    ///
    /// # Safety
    /// [`is_here`] must have said so.
    unsafe fn new() -> Self {
        #[repr(C, align(64))]
        struct Shape {
            palette: u8,
            start: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut shape = Shape { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shape.row_bytes[..8].fill(64);
        shape.rows[..8].fill(16);
        // SAFETY: the CPU has the instruction, says the caller, and the 64 bytes are as it wants them. Not
        // `nomem`: it reads `shape`.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shape, options(nostack, readonly)) };
        Self(PhantomData)
    }

    /// c (32,32) = or, if `ADD`, += left · right over `steps` steps; `c_row` bytes from row to row. If `!TALL`,
    /// of the first sixteen rows only.
    ///
    /// # Safety
    /// The factors must be `steps` blocks long and c be exclusively held.
    #[inline(always)]
    unsafe fn block<const TALL: bool>(
        &self,
        (left, right, steps): (*const u8, *const u8, usize),
        c: *mut f32,
        c_row: usize,
        add: bool,
    ) {
        // SAFETY: the tiles are configured as long as this value lives; memory is as the caller says. The left
        // factor streams from the second-level cache, which the hint (`t1`) keeps from pushing the right one out
        // of the first.
        unsafe {
            if TALL {
                asm!(
                    "test {add:e}, {add:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {c_row}]",
                    "tileloadd tmm1, [{c} + {c_row} + 64]",
                    "tileloadd tmm2, [{low} + {c_row}]",
                    "tileloadd tmm3, [{low} + {c_row} + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{right} + {row}]",
                    "tileloaddt1 tmm4, [{left} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {row} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloaddt1 tmm5, [{left} + {row} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {left}, 2048",
                    "add {right}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c} + {c_row} + 64], tmm1",
                    "tilestored [{low} + {c_row}], tmm2",
                    "tilestored [{low} + {c_row} + 64], tmm3",
                    left = inout(reg) left => _, right = inout(reg) right => _, steps = inout(reg) steps => _,
                    row = in(reg) 64usize, c = in(reg) c, low = in(reg) c.wrapping_byte_add(16 * c_row),
                    c_row = in(reg) c_row, add = in(reg) u32::from(add),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            } else {
                asm!(
                    "test {add:e}, {add:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {c_row}]",
                    "tileloadd tmm1, [{c} + {c_row} + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm6, [{right} + {row}]",
                    "tileloaddt1 tmm4, [{left} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {row} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {left}, 2048",
                    "add {right}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c} + {c_row} + 64], tmm1",
                    left = inout(reg) left => _, right = inout(reg) right => _, steps = inout(reg) steps => _,
                    row = in(reg) 64usize, c = in(reg) c, c_row = in(reg) c_row, add = in(reg) u32::from(add),
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the CPU has the instruction, for the tiles were configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Bytes of a packed factor of `count` rows or columns.
fn size(count: usize, depth: usize) -> usize {
    count.div_ceil(BLOCK) * depth.div_ceil(STEP) * STEP_BYTES
}

/// Lends bytes whose first lies at the begin of a line of the cache.
fn lend<R>(bytes: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    scratch::with(bytes / 4 + 16, |values| {
        // SAFETY: f32 values are bytes, and any bytes are f32 values; 64 bytes more were lent.
        let (_, bytes, _) = unsafe { values.align_to_mut::<u8>() };
        let skipped = bytes.as_ptr().align_offset(64);
        let len = bytes.len() - 64;
        work(&mut bytes[skipped..skipped + len])
    })
}

/// c (m,n) = or += left (m,depth) · right (depth,n), both packed; `left` holds at least the rows of c.
fn multiply(tiles: &Tiles, c: &mut Output<'_>, (left, right): (&[u8], &[u8]), depth: usize, write: Write) {
    let (rows, cols, stride, c) = c.parts();
    assert!(left.len() >= size(rows, depth) && right.len() >= size(cols, depth), "BUG: factors too short");
    let steps = depth.div_ceil(STEP);
    let sweep = steps.div_ceil(steps.div_ceil(SWEEP));
    let near = (LEFT_BYTES / (steps * STEP_BYTES)).max(1) * BLOCK;
    for near_rows in pieces(0..rows, near) {
        for columns in pieces(0..cols, BLOCK) {
            for sweep in pieces(0..steps, sweep) {
                let add = sweep.start > 0 || write == Write::Add;
                for block in pieces(near_rows.clone(), BLOCK) {
                    let at = |start: usize| (start / BLOCK * steps + sweep.start) * STEP_BYTES;
                    let factors =
                        (left[at(block.start)..].as_ptr(), right[at(columns.start)..].as_ptr(), sweep.len());
                    // SAFETY: both factors are as long as asserted; the block is within c, exclusively held.
                    unsafe {
                        let c = c.add(block.start * stride + columns.start);
                        part(tiles, factors, c, stride, (block.len(), columns.len()), add);
                    }
                }
            }
        }
    }
}

/// `range` in pieces of `len`, the last one shorter.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..end.min(start + len))
}

/// The block of c that has `rows` rows and `cols` columns, at most 32 of each; `stride` values from row to row.
///
/// # Safety
/// As of [`Tiles::block`].
#[inline(always)]
unsafe fn part(
    tiles: &Tiles,
    factors: (*const u8, *const u8, usize),
    c: *mut f32,
    stride: usize,
    (rows, cols): (usize, usize),
    add: bool,
) {
    // SAFETY: passed on.
    unsafe {
        match (rows, cols) {
            (BLOCK, BLOCK) => return tiles.block::<true>(factors, c, 4 * stride, add),
            (16, BLOCK) => return tiles.block::<false>(factors, c, 4 * stride, add),
            _ => {}
        }
        // Padded rows and columns have nowhere to go in c.
        #[repr(align(64))]
        struct Whole([f32; BLOCK * BLOCK]);
        let mut whole = Whole([0.0; BLOCK * BLOCK]);
        let whole = whole.0.as_mut_ptr();
        if add {
            for row in 0..rows {
                std::ptr::copy_nonoverlapping(c.add(row * stride), whole.add(row * BLOCK), cols);
            }
        }
        if rows > 16 {
            tiles.block::<true>(factors, whole, 4 * BLOCK, add);
        } else {
            tiles.block::<false>(factors, whole, 4 * BLOCK, add);
        }
        for row in 0..rows {
            std::ptr::copy_nonoverlapping(whole.add(row * BLOCK), c.add(row * stride), cols);
        }
    }
}

/// Multiplies tiles of zeros by each other, about as long as `rounds` rounds of multiply-adds take. Gives the
/// floating-point operations done.
///
/// # Safety
/// [`is_here`] must have said so.
pub(super) unsafe fn spin(rounds: usize) -> f64 {
    /// Products of tiles in a round, none of which waits for another.
    const PRODUCTS: usize = 4;
    let steps = rounds / 16 + 1;
    // SAFETY: passed on; the tiles are configured, and no memory is touched.
    unsafe {
        let _tiles = Tiles::new();
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {steps}",
            "jnz 2b",
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem)
        );
    }
    (2 * steps * PRODUCTS * 16 * 16 * STEP) as f64
}
