//! Linear layers over encoded weights, and the LoRA pairs beside them. A task owns a tile of outputs, decodes
//! the weights it needs block by block (a block and its tokens fit the second-level cache) and multiplies.

use super::product::{Operand, Output, Shared, product};
use super::{Cpu, Lora, LoraGradient, Write, decode, scratch};
use crate::matrix::Matrix;

/// Most outputs of a task. `gemm` packs a task's tokens anew, so that a wide tile is worth more than a decoded
/// block that stays in the second-level cache.
const TILE_MAX: usize = 384;
/// A task's outputs are a multiple of every register tile `gemm` uses.
const TILE_STEP: usize = 48;
/// Tokens of a task: one decoded block serves this many.
const TOKENS: usize = 512;
/// Weights' depth decoded at a time.
const DEPTH: usize = 512;
/// Tokens of a LoRA task.
const LORA_TOKENS: usize = 64;
/// Rows or columns of a LoRA gradient a task owns.
const LORA_TILE: usize = 192;

/// Outputs of a task: an even number of even tiles, so that two threads end together.
fn tile_width(width: usize) -> usize {
    let tiles = width.div_ceil(TILE_MAX).next_multiple_of(2);
    width.div_ceil(tiles).next_multiple_of(TILE_STEP)
}

/// The tile of outputs and the chunk of tokens of a task.
fn tile_of(task: usize, width: usize, tokens: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    let (chunks, step) = (tokens.div_ceil(TOKENS), tile_width(width));
    let (tile, chunk) = (task / chunks * step, task % chunks * TOKENS);
    (tile..width.min(tile + step), chunk..tokens.min(chunk + TOKENS))
}

fn tasks_of(width: usize, tokens: usize) -> usize {
    width.div_ceil(tile_width(width)) * tokens.div_ceil(TOKENS)
}

/// Whether a block from `start` writes or adds: the first obeys `write`, later ones add.
fn write_of(start: usize, write: Write) -> Write {
    if start == 0 { write } else { Write::Add }
}

/// y (T,N) = or += x (T,K) · Wᵀ.
pub(super) fn forward(cpu: &Cpu, y: &mut [f32], x: &[f32], weight: &Matrix, write: Write) {
    let (n, k) = (weight.rows, weight.cols);
    let tokens = x.len() / k;
    assert!(x.len() == tokens * k && y.len() == tokens * n, "BUG: shape of a linear layer");
    let y = Shared::new(y);
    cpu.run(tasks_of(n, tokens), |task| {
        let (tile, rows) = tile_of(task, n, tokens);
        // SAFETY: tiles and chunks of different tasks do not overlap.
        let mut out = unsafe { y.block(rows.start * n + tile.start, rows.len(), tile.len(), n) };
        scratch::with(tile.len() * DEPTH.min(k), |w| {
            for start in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - start);
                decode::block(weight, tile.clone(), start..start + depth, w);
                let x = Operand::rows(&x[rows.start * k + start..], k);
                product(&mut out, depth, 1.0, write_of(start, write), x, Operand::columns(w, depth));
            }
        });
    });
}

/// dx (T,K) = or += dy (T,N) · W.
pub(super) fn backward(cpu: &Cpu, dx: &mut [f32], dy: &[f32], weight: &Matrix, write: Write) {
    let (n, k) = (weight.rows, weight.cols);
    let tokens = dy.len() / n;
    assert!(dx.len() == tokens * k && dy.len() == tokens * n, "BUG: shape of a linear layer");
    let dx = Shared::new(dx);
    cpu.run(tasks_of(k, tokens), |task| {
        let (tile, rows) = tile_of(task, k, tokens);
        // SAFETY: tiles and chunks of different tasks do not overlap.
        let mut out = unsafe { dx.block(rows.start * k + tile.start, rows.len(), tile.len(), k) };
        scratch::with(tile.len() * DEPTH.min(n), |w| {
            for start in (0..n).step_by(DEPTH) {
                let depth = DEPTH.min(n - start);
                decode::block(weight, start..start + depth, tile.clone(), w);
                let dy = Operand::rows(&dy[rows.start * n + start..], n);
                product(&mut out, depth, 1.0, write_of(start, write), dy, Operand::rows(w, tile.len()));
            }
        });
    });
}

/// h (T,R) = x · Aᵀ; y (T,N) += scale * h · Bᵀ.
pub(super) fn lora_forward(cpu: &Cpu, y: &mut [f32], h: &mut [f32], x: &[f32], lora: &Lora<'_>) {
    let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
    let tokens = x.len() / k;
    assert!(h.len() == tokens * r && y.len() == tokens * n, "BUG: shape of a LoRA pair");
    let y = Shared::new(y);
    cpu.run_over(h, LORA_TOKENS * r, |start, h| {
        let (first, rows) = (start / r, h.len() / r);
        let x = Operand::rows(&x[first * k..], k);
        product(&mut Output::of(h, rows, r), k, 1.0, Write::Overwrite, x, Operand::columns(lora.a, k));
        // SAFETY: the rows of different tasks do not overlap.
        let mut y = unsafe { y.block(first * n, rows, n, n) };
        product(&mut y, r, lora.scale, Write::Add, Operand::rows(h, r), Operand::columns(lora.b, r));
    });
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
    let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
    let tokens = x.len() / k;
    assert!(
        h.len() == tokens * r && dh.len() == h.len() && dy.len() == tokens * n,
        "BUG: shape of a LoRA pair"
    );
    let dx = dx.map(Shared::new);
    cpu.run_over(dh, LORA_TOKENS * r, |start, dh| {
        let (first, rows) = (start / r, dh.len() / r);
        let dy = Operand::rows(&dy[first * n..], n);
        product(&mut Output::of(dh, rows, r), n, lora.scale, Write::Overwrite, dy, Operand::rows(lora.b, r));
        if let Some(dx) = &dx {
            // SAFETY: the rows of different tasks do not overlap.
            let mut dx = unsafe { dx.block(first * k, rows, k, k) };
            product(&mut dx, r, 1.0, Write::Add, Operand::rows(dh, r), Operand::rows(lora.a, k));
        }
    });
    let LoraGradient { da, db } = gradient;
    let (da, db) = (Shared::new(da), Shared::new(db));
    let tiles_b = n.div_ceil(LORA_TILE);
    cpu.run(tiles_b + k.div_ceil(LORA_TILE), |task| {
        if task < tiles_b {
            let tile = task * LORA_TILE..n.min((task + 1) * LORA_TILE);
            // SAFETY: each task owns its rows of dB.
            let mut db = unsafe { db.block(tile.start * r, tile.len(), r, r) };
            let dy = Operand::columns(&dy[tile.start..], n);
            product(&mut db, tokens, lora.scale, Write::Add, dy, Operand::rows(h, r));
        } else {
            let start = (task - tiles_b) * LORA_TILE;
            let width = LORA_TILE.min(k - start);
            // SAFETY: each task owns its columns of dA.
            let mut da = unsafe { da.block(start, r, width, k) };
            let x = Operand::rows(&x[start..], k);
            product(&mut da, tokens, 1.0, Write::Add, Operand::columns(dh, r), x);
        }
    });
}
