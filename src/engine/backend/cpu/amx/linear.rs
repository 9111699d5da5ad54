//! Linear layers over encoded weights on AMX. The activations of up to 1024 rows become a packed factor once,
//! rows shared out; then a task owns a tile of outputs, packs the weights it needs and multiplies all rows by
//! them. Any cut gives the same bits.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Cpu;
use super::super::panel::Side;
use super::super::product::{Operand, Shared};
use super::{BLOCK, Factor, Tiles, lend, multiply, pack, pack_weight, size};
use crate::backend::Write;
use crate::matrix::Matrix;

/// Rows packed at once, for which weights are decoded once.
const ROWS: usize = 32 * BLOCK;
/// Rows that a task of the packing takes.
const TASK_ROWS: usize = 4 * BLOCK;
/// Depth packed at once: with it, the weights of a task and the rows that pass by stay in the second-level cache.
const DEPTH: usize = 2048;
/// Most blocks of outputs of a task: enough that the rows are not read from further away too often.
const TASK_BLOCKS: usize = 5;

/// y (T,N) = or += x (T,K) · some rows of a weight, or their transpose: the N or K rows from `row` on.
///
/// # Safety
/// [`super::is_here`] must have said so.
pub(in super::super) unsafe fn run(
    cpu: &Cpu,
    y: &mut [f32],
    x: &[f32],
    (weight, row): (&Matrix, usize),
    side: Side,
    (n, k): (usize, usize),
    write: Write,
) {
    let tokens = x.len() / k;
    let y = Shared::new(y);
    for first in (0..tokens).step_by(ROWS) {
        let rows = ROWS.min(tokens - first);
        for start in (0..k).step_by(DEPTH) {
            let depth = start..k.min(start + DEPTH);
            let write = if start == 0 { write } else { Write::Add };
            lend(size(rows, depth.len()), |left| {
                // SAFETY: passed on.
                unsafe { pack_rows(cpu, &x[first * k + start..], k, rows, depth.len(), left) };
                let left = &left[..size(rows, depth.len())];
                let cut = Cut::new(rows, n, cpu.threads());
                cpu.run(cut.tiles * cut.chunks, |task| {
                    let (outputs, rows) = cut.of(task);
                    if rows.is_empty() {
                        return;
                    }
                    lend(size(outputs.len(), depth.len()), |right| {
                        let at = (first + rows.start) * n + outputs.start;
                        // Rows of the weight are outputs one way, and depth the other.
                        let from_row = |range: &Range<usize>| row + range.start..row + range.end;
                        let (cols, steps) = match side {
                            Side::Rows => (from_row(&outputs), depth.clone()),
                            Side::Columns => (outputs.clone(), from_row(&depth)),
                        };
                        // SAFETY: tiles and chunks of different tasks do not overlap; AMX as passed on.
                        unsafe {
                            let mut y = y.block(at, rows.len(), outputs.len(), n);
                            pack_weight(weight, side, cols, steps, right);
                            let left = &left[size(rows.start, depth.len())..];
                            multiply(&Tiles::new(), &mut y, (left, right), depth.len(), write);
                        }
                    });
                });
            });
        }
    }
}

/// out = the first `depth` columns of `rows` rows of x, `stride` apart.
///
/// # Safety
/// As of [`run`].
unsafe fn pack_rows(cpu: &Cpu, x: &[f32], stride: usize, rows: usize, depth: usize, out: &mut [u8]) {
    let chunks = out[..size(rows, depth)].par_chunks_mut(size(TASK_ROWS, depth)).with_max_len(1);
    cpu.pool.install(|| {
        chunks.enumerate().for_each(|(chunk, out)| {
            let first = chunk * TASK_ROWS;
            let x = Operand::rows(&x[first * stride..], stride);
            // SAFETY: passed on; the slice ends with the last of these rows or after it.
            unsafe { pack(Factor::Left, x, TASK_ROWS.min(rows - first), depth, out) };
        });
    });
}

/// How rows and outputs are shared out: enough tasks for the threads to end together.
struct Cut {
    rows: usize,
    outputs: usize,
    tiles: usize,
    chunks: usize,
}

impl Cut {
    fn new(rows: usize, outputs: usize, threads: usize) -> Self {
        let blocks = outputs.div_ceil(BLOCK);
        let tiles = blocks.div_ceil(TASK_BLOCKS).next_multiple_of(threads).min(blocks);
        Self { rows, outputs, tiles, chunks: threads.div_ceil(tiles) }
    }

    /// The outputs and rows of a task.
    fn of(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (tile, chunk) = (task / self.chunks, task % self.chunks);
        let blocks = self.outputs.div_ceil(BLOCK);
        let at = |tile: usize| self.outputs.min(blocks * tile / self.tiles * BLOCK);
        let height = self.rows.div_ceil(self.chunks).next_multiple_of(BLOCK);
        let row = |chunk: usize| self.rows.min(chunk * height);
        (at(tile)..at(tile + 1), row(chunk)..row(chunk + 1))
    }
}
