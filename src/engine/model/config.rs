//! A model's description: what is computed, in terms no family owns. A family (`families`) reads it from the
//! `config.json` of its `model_type` and writes it back; `assemble` builds blocks from it. Knows nothing of
//! weights; GGUF metadata is turned into this type by `format::gguf_model`.
//!
//! Both generations of field names are read: `rope_theta` + `rope_scaling` + `torch_dtype` of the Hub's files
//! and `rope_parameters` + `dtype` of transformers 5. The writer uses the old names, which every reader knows.

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::families;
use crate::backend::{Activation, LogitMap};

pub(super) mod fields;

use fields::{Fields, invalid, number, rope_scaling};

/// No dimension of a real model comes near these; beyond them a file is taken to be corrupt.
const DIMENSION_MAX: u64 = 1 << 24;
const LAYERS_MAX: u64 = 4096;

/// A decoder's description. Names follow Hugging Face's `config.json` where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type`: the family that reads and writes the description.
    pub model_type: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    /// What mixes the tokens of each layer.
    pub layers: Vec<Mixing>,
    pub rope: Rope,
    /// Of layers whose positions are [`Positions::Local`].
    pub local_rope: Option<Rope>,
    pub attention: AttentionOptions,
    /// Of layers that are [`Mixing::Mamba`].
    pub mamba: Option<MambaOptions>,
    pub mlp: MlpOptions,
    pub norms: NormOptions,
    /// Factor of the embeddings.
    pub embedding_multiplier: f32,
    /// Factor of what a block adds to the stream.
    pub residual_multiplier: f32,
    /// From the head's products to logits.
    pub logits: LogitMap,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a text.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// How a layer mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixing {
    /// Attention, to all earlier tokens or to the last `window` ones, itself included.
    Attention { window: Option<usize>, positions: Positions },
    /// Mamba2: a short convolution and a scan.
    Mamba,
}

/// The rotary positions of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// None.
    None,
    /// The model's rope.
    Global,
    /// The rope of sliding layers.
    Local,
}

/// What all attention layers of a model share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// Biases of q, k and v.
    pub input_bias: bool,
    /// Bias of o.
    pub output_bias: bool,
    /// RMS norms over each head of q and k, before rotation.
    pub head_norm: bool,
    /// Factor of the scores.
    pub scale: f32,
    /// Cap of the scores.
    pub softcap: Option<f32>,
}

/// The gated feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpOptions {
    pub activation: Activation,
    pub bias: bool,
    pub layout: MlpLayout,
}

/// The linear layers of the feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayout {
    /// `mlp.gate_proj`, `mlp.up_proj`, `mlp.down_proj`.
    Apart,
    /// `shared_mlp.input_linear`, gate above up, and `shared_mlp.output_linear`.
    Stacked,
}

/// Where the norms are and how their weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormOptions {
    /// Norms after attention and MLP too, before their results are added to the stream.
    pub sandwich: bool,
    /// The stored weights lack 1.
    pub offset: bool,
}

/// The Mamba2 block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MambaOptions {
    pub heads: usize,
    pub head_dim: usize,
    /// Groups of B and C; divides `heads`.
    pub groups: usize,
    /// Values of a state a channel.
    pub states: usize,
    /// Taps of the convolution.
    pub taps: usize,
    pub conv_bias: bool,
    /// Biases of in_proj and out_proj.
    pub proj_bias: bool,
    /// Limits of dt after its softplus.
    pub dt_limits: (f32, f32),
}

impl MambaOptions {
    /// Channels of x, z and y.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.states
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear { factor: f32 },
    /// Llama 3.1's bands.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: usize,
    },
}

/// A description that cannot be read or run.
#[derive(Debug, Error, PartialEq)]
pub enum ConfigError {
    #[error("not JSON: {cause}")]
    NotJson { cause: String },
    #[error("field `{field}` is missing")]
    Missing { field: String },
    #[error("field `{field}` is `{got}`, expected {expected}")]
    Invalid { field: String, got: String, expected: &'static str },
    #[error("model_type `{model_type}` is not supported yet; supported: {}", families::names())]
    UnsupportedModel { model_type: String },
    #[error("`{field}` of `{got}` is not supported yet; supported: {supported}")]
    Unsupported { field: String, got: String, supported: &'static str },
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| ConfigError::NotJson { cause: error.to_string() })?;
        let no_object = || ConfigError::NotJson { cause: "the top level is no object".to_owned() };
        Self::from_fields(value.as_object().ok_or_else(no_object)?)
    }

    /// Reads the fields of a `config.json`.
    pub(crate) fn from_fields(fields: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields(fields);
        let family = families::find(fields.text("model_type")?.unwrap_or_default())?;
        let config = (family.read)(&fields)?;
        config.validate()?;
        Ok(config)
    }

    /// What families read alike: a llama without biases. `gate` says how the family names the gate of its MLP
    /// and `width` is the field with the MLP's width. Ropes are left to the family.
    pub(super) fn plain(
        model_type: &str,
        fields: &Fields<'_>,
        gate: Gate,
        width: &str,
    ) -> Result<Self, ConfigError> {
        let hidden_size = fields.dimension("hidden_size")?;
        let num_attention_heads = fields.dimension("num_attention_heads")?;
        let head_dim = fields.dimension_or("head_dim", hidden_size / num_attention_heads)?;
        let layers = fields.dimension("num_hidden_layers")?;
        if layers as u64 > LAYERS_MAX {
            return Err(invalid("num_hidden_layers", &layers, "1 to 4096"));
        }
        Ok(Self {
            model_type: model_type.to_owned(),
            hidden_size,
            intermediate_size: fields.dimension(width)?,
            num_attention_heads,
            num_key_value_heads: fields.dimension_or("num_key_value_heads", num_attention_heads)?,
            head_dim,
            vocab_size: fields.dimension("vocab_size")?,
            max_position_embeddings: fields.dimension_or("max_position_embeddings", 2048)?,
            rms_norm_eps: fields.number_or("rms_norm_eps", 1e-6)?,
            layers: vec![Mixing::FULL; layers],
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            local_rope: None,
            attention: AttentionOptions::plain(head_dim),
            mamba: None,
            mlp: MlpOptions { activation: gate.read(fields)?, bias: false, layout: MlpLayout::Apart },
            norms: NormOptions { sandwich: false, offset: false },
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits: LogitMap::IDENTITY,
            tie_word_embeddings: fields.flag_or("tie_word_embeddings", gate == Gate::Gemma)?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
        })
    }

    /// Number of layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    /// Checks what every reader must hold: sane sizes, and heads that divide.
    pub fn validate(&self) -> Result<(), ConfigError> {
        families::find(&self.model_type)?;
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, size) in sizes {
            if size == 0 || size as u64 > DIMENSION_MAX {
                return Err(invalid(field, &size, "a positive whole number below 16777217"));
            }
        }
        if self.layers.is_empty() || self.layers.len() as u64 > LAYERS_MAX {
            return Err(invalid("num_hidden_layers", &self.layers.len(), "1 to 4096"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(invalid(
                "num_key_value_heads",
                &self.num_key_value_heads,
                "a divisor of num_attention_heads",
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", &self.head_dim, "an even number"));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Err(invalid("rms_norm_eps", &self.rms_norm_eps, "a number from 0 to 1"));
        }
        self.validate_numbers()?;
        self.validate_layers()
    }

    fn validate_numbers(&self) -> Result<(), ConfigError> {
        let positive = [
            ("rope_theta", Some(self.rope.theta)),
            ("rope_local_base_freq", self.local_rope.as_ref().map(|rope| rope.theta)),
            ("attention scale", Some(self.attention.scale)),
            ("attention softcap", self.attention.softcap),
            ("embedding_multiplier", Some(self.embedding_multiplier)),
            ("residual_multiplier", Some(self.residual_multiplier)),
            ("logits_scaling", Some(self.logits.scale)),
            ("final_logit_softcapping", self.logits.softcap),
        ];
        for (field, value) in positive {
            if value.is_some_and(|value| !(value > 0.0 && value.is_finite())) {
                return Err(invalid(field, &value.unwrap_or_default(), "a positive number"));
            }
        }
        Ok(())
    }

    fn validate_layers(&self) -> Result<(), ConfigError> {
        for layer in &self.layers {
            match layer {
                Mixing::Attention { window: Some(0), .. } => {
                    return Err(invalid("sliding_window", &0, "a positive whole number"));
                }
                Mixing::Attention { positions: Positions::Local, .. } if self.local_rope.is_none() => {
                    return Err(ConfigError::Missing { field: "rope_local_base_freq".to_owned() });
                }
                Mixing::Attention { .. } => {}
                Mixing::Mamba => match &self.mamba {
                    None => return Err(ConfigError::Missing { field: "mamba_n_heads".to_owned() }),
                    Some(mamba) => mamba.validate()?,
                },
            }
        }
        Ok(())
    }

    /// The `config.json` other tools read. Keys are sorted, so equal descriptions give equal bytes.
    pub fn to_json(&self) -> Map<String, Value> {
        let family = families::find(&self.model_type).expect("a description has a family: `validate`");
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [only] => json!(only),
            several => json!(several),
        };
        let common = json!({
            "architectures": [family.architecture],
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": self.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers(),
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": number(self.rms_norm_eps),
            "rope_scaling": rope_scaling(&self.rope),
            "rope_theta": number(self.rope.theta),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        let own = (family.write)(self);
        let (Value::Object(mut map), Value::Object(own)) = (common, own) else {
            unreachable!("BUG: both are written as objects");
        };
        map.extend(own);
        map
    }

    /// The window of the layers that slide; null where none does.
    pub(super) fn sliding_window(&self) -> Option<usize> {
        self.layers.iter().find_map(|layer| match layer {
            Mixing::Attention { window, .. } => *window,
            Mixing::Mamba => None,
        })
    }

    /// The `layer_types` of transformers.
    pub(super) fn layer_types(&self) -> Vec<&'static str> {
        let kind = |layer: &Mixing| match layer {
            Mixing::Attention { window: Some(_), .. } => "sliding_attention",
            Mixing::Attention { window: None, .. } => "full_attention",
            Mixing::Mamba => "linear_attention",
        };
        self.layers.iter().map(kind).collect()
    }
}

impl Mixing {
    /// Attention to all earlier tokens, rotated.
    pub const FULL: Self = Self::Attention { window: None, positions: Positions::Global };
}

impl AttentionOptions {
    /// No biases, norms or caps; scores over the square root of the heads' size.
    pub fn plain(head_dim: usize) -> Self {
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self { input_bias: false, output_bias: false, head_norm: false, scale, softcap: None }
    }
}

impl MambaOptions {
    fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("mamba_n_heads", self.heads),
            ("mamba_d_head", self.head_dim),
            ("mamba_n_groups", self.groups),
            ("mamba_d_state", self.states),
        ];
        for (field, size) in sizes {
            if size == 0 || size as u64 > DIMENSION_MAX {
                return Err(invalid(field, &size, "a positive whole number below 16777217"));
            }
        }
        if self.conv_channels() as u64 > DIMENSION_MAX {
            return Err(invalid("mamba_d_state", &self.states, "fewer than 16777217 channels in all"));
        }
        if !self.heads.is_multiple_of(self.groups) {
            return Err(invalid("mamba_n_groups", &self.groups, "a divisor of mamba_n_heads"));
        }
        if !(2..=64).contains(&self.taps) {
            return Err(invalid("mamba_d_conv", &self.taps, "2 to 64"));
        }
        let (low, high) = self.dt_limits;
        if low < high { Ok(()) } else { Err(invalid("time_step_limit", &low, "a lower and an upper limit")) }
    }
}

/// How a family names the gate of its MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// `hidden_act`, silu unless it says otherwise.
    Silu,
    /// `hidden_activation` or `hidden_act`, always meaning gelu by tanh.
    Gemma,
}

impl Gate {
    fn read(self, fields: &Fields<'_>) -> Result<Activation, ConfigError> {
        let unsupported = fields::unsupported;
        match self {
            Self::Silu => match fields.text("hidden_act")? {
                None | Some("silu") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                Some(other) => Err(unsupported("hidden_act", &other, "silu, gelu_pytorch_tanh")),
            },
            // Early files of gemma say `gelu` and mean this; transformers reads them so too.
            Self::Gemma => match fields.text("hidden_activation")?.or(fields.text("hidden_act")?) {
                None | Some("gelu_pytorch_tanh" | "gelu") => Ok(Activation::GeluTanh),
                Some(other) => Err(unsupported("hidden_activation", &other, "gelu_pytorch_tanh")),
            },
        }
    }
}

/// The name of a gate in `config.json`.
pub(super) fn gate_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    }
}

#[cfg(test)]
mod tests;
