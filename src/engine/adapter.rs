//! LoRA adapters: which linear layers get a pair of thin matrices, their values, their gradients. Knows the
//! names and shapes of a model's linear layers and nothing else of the model; PEFT's files are in `peft`.
//!
//! Modules and their tensors stand in the model's order (layer by layer; A before B), and that order is the
//! order of every iteration, so optimizer state and gradients line up by position.

use std::collections::BTreeMap;
use std::path::PathBuf;

use thiserror::Error;

use crate::backend::{Buffer, Lora, LoraGradient};
use crate::model::Model;

mod contents;
mod init;
mod magnitude;
mod peft;
mod placed;
mod state_space;
mod targets;

pub use contents::AdapterContents;
pub use state_space::StateSpace;
pub(crate) use state_space::rate;
pub use targets::Targets;

use magnitude::Norms;
use placed::Placed;

/// What adapter to make.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// R, at least 1 and at most the smaller side of each adapted weight.
    pub rank: usize,
    /// Scale of the update, divided by the rank (or its root).
    pub alpha: f32,
    /// Which linear layers are adapted.
    pub targets: Targets,
    /// alpha / sqrt(R) instead of alpha / R.
    pub rslora: bool,
    /// Seed of A's initial values.
    pub seed: u64,
    /// DoRA: the row norms of the adapted weights are trained apart from their directions.
    pub dora: bool,
    /// Share of a pair's inputs that a training pass drops, in [0, 1).
    pub dropout: f32,
    /// Train the constants of Mamba layers (A_log, D, dt_bias) too.
    pub train_ssm: bool,
    /// Other ranks by module, as PEFT's `rank_pattern`: a key is a regular expression that the end of a module's
    /// name, from a `.` on, matches as a whole. The first key in order wins; each must match an adapted module.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other alphas by module, keyed as `rank_pattern` is.
    pub alpha_pattern: BTreeMap<String, f32>,
}

impl Default for LoraConfig {
    /// Rank 16, alpha 32, on every linear layer.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            targets: Targets::Auto,
            rslora: false,
            seed: 0,
            dora: false,
            dropout: 0.0,
            train_ssm: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// A linear layer of a model: its full name, out features, in features.
pub type LinearName = (String, usize, usize);

/// Why an adapter cannot be made, read or written.
#[derive(Debug, Error)]
pub enum AdapterError {
    /// A target names no linear layer.
    #[error("target `{target}` matches no linear layer; did you mean `{nearest}`? available: {available}")]
    UnknownTarget { target: String, nearest: String, available: String },
    /// No target at all.
    #[error("no linear layer is targeted; name some or use `all-linear`")]
    NoTarget,
    /// A target's regular expression is wrong.
    #[error("target expression `{expression}` is not a regular expression")]
    Expression { expression: String, source: regex::Error },
    /// There are no constants of a scan to train.
    #[error("`train_ssm` trains A_log, D and dt_bias of Mamba layers, and this model has none")]
    NoStateSpace,
    /// A key of a rank or alpha pattern matches no adapted layer.
    #[error("`{pattern}` names `{key}`, which matches no adapted layer; adapted: {adapted}")]
    UnmatchedPattern { pattern: &'static str, key: String, adapted: String },
    /// The rank does not fit a layer.
    #[error("rank {rank} does not fit `{module}` ({out}x{input}); it must be from 1 to {}", out.min(input))]
    Rank { rank: usize, module: String, out: usize, input: usize },
    /// A file cannot be read or written.
    #[error("adapter file failed")]
    Io(#[from] std::io::Error),
    /// `adapter_config.json` is not what PEFT writes.
    #[error("`{path}` is not an adapter configuration")]
    Config { path: PathBuf, source: serde_json::Error },
    /// `adapter_config.json` asks for something this engine does not compute.
    #[error("`{path}` sets `{key}` to `{value}`, which is not supported; LoRA, rsLoRA and DoRA are")]
    Unsupported { path: PathBuf, key: &'static str, value: String },
    /// `adapter_model.safetensors` is not a safetensors file, or cannot be written.
    #[error("`{path}` is not a valid safetensors file")]
    Tensors { path: PathBuf, source: safetensors::SafeTensorError },
    /// A tensor of the file belongs to no linear layer of this model.
    #[error(
        "`{path}` holds `{tensor}`, which fits no linear layer of this model; was it trained on another?"
    )]
    UnknownTensor { path: PathBuf, tensor: String },
    /// A module lacks one of its tensors, or a targeted module has none.
    #[error("`{path}` lacks `{tensor}`, so the adapter would apply only in part")]
    MissingTensor { path: PathBuf, tensor: String },
    /// A tensor has the wrong shape.
    #[error("`{tensor}` of `{path}` has shape {got:?}, expected {expected:?}")]
    Shape { path: PathBuf, tensor: String, got: Vec<usize>, expected: Vec<usize> },
    /// A tensor has a type other than f32, bf16 or f16.
    #[error("`{tensor}` of `{path}` is {dtype}; only f32, bf16 and f16 are read")]
    Dtype { path: PathBuf, tensor: String, dtype: String },
}

/// A LoRA adapter for one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    shape: Shape,
    linears: Vec<LinearName>,
    /// Of each linear layer, its module.
    slots: Vec<Option<usize>>,
    modules: Vec<Module>,
    /// One a Mamba layer, or none at all.
    state_spaces: Vec<StateSpace>,
    placed: Placed,
}

/// What decides an adapter's shapes and how it is computed with: all of its description but the values.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    rank: usize,
    alpha: f32,
    rslora: bool,
    dora: bool,
    dropout: f32,
    rank_pattern: BTreeMap<String, usize>,
    alpha_pattern: BTreeMap<String, f32>,
}

/// The pair of matrices at one linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// The layer's full name, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// R of this pair.
    pub rank: usize,
    /// What this pair's update is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA.
    pub scale: f32,
    /// (R, in)
    pub a: Buffer,
    /// (out, R)
    pub b: Buffer,
    /// DoRA's length of each row of the adapted weight (out).
    pub magnitude: Option<Buffer>,
    norms: Norms,
}

impl Adapter {
    /// A fresh adapter for `model`: A uniform in ±1/sqrt(in), B zero, DoRA's magnitudes the norms of the model's
    /// own rows, so it changes nothing yet.
    ///
    /// # Errors
    /// A target or pattern that matches nothing, or a rank that does not fit.
    pub fn new(model: &Model, config: &LoraConfig) -> Result<Self, AdapterError> {
        let mut adapter = Self::for_linears(model.linear_names(), config)?;
        for index in 0..adapter.slots.len() {
            let Some(slot) = adapter.slots[index] else { continue };
            if adapter.modules[slot].magnitude.is_some() {
                adapter.modules[slot].magnitude = Some(model.row_norms(&adapter, index).into());
            }
        }
        if config.train_ssm {
            adapter.state_spaces = model.state_spaces();
            if adapter.state_spaces.is_empty() {
                return Err(AdapterError::NoStateSpace);
            }
        }
        Ok(adapter)
    }

    /// As [`Adapter::new`], from the names and shapes of the linear layers; without the model's values, DoRA's
    /// magnitudes stay zero and the constants of Mamba layers are left out.
    ///
    /// # Errors
    /// As [`Adapter::new`].
    pub fn for_linears(linears: Vec<LinearName>, config: &LoraConfig) -> Result<Self, AdapterError> {
        let chosen = config.targets.choose(&linears)?;
        let shape = Shape {
            rank: config.rank,
            alpha: config.alpha,
            rslora: config.rslora,
            dora: config.dora,
            dropout: config.dropout,
            rank_pattern: config.rank_pattern.clone(),
            alpha_pattern: config.alpha_pattern.clone(),
        };
        let mut adapter = Self::zeros(linears, &chosen, shape)?;
        for module in &mut adapter.modules {
            init::uniform(&mut module.a, module.rank, config.seed, &module.name);
        }
        Ok(adapter)
    }

    /// An adapter of zeros at the `chosen` linear layers.
    fn zeros(linears: Vec<LinearName>, chosen: &[bool], shape: Shape) -> Result<Self, AdapterError> {
        let adapted: Vec<&str> = linears
            .iter()
            .zip(chosen)
            .filter(|(_, chosen)| **chosen)
            .map(|((name, ..), _)| &**name)
            .collect();
        let ranks = targets::by_pattern("rank_pattern", &shape.rank_pattern, &adapted)?;
        let alphas = targets::by_pattern("alpha_pattern", &shape.alpha_pattern, &adapted)?;
        let (mut slots, mut modules) = (vec![None; linears.len()], Vec::new());
        for (index, (name, out, input)) in linears.iter().enumerate().filter(|(index, _)| chosen[*index]) {
            let slot = modules.len();
            let rank = ranks[slot].unwrap_or(shape.rank);
            if rank == 0 || rank > *out.min(input) {
                return Err(AdapterError::Rank { rank, module: name.clone(), out: *out, input: *input });
            }
            let alpha = alphas[slot].unwrap_or(shape.alpha);
            slots[index] = Some(slot);
            modules.push(Module {
                name: name.clone(),
                rank,
                scale: if shape.rslora { alpha / (rank as f32).sqrt() } else { alpha / rank as f32 },
                a: Buffer::zeros(rank * input),
                b: Buffer::zeros(out * rank),
                magnitude: shape.dora.then(|| Buffer::zeros(*out)),
                norms: Norms::default(),
            });
        }
        if modules.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        Ok(Self { shape, linears, slots, modules, state_spaces: Vec::new(), placed: Placed::default() })
    }

    /// R of modules that no pattern names.
    pub fn rank(&self) -> usize {
        self.shape.rank
    }

    /// Share of a pair's inputs that a training pass drops, in [0, 1).
    pub fn dropout(&self) -> f32 {
        self.shape.dropout
    }

    /// The adapted modules, in the model's order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.parameters().map(|(_, values)| values.len()).sum()
    }

    /// Percentage of the model's linear weights (output layer aside) whose layer is adapted.
    pub fn adapted_percent(&self) -> f64 {
        let size = |(_, out, input): &LinearName| out * input;
        let all: usize = self.linears.iter().map(size).sum();
        let chosen = self.linears.iter().zip(&self.slots).filter(|(_, slot)| slot.is_some());
        100.0 * chosen.map(|(linear, _)| size(linear)).sum::<usize>() as f64 / all.max(1) as f64
    }

    /// Every trained tensor with its name in PEFT's file, in the stable order.
    pub fn parameters(&self) -> impl Iterator<Item = (String, &[f32])> {
        let constants = self.state_spaces.iter().flat_map(StateSpace::tensors);
        self.modules.iter().flat_map(Module::tensors).chain(constants)
    }

    /// The constants of each Mamba layer, where they are trained.
    pub fn state_spaces(&self) -> &[StateSpace] {
        &self.state_spaces
    }

    /// As [`Adapter::parameters`], to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        self.placed.forget();
        let constants = self.state_spaces.iter_mut().flat_map(StateSpace::tensors_mut);
        let pairs = self.modules.iter_mut().flat_map(|module| {
            module.norms.forget();
            module.tensors_mut()
        });
        pairs.chain(constants)
    }

    /// Whether this adapter was made for a model with these linear layers.
    pub(crate) fn fits(&self, linears: &[LinearName]) -> bool {
        self.linears == linears
    }

    /// Whether its constants, if it has any, are those of a model's Mamba layers.
    pub(crate) fn fits_state_spaces(&self, model: impl FnOnce() -> Vec<StateSpace>) -> bool {
        if self.state_spaces.is_empty() {
            return true;
        }
        let model = model();
        model.len() == self.state_spaces.len()
            && self.state_spaces.iter().zip(&model).all(|(own, other)| own.fits(other))
    }

    /// The constants of Mamba layer `index`, if they are trained.
    pub(crate) fn state_space(&self, index: usize) -> Option<&StateSpace> {
        self.state_spaces.get(index)
    }

    /// The pair at linear layer `index`, if it is adapted.
    pub(crate) fn lora(&self, index: usize) -> Option<Lora<'_>> {
        let module = &self.modules[self.slots[index]?];
        Some(Lora { a: &module.a, b: &module.b, rank: module.rank, scale: module.scale })
    }

    /// DoRA's magnitudes (out) at linear layer `index`, with the norms of the rows of W + scale·B·A, which
    /// `compute` gives when they are not known yet for the model with this number.
    pub(crate) fn dora(
        &self,
        index: usize,
        model: u64,
        compute: impl FnOnce() -> Vec<f32>,
    ) -> Option<(&Buffer, std::sync::Arc<[f32]>)> {
        let module = &self.modules[self.slots[index]?];
        let magnitude = module.magnitude.as_ref()?;
        Some((magnitude, module.norms.get(model, compute)))
    }
}

impl Module {
    /// A, B and perhaps the magnitudes.
    fn tensors(&self) -> impl Iterator<Item = (String, &[f32])> {
        let pair = [(peft::key(&self.name, 'A'), &self.a[..]), (peft::key(&self.name, 'B'), &self.b[..])];
        let magnitude = self.magnitude.as_deref().map(|values| (peft::magnitude_key(&self.name), values));
        pair.into_iter().chain(magnitude)
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        let Self { name, a, b, magnitude, .. } = self;
        let pair = [(peft::key(name, 'A'), &mut a[..]), (peft::key(name, 'B'), &mut b[..])];
        let magnitude = magnitude.as_deref_mut().map(|values| (peft::magnitude_key(name), values));
        pair.into_iter().chain(magnitude)
    }
}

/// Gradients of an adapter's tensors, in the same order and shapes.
#[derive(Debug, Clone)]
pub struct Gradients {
    slots: Vec<Option<usize>>,
    modules: Vec<Module>,
    state_spaces: Vec<StateSpace>,
}

impl Gradients {
    /// Zero gradients for `adapter`.
    pub fn new(adapter: &Adapter) -> Self {
        let mut gradients = Self {
            slots: adapter.slots.clone(),
            modules: adapter.modules.clone(),
            state_spaces: adapter.state_spaces.clone(),
        };
        gradients.zero();
        gradients
    }

    /// Sets all to 0.
    pub fn zero(&mut self) {
        for (_, values) in self.tensors_mut() {
            values.fill(0.0);
        }
    }

    /// The Euclidean norm over all tensors, summed in f64 in the stable order.
    pub fn norm(&self) -> f64 {
        let squares =
            |(_, values): (String, &[f32])| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
        self.tensors().map(squares).sum::<f64>().sqrt()
    }

    /// Multiplies all by `factor`.
    pub fn scale(&mut self, factor: f32) {
        for (_, values) in self.tensors_mut() {
            values.iter_mut().for_each(|value| *value *= factor);
        }
    }

    /// The name of the first tensor with a value that is infinite or not a number.
    pub fn first_not_finite(&self) -> Option<String> {
        self.tensors().find(|(_, values)| !values.iter().all(|value| value.is_finite())).map(|(name, _)| name)
    }

    /// Every tensor with its name, in the order of [`Adapter::parameters`].
    pub fn tensors(&self) -> impl Iterator<Item = (String, &[f32])> {
        let constants = self.state_spaces.iter().flat_map(StateSpace::tensors);
        self.modules.iter().flat_map(Module::tensors).chain(constants)
    }

    /// As [`Gradients::tensors`], to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        let constants = self.state_spaces.iter_mut().flat_map(StateSpace::tensors_mut);
        self.modules.iter_mut().flat_map(Module::tensors_mut).chain(constants)
    }

    /// Whether these are gradients of `adapter`.
    pub(crate) fn fit(&self, adapter: &Adapter) -> bool {
        self.slots == adapter.slots
            && self.modules.iter().zip(&adapter.modules).all(|(own, other)| {
                own.rank == other.rank && own.magnitude.is_some() == other.magnitude.is_some()
            })
            && self.state_spaces.len() == adapter.state_spaces.len()
            && self.state_spaces.iter().zip(&adapter.state_spaces).all(|(own, other)| own.fits(other))
    }

    /// The gradients of the constants of Mamba layer `index`.
    pub(crate) fn state_space(&mut self, index: usize) -> Option<&mut StateSpace> {
        self.state_spaces.get_mut(index)
    }

    /// The gradient of the pair at linear layer `index`.
    pub(crate) fn lora(&mut self, index: usize) -> Option<LoraGradient<'_>> {
        let module = &mut self.modules[self.slots[index]?];
        Some(LoraGradient { da: &mut module.a, db: &mut module.b })
    }

    /// The gradient of DoRA's magnitudes (out) at linear layer `index`.
    pub(crate) fn magnitude(&mut self, index: usize) -> Option<&mut Buffer> {
        self.modules[self.slots[index]?].magnitude.as_mut()
    }
}

#[cfg(test)]
mod tests;
