//! `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a Hugging Face folder, read and
//! written. Knows the files; the vocabulary itself is the tokenizers crate's.

use std::path::Path;

use serde_json::{Value, json};

use crate::tokenizer::{Settings, TokenizerError};

/// The vocabulary, and how text is cut.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The largest real files are 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// The text of `tokenizer.json`, and the settings beside it.
pub(crate) fn read(folder: &Path) -> Result<(String, Settings), TokenizerError> {
    let path = folder.join(TOKENIZER);
    if !path.exists() {
        let hint = if folder.join("tokenizer.model").exists() {
            "the folder has a SentencePiece `tokenizer.model` only; save the tokenizer anew with transformers (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`), which writes `tokenizer.json`"
        } else {
            "copy `tokenizer.json` and `tokenizer_config.json` of the model into the folder"
        };
        return Err(TokenizerError::Missing { path, hint });
    }
    let json = read_text(&path)?;
    let mut settings = read_settings(&folder.join(CONFIG))?;
    let template = folder.join(CHAT_TEMPLATE);
    if template.exists() {
        settings.chat_template = Some(read_text(&template)?);
    }
    Ok((json, settings))
}

/// Writes both files; a folder read back gives the same ids for every text.
pub(crate) fn write(folder: &Path, json: &str, settings: &Settings) -> Result<(), TokenizerError> {
    let config = json!({
        "add_bos_token": settings.add_bos,
        "add_eos_token": false,
        "bos_token": settings.bos_token,
        "chat_template": settings.chat_template,
        "clean_up_tokenization_spaces": false,
        "eos_token": settings.eos_token,
        "pad_token": settings.pad_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": settings.unk_token,
    });
    let config = match config {
        // Loaders take an absent key for "none", but stumble over a null.
        Value::Object(mut fields) => {
            fields.retain(|_, value| !value.is_null());
            Value::Object(fields)
        }
        other => other,
    };
    fs_err::write(folder.join(TOKENIZER), json)?;
    fs_err::write(folder.join(CONFIG), format!("{config:#}\n"))?;
    Ok(())
}

fn read_settings(path: &Path) -> Result<Settings, TokenizerError> {
    if !path.exists() {
        return Ok(Settings::default());
    }
    let invalid = |cause: String| TokenizerError::Invalid { path: path.to_owned(), cause };
    let config: Value =
        serde_json::from_str(&read_text(path)?).map_err(|error| invalid(error.to_string()))?;
    let token = |key: &str| match &config[key] {
        Value::Null => Ok(None),
        Value::String(token) => Ok(Some(token.clone())),
        // Older files write the whole added token.
        Value::Object(token) => match token.get("content") {
            Some(Value::String(content)) => Ok(Some(content.clone())),
            _ => Err(invalid(format!("`{key}` has no content"))),
        },
        other => Err(invalid(format!("`{key}` is `{other}`, expected a token"))),
    };
    Ok(Settings {
        bos_token: token("bos_token")?,
        eos_token: token("eos_token")?,
        pad_token: token("pad_token")?,
        unk_token: token("unk_token")?,
        add_bos: config["add_bos_token"].as_bool(),
        chat_template: chat_template(&config["chat_template"]).map_err(invalid)?,
    })
}

/// One template, or a list of named ones of which `default` is for conversations.
fn chat_template(value: &Value) -> Result<Option<String>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
            match default.map(|entry| &entry["template"]) {
                None => Ok(None),
                Some(Value::String(template)) => Ok(Some(template.clone())),
                Some(other) => Err(format!("`chat_template` holds `{other}`, expected a template")),
            }
        }
        other => Err(format!("`chat_template` is `{other}`, expected a template or a list of them")),
    }
}

fn read_text(path: &Path) -> Result<String, TokenizerError> {
    let len = fs_err::metadata(path)?.len();
    if len > FILE_BYTES_MAX {
        let cause = format!("has {len} bytes, more than the limit of {FILE_BYTES_MAX}");
        return Err(TokenizerError::Invalid { path: path.to_owned(), cause });
    }
    Ok(fs_err::read_to_string(path)?)
}
