//! The llama family (Llama 3.x, TinyLlama, SmolLM2): RMS norms before attention and before a silu-gated MLP,
//! rotary positions, grouped heads, optional biases, an output layer that may share the embedding's weights.
//! This file is the map from tensor names to blocks and the check of every shape; the blocks compute.

use super::blocks::attention::Attention;
use super::blocks::linear::Linear;
use super::blocks::mlp::Mlp;
use super::blocks::norm::Norm;
use super::blocks::rope::Frequencies;
use super::decoder::{Decoder, Layer};
use super::{ModelConfig, ModelError, Tensors};
use crate::matrix::Matrix;

/// Linear layers of one decoder layer.
const LINEARS: usize = 7;

/// Assembles the decoder.
pub(super) fn decoder(config: &ModelConfig, tensors: &Tensors<'_>) -> Result<Decoder, ModelError> {
    check(config)?;
    let builder = Builder { config, tensors };
    let (vocabulary, c) = (config.vocab_size, config.hidden_size);
    let embedding = builder.matrix("model.embed_tokens.weight", vocabulary, c)?;
    let head = match config.tie_word_embeddings {
        true => embedding.clone(),
        false => builder.matrix("lm_head.weight", vocabulary, c)?,
    };
    let layers = (0..config.num_hidden_layers).map(|layer| builder.layer(layer)).collect::<Result<_, _>>()?;
    let norm = builder.norm("model.norm.weight")?;
    Ok(Decoder { embedding, layers, norm, head, rope: Frequencies::new(&config.rope, config.head_dim) })
}

fn check(config: &ModelConfig) -> Result<(), ModelError> {
    let bad = |field, value, reason| Err(ModelError::Config { field, value, reason });
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    for (field, value) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("vocab_size", config.vocab_size),
    ] {
        if value == 0 {
            return bad(field, value, "it must be at least 1");
        }
    }
    if !heads.is_multiple_of(kv_heads) {
        return bad("num_key_value_heads", kv_heads, "it must divide `num_attention_heads`");
    }
    if config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
        return bad("head_dim", config.head_dim, "rotary positions need a positive even number");
    }
    Ok(())
}

struct Builder<'a> {
    config: &'a ModelConfig,
    tensors: &'a Tensors<'a>,
}

impl Builder<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (c, i) = (config.hidden_size, config.intermediate_size);
        let (heads, kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (attention_bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        let prefix = format!("model.layers.{layer}");
        let linear = |place: usize, part: &str, out: usize, input: usize, bias: bool| {
            self.linear(format!("{prefix}.{part}"), layer * LINEARS + place, out, input, bias)
        };
        Ok(Layer {
            attention_norm: self.norm(&format!("{prefix}.input_layernorm.weight"))?,
            attention: Attention {
                q: linear(0, "self_attn.q_proj", heads * head_dim, c, attention_bias)?,
                k: linear(1, "self_attn.k_proj", kv_heads * head_dim, c, attention_bias)?,
                v: linear(2, "self_attn.v_proj", kv_heads * head_dim, c, attention_bias)?,
                o: linear(3, "self_attn.o_proj", c, heads * head_dim, attention_bias)?,
                heads,
                kv_heads,
                head_dim,
            },
            mlp_norm: self.norm(&format!("{prefix}.post_attention_layernorm.weight"))?,
            mlp: Mlp {
                gate: linear(4, "mlp.gate_proj", i, c, mlp_bias)?,
                up: linear(5, "mlp.up_proj", i, c, mlp_bias)?,
                down: linear(6, "mlp.down_proj", c, i, mlp_bias)?,
            },
        })
    }

    fn linear(
        &self,
        name: String,
        index: usize,
        out: usize,
        input: usize,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let weight = self.matrix(&format!("{name}.weight"), out, input)?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), out)?) } else { None };
        Ok(Linear { name, index, weight, bias })
    }

    fn norm(&self, name: &str) -> Result<Norm, ModelError> {
        Ok(Norm { weight: self.vector(name, self.config.hidden_size)?, epsilon: self.config.rms_norm_eps })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let matrix = (self.tensors.matrix)(name)?;
        match (matrix.rows, matrix.cols) == (rows, cols) {
            true => Ok(matrix),
            false => Err(shape_error(name, vec![matrix.rows, matrix.cols], vec![rows, cols])),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let vector = (self.tensors.vector)(name)?;
        match vector.len() == len {
            true => Ok(vector),
            false => Err(shape_error(name, vec![vector.len()], vec![len])),
        }
    }
}

fn shape_error(tensor: &str, got: Vec<usize>, expected: Vec<usize>) -> ModelError {
    ModelError::Shape { tensor: tensor.to_owned(), got, expected }
}
