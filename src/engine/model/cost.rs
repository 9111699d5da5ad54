//! How many floating-point operations a training step needs, so that its time can be held against what the
//! machine can do. Counts what the mathematics asks for, a multiply-add as two, and nothing that an implementation
//! does besides: layers computed twice, scores of keys that a query does not see.
//!
//! ```text
//! linear      forward, and the gradient of its input unless all below is frozen: the weights are
//! LoRA pair   forward, and the gradients of its input, of A and of B
//! attention   q·k and p·v forward; scores again, dV, dP, dQ, dK backward: of the keys that are seen
//! head        forward and the gradient of its input, of rows with a target
//! ```
//! Not counted: norms, rotations, gates, softmax, convolutions, scans, the optimizer.

use super::blocks::linear::Linear;
use super::decoder::{Decoder, Layer, Mixer};
use super::{Model, Pack};
use crate::adapter::Adapter;
use crate::backend::Span;

impl Model {
    /// Floating-point operations of [`Model::loss_and_gradients`].
    pub fn training_flops(&self, adapter: &Adapter, pack: &Pack) -> f64 {
        self.decoder.training_flops(adapter, pack)
    }
}

impl Decoder {
    fn training_flops(&self, adapter: &Adapter, pack: &Pack) -> f64 {
        let (_, spans) = pack.layout();
        let adapted = |linear: &Linear| adapter.lora(linear.index).is_some();
        let lowest = self.layers.iter().position(|layer| layer.linears().into_iter().any(adapted));
        let layers = self.layers.iter().enumerate().map(|(index, layer)| {
            // Below the lowest adapted layer nothing runs backward, and its own input needs no gradient.
            let backward = lowest.is_some_and(|lowest| lowest <= index);
            let frozen = lowest == Some(index);
            layer.training_flops(adapter, &spans, pack.tokens.len(), backward, frozen)
        });
        let head = 4.0 * (pack.supervised() * self.head.rows * self.head.cols) as f64;
        layers.sum::<f64>() + head
    }
}

impl Layer {
    /// `frozen`: nothing below is adapted.
    fn training_flops(
        &self,
        adapter: &Adapter,
        spans: &[Span],
        tokens: usize,
        backward: bool,
        frozen: bool,
    ) -> f64 {
        let inputs = match &self.mixer {
            Mixer::Attention(attention) => vec![&attention.q, &attention.k, &attention.v],
            Mixer::Mamba(mamba) => vec![&mamba.in_proj],
        };
        let reads_input = |linear: &Linear| inputs.iter().any(|input| input.index == linear.index);
        let linears = self.linears().into_iter().map(|linear| {
            let (n, k) = (linear.weight.rows, linear.weight.cols);
            let passes_on = usize::from(backward && !(frozen && reads_input(linear)));
            let rank = adapter.lora(linear.index).map_or(0, |lora| lora.rank);
            let pair = rank * (3 * n + (2 + passes_on) * k);
            2.0 * (tokens * ((1 + passes_on) * n * k + pair)) as f64
        });
        let attention = match &self.mixer {
            Mixer::Attention(attention) => {
                let pairs: usize = spans.iter().map(|span| span.pairs(attention.window)).sum();
                let products = if backward { 2 + 5 } else { 2 };
                2.0 * (products * pairs * attention.heads * attention.head_dim) as f64
            }
            Mixer::Mamba(_) => 0.0,
        };
        linears.sum::<f64>() + attention
    }
}
