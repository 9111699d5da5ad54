//! LoRA adapters: which linear layers get a pair of thin matrices, their values, their gradients. Knows the
//! names and shapes of a model's linear layers and nothing else of the model; PEFT's files are in `peft`.
//!
//! Modules and their tensors stand in the model's order (layer by layer; A before B), and that order is the
//! order of every iteration, so optimizer state and gradients line up by position.

use std::path::PathBuf;

use thiserror::Error;

use crate::backend::{Lora, LoraGradient};
use crate::model::Model;

mod init;
mod peft;
mod targets;

pub use targets::Targets;

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
    #[error("`{path}` sets `{key}` to `{value}`, which is not supported; only plain LoRA is")]
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
    rank: usize,
    alpha: f32,
    rslora: bool,
    linears: Vec<LinearName>,
    /// Of each linear layer, its module.
    slots: Vec<Option<usize>>,
    modules: Vec<Module>,
}

/// The pair of matrices at one linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// The layer's full name, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// (R, in)
    pub a: Vec<f32>,
    /// (out, R)
    pub b: Vec<f32>,
}

impl Adapter {
    /// A fresh adapter for `model`: A uniform in ±1/sqrt(in), B zero, so it changes nothing yet.
    ///
    /// # Errors
    /// A target that matches nothing, or a rank that does not fit.
    pub fn new(model: &Model, config: &LoraConfig) -> Result<Self, AdapterError> {
        Self::for_linears(model.linear_names(), config)
    }

    /// As [`Adapter::new`], from the names and shapes of the linear layers.
    ///
    /// # Errors
    /// As [`Adapter::new`].
    pub fn for_linears(linears: Vec<LinearName>, config: &LoraConfig) -> Result<Self, AdapterError> {
        let chosen = config.targets.choose(&linears)?;
        let mut adapter = Self::zeros(linears, &chosen, config.rank, config.alpha, config.rslora)?;
        for module in &mut adapter.modules {
            init::uniform(&mut module.a, config.rank, config.seed, &module.name);
        }
        Ok(adapter)
    }

    /// An adapter of zeros at the `chosen` linear layers.
    fn zeros(
        linears: Vec<LinearName>,
        chosen: &[bool],
        rank: usize,
        alpha: f32,
        rslora: bool,
    ) -> Result<Self, AdapterError> {
        let (mut slots, mut modules) = (vec![None; linears.len()], Vec::new());
        for (index, (name, out, input)) in linears.iter().enumerate().filter(|(index, _)| chosen[*index]) {
            if rank == 0 || rank > *out.min(input) {
                return Err(AdapterError::Rank { rank, module: name.clone(), out: *out, input: *input });
            }
            slots[index] = Some(modules.len());
            modules.push(Module { name: name.clone(), a: vec![0.0; rank * input], b: vec![0.0; out * rank] });
        }
        if modules.is_empty() {
            return Err(AdapterError::NoTarget);
        }
        Ok(Self { rank, alpha, rslora, linears, slots, modules })
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What the update is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        if self.rslora { self.alpha / rank.sqrt() } else { self.alpha / rank }
    }

    /// The adapted modules, in the model's order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.modules.iter().map(|module| module.a.len() + module.b.len()).sum()
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
        self.modules.iter().flat_map(|module| {
            [(peft::key(&module.name, 'A'), &module.a[..]), (peft::key(&module.name, 'B'), &module.b)]
        })
    }

    /// As [`Adapter::parameters`], to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        self.modules.iter_mut().flat_map(|module| {
            let Module { name, a, b } = module;
            [(peft::key(name, 'A'), &mut a[..]), (peft::key(name, 'B'), &mut b[..])]
        })
    }

    /// Whether this adapter was made for a model with these linear layers.
    pub(crate) fn fits(&self, linears: &[LinearName]) -> bool {
        self.linears == linears
    }

    /// The pair at linear layer `index`, if it is adapted.
    pub(crate) fn lora(&self, index: usize) -> Option<Lora<'_>> {
        let module = &self.modules[self.slots[index]?];
        Some(Lora { a: &module.a, b: &module.b, rank: self.rank, scale: self.scale() })
    }
}

/// Gradients of an adapter's tensors, in the same order and shapes.
#[derive(Debug, Clone)]
pub struct Gradients {
    slots: Vec<Option<usize>>,
    modules: Vec<Module>,
}

impl Gradients {
    /// Zero gradients for `adapter`.
    pub fn new(adapter: &Adapter) -> Self {
        let mut gradients = Self { slots: adapter.slots.clone(), modules: adapter.modules.clone() };
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
        self.modules.iter().flat_map(|module| {
            [(peft::key(&module.name, 'A'), &module.a[..]), (peft::key(&module.name, 'B'), &module.b)]
        })
    }

    /// As [`Gradients::tensors`], to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (String, &mut [f32])> {
        self.modules.iter_mut().flat_map(|module| {
            let Module { name, a, b } = module;
            [(peft::key(name, 'A'), &mut a[..]), (peft::key(name, 'B'), &mut b[..])]
        })
    }

    /// Whether these are gradients of `adapter`.
    pub(crate) fn fit(&self, adapter: &Adapter) -> bool {
        self.slots == adapter.slots
            && self.modules.iter().zip(&adapter.modules).all(|(own, other)| own.a.len() == other.a.len())
    }

    /// The gradient of the pair at linear layer `index`.
    pub(crate) fn lora(&mut self, index: usize) -> Option<LoraGradient<'_>> {
        let module = &mut self.modules[self.slots[index]?];
        Some(LoraGradient { da: &mut module.a, db: &mut module.b })
    }
}
