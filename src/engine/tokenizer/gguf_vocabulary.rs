//! The vocabulary in a GGUF file, written as the `tokenizer.json` it was made from. Knows llama.cpp's metadata
//! keys and its names for the ways to cut text; nothing of templates or ids in use.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use crate::format::FormatError;
use crate::format::gguf::{Gguf, GgufError, Value};
use crate::tokenizer::{Settings, TokenizerError};

/// llama.cpp's token types.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Llama 3's way to cut text, and Qwen 2's, which takes digits one by one.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The text of a `tokenizer.json`, and the settings beside it.
pub(crate) fn read(path: &Path) -> Result<(String, Settings), TokenizerError> {
    let file = Gguf::open(path)?;
    let fail = |cause| FormatError::Gguf { path: path.to_owned(), cause };
    let model = file.text("tokenizer.ggml.model").map_err(fail)?.unwrap_or_default();
    if model != "gpt2" {
        return Err(TokenizerError::Unsupported {
            path: path.to_owned(),
            field: "tokenizer.ggml.model",
            got: model.to_owned(),
            supported: "gpt2 (byte-level BPE)",
            hint: "take the safetensors folder of the model with its tokenizer.json",
        });
    }
    let pre = file.text("tokenizer.ggml.pre").map_err(fail)?.unwrap_or("default");
    let cut = Cut::named(pre).ok_or_else(|| TokenizerError::Unsupported {
        path: path.to_owned(),
        field: "tokenizer.ggml.pre",
        got: pre.to_owned(),
        supported: "gpt-2, smollm, llama-bpe, qwen2",
        hint: "take the safetensors folder of the model with its tokenizer.json",
    })?;
    let vocabulary = Vocabulary::read(&file).map_err(fail)?;
    let settings = settings(&file, &vocabulary, &cut).map_err(fail)?;
    let bos = settings.bos_token.as_deref().filter(|_| settings.add_bos == Some(true));
    let json = tokenizer_json(&vocabulary, &cut, bos).map_err(fail)?;
    Ok((json.to_string(), settings))
}

/// How text is cut before byte-pair encoding.
struct Cut {
    pre_tokenizer: Json,
    normalizer: Json,
    /// Whole words are looked up before merges are tried.
    ignore_merges: bool,
    adds_bos: bool,
}

impl Cut {
    /// llama.cpp's `tokenizer.ggml.pre`.
    fn named(pre: &str) -> Option<Self> {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let sequence = |steps: [Json; 2]| json!({"type": "Sequence", "pretokenizers": steps});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let plain = |pre_tokenizer| Self {
            pre_tokenizer,
            normalizer: Json::Null,
            ignore_merges: false,
            adds_bos: false,
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        Some(match pre {
            "gpt-2" => plain(byte_level(true)),
            "smollm" => plain(sequence([digits, byte_level(true)])),
            "llama-bpe" | "llama3" | "llama-v3" => Self {
                ignore_merges: true,
                adds_bos: true,
                ..plain(sequence([split(LLAMA3_PATTERN), byte_level(false)]))
            },
            "qwen2" => Self {
                normalizer: json!({"type": "NFC"}),
                ..plain(sequence([split(QWEN2_PATTERN), byte_level(false)]))
            },
            _ => return None,
        })
    }
}

struct Vocabulary<'file> {
    tokens: Vec<&'file str>,
    types: Vec<i64>,
    merges: Vec<(&'file str, &'file str)>,
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
        let merges =
            texts(file, "tokenizer.ggml.merges")?.into_iter().map(split_merge).collect::<Result<_, _>>()?;
        Ok(Self { types: types.collect(), tokens, merges })
    }

    /// The text of the token whose id is under `key`.
    fn special(&self, file: &Gguf, key: &str) -> Result<Option<String>, GgufError> {
        let Some(id) = file.unsigned(key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        token.map(|token| Some((*token).to_owned())).ok_or_else(|| GgufError::Metadata {
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

fn settings(file: &Gguf, vocabulary: &Vocabulary<'_>, cut: &Cut) -> Result<Settings, GgufError> {
    Ok(Settings {
        bos_token: vocabulary.special(file, "tokenizer.ggml.bos_token_id")?,
        eos_token: vocabulary.special(file, "tokenizer.ggml.eos_token_id")?,
        pad_token: vocabulary.special(file, "tokenizer.ggml.padding_token_id")?,
        unk_token: vocabulary.special(file, "tokenizer.ggml.unknown_token_id")?,
        add_bos: Some(file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(cut.adds_bos)),
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
    })
}

/// `bos`: the token other loaders shall put before every text.
fn tokenizer_json(vocabulary: &Vocabulary<'_>, cut: &Cut, bos: Option<&str>) -> Result<Json, GgufError> {
    let mut ids = Map::new();
    let mut added = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if ids.insert((*token).to_owned(), json!(id)).is_some() {
            return Err(GgufError::Duplicate { name: (*token).to_owned() });
        }
        let kind = vocabulary.types.get(id).copied();
        if matches!(kind, Some(CONTROL | USER_DEFINED)) {
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": kind == Some(CONTROL)}));
        }
    }
    let post_processor = match bos {
        None => Json::Null,
        Some(bos) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        }),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": cut.normalizer,
        "pre_tokenizer": cut.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.ignore_merges, "vocab": ids, "merges": vocabulary.merges,
        },
    }))
}
