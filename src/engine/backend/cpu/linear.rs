//! Linear layers over encoded weights, and the LoRA pairs beside them. A task owns a tile of outputs, decodes
//! the weights it needs into panels, sweep by sweep, and multiplies all its tokens by them.

use std::ops::Range;

use super::panel::{self, Side};
use super::product::{Operand, Output, Panels, SWEEP, Shared, multiply, product};
use super::{Cpu, Lora, LoraGradient, Write, gemv, scratch};
use crate::matrix::Matrix;

/// Most outputs of a task: a sweep of decoded weights, the rows that pass by it and their results share the
/// second-level cache.
const TILE: usize = 96;
/// Tokens of a task: weights decoded once serve this many.
const TOKENS: usize = 512;
/// Up to so many tokens, decoded weights are used at once, while they are in the first-level cache.
const FEW: usize = 96;
/// Tokens of a LoRA task.
const LORA_TOKENS: usize = 128;
/// Rows or columns of a LoRA gradient a task owns.
const LORA_TILE: usize = 192;

/// y (T,N) = or += x (T,K) · Wᵀ.
pub(super) fn forward(cpu: &Cpu, y: &mut [f32], x: &[f32], weight: &Matrix, write: Write) {
    forward_part(cpu, y, x, (weight, 0..weight.rows), write);
}

/// y (T,N) = or += x (T,K) · the transpose of these rows of the weight.
pub(super) fn forward_part(cpu: &Cpu, y: &mut [f32], x: &[f32], part: (&Matrix, Range<usize>), write: Write) {
    run(cpu, y, x, part, Side::Rows, write, None);
}

/// dx (T,K) = or += dy (T,N) · W.
pub(super) fn backward(cpu: &Cpu, dx: &mut [f32], dy: &[f32], weight: &Matrix, write: Write) {
    backward_part(cpu, dx, dy, (weight, 0..weight.rows), write);
}

/// dx (T,K) = or += dy (T,N) · these rows of the weight.
pub(super) fn backward_part(
    cpu: &Cpu,
    dx: &mut [f32],
    dy: &[f32],
    part: (&Matrix, Range<usize>),
    write: Write,
) {
    run(cpu, dx, dy, part, Side::Columns, write, None);
}

/// Outputs of a task: enough tasks for the threads to end together. Any cut gives the same bits.
fn tile_of(outputs: usize, threads: usize) -> usize {
    let tiles = outputs.div_ceil(TILE).next_multiple_of(threads);
    outputs.div_ceil(tiles).next_multiple_of(panel::WIDTH)
}

/// y (T,N) = or += x (T,K) · some rows of a weight, or their transpose.
fn run(
    cpu: &Cpu,
    y: &mut [f32],
    x: &[f32],
    (weight, part): (&Matrix, Range<usize>),
    side: Side,
    write: Write,
    pair: Option<Thin<'_>>,
) {
    let (n, k) = match side {
        Side::Rows => (part.len(), weight.cols),
        Side::Columns => (weight.cols, part.len()),
    };
    let tokens = x.len() / k;
    assert!(x.len() == tokens * k && y.len() == tokens * n, "BUG: shape of a linear layer");
    #[cfg(target_arch = "x86_64")]
    if cpu.kernel.rounds() {
        // SAFETY: a kernel exists only where its instructions do.
        unsafe { super::amx::linear::run(cpu, y, x, (weight, part.start), side, (n, k), write) };
        return add_pair(cpu, y, n, pair);
    }
    let whole = side == Side::Rows && part.len() == weight.rows;
    let thin = if whole { gemv::outputs(weight, tokens) } else { 0 };
    if thin > 0 {
        gemv::forward(cpu, Shared::new(y), x, weight, write);
        if thin < n {
            run_tiles(cpu, y, x, (weight, part), side, (thin..n, k), write, None);
        }
        return add_pair(cpu, y, n, pair);
    }
    run_tiles(cpu, y, x, (weight, part), side, (0..n, k), write, pair);
}

/// The last outputs of each row, tile by tile.
fn run_tiles(
    cpu: &Cpu,
    y: &mut [f32],
    x: &[f32],
    (weight, part): (&Matrix, Range<usize>),
    side: Side,
    (outputs, k): (Range<usize>, usize),
    write: Write,
    pair: Option<Thin<'_>>,
) {
    let (tokens, from, n) = (x.len() / k, outputs.start, outputs.end);
    let y = Shared::new(y);
    let (step, chunks) = (tile_of(n - from, cpu.threads()), tokens.div_ceil(TOKENS));
    cpu.run((n - from).div_ceil(step) * chunks, |task| {
        let (start, first) = (from + task / chunks * step, task % chunks * TOKENS);
        let (tile, rows) = (start..n.min(start + step), TOKENS.min(tokens - first));
        // SAFETY: tiles and chunks of different tasks do not overlap.
        let mut y = unsafe { y.block(first * n + start, rows, tile.len(), n) };
        let x = Operand::rows(&x[first * k..(first + rows) * k], k);
        let narrow = match rows {
            // One panel has too few sums to keep the CPU busy.
            1 => 2 * panel::WIDTH,
            2..=FEW if cpu.kernel.is_wide() => 2 * panel::WIDTH,
            2..=FEW => panel::WIDTH,
            _ => tile.len(),
        };
        for start in tile.clone().step_by(narrow) {
            let narrow = start..tile.end.min(start + narrow);
            let mut y = y.columns(narrow.start - tile.start..narrow.end - tile.start);
            part_of(cpu, &mut y, x, (weight, part.start), side, narrow, k, write);
        }
        if let Some(Thin { left, right, rank, scale }) = pair {
            // While the tile is in a cache: a pass of its own would move all of y to and fro for little.
            let (left, right) = (Operand::rows(&left[first * rank..], rank), right.from(start * right.col));
            product(cpu.kernel, &mut y, rank, scale, Write::Add, left, right);
        }
    });
}

/// What a LoRA pair adds to a product: scale * left (T,R) · right (R,N).
#[derive(Clone, Copy)]
struct Thin<'a> {
    left: &'a [f32],
    right: Operand<'a>,
    rank: usize,
    scale: f32,
}

/// y (T,N) += the pair's part, row by row.
fn add_pair(cpu: &Cpu, y: &mut [f32], n: usize, pair: Option<Thin<'_>>) {
    let Some(Thin { left, right, rank, scale }) = pair else { return };
    cpu.run_over(y, LORA_TOKENS * n, |start, y| {
        let (rows, left) = (y.len() / n, Operand::rows(&left[start / n * rank..], rank));
        product(cpu.kernel, &mut Output::of(y, rows, n), rank, scale, Write::Add, left, right);
    });
}

/// y (T,N) = or += x (T,K) · the outputs `part` of a weight from row `first` on.
fn part_of(
    cpu: &Cpu,
    y: &mut Output<'_>,
    x: Operand<'_>,
    (weight, first): (&Matrix, usize),
    side: Side,
    part: Range<usize>,
    k: usize,
    write: Write,
) {
    // Rows of the weight are outputs one way, and depth the other.
    let from_first = |range: &Range<usize>, is_rows| match is_rows {
        true => first + range.start..first + range.end,
        false => range.clone(),
    };
    let sweep = SWEEP.min(k);
    scratch::with(panel::size(part.len(), sweep), |panels| {
        for start in (0..k).step_by(sweep) {
            let depth = start..k.min(start + sweep);
            let write = if start == 0 { write } else { Write::Add };
            let cols = from_first(&part, side == Side::Rows);
            let steps = from_first(&depth, side == Side::Columns);
            panel::decode(cpu.kernel, weight, side, cols, steps, panels);
            let panels = Panels::packed(panels, depth.len());
            multiply(cpu.kernel, y, depth.len(), 1.0, write, x.from(start), panels);
        }
    });
}

/// h (T,R) = x · Aᵀ; y (T,N) = x · Wᵀ + scale * h · Bᵀ.
pub(super) fn adapted_forward(
    cpu: &Cpu,
    y: &mut [f32],
    h: &mut [f32],
    x: &[f32],
    weight: &Matrix,
    lora: &Lora<'_>,
) {
    project(cpu, h, x, lora);
    let (rank, scale) = (lora.rank, lora.scale);
    let pair = Thin { left: h, right: Operand::columns(lora.b, rank), rank, scale };
    run(cpu, y, x, (weight, 0..weight.rows), Side::Rows, Write::Overwrite, Some(pair));
}

/// dx = or += dy · W + dh · A, and the pair's gradients as [`lora_backward`].
pub(super) fn adapted_backward(
    cpu: &Cpu,
    gradient: LoraGradient<'_>,
    (dx, write): (&mut [f32], Write),
    dh: &mut [f32],
    dy: &[f32],
    x: &[f32],
    h: &[f32],
    weight: &Matrix,
    lora: &Lora<'_>,
) {
    project_back(cpu, dh, dy, lora);
    let pair = Thin { left: dh, right: Operand::rows(lora.a, weight.cols), rank: lora.rank, scale: 1.0 };
    run(cpu, dx, dy, (weight, 0..weight.rows), Side::Columns, write, Some(pair));
    gradients(cpu, gradient, dh, dy, x, h, lora);
}

/// h (T,R) = x · Aᵀ; y (T,N) += scale * h · Bᵀ.
pub(super) fn lora_forward(cpu: &Cpu, y: &mut [f32], h: &mut [f32], x: &[f32], lora: &Lora<'_>) {
    let (r, n) = (lora.rank, lora.b.len() / lora.rank);
    assert_eq!(y.len(), h.len() / r * n, "BUG: shape of a LoRA pair");
    project(cpu, h, x, lora);
    let pair = Thin { left: h, right: Operand::columns(lora.b, r), rank: r, scale: lora.scale };
    add_pair(cpu, y, n, Some(pair));
}

/// dB += scale * dyᵀ · h; dh = scale * dy · B; dA += dhᵀ · x; dx += dh · A.
pub(super) fn lora_backward(
    cpu: &Cpu,
    gradient: LoraGradient<'_>,
    dx: Option<&mut [f32]>,
    dh: &mut [f32],
    dy: &[f32],
    x: &[f32],
    h: &[f32],
    lora: &Lora<'_>,
) {
    let (r, k) = (lora.rank, lora.a.len() / lora.rank);
    project_back(cpu, dh, dy, lora);
    if let Some(dx) = dx {
        let pair = Thin { left: dh, right: Operand::rows(lora.a, k), rank: r, scale: 1.0 };
        add_pair(cpu, dx, k, Some(pair));
    }
    gradients(cpu, gradient, dh, dy, x, h, lora);
}

/// h (T,R) = x (T,K) · Aᵀ.
fn project(cpu: &Cpu, h: &mut [f32], x: &[f32], lora: &Lora<'_>) {
    let (r, k) = (lora.rank, lora.a.len() / lora.rank);
    assert_eq!(h.len(), x.len() / k * r, "BUG: shape of a LoRA pair");
    cpu.run_over(h, LORA_TOKENS * r, |start, h| {
        let (rows, x) = (h.len() / r, Operand::rows(&x[start / r * k..], k));
        let h = &mut Output::of(h, rows, r);
        product(cpu.kernel, h, k, 1.0, Write::Overwrite, x, Operand::columns(lora.a, k));
    });
}

/// dh (T,R) = scale * dy (T,N) · B.
fn project_back(cpu: &Cpu, dh: &mut [f32], dy: &[f32], lora: &Lora<'_>) {
    let (r, n) = (lora.rank, lora.b.len() / lora.rank);
    assert_eq!(dh.len(), dy.len() / n * r, "BUG: shape of a LoRA pair");
    cpu.run_over(dh, LORA_TOKENS * r, |start, dh| {
        let (rows, dy) = (dh.len() / r, Operand::rows(&dy[start / r * n..], n));
        let dh = &mut Output::of(dh, rows, r);
        product(cpu.kernel, dh, n, lora.scale, Write::Overwrite, dy, Operand::rows(lora.b, r));
    });
}

/// dB += scale * dyᵀ · h; dA += dhᵀ · x.
fn gradients(
    cpu: &Cpu,
    gradient: LoraGradient<'_>,
    dh: &[f32],
    dy: &[f32],
    x: &[f32],
    h: &[f32],
    lora: &Lora<'_>,
) {
    let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
    let tokens = x.len() / k;
    assert!(
        h.len() == tokens * r && dh.len() == h.len() && dy.len() == tokens * n,
        "BUG: shape of a LoRA pair"
    );
    let LoraGradient { da, db } = gradient;
    let (da, db) = (Shared::new(da), Shared::new(db));
    let tiles_b = n.div_ceil(LORA_TILE);
    cpu.run(tiles_b + k.div_ceil(LORA_TILE), |task| {
        if task < tiles_b {
            let tile = task * LORA_TILE..n.min((task + 1) * LORA_TILE);
            // SAFETY: each task owns its rows of dB.
            let db = unsafe { db.slice(tile.start * r..tile.end * r) };
            // As (R, tile) first, so that each line of dy is read once and not once a row.
            scratch::with(r * tile.len(), |transposed| {
                let mut out = Output::of(transposed, r, tile.len());
                let (h, dy) = (Operand::columns(h, r), Operand::rows(&dy[tile.start..], n));
                product(cpu.kernel, &mut out, tokens, lora.scale, Write::Overwrite, h, dy);
                for (j, db) in db.chunks_exact_mut(r).enumerate() {
                    for (db, row) in db.iter_mut().zip(transposed.chunks_exact(tile.len())) {
                        *db += row[j];
                    }
                }
            });
        } else {
            let start = (task - tiles_b) * LORA_TILE;
            let width = LORA_TILE.min(k - start);
            // SAFETY: each task owns its columns of dA.
            let mut da = unsafe { da.block(start, r, width, k) };
            let x = Operand::rows(&x[start..], k);
            product(cpu.kernel, &mut da, tokens, 1.0, Write::Add, Operand::columns(dh, r), x);
        }
    });
}
