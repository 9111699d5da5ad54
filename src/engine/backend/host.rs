//! Small operations over host memory that every backend computes alike: moving rows, DoRA's columns, dropped values,
//! sums over rows. Plain loops, cut by shape alone, in the thread pool they are called from.

use rayon::prelude::*;

use super::Write;
use crate::random::{GOLDEN, mix};

/// Which values of the rows (T) of a linear layer's input are dropped. Bits are a function of the row's stream, the
/// layer and the channel.
#[derive(Debug, Clone, Copy)]
pub struct Dropped<'a> {
    /// A stream of random numbers a row (T).
    pub rows: &'a [u64],
    /// The layer's number.
    pub linear: usize,
    /// Of 65536, how many are dropped.
    pub threshold: u16,
    /// What the rest is multiplied by.
    pub scale: f32,
}

pub(super) fn gather_rows(y: &mut [f32], x: &[f32], rows: &[usize]) {
    let c = y.len() / rows.len().max(1);
    for (values, &row) in y.chunks_exact_mut(c.max(1)).zip(rows) {
        values.copy_from_slice(&x[row * c..(row + 1) * c]);
    }
}

pub(super) fn scatter_rows(y: &mut [f32], x: &[f32], rows: &[usize]) {
    let c = x.len() / rows.len().max(1);
    for (values, &row) in x.chunks_exact(c.max(1)).zip(rows) {
        y[row * c..(row + 1) * c].copy_from_slice(values);
    }
}

pub(super) fn add_columns(y: &mut [f32], x: &[f32], factors: Option<&[f32]>, sign: f32, write: Write) {
    assert_eq!(y.len(), x.len(), "BUG: shapes of a linear layer's outputs");
    let combine = |y: &mut f32, term: f32| match write {
        Write::Overwrite => *y = term,
        Write::Add => *y += term,
    };
    let Some(factors) = factors else {
        return y.iter_mut().zip(x).for_each(|(y, &x)| combine(y, sign * x));
    };
    let n = factors.len();
    y.par_chunks_exact_mut(n).zip(x.par_chunks_exact(n)).for_each(|(y, x)| {
        for ((y, &x), &factor) in y.iter_mut().zip(x).zip(factors) {
            combine(y, sign * factor * x);
        }
    });
}

pub(super) fn column_dots(sums: &mut [f32], dy: &[f32], z: &[f32], divisors: &[f32]) {
    let mut dots = vec![0.0f64; divisors.len()];
    for (dy, z) in dy.chunks_exact(divisors.len()).zip(z.chunks_exact(divisors.len())) {
        for ((dot, &dy), &z) in dots.iter_mut().zip(dy).zip(z) {
            *dot += f64::from(dy) * f64::from(z);
        }
    }
    for ((sum, dot), &divisor) in sums.iter_mut().zip(dots).zip(divisors) {
        *sum += (dot / f64::from(divisor)) as f32;
    }
}

pub(super) fn dropout(y: &mut [f32], x: &[f32], dropped: &Dropped<'_>, write: Write) {
    let Dropped { rows, linear, threshold, scale } = *dropped;
    assert!(y.len() == x.len() && x.len().is_multiple_of(rows.len()), "BUG: shape of a dropout");
    let k = x.len() / rows.len();
    let rows = y.par_chunks_exact_mut(k).zip(x.par_chunks_exact(k)).zip(rows);
    rows.for_each(|((y, x), &row)| {
        let stream = mix(row ^ mix(linear as u64 + 1));
        for (index, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
            let mut bits = bits(stream, index);
            for (y, &x) in y.iter_mut().zip(x) {
                let kept = if (bits as u16) < threshold { 0.0 } else { scale } * x;
                match write {
                    Write::Overwrite => *y = kept,
                    Write::Add => *y += kept,
                }
                bits >>= 16;
            }
        }
    });
}

pub(super) fn add_noise(x: &mut [f32], rows: &[u64], lengths: &[usize], alpha: f32) {
    let c = x.len() / rows.len();
    x.par_chunks_exact_mut(c).zip(rows).zip(lengths).for_each(|((values, &row), &length)| {
        let bound = alpha / ((length * c) as f32).sqrt();
        for (channel, value) in values.iter_mut().enumerate() {
            // Streams of linear layers start at `mix` of their number; this one at the row itself.
            let unit = (bits(row, channel) >> 40) as f32 / (1 << 24) as f32;
            *value += bound * (2.0 * unit - 1.0);
        }
    });
}

/// Number `index` of a stream.
fn bits(stream: u64, index: usize) -> u64 {
    mix(stream.wrapping_add((index as u64 + 1).wrapping_mul(GOLDEN)))
}

/// Looks at exponents only, which vectorises.
pub(super) fn is_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    let full = |value: &f32| value.to_bits() & EXPONENT == EXPONENT;
    values.chunks(1024).all(|chunk| !chunk.iter().fold(false, |any, value| any | full(value)))
}

/// Of each head (H), the sums for the rate's logarithm, for what is added at once and for dt's bias.
pub(super) fn scan_constants(
    rate: &[f32],
    (dy, x): (&[f32], &[f32]),
    (drate, ddt): (&[f32], &[f32]),
) -> Vec<[f32; 3]> {
    let heads = rate.len();
    let head_dim = x.len() / ddt.len();
    let column = |values: &[f32], head: usize| -> f64 {
        values.iter().skip(head).step_by(heads).map(|&value| f64::from(value)).sum()
    };
    let of_head = |head: usize| {
        let rows = dy.chunks_exact(head_dim).zip(x.chunks_exact(head_dim)).skip(head).step_by(heads);
        let seen = rows.flat_map(|(dy, x)| dy.iter().zip(x)).map(|(&dy, &x)| f64::from(dy) * f64::from(x));
        // The rate is -exp(A_log), and so is its slope.
        let da_log = f64::from(rate[head]) * column(drate, head);
        [da_log as f32, seen.sum::<f64>() as f32, column(ddt, head) as f32]
    };
    (0..heads).into_par_iter().map(of_head).collect()
}
