//! From a description to blocks: which tensors a model has, under Hugging Face's names and with which shapes, and
//! which block each goes to. The only list of tensors there is: `tensors` is the same walk with nothing read.

use std::cell::RefCell;

use super::ModelError;
use super::blocks::attention::{Attention, HeadNorms};
use super::blocks::linear::Linear;
use super::blocks::mamba::Mamba;
use super::blocks::mlp::{Gated, Mlp};
use super::blocks::norm::Norm;
use super::blocks::residual::Residual;
use super::blocks::rope::Frequencies;
use super::config::{MambaOptions, Mixing, MlpLayout, ModelConfig, Positions};
use super::decoder::{Decoder, Layer, Mixer};
use crate::adapter::rate;
use crate::backend::Buffer;
use crate::matrix::Matrix;

/// Gives tensors by Hugging Face's names, each checked to have the shape asked for.
pub(crate) trait TensorSource {
    /// The weight (rows, cols) of a linear layer.
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError>;
    /// An embedding or an output layer (rows, cols).
    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError>;
    /// Anything small, as f32.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError>;
}

/// A tensor that a model has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
    /// The weight of a linear layer, which adapters attach to.
    pub linear: bool,
}

/// Every tensor of a model, in the order it is assembled.
///
/// # Errors
/// The description makes no sense.
pub fn tensors(config: &ModelConfig) -> Result<Vec<TensorSpec>, ModelError> {
    let list = TensorList::default();
    decoder(config, &list)?;
    Ok(list.0.into_inner())
}

/// Full name, out features and in features of each linear layer of a model, as [`super::Model::linear_names`] has
/// them.
///
/// # Errors
/// The description makes no sense.
pub fn linears(config: &ModelConfig) -> Result<Vec<(String, usize, usize)>, ModelError> {
    let weights = tensors(config)?.into_iter().filter(|tensor| tensor.linear);
    let name = |name: String| name.strip_suffix(".weight").map_or(name.clone(), str::to_owned);
    Ok(weights.map(|TensorSpec { name: weight, shape, .. }| (name(weight), shape[0], shape[1])).collect())
}

/// Notes what is asked for and gives nothing.
#[derive(Default)]
struct TensorList(RefCell<Vec<TensorSpec>>);

impl TensorList {
    fn note(&self, name: &str, shape: &[usize], linear: bool) {
        let spec = TensorSpec { name: name.to_owned(), shape: shape.to_vec(), linear };
        self.0.borrow_mut().push(spec);
    }
}

impl TensorSource for TensorList {
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        self.note(name, &[rows, cols], true);
        Ok(Matrix::from_f32(0, 0, &[]))
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        self.note(name, &[rows, cols], false);
        Ok(Matrix::from_f32(0, 0, &[]))
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.note(name, shape, false);
        Ok(Vec::new())
    }
}

/// Assembles the decoder.
pub(super) fn decoder(config: &ModelConfig, source: &dyn TensorSource) -> Result<Decoder, ModelError> {
    config.validate()?;
    let mut builder = Builder { config, source, linears: 0, mambas: 0 };
    let (vocabulary, c) = (config.vocab_size, config.hidden_size);
    let embedding = source.table("model.embed_tokens.weight", vocabulary, c)?;
    let layers = config.layers.iter().enumerate();
    let layers = layers.map(|(index, mixing)| builder.layer(index, mixing)).collect::<Result<_, _>>()?;
    let norm = builder.norm("model.norm.weight", c)?;
    let head = match config.tie_word_embeddings {
        true => embedding.clone(),
        false => source.table("lm_head.weight", vocabulary, c)?,
    };
    let ropes = [Some(&config.rope), config.local_rope.as_ref()];
    Ok(Decoder {
        embedding,
        embedding_multiplier: config.embedding_multiplier,
        layers,
        norm,
        head,
        logits: config.logits,
        ropes: ropes.into_iter().flatten().map(|rope| Frequencies::new(rope, config.head_dim)).collect(),
    })
}

struct Builder<'a> {
    config: &'a ModelConfig,
    source: &'a dyn TensorSource,
    /// Linear layers so far.
    linears: usize,
    /// Mamba layers so far.
    mambas: usize,
}

impl Builder<'_> {
    fn layer(&mut self, index: usize, mixing: &Mixing) -> Result<Layer, ModelError> {
        let prefix = format!("model.layers.{index}");
        let norms = match self.config.norms.sandwich {
            false => [Some("input_layernorm"), None, Some("post_attention_layernorm"), None],
            true => [
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ],
        };
        let c = self.config.hidden_size;
        let norm = |name: Option<&str>| {
            name.map(|name| self.norm(&format!("{prefix}.{name}.weight"), c)).transpose()
        };
        let [before_mixer, after_mixer, before_mlp, after_mlp] = norms.map(norm);
        let multiplier = self.config.residual_multiplier;
        let residual = |before: Option<Norm>, after| Residual {
            before: before.expect("BUG: every block has a norm before it"),
            after,
            multiplier,
        };
        let around_mixer = residual(before_mixer?, after_mixer?);
        let around_mlp = residual(before_mlp?, after_mlp?);
        let mixer = match mixing {
            Mixing::Attention { window, positions } => {
                Mixer::Attention(self.attention(&format!("{prefix}.self_attn"), *window, *positions)?)
            }
            Mixing::Mamba => {
                let options = self.config.mamba.expect("`validate` saw the options of mamba");
                Mixer::Mamba(self.mamba(&format!("{prefix}.mamba"), options)?)
            }
        };
        Ok(Layer { around_mixer, mixer, around_mlp, mlp: self.mlp(&prefix)? })
    }

    fn attention(
        &mut self,
        prefix: &str,
        window: Option<usize>,
        positions: Positions,
    ) -> Result<Attention, ModelError> {
        let config = self.config;
        let (c, heads, kv_heads, head_dim) =
            (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let options = config.attention;
        let mut linear =
            |name: &str, out, input, bias| self.linear(format!("{prefix}.{name}"), out, input, bias);
        Ok(Attention {
            q: linear("q_proj", heads * head_dim, c, options.input_bias)?,
            k: linear("k_proj", kv_heads * head_dim, c, options.input_bias)?,
            v: linear("v_proj", kv_heads * head_dim, c, options.input_bias)?,
            o: linear("o_proj", c, heads * head_dim, options.output_bias)?,
            norms: match options.head_norm {
                false => None,
                true => Some(HeadNorms {
                    q: self.norm(&format!("{prefix}.q_norm.weight"), head_dim)?,
                    k: self.norm(&format!("{prefix}.k_norm.weight"), head_dim)?,
                }),
            },
            heads,
            kv_heads,
            head_dim,
            rope: match positions {
                Positions::None => None,
                Positions::Global => Some(0),
                Positions::Local => Some(1),
            },
            scale: options.scale,
            softcap: options.softcap,
            window,
        })
    }

    fn mamba(&mut self, prefix: &str, options: MambaOptions) -> Result<Mamba, ModelError> {
        let (c, inner, channels) = (self.config.hidden_size, options.inner(), options.conv_channels());
        let projected = inner + channels + options.heads;
        let in_proj = self.linear(format!("{prefix}.in_proj"), projected, c, options.proj_bias)?;
        let values = |name: &str, shape: &[usize]| self.source.values(&format!("{prefix}.{name}"), shape);
        let conv_weight = values("conv1d.weight", &[channels, 1, options.taps])?.into();
        let conv_bias = match options.conv_bias {
            true => values("conv1d.bias", &[channels])?.into(),
            false => Buffer::zeros(channels),
        };
        let a_log = values("A_log", &[options.heads])?;
        let (rate, a_log) = (rate(&a_log).into(), a_log.into());
        let dt_bias = values("dt_bias", &[options.heads])?.into();
        let skip = values("D", &[options.heads])?.into();
        let weight = values("norm.weight", &[inner])?.into();
        let group = inner / options.groups;
        let norm = Norm { weight, group, epsilon: self.config.rms_norm_eps };
        let out_proj = self.linear(format!("{prefix}.out_proj"), c, inner, options.proj_bias)?;
        self.mambas += 1;
        let (name, index) = (prefix.to_owned(), self.mambas - 1);
        Ok(Mamba {
            name,
            index,
            options,
            in_proj,
            conv_weight,
            conv_bias,
            dt_bias,
            a_log,
            rate,
            skip,
            norm,
            out_proj,
        })
    }

    fn mlp(&mut self, prefix: &str) -> Result<Mlp, ModelError> {
        let (c, i) = (self.config.hidden_size, self.config.intermediate_size);
        let options = self.config.mlp;
        let mut linear =
            |name: &str, out, input| self.linear(format!("{prefix}.{name}"), out, input, options.bias);
        let gated = match options.layout {
            MlpLayout::Apart => {
                Gated::Apart { gate: linear("mlp.gate_proj", i, c)?, up: linear("mlp.up_proj", i, c)? }
            }
            MlpLayout::Stacked => Gated::Stacked(linear("shared_mlp.input_linear", 2 * i, c)?),
        };
        let down = match options.layout {
            MlpLayout::Apart => linear("mlp.down_proj", c, i)?,
            MlpLayout::Stacked => linear("shared_mlp.output_linear", c, i)?,
        };
        Ok(Mlp { gated, down, activation: options.activation })
    }

    fn linear(&mut self, name: String, out: usize, input: usize, bias: bool) -> Result<Linear, ModelError> {
        let weight = self.source.linear(&format!("{name}.weight"), out, input)?;
        let bias = match bias {
            true => Some(self.source.values(&format!("{name}.bias"), &[out])?.into()),
            false => None,
        };
        self.linears += 1;
        Ok(Linear { name, index: self.linears - 1, weight, bias })
    }

    fn norm(&self, name: &str, len: usize) -> Result<Norm, ModelError> {
        let mut weight = self.source.values(name, &[len])?;
        if self.config.norms.offset {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(Norm { weight: weight.into(), group: len, epsilon: self.config.rms_norm_eps })
    }
}
