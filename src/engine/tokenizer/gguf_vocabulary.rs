//! The vocabulary in a GGUF file, written as the `tokenizer.json` it was made from. Knows llama.cpp's metadata
//! keys; nothing of templates or ids in use.
//!
//! ```text
//! tokenizer.ggml.model = gpt2   byte-level BPE: merges in the file, text cut as `cut` says
//! tokenizer.ggml.model = llama  SentencePiece BPE: merges by score, see `sentencepiece`
//! ```

mod cut;
mod sentencepiece;

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use crate::format::FormatError;
use crate::format::gguf::{Gguf, GgufError, Value};
use crate::tokenizer::gguf_vocabulary::cut::Cut;
use crate::tokenizer::{Settings, TokenizerError};

/// llama.cpp's token types.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// The text of a `tokenizer.json`, and the settings beside it.
pub(crate) fn read(path: &Path) -> Result<(String, Settings), TokenizerError> {
    let file = Gguf::open(path)?;
    let fail = |cause| FormatError::Gguf { path: path.to_owned(), cause };
    let model = file.text("tokenizer.ggml.model").map_err(fail)?.unwrap_or_default();
    let unsupported = |field, got: &str, supported, hint| TokenizerError::Unsupported {
        path: path.to_owned(),
        field,
        got: got.to_owned(),
        supported,
        hint,
    };
    match model {
        "gpt2" => {
            let field = "tokenizer.ggml.pre";
            let pre = file.text(field).map_err(fail)?.unwrap_or("default");
            let cut = Cut::named(pre).ok_or_else(|| unsupported(field, pre, cut::SUPPORTED, HINT))?;
            Ok(byte_level(&file, &cut).map_err(fail)?)
        }
        "llama" => Ok(sentencepiece::read(&file).map_err(fail)?),
        _ => Err(unsupported(
            "tokenizer.ggml.model",
            model,
            "gpt2 (byte-level BPE), llama (SentencePiece BPE)",
            HINT,
        )),
    }
    .map(|(json, settings)| (json.to_string(), settings))
}

const HINT: &str = "take the safetensors folder of the model with its tokenizer.json";

fn byte_level(file: &Gguf, cut: &Cut) -> Result<(Json, Settings), GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    let merges: Vec<_> =
        texts(file, "tokenizer.ggml.merges")?.into_iter().map(split_merge).collect::<Result<_, _>>()?;
    let settings = settings(file, &vocabulary, cut.adds_bos)?;
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let parts = Parts {
        normalizer: cut.normalizer.clone(),
        pre_tokenizer: cut.pre_tokenizer.clone(),
        decoder: byte_level,
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.ignore_merges,
        }),
        merges: json!(merges),
        added: |kind| matches!(kind, CONTROL | USER_DEFINED),
    };
    Ok((tokenizer_json(&vocabulary, parts, &settings)?, settings))
}

struct Vocabulary<'file> {
    tokens: Vec<Cow<'file, str>>,
    types: Vec<i64>,
}

impl<'file> Vocabulary<'file> {
    fn read(file: &'file Gguf) -> Result<Self, GgufError> {
        let tokens = texts(file, "tokenizer.ggml.tokens")?;
        let key = "tokenizer.ggml.token_type";
        let types = file.list(key)?.unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            return Err(GgufError::Metadata {
                key: key.to_owned(),
                got: format!("a list of {}", types.len()),
                expected: "as many as there are tokens",
            });
        }
        let types = types.iter().map(|value| match value {
            Value::Signed(code) => *code,
            Value::Unsigned(code) => i64::try_from(*code).unwrap_or(0),
            _ => 0,
        });
        Ok(Self { types: types.collect(), tokens: tokens.into_iter().map(Cow::Borrowed).collect() })
    }

    /// The text of the token whose id is under `key`.
    fn special(&self, file: &Gguf, key: &str) -> Result<Option<String>, GgufError> {
        let Some(id) = file.unsigned(key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        token.map(|token| Some(token.clone().into_owned())).ok_or_else(|| GgufError::Metadata {
            key: key.to_owned(),
            got: id.to_string(),
            expected: "the id of a token",
        })
    }
}

/// "left right"; the first character may be a space of its own.
fn split_merge(merge: &str) -> Result<(&str, &str), GgufError> {
    let space = merge.char_indices().skip(1).find(|(_, character)| *character == ' ');
    space.map(|(at, _)| (&merge[..at], &merge[at + 1..])).ok_or_else(|| GgufError::Metadata {
        key: "tokenizer.ggml.merges".to_owned(),
        got: format!("`{merge}`"),
        expected: "two parts with a space between",
    })
}

fn texts<'file>(file: &'file Gguf, key: &str) -> Result<Vec<&'file str>, GgufError> {
    let values = file.list(key)?.ok_or_else(|| GgufError::MissingMetadata { key: key.to_owned() })?;
    let text = |value: &'file Value| match value {
        Value::Text(text) => Ok(text.as_str()),
        _ => Err(GgufError::Metadata {
            key: key.to_owned(),
            got: "a list of other values".to_owned(),
            expected: "a list of texts",
        }),
    };
    values.iter().map(text).collect()
}

/// `adds_bos` is for files that do not say.
fn settings(file: &Gguf, vocabulary: &Vocabulary<'_>, adds_bos: bool) -> Result<Settings, GgufError> {
    Ok(Settings {
        bos_token: vocabulary.special(file, "tokenizer.ggml.bos_token_id")?,
        eos_token: vocabulary.special(file, "tokenizer.ggml.eos_token_id")?,
        pad_token: vocabulary.special(file, "tokenizer.ggml.padding_token_id")?,
        unk_token: vocabulary.special(file, "tokenizer.ggml.unknown_token_id")?,
        add_bos: Some(file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos)),
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
    })
}

/// What differs between kinds of `tokenizer.json`.
struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    /// Without `vocab` and `merges`.
    model: Json,
    merges: Json,
    /// Whether tokens of this type are cut out of the text first.
    added: fn(i64) -> bool,
}

fn tokenizer_json(
    vocabulary: &Vocabulary<'_>,
    mut parts: Parts,
    settings: &Settings,
) -> Result<Json, GgufError> {
    let mut ids = Map::new();
    let mut added = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if ids.insert(token.clone().into_owned(), json!(id)).is_some() {
            return Err(GgufError::Duplicate { name: token.clone().into_owned() });
        }
        let kind = vocabulary.types.get(id).copied().unwrap_or_default();
        if (parts.added)(kind) {
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": kind != USER_DEFINED}));
        }
    }
    // The token other loaders shall put before every text.
    let post_processor = match settings.bos_token.as_deref().filter(|_| settings.add_bos == Some(true)) {
        None => Json::Null,
        Some(bos) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        }),
    };
    parts.model["vocab"] = Json::Object(ids);
    parts.model["merges"] = parts.merges;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}
