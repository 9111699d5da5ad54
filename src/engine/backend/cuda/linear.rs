//! Products with weights and LoRA pairs. A pair extends the depth of its layer's product: the sums go on over the
//! rank, so y = [x, h]·[W, B]ᵀ and dx = [dy, dh]·[W; A] cost no pass of their own over y and dx.
//!
//! On the device h is scale · x · Aᵀ and dh is scale · dy · B, so that nothing else needs the scale.

use super::super::{Buffer, Lora, LoraGradient, Precision, Write};
use super::Cuda;
use super::device::{Arg, DeviceBuffer, Launch};
use super::operand::Encoded;
use crate::matrix::Matrix;

use Precision::{Exact, Rounded};

/// Tiles of 128 x 128 below which the smaller ones fill a device better. A constant, so that every device adds alike.
const FEW_TILES: usize = 128;
/// Rows up to which decoding a weight where it is used costs less than decoding it once for all of them.
const FEW_ROWS: usize = 64;
/// Rows that one pass over a weight's codes can serve.
const SINGLE_ROWS: usize = 8;
/// Rows that a piece of a sum over rows takes.
const SPLIT_ROWS: usize = 512;

/// A dense bf16 weight, and what keeps its memory.
pub(super) enum Dense<'c> {
    Resident(std::sync::Arc<DeviceBuffer>),
    Decoded(std::sync::MutexGuard<'c, DeviceBuffer>),
}

impl Dense<'_> {
    pub(super) fn arg(&self) -> Arg {
        Arg::Pointer(match self {
            Self::Resident(values) => values.at(Rounded),
            Self::Decoded(values) => values.at(Rounded),
        })
    }
}

/// A second pair of factors, whose products are added: (m,k2) and its partner, k2.
pub(super) type Extension = Option<(Arg, Arg, usize)>;

impl Cuda {
    /// The weight (N,K) as bf16; NF4 is decoded into memory that the next weight takes over.
    pub(super) fn dense(&self, weight: &Matrix) -> Dense<'_> {
        match self.matrix(weight).0 {
            Encoded::Bf16(values) => Dense::Resident(values),
            Encoded::Nf4 { packed, absmax } => {
                let mut decoded = self.decoded.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let (rows, cols) = (weight.rows, weight.cols);
                decoded.resize(rows * cols);
                let args = [
                    packed.arg(),
                    Arg::Pointer(absmax.at(Exact)),
                    Arg::Pointer(decoded.at(Rounded)),
                    int(rows),
                    int(cols),
                    int(cols),
                ];
                self.launch("nf4_dequantize", (rows * cols).div_ceil(8192), 256, &args);
                Dense::Decoded(decoded)
            }
        }
    }

    /// c (m,n) = or += a (m,k) · bᵀ or b + the extension's; rows of c and a are `ldc` and `lda` values apart.
    pub(super) fn gemm(
        &self,
        kind: Gemm,
        (c, ldc): (Arg, usize),
        ((a, lda), b): ((Arg, usize), Arg),
        (m, n, k): (usize, usize, usize),
        extension: Extension,
        write: Write,
    ) {
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side);
        let (name, grid) = match (kind, tiles(128) < FEW_TILES) {
            (Gemm::Nt, false) => ("gemm_nt", tiles(128)),
            (Gemm::Nt, true) => ("gemm_nt_small", tiles(64)),
            (Gemm::NtExact, false) => ("gemm_nt_f32", tiles(128)),
            (Gemm::NtExact, true) => ("gemm_nt_f32_small", tiles(64)),
            (Gemm::Nn, false) => ("gemm_nn", tiles(128)),
            (Gemm::Nn, true) => ("gemm_nn_small", tiles(64)),
        };
        let (a2, b2, k2) = extension.unwrap_or((Arg::Pointer(0), Arg::Pointer(0), 0));
        // Of b (n,k) the rows are k apart, of b (k,n) they are n.
        let (ldb, ldb2) = if kind == Gemm::Nn { (n, n) } else { (k, k2) };
        let add = int(usize::from(write == Write::Add));
        let args = [
            c,
            int(ldc),
            a,
            int(lda),
            b,
            int(ldb),
            a2,
            int(k2),
            b2,
            int(ldb2),
            int(m),
            int(n),
            int(k),
            int(k2),
            add,
        ];
        self.launch(name, grid, 128, &args);
    }

    /// y (m,N) = x (m,K) · Wᵀ + the extension's, with W decoded where it is used: for a step of generation, or the few
    /// tokens of a prompt. False, and nothing is done, for other weights and for more rows.
    fn few_rows(&self, y: Arg, x: Arg, weight: &Matrix, m: usize, extension: Extension) -> bool {
        let Encoded::Nf4 { packed, absmax } = self.matrix(weight).0 else { return false };
        let (n, k) = (weight.rows, weight.cols);
        if m > FEW_ROWS || !k.is_multiple_of(64) {
            return false;
        }
        let (h, b, r) = extension.unwrap_or((Arg::Pointer(0), Arg::Pointer(0), 0));
        let absmax = Arg::Pointer(absmax.at(Exact));
        let args = [y, x, packed.arg(), absmax, h, b, int(m), int(n), int(k), int(r)];
        match m <= SINGLE_ROWS {
            true => self.launch("nf4_gemv", n.div_ceil(16), 256, &args),
            false => {
                let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
                self.start("nf4_gemm", Launch { grid, block: 128, shared: 0 }, &args);
            }
        }
        true
    }

    pub(super) fn linear_forward(&self, y: &mut Buffer, x: &Buffer, weight: &Matrix, write: Write) {
        let (n, k) = (weight.rows, weight.cols);
        let shape = (x.len() / k, n, k);
        let (x, y) = (self.input(x, Rounded), self.output(y, Rounded));
        if write == Write::Overwrite && self.few_rows(y.arg(), x.arg(), weight, shape.0, None) {
            return;
        }
        let w = self.dense(weight);
        self.gemm(Gemm::Nt, (y.arg(), n), ((x.arg(), k), w.arg()), shape, None, write);
    }

    pub(super) fn linear_back(&self, dx: &mut Buffer, dy: &Buffer, weight: &Matrix, write: Write) {
        let (n, k) = (weight.rows, weight.cols);
        let shape = (dy.len() / n, k, n);
        let (dy, dx, w) = (self.input(dy, Rounded), self.output(dx, Rounded), self.dense(weight));
        self.gemm(Gemm::Nn, (dx.arg(), k), ((dy.arg(), n), w.arg()), shape, None, write);
    }

    /// y (T,N) = x (T,K) · Wᵀ + h · Bᵀ, or without W y += h · Bᵀ; writes h.
    pub(super) fn pair_forward(
        &self,
        y: &mut Buffer,
        h: &mut Buffer,
        x: &Buffer,
        weight: Option<&Matrix>,
        lora: &Lora<'_>,
    ) {
        let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
        let t = x.len() / k;
        let (a, b) = (self.input(lora.a, Rounded), self.input(lora.b, Rounded));
        let (x, y, h) = (self.input(x, Rounded), self.output(y, Rounded), self.output(h, Rounded));
        let args = [h.arg(), int(r), x.arg(), int(k), a.arg(), Arg::F32(lora.scale), int(t), int(r), int(k)];
        self.start("lora_down", narrow(t, r), &args);
        match weight {
            Some(weight) => {
                let extension = Some((h.arg(), b.arg(), r));
                if self.few_rows(y.arg(), x.arg(), weight, t, extension) {
                    return;
                }
                let w = self.dense(weight);
                let from = ((x.arg(), k), w.arg());
                self.gemm(Gemm::Nt, (y.arg(), n), from, (t, n, k), extension, Write::Overwrite);
            }
            None => {
                let from = ((h.arg(), r), b.arg());
                self.gemm(Gemm::Nt, (y.arg(), n), from, (t, n, r), None, Write::Add);
            }
        }
    }

    /// dB += dyᵀ · h, dh = scale · dy · B, dA += dhᵀ · x; dx = or += dy · W + dh · A if asked for.
    pub(super) fn pair_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: Option<(&mut Buffer, Write, Option<&Matrix>)>,
        dh: &mut Buffer,
        (dy, x, h): (&Buffer, &Buffer, &Buffer),
        lora: &Lora<'_>,
    ) {
        let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
        let t = x.len() / k;
        let (a, b) = (self.input(lora.a, Rounded), self.input(lora.b, Rounded));
        let (dy, x, h) = (self.input(dy, Rounded), self.input(x, Rounded), self.input(h, Rounded));
        let dh = self.output(dh, Rounded);
        let args =
            [dh.arg(), int(r), dy.arg(), int(n), b.arg(), Arg::F32(lora.scale), int(t), int(r), int(n)];
        self.start("lora_up_transposed", narrow(t, r), &args);
        let LoraGradient { da, db } = gradient;
        self.add_transposed(db, (dy.arg(), n), (h.arg(), r), t);
        self.add_transposed(da, (dh.arg(), r), (x.arg(), k), t);
        let Some((dx, write, weight)) = dx else { return };
        let dx = self.output(dx, Rounded);
        match weight {
            Some(weight) => {
                let (w, extension) = (self.dense(weight), Some((dh.arg(), a.arg(), r)));
                let from = ((dy.arg(), n), w.arg());
                self.gemm(Gemm::Nn, (dx.arg(), k), from, (t, k, n), extension, write);
            }
            None => {
                let from = ((dh.arg(), r), a.arg());
                self.gemm(Gemm::Nn, (dx.arg(), k), from, (t, k, r), None, write);
            }
        }
    }

    /// c (m,n) f32 += aᵀ · b with a (t,m) and b (t,n): pieces of rows first, then their sum in order.
    fn add_transposed(&self, c: &mut Buffer, (a, m): (Arg, usize), (b, n): (Arg, usize), t: usize) {
        let splits = t.div_ceil(SPLIT_ROWS);
        let partial = DeviceBuffer::new(&self.device, splits * m * n, Exact);
        let partial = Arg::Pointer(partial.at(Exact));
        let (tile_m, tile_n) = if m > n { (128, 64) } else { (64, 128) };
        let launch = Launch {
            grid: [(m.div_ceil(tile_m) * n.div_ceil(tile_n)) as u32, 1, splits as u32],
            block: 128,
            shared: 0,
        };
        let args = [partial, a, int(m), b, int(n), int(m), int(n), int(t), int(SPLIT_ROWS)];
        self.start("gemm_tn_partial", launch, &args);
        let c = self.output(c, Exact);
        let args = [c.arg(), partial, Arg::F32(1.0), Arg::I64((m * n) as i64), int(splits)];
        self.launch("add_partials", (m * n).div_ceil(256), 256, &args);
    }
}

/// How a product reads its second factor, and what it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gemm {
    /// b (n,k), into bf16.
    Nt,
    /// b (n,k), into f32.
    NtExact,
    /// b (k,n), into bf16.
    Nn,
}

pub(super) fn int(value: usize) -> Arg {
    Arg::I32(value as i32)
}

/// The launch of a product of t rows that is r wide.
fn narrow(t: usize, r: usize) -> Launch {
    let width = if r <= 16 {
        16
    } else if r <= 32 {
        32
    } else {
        64
    };
    Launch { grid: [r.div_ceil(64) as u32, t.div_ceil(32) as u32, 1], block: 128, shared: (32 + width) * 512 }
}
