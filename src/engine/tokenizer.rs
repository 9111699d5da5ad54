//! Text to token ids and back, chat templates, and which tokens of a conversation are learnt. One tokenise path
//! serves training, evaluation and serving, so a prompt has the same ids everywhere. Knows nothing of tensors.
//!
//! ```text
//! tokenizer.json + tokenizer_config.json ── files ──┐
//! GGUF metadata ── gguf_vocabulary ── the same JSON ┴─► Tokenizer ── template ── supervise
//! ```

mod files;
#[cfg(test)]
mod fuzz;
mod gguf_vocabulary;
pub mod supervise;
pub mod template;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use regex::Regex;
use serde::de::IgnoredAny;
use thiserror::Error;
use tokenizers::{ModelWrapper, PostProcessorWrapper};

use crate::format::FormatError;
use crate::model::ModelConfig;
pub use crate::tokenizer::supervise::{Piece, Supervised};
pub use crate::tokenizer::template::Message;
use crate::tokenizer::template::{Template, TemplateTokens};

/// A tokenizer that cannot be read, or a text it cannot take.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("tokenizer file `{path}` is missing; hint: {hint}")]
    Missing { path: PathBuf, hint: &'static str },
    #[error("tokenizer file `{path}`: {cause}")]
    Invalid { path: PathBuf, cause: String },
    #[error("{field} `{got}` of `{path}` is not supported; supported: {supported}; hint: {hint}")]
    Unsupported {
        path: PathBuf,
        field: &'static str,
        got: String,
        supported: &'static str,
        hint: &'static str,
    },
    #[error("{role} token `{token}` is not in the vocabulary")]
    UnknownSpecial { role: &'static str, token: String },
    #[error("{role} token id {id} is not in the vocabulary of {vocab_size}")]
    UnknownSpecialId { role: &'static str, id: u32, vocab_size: usize },
    #[error(
        "the tokenizer has {tokens} token ids, but the model's embedding has {rows} rows; hint: take the tokenizer that came with the model"
    )]
    TooLarge { tokens: usize, rows: usize },
    #[error("the text cannot be tokenised: {cause}")]
    Encode { cause: String },
    #[error("the token ids cannot be decoded: {cause}")]
    Decode { cause: String },
    #[error(
        "the model has no chat template; hint: take an instruct model, or put a `chat_template.jinja` into its folder"
    )]
    NoChatTemplate,
    #[error("the chat template fails: {cause}")]
    Template { cause: String },
    #[error("message {index} ({role}) contains the special token `{token}`; hint: remove it from the text")]
    SpecialInContent { index: usize, role: String, token: String },
    #[error("message {index} (assistant) comes first; hint: begin with a user message")]
    AssistantFirst { index: usize },
    #[error(
        "the chat template's generation prompt, which ends in (`{}`), is not how the answer in message {index} begins (`{}`); hint: take a template without forced thinking, or put what the prompt opens into the answers",
        prompt.escape_debug(),
        written.escape_debug()
    )]
    OtherPrompt { index: usize, prompt: String, written: String },
    #[error(
        "the chat template rewrites the answer in message {index} once other messages follow; hint: make an example of its own of each answer"
    )]
    HistoryRewritten { index: usize },
    #[error("the chat template changes the text of message {index}, so its tokens cannot be told apart")]
    ContentAltered { index: usize },
    #[error(
        "the chat template puts special token `{token}` between the prompt and the answer in message {index}; hint: it must honour `add_generation_prompt`"
    )]
    HeaderInAnswer { index: usize, token: String },
    #[error("a token spans the border between the prompt and the answer in message {index}")]
    Straddles { index: usize },
    #[error(
        "no end-of-turn token follows message {index}: the chat template writes `{written}`, which holds no special token of the vocabulary"
    )]
    NoEndOfTurn { index: usize, written: String },
    #[error("the conversation has no assistant message to learn from")]
    NothingSupervised,
}

/// What becomes of special tokens (`<|im_start|>`) in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// They are single tokens with their meaning.
    Parse,
    /// They are plain text, as a user's words are.
    AsText,
}

/// A tokenizer with its special tokens and its chat template.
pub struct Tokenizer {
    /// Without its post-processor: beginning-of-text tokens are added here, and untrimmed offsets are needed.
    inner: tokenizers::Tokenizer,
    /// Treats special tokens as text; made when first needed.
    literal: OnceLock<tokenizers::Tokenizer>,
    /// Kept for saving.
    post_processor: Option<PostProcessorWrapper>,
    special_ids: BTreeSet<u32>,
    /// Tokens that are cut out of a text first, special or not.
    added_ids: BTreeSet<u32>,
    /// Matches any special token; `None` where there are none.
    special_pattern: Option<Regex>,
    settings: Settings,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    end_of_turn: Vec<u32>,
    template: Option<Template>,
    vocab_size: usize,
}

/// What `tokenizer_config.json` or the GGUF metadata say beside the vocabulary.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Settings {
    pub(crate) bos_token: Option<String>,
    pub(crate) eos_token: Option<String>,
    pub(crate) pad_token: Option<String>,
    pub(crate) unk_token: Option<String>,
    /// `None` where the file does not say: then the post-processor decides.
    pub(crate) add_bos: Option<bool>,
    pub(crate) chat_template: Option<String>,
}

/// Used where a model has ChatML's tokens but no template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face folder, of the folder a `.safetensors` file lies in, or of a
    /// `.gguf` file.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        if path.extension().is_some_and(|extension| extension == "gguf") && path.is_file() {
            let (json, settings) = gguf_vocabulary::read(path)?;
            return Self::new(path, &json, settings);
        }
        let folder = if path.is_file() { path.parent().unwrap_or(Path::new(".")) } else { path };
        let (json, settings) = files::read(folder)?;
        Self::new(&folder.join(files::TOKENIZER), &json, settings)
    }

    /// `path` is named in errors.
    fn new(path: &Path, json: &str, mut settings: Settings) -> Result<Self, TokenizerError> {
        let invalid = |cause: String| TokenizerError::Invalid { path: path.to_owned(), cause };
        // The library panics on some texts that are no JSON at all.
        serde_json::from_str::<IgnoredAny>(json).map_err(|error| invalid(error.to_string()))?;
        let mut inner: tokenizers::Tokenizer = guarded(|| json.parse()).map_err(invalid)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        let prefix = guarded(|| inner.encode("", true)).map_err(invalid)?;
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let find = |role, token: &Option<String>| match token {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(TokenizerError::UnknownSpecial { role, token: token.clone() }),
            },
        };
        let (bos, eos, pad) = (
            find("beginning-of-text", &settings.bos_token)?,
            find("end-of-text", &settings.eos_token)?,
            find("padding", &settings.pad_token)?,
        );
        let emits_bos = bos.is_some() && prefix.get_ids().first().copied() == bos;
        settings.add_bos = Some(bos.is_some() && settings.add_bos.unwrap_or(emits_bos));

        let specials: BTreeMap<u32, String> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (id, token.content))
            .collect();
        if settings.chat_template.is_none()
            && ["<|im_start|>", "<|im_end|>"].iter().all(|t| inner.token_to_id(t).is_some())
        {
            settings.chat_template = Some(CHATML.to_owned());
        }
        let template = match &settings.chat_template {
            None => None,
            Some(source) => Some(
                Template::new(source)
                    .map_err(|error| invalid(format!("the chat template is unreadable: {error}")))?,
            ),
        };
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let mut tokenizer = Self {
            literal: OnceLock::new(),
            post_processor,
            special_pattern: pattern(specials.values()).map_err(|error| invalid(error.to_string()))?,
            special_ids: specials.into_keys().collect(),
            added_ids: inner.get_added_tokens_decoder().into_keys().collect(),
            settings,
            bos,
            eos,
            pad,
            end_of_turn: Vec::new(),
            template,
            vocab_size,
            inner,
        };
        tokenizer.end_of_turn = tokenizer.find_end_of_turn();
        Ok(tokenizer)
    }

    /// Token ids of `text`; nothing is put before or after it.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let tokenizer = match specials {
            Specials::Parse => &self.inner,
            Specials::AsText => self.literal.get_or_init(|| {
                let mut literal = self.inner.clone();
                literal.set_encode_special_tokens(true);
                literal
            }),
        };
        let encoding = guarded(|| tokenizer.encode_fast(text, false))
            .map_err(|cause| TokenizerError::Encode { cause })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; ids beyond the vocabulary have none. `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|cause| TokenizerError::Decode { cause })
    }

    /// Token ids to generate an answer from: the rendered conversation with the generation prompt, begun with
    /// the beginning-of-text token where the model wants one (never twice).
    pub fn prompt_ids(&self, messages: &[Message]) -> Result<Vec<u32>, TokenizerError> {
        self.refuse_specials(messages)?;
        let ids = self.encode(&self.render(messages, true)?, Specials::Parse)?;
        Ok(self.bos_before(&ids).into_iter().chain(ids).collect())
    }

    /// The conversation as the model's chat template writes it.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let template = self.template.as_ref().ok_or(TokenizerError::NoChatTemplate)?;
        let tokens = TemplateTokens {
            bos_token: self.settings.bos_token.as_deref(),
            eos_token: self.settings.eos_token.as_deref(),
            pad_token: self.settings.pad_token.as_deref(),
            unk_token: self.settings.unk_token.as_deref(),
        };
        template
            .render(messages, add_generation_prompt, &tokens)
            .map_err(|error| TokenizerError::Template { cause: error.to_string() })
    }

    /// The text of a token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary has it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The beginning-of-text token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// Whether a text for the model begins with the beginning-of-text token.
    pub fn adds_bos(&self) -> bool {
        self.settings.add_bos == Some(true)
    }

    /// Whether the token is special (a marker, not text).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The special tokens with their ids, in the order of the ids.
    pub fn specials(&self) -> impl Iterator<Item = (u32, String)> {
        self.special_ids.iter().filter_map(|&id| Some((id, self.token(id)?)))
    }

    /// How the vocabulary is made: `BPE`, `Unigram`, `WordPiece` or `WordLevel`.
    pub fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::Unigram(_) => "Unigram",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
        }
    }

    /// Where generation stops: the end-of-text token, and the token the chat template ends an answer with.
    /// Sorted. A model's `eos_token_ids` come on top.
    pub fn end_of_turn_ids(&self) -> &[u32] {
        &self.end_of_turn
    }

    /// The chat template, where there is one.
    pub fn chat_template(&self) -> Option<&str> {
        self.settings.chat_template.as_deref()
    }

    /// Checks that every token has a row in the model's embedding, and that the model's special ids exist.
    pub fn check_fits(&self, config: &ModelConfig) -> Result<(), TokenizerError> {
        if self.vocab_size > config.vocab_size {
            return Err(TokenizerError::TooLarge { tokens: self.vocab_size, rows: config.vocab_size });
        }
        let roles = [("beginning-of-text", config.bos_token_id), ("padding", config.pad_token_id)];
        let ends = config.eos_token_ids.iter().map(|&id| ("end-of-text", Some(id)));
        for (role, id) in roles.into_iter().chain(ends) {
            let Some(id) = id else { continue };
            if self.token(id).is_none() {
                return Err(TokenizerError::UnknownSpecialId { role, id, vocab_size: self.vocab_size });
            }
        }
        Ok(())
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, which Hugging Face's loaders and `open` read.
    pub fn save(&self, folder: &Path) -> Result<(), TokenizerError> {
        let mut whole = self.inner.clone();
        whole.with_post_processor(self.post_processor.clone());
        let json =
            whole.to_string(true).map_err(|error| TokenizerError::Encode { cause: error.to_string() })?;
        files::write(folder, &json, &self.settings)
    }

    /// The beginning-of-text token, if `ids` lacks it and should have it.
    fn bos_before(&self, ids: &[u32]) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos() && ids.first().copied() != self.bos)
    }

    /// A note that quotes `<|im_end|>` would end its own turn: refused rather than obeyed.
    fn refuse_specials(&self, messages: &[Message]) -> Result<(), TokenizerError> {
        let Some(pattern) = &self.special_pattern else { return Ok(()) };
        for (index, message) in messages.iter().enumerate() {
            if let Some(found) = pattern.find(&message.content) {
                let (role, token) = (message.role.clone(), found.as_str().to_owned());
                return Err(TokenizerError::SpecialInContent { index, role, token });
            }
        }
        Ok(())
    }

    fn find_end_of_turn(&self) -> Vec<u32> {
        let probe = [Message::new("user", "Hello"), Message::new("assistant", "Hello")];
        let mut ids: BTreeSet<u32> = self.eos.into_iter().collect();
        // A model without a usable template still stops at the end of text.
        if let Ok(supervised) = self.supervise(&probe) {
            let last = supervised.supervised.iter().rposition(|&supervised| supervised);
            ids.extend(last.map(|last| supervised.tokens[last]));
        }
        ids.into_iter().collect()
    }
}

/// Calls the tokenizers library, which panics on some files whose parts contradict each other.
fn guarded<T>(call: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts contradict each other; hint: take `tokenizer.json` anew".to_owned()),
    }
}

fn pattern<'token>(specials: impl Iterator<Item = &'token String>) -> Result<Option<Regex>, regex::Error> {
    let escaped: Vec<String> = specials.map(|token| regex::escape(token)).collect();
    if escaped.is_empty() {
        return Ok(None);
    }
    Regex::new(&escaped.join("|")).map(Some)
}

#[cfg(test)]
pub(crate) mod tests;
