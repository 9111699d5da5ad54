//! What a model on disk is, from its description and the headers of its tensors: sizes, encodings, tokenizer, chat
//! template, what an adapter would sit on, and about how much memory training would take. Computes nothing with it
//! and shows nothing; knows no manifest.

use std::path::Path;

use serde::Serialize;
use tunesmith_engine::adapter::{Adapter, LoraConfig, Targets};
use tunesmith_engine::base::{self, BaseError, Quantize};
use tunesmith_engine::format::Checkpoint;
use tunesmith_engine::model::{Mixing, ModelConfig, Positions, Rope, RopeScaling, linears, tensors};
use tunesmith_engine::tokenizer::{Message, Tokenizer, TokenizerError};
use tunesmith_engine::trainer::{MemoryPlan, TrainError, TrainOptions};

/// Tokens of one training pass, as the `train` stage has it unless told otherwise.
const PASS_TOKENS: usize = 512;

/// A model.
#[derive(Debug, Serialize)]
pub(crate) struct ModelFacts {
    pub(crate) path: String,
    /// `GGUF` or `safetensors`.
    pub(crate) format: &'static str,
    /// `llama`.
    pub(crate) family: String,
    pub(crate) layers: usize,
    /// Of them, those with a Mamba mixer instead of attention.
    pub(crate) mamba_layers: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) attention_heads: usize,
    pub(crate) key_value_heads: usize,
    pub(crate) head_dim: usize,
    /// Tokens that layers with a sliding window see.
    pub(crate) sliding_window: Option<usize>,
    /// How positions are told, in words.
    pub(crate) positions: String,
    pub(crate) context_length: usize,
    pub(crate) vocabulary: usize,
    pub(crate) tied_embedding: bool,
    pub(crate) parameters: u64,
    pub(crate) linear_parameters: u64,
    /// How the tensors are stored, the most values first.
    pub(crate) encodings: Vec<EncodingFacts>,
    pub(crate) tokenizer: Option<TokenizerFacts>,
    /// Why there is no tokenizer, or why it does not belong to the model.
    pub(crate) tokenizer_problem: Option<String>,
    pub(crate) lora: LoraFacts,
    /// The plan of a run with the `train` stage's defaults, the linear layers in NF4.
    pub(crate) training_memory: MemoryPlan,
    /// Its sum.
    pub(crate) training_memory_bytes: u64,
}

/// Tensors of one encoding.
#[derive(Debug, Serialize)]
pub(crate) struct EncodingFacts {
    pub(crate) encoding: &'static str,
    pub(crate) tensors: usize,
    pub(crate) linear_tensors: usize,
    pub(crate) values: u64,
    pub(crate) bytes: u64,
}

/// A tokenizer and what its chat template does.
#[derive(Debug, Serialize)]
pub(crate) struct TokenizerFacts {
    /// `BPE`.
    pub(crate) kind: &'static str,
    pub(crate) tokens: usize,
    pub(crate) bos: Option<String>,
    /// Whether a text begins with it.
    pub(crate) adds_bos: bool,
    pub(crate) eos: Option<String>,
    pub(crate) pad: Option<String>,
    pub(crate) special_tokens: Vec<String>,
    pub(crate) chat_template: TemplateFacts,
}

/// What a chat template does with a short conversation.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TemplateFacts {
    pub(crate) present: bool,
    /// Why it cannot be rendered.
    pub(crate) failure: Option<String>,
    /// The tokens that end a learnt answer.
    pub(crate) closes_turns_with: Vec<String>,
    /// Why answers cannot be learnt with it.
    pub(crate) not_trainable: Option<String>,
    /// Whether it takes a system message.
    pub(crate) takes_system: bool,
    /// Whether every answer of a conversation can be learnt, not only the last.
    pub(crate) learns_every_answer: bool,
}

/// What LoRA would sit on.
#[derive(Debug, Serialize)]
pub(crate) struct LoraFacts {
    pub(crate) rank: usize,
    /// Share of the linear weights whose layer `targets: auto` adapts, in percent.
    pub(crate) auto_percent: f64,
    /// The same for q, k, v and o alone, which other tools take for granted; none for a model without them.
    pub(crate) attention_only_percent: Option<f64>,
    pub(crate) trained_values: usize,
    pub(crate) layers: Vec<TargetFacts>,
}

/// The linear layers of one name.
#[derive(Debug, Serialize)]
pub(crate) struct TargetFacts {
    pub(crate) name: String,
    pub(crate) count: usize,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// Of all linear weights.
    pub(crate) percent: f64,
}

/// A model that cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InspectError {
    #[error(transparent)]
    Format(#[from] tunesmith_engine::format::FormatError),
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Model(#[from] tunesmith_engine::model::ModelError),
    #[error(transparent)]
    Adapter(#[from] tunesmith_engine::adapter::AdapterError),
    #[error(transparent)]
    Memory(#[from] TrainError),
}

/// Describes the model at `path`: a GGUF file, a safetensors file or a Hugging Face folder.
pub(crate) fn model(path: &Path) -> Result<ModelFacts, InspectError> {
    let checkpoint = Checkpoint::open(path)?;
    let config = checkpoint.config();
    let outlook = base::outlook(&checkpoint, Quantize::Nf4)?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (tokenizer, tokenizer_problem) = match Tokenizer::open(path) {
        Ok(tokenizer) => {
            let problem = tokenizer.check_fits(config).err().map(|error| error.to_string());
            (Some(tokenizer_facts(&tokenizer)), problem)
        }
        Err(error) => (None, Some(error.to_string())),
    };
    let options = TrainOptions::new(LoraConfig::default());
    let memory = MemoryPlan::estimate(config, outlook.bytes, threads, PASS_TOKENS, &options)?;
    let window = |mixing: &Mixing| match mixing {
        Mixing::Attention { window, .. } => *window,
        Mixing::Mamba => None,
    };
    Ok(ModelFacts {
        path: path.display().to_string(),
        format: if path.extension().is_some_and(|extension| extension == "gguf") {
            "GGUF"
        } else {
            "safetensors"
        },
        family: config.model_type.clone(),
        layers: config.num_hidden_layers(),
        mamba_layers: config.layers.iter().filter(|mixing| **mixing == Mixing::Mamba).count(),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        attention_heads: config.num_attention_heads,
        key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        sliding_window: config.layers.iter().find_map(window),
        positions: positions(config),
        context_length: config.max_position_embeddings,
        vocabulary: config.vocab_size,
        tied_embedding: config.tie_word_embeddings,
        parameters: outlook.parameters,
        linear_parameters: outlook.linear_parameters,
        encodings: encodings(&checkpoint)?,
        tokenizer,
        tokenizer_problem,
        lora: lora(config)?,
        training_memory_bytes: memory.total(),
        training_memory: memory,
    })
}

fn positions(config: &ModelConfig) -> String {
    let rotated = |kind| {
        config
            .layers
            .iter()
            .any(|mixing| matches!(mixing, Mixing::Attention { positions, .. } if *positions == kind))
    };
    let ropes = [
        rotated(Positions::Global).then(|| rope(&config.rope)),
        config
            .local_rope
            .as_ref()
            .filter(|_| rotated(Positions::Local))
            .map(|local| format!("{} in sliding layers", rope(local))),
    ];
    let told: Vec<String> = ropes.into_iter().flatten().collect();
    if told.is_empty() { "none".to_owned() } else { told.join(", ") }
}

fn rope(rope: &Rope) -> String {
    let theta = rope.theta;
    match &rope.scaling {
        RopeScaling::None => format!("rope {theta}"),
        RopeScaling::Linear { factor } => format!("rope {theta}, scaled by {factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings: original, .. } => {
            format!("rope {theta}, scaled by {factor} as Llama 3's from {original} tokens")
        }
    }
}

fn encodings(checkpoint: &Checkpoint) -> Result<Vec<EncodingFacts>, InspectError> {
    let mut found: Vec<EncodingFacts> = Vec::new();
    for spec in tensors(checkpoint.config())? {
        let tensor = checkpoint.tensor(&spec.name)?;
        let encoding = tensor.data.encoding();
        let at = found.iter().position(|facts| facts.encoding == encoding).unwrap_or_else(|| {
            found.push(EncodingFacts { encoding, tensors: 0, linear_tensors: 0, values: 0, bytes: 0 });
            found.len() - 1
        });
        let facts = &mut found[at];
        facts.tensors += 1;
        facts.linear_tensors += usize::from(spec.linear);
        facts.values += tensor.len() as u64;
        facts.bytes += tensor.data.size_bytes() as u64;
    }
    found.sort_by_key(|facts| (std::cmp::Reverse(facts.values), facts.encoding));
    Ok(found)
}

fn tokenizer_facts(tokenizer: &Tokenizer) -> TokenizerFacts {
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    TokenizerFacts {
        kind: tokenizer.kind(),
        tokens: tokenizer.vocab_size(),
        bos: name(tokenizer.bos_id()),
        adds_bos: tokenizer.adds_bos(),
        eos: name(tokenizer.eos_id()),
        pad: name(tokenizer.pad_id()),
        special_tokens: tokenizer.specials().map(|(_, token)| token).collect(),
        chat_template: template_facts(tokenizer),
    }
}

/// Tries the template on a question, an answer, and another round.
fn template_facts(tokenizer: &Tokenizer) -> TemplateFacts {
    let mut facts =
        TemplateFacts { present: tokenizer.chat_template().is_some(), ..TemplateFacts::default() };
    if !facts.present {
        return facts;
    }
    let turn = [Message::new("user", "What is six times seven?"), Message::new("assistant", "Forty-two.")];
    facts.failure = tokenizer.render(&turn, false).err().map(|error| match error {
        TokenizerError::Template { cause } => cause,
        other => other.to_string(),
    });
    let system = [Message::new("system", "Be brief."), turn[0].clone()];
    facts.takes_system = tokenizer.render(&system, true).is_ok_and(|text| text.contains("Be brief."));
    match tokenizer.pieces(&turn) {
        Ok(pieces) => {
            let last = pieces.iter().rfind(|piece| piece.supervised);
            facts.closes_turns_with = last.map(|piece| piece.text.clone()).into_iter().collect();
        }
        Err(error) => facts.not_trainable = Some(error.to_string()),
    }
    facts.learns_every_answer = tokenizer.supervise(&[turn.clone(), turn].concat()).is_ok();
    facts
}

fn lora(config: &ModelConfig) -> Result<LoraFacts, InspectError> {
    let linears = linears(config)?;
    let all: usize = linears.iter().map(|(_, out, input)| out * input).sum();
    let mut layers: Vec<TargetFacts> = Vec::new();
    for (name, out, input) in &linears {
        let leaf = name.rsplit('.').next().unwrap_or(name);
        let at = layers.iter().position(|facts| facts.name == leaf).unwrap_or_else(|| {
            let (name, out_features, in_features) = (leaf.to_owned(), *out, *input);
            layers.push(TargetFacts { name, count: 0, out_features, in_features, percent: 0.0 });
            layers.len() - 1
        });
        layers[at].count += 1;
        layers[at].percent += 100.0 * (out * input) as f64 / all as f64;
    }
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"].map(str::to_owned);
    let attention = LoraConfig { targets: Targets::Names(names.into()), rank: 1, ..LoraConfig::default() };
    let smallest = linears.iter().map(|(_, out, input)| *out.min(input)).min().unwrap_or(1);
    let auto = LoraConfig { rank: LoraConfig::default().rank.min(smallest), ..LoraConfig::default() };
    let attention =
        Adapter::for_linears(linears.clone(), &attention).ok().map(|adapter| adapter.adapted_percent());
    let rank = auto.rank;
    let adapter = Adapter::for_linears(linears, &auto)?;
    Ok(LoraFacts {
        rank,
        auto_percent: adapter.adapted_percent(),
        attention_only_percent: attention,
        trained_values: adapter.parameter_count(),
        layers,
    })
}
