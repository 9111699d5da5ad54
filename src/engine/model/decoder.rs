//! A stack of layers between an embedding and a head: the order of a pass, forward and back. Which blocks a
//! layer has is the family's business; what they compute is theirs.
//!
//! Only rows that need logits pass the final norm and the head. The backward stops where nothing below is
//! adapted.

use super::blocks::Pass;
use super::blocks::attention::Attention;
use super::blocks::linear::Linear;
use super::blocks::mamba::Mamba;
use super::blocks::mlp::Mlp;
use super::blocks::norm::Norm;
use super::blocks::residual::Residual;
use super::blocks::rope::{Frequencies, RopeBuffer};
use super::cache::{CacheLayout, Kept, KvCache, LayerCache};
use super::workspace::{HeadBuffers, LayerActivations, Scratch, Workspace};
use super::{ModelError, Pack};
use crate::adapter::{Gradients, StateSpace};
use crate::backend::{Backend, Buffer, Limits, LogitMap};
use crate::matrix::Matrix;

/// Embedding, layers, norm, head.
pub(super) struct Decoder {
    /// (V,C)
    pub(super) embedding: Matrix,
    pub(super) embedding_multiplier: f32,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    /// (V,C); the embedding itself where the model ties them.
    pub(super) head: Matrix,
    pub(super) logits: LogitMap,
    /// The model's rope, and that of local layers where there is one.
    pub(super) ropes: Vec<Frequencies>,
}

/// x += mixer(norm(x)); x += mlp(norm(x)).
pub(super) struct Layer {
    pub(super) around_mixer: Residual,
    pub(super) mixer: Mixer,
    pub(super) around_mlp: Residual,
    pub(super) mlp: Mlp,
}

/// What carries values from token to token.
#[allow(clippy::large_enum_variant, reason = "one a layer, made once")]
pub(super) enum Mixer {
    Attention(Attention),
    Mamba(Mamba),
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
    /// Refuses shapes beyond a backend's limits.
    pub(super) fn fits(&self, limits: &Limits) -> Result<(), ModelError> {
        let shapes = self.layers.iter().flat_map(|layer| match &layer.mixer {
            Mixer::Attention(attention) => vec![("head dimension", attention.head_dim, limits.head_dim)],
            Mixer::Mamba(mamba) => vec![
                ("number of states", mamba.options.states, limits.states),
                ("convolution's width", mamba.options.taps, limits.taps),
            ],
        });
        match shapes.into_iter().find(|(_, got, limit)| got > limit) {
            Some((what, got, limit)) => Err(ModelError::TooLarge { what, got, limit }),
            None => Ok(()),
        }
    }

    /// Brings the weights to where `backend` computes.
    pub(super) fn place(&mut self, backend: &dyn Backend, tied: bool) {
        backend.place_matrix(&mut self.embedding);
        match tied {
            true => self.head = self.embedding.clone(),
            false => backend.place_matrix(&mut self.head),
        }
        self.norm.place(backend);
        for Layer { around_mixer, mixer, around_mlp, mlp } in &mut self.layers {
            around_mixer.place(backend);
            around_mlp.place(backend);
            match mixer {
                Mixer::Attention(attention) => attention.place(backend),
                Mixer::Mamba(mamba) => mamba.place(backend),
            }
            mlp.place(backend);
        }
    }

    /// All linear layers, in the order of the forward pass.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears)
    }

    /// The constants of each Mamba layer.
    pub(super) fn state_spaces(&self) -> impl Iterator<Item = StateSpace> {
        self.layers.iter().filter_map(|layer| match &layer.mixer {
            Mixer::Attention(_) => None,
            Mixer::Mamba(mamba) => Some(mamba.state_space()),
        })
    }

    /// What decoding keeps of each layer.
    pub(super) fn kept(&self) -> impl Iterator<Item = Kept> {
        self.layers.iter().map(|layer| layer.mixer.kept())
    }

    /// Makes sure the ropes' tables cover all `positions`.
    pub(super) fn prepare(&self, backend: &dyn Backend, workspace: &mut Workspace, positions: &[usize]) {
        let ropes = &mut workspace.ropes;
        ropes.resize_with(ropes.len().max(self.ropes.len()), RopeBuffer::default);
        for (buffer, frequencies) in ropes.iter_mut().zip(&self.ropes) {
            buffer.prepare(backend, frequencies, positions);
        }
    }

    /// Runs `tokens` (T) through all layers; leaves the stream (T,C) in the workspace.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        tokens: &[u32],
        workspace: &mut Workspace,
        keep: Keep,
        mut cache: Option<(&mut KvCache, &CacheLayout)>,
    ) -> Result<(), ModelError> {
        let Workspace { ropes, layers, stream, scratch, recomputed, spare, .. } = workspace;
        pass.backend.embed(pass.sized(stream, tokens.len() * self.embedding.cols), &self.embedding, tokens);
        if self.embedding_multiplier != 1.0 {
            pass.backend.scale(stream, self.embedding_multiplier);
        }
        if let Some(noise) = &pass.noise {
            noise.add_to_embeddings(pass.backend, stream);
        }
        check_finite(pass, stream, || "model.embed_tokens".to_owned())?;
        let kept = if keep == Keep::All { self.layers.len() } else { 1 };
        layers.resize_with(layers.len().max(kept), LayerActivations::default);
        for (index, layer) in self.layers.iter().enumerate() {
            let saved = &mut layers[if keep == Keep::All { index } else { 0 }];
            let cache = cache.as_mut().map(|(cache, layout)| (&mut cache.layers[index], *layout));
            let passes_on = keep == Keep::All && index < *recomputed;
            if passes_on {
                saved.swap_all_but_input(spare);
            }
            layer.forward(pass, stream, scratch, ropes, saved, cache);
            check_finite(pass, stream, || layer.first_not_finite(pass, saved))?;
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
        self.gather(pass, rows, stream, head);
        let HeadBuffers { rows: gathered, normed, dnormed, drows, .. } = head;
        let targets: Vec<u32> = rows.iter().filter_map(|&row| pack.targets[row]).collect();
        let mut losses = vec![0.0; rows.len()];
        let gradient = scale.map(|scale| (pass.sized(dnormed, normed.len()), scale));
        let (head, map) = (&self.head, self.logits);
        pass.backend.cross_entropy(&mut losses, gradient, normed, &targets, head, map, &mut scratch.backend);
        if let Some(failure) = pass.backend.failure() {
            return Err(failure.into());
        }
        if losses.iter().any(|loss| !loss.is_finite()) {
            return Err(ModelError::NotFinite { name: "lm_head".to_owned() });
        }
        if scale.is_some() {
            pass.backend.clear(pass.sized(drows, gathered.len()));
            self.norm.backward(pass, drows, dnormed, gathered);
            pass.backend.clear(pass.sized(dstream, stream.len()));
            pass.backend.scatter_rows(dstream, drows, rows);
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
        let Workspace { ropes, layers, stream, dstream, dadded, scratch, recomputed, spare, .. } = workspace;
        let lowest = self.layers.iter().position(|layer| layer.is_adapted(pass)).unwrap_or(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            let below = if index == lowest { Below::Frozen } else { Below::Adapted };
            let saved = &mut layers[index];
            if index < *recomputed {
                saved.swap_all_but_input(spare);
                pass.backend.copy(stream, &saved.input);
                layer.forward(pass, stream, scratch, ropes, saved, None);
            }
            layer.backward(pass, gradients, (&mut *dstream, &mut *dadded), scratch, ropes, saved, below);
            if index < *recomputed {
                saved.swap_all_but_input(spare);
            }
            check_finite(pass, dstream, || format!("gradient below model.layers.{index}"))?;
        }
        Ok(())
    }

    /// Logits (rows, V), in the workspace.
    pub(super) fn logits<'w>(
        &self,
        pass: &Pass<'_>,
        rows: &[usize],
        workspace: &'w mut Workspace,
    ) -> &'w mut [f32] {
        let Workspace { stream, head, .. } = workspace;
        self.gather(pass, rows, stream, head);
        let logits = pass.exact(&mut head.logits, rows.len() * self.head.rows);
        pass.backend.logits(logits, &head.normed, &self.head);
        pass.backend.map_logits(logits, self.logits);
        logits.fetch()
    }

    /// The stream before each layer and the normed stream after the last, of a pass that kept all layers.
    pub(super) fn hidden_states(
        &self,
        pass: &Pass<'_>,
        rows: &[usize],
        workspace: &mut Workspace,
    ) -> Vec<Vec<f32>> {
        self.gather(pass, rows, &workspace.stream, &mut workspace.head);
        let inputs = workspace.layers[..self.layers.len()].iter().map(|layer| layer.input.to_host());
        inputs.chain([workspace.head.normed.to_host()]).collect()
    }

    /// Copies `rows` of the stream together and norms them.
    fn gather(&self, pass: &Pass<'_>, rows: &[usize], stream: &Buffer, head: &mut HeadBuffers) {
        let c = self.head.cols;
        let gathered = pass.sized(&mut head.rows, rows.len() * c);
        pass.backend.gather_rows(gathered, stream, rows);
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
    pub(super) fn linears(&self) -> Vec<&Linear> {
        [self.mixer.linears(), self.mlp.linears()].concat()
    }

    fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        self.mixer.is_adapted(pass) || self.mlp.linears().iter().any(|linear| linear.is_adapted(pass))
    }

    /// Advances the stream (T,C) by this layer.
    fn forward(
        &self,
        pass: &Pass<'_>,
        stream: &mut Buffer,
        scratch: &mut Scratch,
        ropes: &[RopeBuffer],
        saved: &mut LayerActivations,
        cache: Option<(&mut LayerCache, &CacheLayout)>,
    ) {
        pass.backend.copy(pass.sized(&mut saved.input, stream.len()), stream);
        self.around_mixer.before.forward(pass, &mut scratch.normed, stream);
        self.mixer.forward(pass, scratch, ropes, saved, cache);
        self.around_mixer.add(pass, stream, &mut scratch.dnormed, &mut saved.mixed);
        pass.backend.copy(pass.sized(&mut saved.middle, stream.len()), stream);
        let Scratch { normed, dnormed: delta, wide, .. } = scratch;
        self.around_mlp.before.forward(pass, normed, stream);
        self.mlp.forward(pass, delta, normed, wide, &mut saved.mlp);
        self.around_mlp.add(pass, stream, delta, &mut saved.fed);
    }

    /// Turns the gradient of the layer's output (T,C) into that of its input, unless all below is frozen.
    fn backward(
        &self,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
        (dstream, dadded): (&mut Buffer, &mut Buffer),
        scratch: &mut Scratch,
        ropes: &[RopeBuffer],
        saved: &mut LayerActivations,
        below: Below,
    ) {
        let mixer_adapted = self.mixer.is_adapted(pass);
        let needs_middle = below == Below::Adapted || mixer_adapted;
        self.around_mlp.before.forward(pass, &mut scratch.normed, &saved.middle);
        let dy = self.around_mlp.add_backward(pass, dstream, dadded, &saved.fed);
        self.mlp.backward(pass, gradients, scratch, dy, &mut saved.mlp, needs_middle);
        if !needs_middle {
            return;
        }
        self.around_mlp.before.backward(pass, dstream, &scratch.dnormed, &saved.middle);
        self.around_mixer.before.forward(pass, &mut scratch.normed, &saved.input);
        let needs_input = below == Below::Adapted;
        let dy = self.around_mixer.add_backward(pass, dstream, dadded, &saved.mixed);
        match &self.mixer {
            Mixer::Attention(attention) => {
                attention.backward(pass, gradients, scratch, dy, ropes, &saved.attention, needs_input);
            }
            Mixer::Mamba(mamba) => {
                mamba.backward(pass, gradients, scratch, dy, &mut saved.mamba, needs_input);
            }
        }
        if needs_input {
            self.around_mixer.before.backward(pass, dstream, &scratch.dnormed, &saved.input);
        }
    }

    /// The name of what first went wrong in a layer whose output is not finite.
    fn first_not_finite(&self, pass: &Pass<'_>, saved: &LayerActivations) -> String {
        let (mut parts, last) = match &self.mixer {
            Mixer::Attention(attention) => (attention.outputs(&saved.attention), &attention.o),
            Mixer::Mamba(mamba) => (mamba.outputs(&saved.mamba), &mamba.out_proj),
        };
        parts.push((last, &saved.middle));
        parts.extend(self.mlp.outputs(&saved.mlp));
        let bad = parts.into_iter().find(|(_, values)| !pass.backend.is_finite(values));
        bad.map_or(&self.mlp.down, |(linear, _)| linear).name.clone()
    }
}

impl Mixer {
    fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Attention(attention) => attention.linears(),
            Self::Mamba(mamba) => mamba.linears(),
        }
    }

    fn is_adapted(&self, pass: &Pass<'_>) -> bool {
        match self {
            Self::Attention(attention) => attention.linears().iter().any(|linear| linear.is_adapted(pass)),
            Self::Mamba(mamba) => mamba.is_adapted(pass),
        }
    }

    fn kept(&self) -> Kept {
        match self {
            Self::Attention(attention) => Kept::Rows { width: attention.kv_heads * attention.head_dim },
            Self::Mamba(mamba) => {
                let (conv, scan) = mamba.state_sizes();
                Kept::States { conv, scan }
            }
        }
    }

    /// y (T,C) from `scratch.normed` (T,C), written to `scratch.dnormed`.
    fn forward(
        &self,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
        ropes: &[RopeBuffer],
        saved: &mut LayerActivations,
        cache: Option<(&mut LayerCache, &CacheLayout)>,
    ) {
        match (self, cache) {
            (Self::Attention(attention), cache) => {
                let cache = cache.map(|(cache, layout)| match cache {
                    LayerCache::Attention(keys) => (keys, layout),
                    LayerCache::Mamba(_) => unreachable!("BUG: the cache of another model"),
                });
                let Scratch { normed, dnormed: y, .. } = scratch;
                attention.forward(pass, y, normed, ropes, &mut saved.attention, cache);
            }
            (Self::Mamba(mamba), cache) => {
                let cache = cache.map(|(cache, layout)| match cache {
                    LayerCache::Mamba(state) => (state, layout),
                    LayerCache::Attention(_) => unreachable!("BUG: the cache of another model"),
                });
                mamba.forward(pass, scratch, &mut saved.mamba, cache);
            }
        }
    }
}

fn check_finite(pass: &Pass<'_>, values: &Buffer, name: impl FnOnce() -> String) -> Result<(), ModelError> {
    let finite = pass.backend.is_finite(values);
    if let Some(failure) = pass.backend.failure() {
        return Err(failure.into());
    }
    if finite { Ok(()) } else { Err(ModelError::NotFinite { name: name() }) }
}
