//! A language model ready to train an adapter on or to generate with: weights, description and backend. The
//! face of the room: [`Model`] decides what runs; `decoder` and `blocks` compute; `pack` says what goes in.
//! Knows nothing of optimizers, schedules, texts or sampling.
//!
//! ```text
//! Pack ──► embed ──► layer ──► … ──► layer ──► norm ──► head ──► loss      (backward runs the same way back)
//!                      └── blocks: norm, attention or mamba, norm, mlp, each linear with its LoRA pair
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::adapter::{Adapter, Gradients, StateSpace};
use crate::backend::{Backend, BackendKind, Compute, Span};
use crate::format::Checkpoint;
use crate::matrix::Matrix;

mod assemble;
mod blocks;
mod cache;
pub mod config;
mod cost;
mod decoder;
pub(crate) mod families;
mod noise;
mod pack;
mod workspace;

pub(crate) use assemble::TensorSource;
pub use assemble::{TensorSpec, linears, tensors};
use cache::CacheLayout;
pub use cache::KvCache;
pub use config::{
    AttentionOptions, MambaOptions, Mixing, MlpLayout, MlpOptions, ModelConfig, NormOptions, Positions, Rope,
    RopeScaling,
};
pub use noise::Noise;
pub use pack::{Pack, PackLoss, SequenceLoss};
pub use workspace::Workspace;

use blocks::Pass;
use decoder::{Decoder, Keep};
use noise::RowNoise;

/// Why a model cannot be opened or a pass cannot be computed.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The environment asks for a backend that is not here.
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
    /// The checkpoint cannot be read, or lacks a tensor.
    #[error(transparent)]
    Format(#[from] crate::format::FormatError),
    /// The description makes no sense, or is not of a supported family.
    #[error("the model's description: {0}")]
    Config(#[from] config::ConfigError),
    /// A tensor's shape contradicts the description.
    #[error("`{tensor}` has shape {got:?}, expected {expected:?} from the model's description")]
    Shape { tensor: String, got: Vec<usize>, expected: Vec<usize> },
    /// A token that the model has no embedding for.
    #[error(
        "token {token} is beyond the vocabulary of {vocabulary}; do tokenizer and model belong together?"
    )]
    Token { token: u32, vocabulary: usize },
    /// A row that the pack does not have.
    #[error("row {row} is beyond the pack's {tokens} tokens")]
    Row { row: usize, tokens: usize },
    /// The adapter was made for other linear layers.
    #[error("the adapter does not fit this model's linear layers")]
    AdapterMismatch,
    /// The gradients are those of another adapter.
    #[error("the gradients do not have the adapter's shapes")]
    GradientMismatch,
    /// The cache was made for another model or number of sequences.
    #[error("the cache holds {expected} sequences, got tokens for {got}")]
    CacheSequences { expected: usize, got: usize },
    /// More tokens than the cache has room for.
    #[error("sequence {sequence} would have {tokens} tokens, but the cache has room for {capacity}")]
    CacheFull { sequence: usize, tokens: usize, capacity: usize },
    /// Part of a sequence cannot be forgotten.
    #[error(
        "sequence {sequence} cannot go back to {len} tokens; hint: a model with Mamba layers forgets all or nothing"
    )]
    CacheKeepsNoPast { sequence: usize, len: usize },
    /// A shape that the backend has no kernels for.
    #[error("the model's {what} is {got}; on a GPU at most {limit} is computed; use `--device cpu`")]
    TooLarge { what: &'static str, got: usize, limit: usize },
    /// The device gave up.
    #[error(transparent)]
    Device(#[from] crate::backend::DeviceError),
    /// A value became infinite or not a number.
    #[error("`{name}` is not finite; lower the learning rate, or check the base model's weights")]
    NotFinite { name: String },
}

/// Weights, description and backend.
pub struct Model {
    config: ModelConfig,
    decoder: Decoder,
    backend: Arc<dyn Backend>,
    /// Unlike that of any other model of this process.
    number: u64,
}

static MODELS: AtomicU64 = AtomicU64::new(0);

impl Model {
    /// Opens a checkpoint (a folder or a file of any supported format).
    ///
    /// # Errors
    /// The checkpoint cannot be read or does not fit its own description.
    pub fn open(path: &Path, device: &Compute) -> Result<Self, ModelError> {
        Self::from_checkpoint(&Checkpoint::open(path)?, device)
    }

    /// The model of an open checkpoint.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, device: &Compute) -> Result<Self, ModelError> {
        Self::assemble(checkpoint.config().clone(), checkpoint, device)
    }

    /// A model from tensors read by name.
    pub(crate) fn assemble(
        config: ModelConfig,
        source: &dyn TensorSource,
        device: &Compute,
    ) -> Result<Self, ModelError> {
        let backend = device.backend()?;
        let mut decoder = assemble::decoder(&config, source)?;
        if let Some(limits) = backend.limits() {
            decoder.fits(&limits)?;
        }
        decoder.place(&*backend, config.tie_word_embeddings);
        let number = MODELS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { config, decoder, backend, number })
    }

    /// The model's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The numerics class: results of one class are equal bit for bit.
    pub fn numerics(&self) -> String {
        self.backend.numerics()
    }

    /// The kind of backend that computes.
    pub fn backend_kind(&self) -> BackendKind {
        self.backend.kind()
    }

    /// Full name, out features and in features of each linear layer an adapter can sit on, in the order of
    /// the forward pass.
    pub fn linear_names(&self) -> Vec<(String, usize, usize)> {
        self.decoder
            .linears()
            .map(|linear| (linear.name.clone(), linear.weight.rows, linear.weight.cols))
            .collect()
    }

    /// The constants of each Mamba layer's scan, in the order of the layers.
    pub fn state_spaces(&self) -> Vec<StateSpace> {
        self.decoder.state_spaces().collect()
    }

    /// Bytes of all weight matrices, and those of them that are pages of a file, read when first touched.
    pub(crate) fn weight_bytes(&self) -> (u64, u64) {
        let head = (!self.config.tie_word_embeddings).then_some(&self.decoder.head);
        let linears = self.decoder.linears().map(|linear| &linear.weight);
        let all = linears.chain([&self.decoder.embedding]).chain(head);
        all.fold((0, 0), |(size, mapped), matrix| {
            (size + matrix.size_bytes() as u64, mapped + matrix.mapped_bytes() as u64)
        })
    }

    /// The memory of the device that computes, where there is one.
    pub fn device_memory(&self) -> Option<crate::backend::DeviceMemory> {
        self.backend.device_memory()
    }

    /// Threads that compute.
    pub(crate) fn threads(&self) -> usize {
        match self.backend.kind() {
            BackendKind::Reference => 1,
            _ => self.inside(rayon::current_num_threads),
        }
    }

    /// ‖W + scale·B·A‖ of each row of linear layer `index` with the pair of `adapter`.
    pub(crate) fn row_norms(&self, adapter: &Adapter, index: usize) -> Vec<f32> {
        let linear = self.decoder.linears().nth(index).expect("BUG: the adapter is of another model");
        self.inside(|| linear.row_norms(&*self.backend, adapter))
    }

    /// [`Pack::new`], with what all sequences begin with only once where this model can: losses and gradients are
    /// those of [`Pack::new`] but for rounding. For passes without noise, whose numbers are of whole sequences.
    pub fn pack(&self, sequences: &[(&[u32], &[bool])]) -> Pack {
        // A Mamba layer's state would have to be handed from the beginning to every sequence.
        match self.config.layers.contains(&Mixing::Mamba) {
            true => Pack::new(sequences),
            false => Pack::sharing(sequences),
        }
    }

    /// Forward and backward over one pack: adds to `gradients` the gradient of `scale` * sum of the negative
    /// log-likelihoods of the supervised targets. The pack's noise applies here and in no other pass.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] names the first bad activation or gradient; the gradients are then useless.
    pub fn loss_and_gradients(
        &self,
        adapter: &Adapter,
        pack: &Pack,
        scale: f32,
        gradients: &mut Gradients,
        workspace: &mut Workspace,
    ) -> Result<PackLoss, ModelError> {
        self.check(Some(adapter), &pack.tokens)?;
        if !gradients.fit(adapter) {
            return Err(ModelError::GradientMismatch);
        }
        let rows = pack.supervised_rows();
        if rows.is_empty() {
            return Ok(PackLoss { nll: 0.0, supervised: 0 });
        }
        let losses = self.inside(|| {
            let (positions, spans) = pack.layout();
            self.decoder.prepare(&*self.backend, workspace, &positions);
            let here = adapter.placed(self.number, &*self.backend);
            let mut pass = self.pass(Some(&here), &positions, &spans);
            pass.noise = pack.noise.as_ref().map(|noise| RowNoise::new(noise, &pack.starts));
            self.decoder.forward(&pass, &pack.tokens, workspace, Keep::All, None)?;
            let losses = self.decoder.loss(&pass, pack, &rows, Some(scale), workspace)?;
            match self.backend.kind() {
                BackendKind::Cuda => {
                    let kept = workspace.gradients.take().filter(|kept| kept.fit(adapter));
                    let mut placed = kept.unwrap_or_else(|| Gradients::placed(adapter, &*self.backend));
                    placed.clear(&*self.backend);
                    self.decoder.backward(&pass, &mut placed, workspace)?;
                    gradients.add(&mut placed);
                    workspace.gradients = Some(placed);
                }
                _ => self.decoder.backward(&pass, gradients, workspace)?,
            }
            Ok::<_, ModelError>(losses)
        })?;
        if let Some(name) = gradients.first_not_finite() {
            return Err(ModelError::NotFinite { name: format!("gradient of {name}") });
        }
        Ok(PackLoss { nll: losses.iter().sum(), supervised: rows.len() })
    }

    /// The loss of each sequence of a pack; forward only.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`].
    pub fn loss(
        &self,
        adapter: Option<&Adapter>,
        pack: &Pack,
        workspace: &mut Workspace,
    ) -> Result<Vec<SequenceLoss>, ModelError> {
        let rows = pack.supervised_rows();
        self.forward_pack(adapter, pack, workspace, Keep::One)?;
        let losses = self.inside(|| {
            let pass = self.pass(None, &[], &[]);
            self.decoder.loss(&pass, pack, &rows, None, workspace)
        })?;
        Ok(pack.by_sequence(&rows, &losses))
    }

    /// Logits (rows, V) of the given rows of a pack.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`], and a row beyond the pack.
    pub fn logits(
        &self,
        adapter: Option<&Adapter>,
        pack: &Pack,
        rows: &[usize],
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>, ModelError> {
        if let Some(&row) = rows.iter().find(|row| **row >= pack.tokens.len()) {
            return Err(ModelError::Row { row, tokens: pack.tokens.len() });
        }
        self.forward_pack(adapter, pack, workspace, Keep::One)?;
        Ok(self.inside(|| self.decoder.logits(&self.pass(None, &[], &[]), rows, workspace).to_vec()))
    }

    /// The residual stream (T,C) before each layer, and last the normed stream before the head: what Hugging
    /// Face calls `hidden_states`.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`].
    pub fn hidden_states(
        &self,
        adapter: Option<&Adapter>,
        pack: &Pack,
        workspace: &mut Workspace,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.forward_pack(adapter, pack, workspace, Keep::All)?;
        let rows: Vec<usize> = (0..pack.tokens.len()).collect();
        Ok(self.inside(|| self.decoder.hidden_states(&self.pass(None, &[], &[]), &rows, workspace)))
    }

    /// An empty cache for `sequences` sequences of up to `capacity` tokens each.
    pub fn new_cache(&self, sequences: usize, capacity: usize) -> KvCache {
        self.new_cache_of(&vec![capacity; sequences])
    }

    /// An empty cache for one sequence of up to so many tokens for each of `capacities`.
    pub fn new_cache_of(&self, capacities: &[usize]) -> KvCache {
        KvCache::new(&self.backend, self.decoder.kept(), capacities)
    }

    /// Feeds new tokens to each sequence of the cache (many: prefill; one: a decoding step; none: the
    /// sequence stays as it is). Gives the logits (V) of the last fed token of each sequence that advanced.
    ///
    /// # Errors
    /// No room left, a token beyond the vocabulary, or a value that is not finite; the cache is then unchanged.
    pub fn extend(
        &self,
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        tokens: &[&[u32]],
        workspace: &mut Workspace,
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        let logits = self.extend_in_place(adapter, cache, tokens, workspace)?;
        let mut logits = logits.chunks_exact(self.config.vocab_size);
        let next = |fed: &&[u32]| if fed.is_empty() { None } else { logits.next().map(<[f32]>::to_vec) };
        Ok(tokens.iter().map(next).collect())
    }

    /// As [`Model::extend`], the logits (sequences that advanced, V) in the workspace.
    ///
    /// # Errors
    /// As [`Model::extend`].
    pub(crate) fn extend_in_place<'w>(
        &self,
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        tokens: &[&[u32]],
        workspace: &'w mut Workspace,
    ) -> Result<&'w mut [f32], ModelError> {
        let layout = self.forward_cached(adapter, cache, tokens, workspace)?;
        cache.advance(tokens);
        let rows = layout.last_rows();
        if rows.is_empty() {
            return Ok(&mut []);
        }
        Ok(self.inside(|| self.decoder.logits(&self.pass(None, &[], &[]), &rows, workspace)))
    }

    /// As [`Model::extend`], for tokens whose logits nobody wants.
    ///
    /// # Errors
    /// As [`Model::extend`].
    pub(crate) fn feed(
        &self,
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        tokens: &[&[u32]],
        workspace: &mut Workspace,
    ) -> Result<(), ModelError> {
        self.forward_cached(adapter, cache, tokens, workspace)?;
        cache.advance(tokens);
        Ok(())
    }

    /// The loss of the `continuations` of what each sequence of the cache holds, one a sequence, given as to
    /// [`Pack::new`]: (tokens, whether each is supervised). The sequences stay as they are.
    ///
    /// # Errors
    /// As [`Model::extend`].
    pub fn loss_after(
        &self,
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        continuations: &[(&[u32], &[bool])],
        workspace: &mut Workspace,
    ) -> Result<Vec<SequenceLoss>, ModelError> {
        let pack = Pack::new(continuations);
        let rows = pack.supervised_rows();
        if rows.is_empty() {
            return Ok(pack.by_sequence(&[], &[]));
        }
        let tokens: Vec<&[u32]> = continuations.iter().map(|(tokens, _)| *tokens).collect();
        self.forward_cached(adapter, cache, &tokens, workspace)?;
        let losses = self.inside(|| {
            let pass = self.pass(None, &[], &[]);
            self.decoder.loss(&pass, &pack, &rows, None, workspace)
        })?;
        Ok(pack.by_sequence(&rows, &losses))
    }

    /// Runs tokens on top of what the cache holds, whose sequences do not advance yet.
    fn forward_cached(
        &self,
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
        tokens: &[&[u32]],
        workspace: &mut Workspace,
    ) -> Result<CacheLayout, ModelError> {
        let layout = cache.layout(tokens)?;
        let fed: Vec<u32> = tokens.concat();
        self.check(adapter, &fed)?;
        if !fed.is_empty() {
            self.inside(|| {
                self.decoder.prepare(&*self.backend, workspace, &layout.positions);
                let here = adapter.map(|adapter| adapter.placed(self.number, &*self.backend));
                let pass = self.pass(here.as_deref(), &layout.positions, &layout.spans);
                self.decoder.forward(&pass, &fed, workspace, Keep::One, Some((cache, &layout)))
            })?;
        }
        Ok(layout)
    }

    fn forward_pack(
        &self,
        adapter: Option<&Adapter>,
        pack: &Pack,
        workspace: &mut Workspace,
        keep: Keep,
    ) -> Result<(), ModelError> {
        self.check(adapter, &pack.tokens)?;
        self.inside(|| {
            let (positions, spans) = pack.layout();
            self.decoder.prepare(&*self.backend, workspace, &positions);
            let here = adapter.map(|adapter| adapter.placed(self.number, &*self.backend));
            let pass = self.pass(here.as_deref(), &positions, &spans);
            self.decoder.forward(&pass, &pack.tokens, workspace, keep, None)
        })
    }

    fn pass<'a>(
        &'a self,
        adapter: Option<&'a Adapter>,
        positions: &'a [usize],
        spans: &'a [Span],
    ) -> Pass<'a> {
        Pass { backend: &*self.backend, adapter, positions, spans, noise: None, model: self.number }
    }

    fn check(&self, adapter: Option<&Adapter>, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.config.vocab_size;
        if let Some(&token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(ModelError::Token { token, vocabulary });
        }
        match adapter {
            Some(adapter)
                if !adapter.fits(&self.linear_names())
                    || !adapter.fits_state_spaces(|| self.state_spaces()) =>
            {
                Err(ModelError::AdapterMismatch)
            }
            _ => Ok(()),
        }
    }

    /// Runs `work` where the backend's operations start cheapest.
    fn inside<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let (mut work, mut result) = (Some(work), None);
        self.backend.enter(&mut || result = work.take().map(|work| work()));
        result.expect("the backend runs the work once")
    }
}

impl TensorSource for Checkpoint {
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let matrix = self.matrix(name)?;
        match (matrix.rows, matrix.cols) == (rows, cols) {
            true => Ok(matrix),
            false => Err(ModelError::Shape {
                tensor: name.to_owned(),
                got: vec![matrix.rows, matrix.cols],
                expected: vec![rows, cols],
            }),
        }
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        self.linear(name, rows, cols)
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            let expected = shape.to_vec();
            return Err(ModelError::Shape { tensor: name.to_owned(), got: tensor.shape, expected });
        }
        let mut values = vec![0.0; tensor.len()];
        tensor.decode_rows(0, &mut values);
        Ok(values)
    }
}

#[cfg(test)]
mod tests;
