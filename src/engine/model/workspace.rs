//! The buffers of a pass, kept from one pass to the next so that nothing large is allocated per step: what
//! each layer saves for its backward, and scratch that layers share.

use super::blocks::attention::AttentionActivations;
use super::blocks::linear::PairScratch;
use super::blocks::mamba::{MambaActivations, MambaScratch};
use super::blocks::mlp::MlpActivations;
use super::blocks::rope::RopeBuffer;
use crate::adapter::Gradients;
use crate::backend::Buffer;

/// Reusable buffers; start with `Workspace::default()`. Any model may use any workspace.
#[derive(Debug, Default)]
pub struct Workspace {
    /// One a rope of the model.
    pub(super) ropes: Vec<RopeBuffer>,
    /// One a layer while training; one for all layers otherwise.
    pub(super) layers: Vec<LayerActivations>,
    /// How many of the lowest layers keep only their input while training, and are computed again on the way back.
    pub(super) recomputed: usize,
    /// What those layers share.
    pub(super) spare: LayerActivations,
    /// The residual stream (T,C).
    pub(super) stream: Buffer,
    /// The gradient of the residual stream (T,C).
    pub(super) dstream: Buffer,
    /// The gradient of what a block adds to the stream, where that differs (T,C).
    pub(super) dadded: Buffer,
    pub(super) scratch: Scratch,
    pub(super) head: HeadBuffers,
    /// Of an adapter that is trained on a device.
    pub(super) gradients: Option<Gradients>,
}

impl Workspace {
    /// Trades time for memory: of the lowest `layers` layers, training passes keep only the input and compute the
    /// rest a second time. Not a bit of any result changes.
    pub fn recompute_layers(&mut self, layers: usize) {
        self.recomputed = layers;
    }
}

impl LayerActivations {
    /// Swaps everything but the layer's input.
    pub(super) fn swap_all_but_input(&mut self, other: &mut Self) {
        std::mem::swap(self, other);
        std::mem::swap(&mut self.input, &mut other.input);
    }
}

/// What a layer's backward needs from its forward; norms and gated products are recomputed.
#[derive(Debug, Default)]
pub(super) struct LayerActivations {
    /// The stream before the layer (T,C).
    pub(super) input: Buffer,
    /// The stream between attention and MLP (T,C).
    pub(super) middle: Buffer,
    /// Of layers that attend.
    pub(super) attention: AttentionActivations,
    /// Of layers that do not.
    pub(super) mamba: MambaActivations,
    /// What the mixer and the MLP gave, where a norm follows (T,C).
    pub(super) mixed: Buffer,
    pub(super) fed: Buffer,
    pub(super) mlp: MlpActivations,
}

/// Buffers of one layer at a time.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// A normed stream (T,C).
    pub(super) normed: Buffer,
    /// Its gradient (T,C).
    pub(super) dnormed: Buffer,
    /// silu(gate) * up (T,I).
    pub(super) wide: Buffer,
    /// Its gradient (T,I).
    pub(super) dwide: Buffer,
    /// Gradient of the attention's output (T, H·D).
    pub(super) dattended: Buffer,
    pub(super) dq: Buffer,
    pub(super) dk: Buffer,
    pub(super) dv: Buffer,
    /// Gradient of q or k before its norm.
    pub(super) dplain: Buffer,
    pub(super) mamba: MambaScratch,
    pub(super) pair: PairScratch,
    /// The backend's own.
    pub(super) backend: Vec<f32>,
}

/// Buffers of the rows that reach the head (S,C).
#[derive(Debug, Default)]
pub(super) struct HeadBuffers {
    pub(super) rows: Buffer,
    pub(super) normed: Buffer,
    pub(super) dnormed: Buffer,
    pub(super) drows: Buffer,
    /// (S,V), of passes that give logits.
    pub(super) logits: Buffer,
}
