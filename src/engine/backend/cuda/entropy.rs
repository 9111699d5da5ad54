//! Cross-entropy over the vocabulary: logits of a bounded number of rows at a time, in f32, turned into their gradient
//! beside them.

use super::super::{Buffer, LogitMap, Precision, Write};
use super::Cuda;
use super::device::{Arg, DeviceBuffer};
use super::linear::{Gemm, int};
use crate::matrix::Matrix;

use Precision::{Exact, Rounded};

/// Logits that exist at a time.
const LOGITS: usize = 1 << 26;
/// Rows of a tile of a product.
const TILE_ROWS: usize = 128;

impl Cuda {
    pub(super) fn entropy(
        &self,
        nll: &mut [f64],
        gradient: Option<(&mut Buffer, f32)>,
        hidden: &Buffer,
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
    ) {
        let (vocabulary, c, rows) = (head.rows, head.cols, targets.len());
        // Rows of logits begin on 16 bytes, and whole tiles of rows are made at a time.
        let stride = vocabulary.next_multiple_of(8);
        let chunk = (LOGITS / stride / TILE_ROWS * TILE_ROWS).max(TILE_ROWS).min(rows.max(1));
        let list = self.list(targets.iter().map(|&target| target as usize));
        let hidden = self.input(hidden, Rounded);
        let (dhidden, scale) = match gradient {
            Some((dhidden, scale)) => (Some(self.output(dhidden, Rounded)), scale),
            None => (None, 0.0),
        };
        let weight = self.dense(head);
        let losses = DeviceBuffer::new(&self.device, rows, Exact);
        let logits = DeviceBuffer::new(&self.device, chunk * stride, Exact);
        let dlogits =
            DeviceBuffer::new(&self.device, dhidden.as_ref().map_or(0, |_| chunk * stride), Rounded);
        let Arg::Pointer(targets) = list.arg() else { unreachable!("BUG: a list is at an address") };
        let (at_logits, at_dlogits) = (Arg::Pointer(logits.at(Exact)), Arg::Pointer(dlogits.at(Rounded)));
        for first in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - first);
            let x = hidden.at(first * c, Rounded);
            let shape = (count, vocabulary, c);
            let from = ((x, c), weight.arg());
            self.gemm(Gemm::NtExact, (at_logits, stride), from, shape, None, Write::Overwrite);
            let args = [
                Arg::Pointer(losses.at_value(first)),
                if dhidden.is_some() { at_dlogits } else { Arg::Pointer(0) },
                at_logits,
                Arg::Pointer(targets + 4 * first as u64),
                int(vocabulary),
                int(stride),
                Arg::F32(map.scale),
                Arg::F32(map.softcap.unwrap_or(0.0)),
                Arg::F32(scale),
            ];
            self.launch("cross_entropy_strided", count, 512, &args);
            if let Some(dhidden) = &dhidden {
                let (dx, shape) = (dhidden.at(first * c, Rounded), (count, c, vocabulary));
                let from = ((at_dlogits, stride), weight.arg());
                self.gemm(Gemm::Nn, (dx, c), from, shape, None, Write::Overwrite);
            }
        }
        nll.iter_mut().zip(losses.to_host()).for_each(|(nll, loss)| *nll = loss.into());
    }
}
