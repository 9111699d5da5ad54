//! The QLoRA engine of tunesmith: reads base models, quantises them to NF4, trains LoRA adapters with
//! hand-written forward and backward passes, and generates text. It knows no manifest and no cache.
//!
//! Letters for dimensions, valid in the whole package: B batch (sequences), T tokens of a pack, C channels
//! (hidden size), H heads, D head dim, I intermediate size, V vocabulary, R LoRA rank. Matrices are
//! row-major; a linear layer's weight is (out, in), so y (T,out) = x (T,in) · Wᵀ. Gradients are `d` + name.
//!
//! ```text
//! tokenizer + template ──► trainer ──► model ──► backend ops ──► kernels
//!        format (GGUF, safetensors) ──► quant (NF4) ──► base folder ──► model
//! ```

#![allow(
    clippy::needless_range_loop,
    clippy::too_many_arguments,
    reason = "index loops and explicit shapes are clearer in numeric code"
)]

pub mod adapter;
pub mod backend;
pub mod base;
pub mod format;
pub mod generate;
pub mod matrix;
pub mod model;
pub mod optimizer;
pub mod process;
pub mod quant;
mod random;
pub mod tokenizer;
pub mod trainer;
