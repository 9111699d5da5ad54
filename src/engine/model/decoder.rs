//! A stack of layers between an embedding and a head: the order of a pass, forward and back. Which blocks a
//! layer has is the family's business; what they compute is theirs.
//!
//! Only rows that need logits pass the final norm and the head. The backward stops where nothing below is
//! adapted.

use super::blocks::Pass;
use super::blocks::attention::Attention;
use super::blocks::linear::Linear;
use super::blocks::mlp::Mlp;
use super::blocks::norm::Norm;
use super::blocks::rope::Frequencies;
use super::cache::{KvCache, LayerCache};
use super::workspace::{HeadBuffers, LayerActivations, Scratch, Workspace, sized};
use super::{ModelError, Pack};
use crate::adapter::Gradients;
use crate::backend::{RopeTable, Write};
use crate::matrix::Matrix;

/// Embedding, layers, norm, head.
pub(super) struct Decoder {
    /// (V,C)
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    /// (V,C); the embedding itself where the model ties them.
    pub(super) head: Matrix,
    pub(super) rope: Frequencies,
}

/// x += attention(norm(x)); x += mlp(norm(x)).
pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    pub(super) attention: Attention,
    pub(super) mlp_norm: Norm,
    pub(super) mlp: Mlp,
}

/// Which layers' activations outlive the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// All: a backward follows.
    All,
    /// Only the last layer's; all layers share one set of buffers.
    One,
}

impl Decoder {
    /// All linear layers, in the order of the forward pass.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| layer.attention.linears().into_iter().chain(layer.mlp.linears()))
    }

    /// Runs `tokens` (T) through all layers; leaves the stream (T,C) in the workspace.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        tokens: &[u32],
        workspace: &mut Workspace,
        keep: Keep,
        mut cache: Option<(&mut KvCache, &[usize])>,
    ) -> Result<(), ModelError> {
        let Workspace { rope, layers, stream, scratch, recomputed, spare, .. } = workspace;
        pass.backend.embed(sized(stream, tokens.len() * self.embedding.cols), &self.embedding, tokens);
        if let Some(noise) = &pass.noise {
            noise.add_to_embeddings(stream);
        }
        check_finite(stream, || "model.embed_tokens".to_owned())?;
        let kept = if keep == Keep::All { self.layers.len() } else { 1 };
        layers.resize_with(layers.len().max(kept), LayerActivations::default);
        for (index, layer) in self.layers.iter().enumerate() {
            let saved = &mut layers[if keep == Keep::All { index } else { 0 }];
            let cache = cache.as_mut().map(|(cache, rows)| (&mut cache.layers[index], *rows));
            let passes_on = keep == Keep::All && index < *recomputed;
            if passes_on {
                saved.swap_all_but_input(spare);
            }
            layer.forward(pass, stream, scratch, &rope.table, saved, cache);
            check_finite(stream, || layer.first_not_finite(saved))?;
            if passes_on {
                saved.swap_all_but_input(spare);
            }
        }
        Ok(())
    }

    /// The negative log-likelihood of the target of each of `rows`. With `scale`, also writes the stream's
    /// gradient (T,C), zero in other rows.
    pub(super) fn loss(
        &self,
        pass: &Pass<'_>,
        pack: &Pack,
        rows: &[usize],
        scale: Option<f32>,
        workspace: &mut Workspace,
    ) -> Result<Vec<f64>, ModelError> {
        let Workspace { stream, dstream, scratch, head, .. } = workspace;
        let c = self.head.cols;
        self.gather(pass, rows, stream, head);
        let HeadBuffers { rows: gathered, normed, dnormed, drows } = head;
        let targets: Vec<u32> = rows.iter().filter_map(|&row| pack.targets[row]).collect();
        let mut losses = vec![0.0; rows.len()];
        let gradient = scale.map(|scale| (sized(dnormed, normed.len()), scale));
        pass.backend.cross_entropy(&mut losses, gradient, normed, &targets, &self.head, &mut scratch.backend);
        if losses.iter().any(|loss| !loss.is_finite()) {
            return Err(ModelError::NotFinite { name: "lm_head".to_owned() });
        }
        if scale.is_some() {
            sized(drows, gathered.len()).fill(0.0);
            self.norm.backward(pass, drows, dnormed, gathered);
            sized(dstream, stream.len()).fill(0.0);
            for (values, &row) in drows.chunks_exact(c).zip(rows) {
                dstream[row * c..(row + 1) * c].copy_from_slice(values);
            }
        }
        Ok(losses)
    }

    /// Carries the stream's gradient down through the layers; adds to the adapter's gradients.
    pub(super) fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        workspace: &mut Workspace,
    ) -> Result<(), ModelError> {
        let Workspace { rope, layers, stream, dstream, scratch, recomputed, spare, .. } = workspace;
        let lowest = self.layers.iter().position(|layer| layer.is_adapted(pass)).unwrap_or(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            let below = if index == lowest { Below::Frozen } else { Below::Adapted };
            let saved = &mut layers[index];
            if index < *recomputed {
                saved.swap_all_but_input(spare);
                stream.copy_from_slice(&saved.input);
                layer.forward(pass, stream, scratch, &rope.table, saved, None);
            }
            layer.backward(pass, gradients, dstream, scratch, &rope.table, saved, below);
            if index < *recomputed {
                saved.swap_all_but_input(spare);
            }
            check_finite(dstream, || format!("gradient below model.layers.{index}"))?;
        }
        Ok(())
    }

    /// Logits (rows, V).
    pub(super) fn logits(&self, pass: &Pass<'_>, rows: &[usize], workspace: &mut Workspace) -> Vec<f32> {
        self.gather(pass, rows, &workspace.stream, &mut workspace.head);
        let mut logits = vec![0.0; rows.len() * self.head.rows];
        pass.backend.linear(&mut logits, &workspace.head.normed, &self.head, Write::Overwrite);
        logits
    }

    /// The stream before each layer and the normed stream after the last, of a pass that kept all layers.
    pub(super) fn hidden_states(
        &self,
        pass: &Pass<'_>,
        rows: &[usize],
        workspace: &mut Workspace,
    ) -> Vec<Vec<f32>> {
        self.gather(pass, rows, &workspace.stream, &mut workspace.head);
        let inputs = workspace.layers[..self.layers.len()].iter().map(|layer| layer.input.clone());
        inputs.chain([workspace.head.normed.clone()]).collect()
    }

    /// Copies `rows` of the stream together and norms them.
    fn gather(&self, pass: &Pass<'_>, rows: &[usize], stream: &[f32], head: &mut HeadBuffers) {
        let c = self.head.cols;
        let gathered = sized(&mut head.rows, rows.len() * c);
        for (values, &row) in gathered.chunks_exact_mut(c).zip(rows) {
            values.copy_from_slice(&stream[row * c..(row + 1) * c]);
        }
        self.norm.forward(pass, &mut head.normed, gathered);
    }
}

/// Whether anything below a layer needs the gradient of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Below {
    Frozen,
    Adapted,
}

impl Layer {
    fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        self.attention.linears().iter().chain(&self.mlp.linears()).any(|linear| linear.is_adapted(pass))
    }

    /// Advances the stream (T,C) by this layer.
    fn forward(
        &self,
        pass: &Pass<'_>,
        stream: &mut [f32],
        scratch: &mut Scratch,
        table: &RopeTable,
        saved: &mut LayerActivations,
        cache: Option<(&mut LayerCache, &[usize])>,
    ) {
        let Scratch { normed, dnormed: delta, wide, .. } = scratch;
        sized(&mut saved.input, stream.len()).copy_from_slice(stream);
        self.attention_norm.forward(pass, normed, stream);
        self.attention.forward(pass, delta, normed, table, &mut saved.attention, cache);
        pass.backend.add(stream, delta);
        sized(&mut saved.middle, stream.len()).copy_from_slice(stream);
        self.mlp_norm.forward(pass, normed, stream);
        self.mlp.forward(pass, delta, normed, wide, &mut saved.mlp);
        pass.backend.add(stream, delta);
    }

    /// Turns the gradient of the layer's output (T,C) into that of its input, unless all below is frozen.
    fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        dstream: &mut [f32],
        scratch: &mut Scratch,
        table: &RopeTable,
        saved: &mut LayerActivations,
        below: Below,
    ) {
        let attention_adapted = self.attention.linears().iter().any(|linear| linear.is_adapted(pass));
        let needs_middle = below == Below::Adapted || attention_adapted;
        self.mlp_norm.forward(pass, &mut scratch.normed, &saved.middle);
        self.mlp.backward(pass, gradients, scratch, dstream, &mut saved.mlp, needs_middle);
        if !needs_middle {
            return;
        }
        self.mlp_norm.backward(pass, dstream, &scratch.dnormed, &saved.middle);
        self.attention_norm.forward(pass, &mut scratch.normed, &saved.input);
        let needs_input = below == Below::Adapted;
        self.attention.backward(pass, gradients, scratch, dstream, table, &saved.attention, needs_input);
        if needs_input {
            self.attention_norm.backward(pass, dstream, &scratch.dnormed, &saved.input);
        }
    }

    /// The name of what first went wrong in a layer whose output is not finite.
    fn first_not_finite(&self, saved: &LayerActivations) -> String {
        let (attention, mlp) = (&saved.attention, &saved.mlp);
        let parts = [
            (&self.attention.q, &attention.q),
            (&self.attention.k, &attention.k),
            (&self.attention.v, &attention.v),
            (&self.attention.o, &saved.middle),
            (&self.mlp.gate, &mlp.gate),
            (&self.mlp.up, &mlp.up),
        ];
        let bad = parts.into_iter().find(|(_, values)| !is_finite(values));
        bad.map_or(&self.mlp.down, |(linear, _)| linear).name.clone()
    }
}

fn check_finite(values: &[f32], name: impl FnOnce() -> String) -> Result<(), ModelError> {
    if is_finite(values) { Ok(()) } else { Err(ModelError::NotFinite { name: name() }) }
}

/// Looks at exponents only, which vectorises.
fn is_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    let full = |value: &f32| value.to_bits() & EXPONENT == EXPONENT;
    values.chunks(1024).all(|chunk| !chunk.iter().fold(false, |any, value| any | full(value)))
}
