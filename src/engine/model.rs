//! What a model is: its description and its blocks. To be completed.

pub mod config;

pub use config::{ModelConfig, Rope, RopeScaling};
