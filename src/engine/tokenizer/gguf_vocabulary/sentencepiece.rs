//! SentencePiece vocabularies of byte-pair kind (Llama 1 and 2, TinyLlama, Mistral, Phi-3, Gemma) as
//! `tokenizer.json`. Knows scores, byte tokens and the space written as `▁`; nothing of how text is cut, because
//! such models do not cut it.
//!
//! SentencePiece merges the neighbouring pair whose joined piece has the highest score. A `tokenizer.json` has no
//! scores but a ranked list of pairs; it is made the way Hugging Face makes it: every way to put a piece together
//! from two others, ordered by score, then by the length of the left part. Characters without a token become
//! their bytes, `<0xE2>`.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::{Value as Json, json};

use crate::format::gguf::{Gguf, GgufError, Value};
use crate::tokenizer::Settings;
use crate::tokenizer::gguf_vocabulary::{
    BYTE, CONTROL, Parts, UNKNOWN, USER_DEFINED, Vocabulary, settings, tokenizer_json,
};

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// `tokenizer.json` and the settings beside it.
pub(super) fn read(file: &Gguf) -> Result<(Json, Settings), GgufError> {
    let mut vocabulary = Vocabulary::read(file)?;
    let scores = scores(file, vocabulary.tokens.len())?;
    for (token, &kind) in vocabulary.tokens.iter_mut().zip(&vocabulary.types) {
        // These are cut out of the text before spaces are rewritten; some converters leave them rewritten.
        if kind == USER_DEFINED && token.contains(SPACE) {
            *token = Cow::Owned(token.replace(SPACE, " "));
        }
    }
    let settings = settings(file, &vocabulary, true)?;
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let rewrite = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let restore = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
    let mut normalizers = vec![rewrite];
    let mut decoders = vec![restore, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.types.iter().position(|&kind| kind == UNKNOWN);
    let parts = Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &vocabulary.tokens[id]),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": vocabulary.types.contains(&BYTE), "ignore_merges": false,
        }),
        merges: json!(merges(&vocabulary, &scores)),
        added: |kind| matches!(kind, CONTROL | USER_DEFINED | UNKNOWN),
    };
    Ok((tokenizer_json(&vocabulary, parts, &settings)?, settings))
}

fn scores(file: &Gguf, tokens: usize) -> Result<Vec<f64>, GgufError> {
    let key = "tokenizer.ggml.scores";
    let bad = |got: String, expected| GgufError::Metadata { key: key.to_owned(), got, expected };
    let values = file.list(key)?.ok_or_else(|| GgufError::MissingMetadata { key: key.to_owned() })?;
    if values.len() != tokens {
        return Err(bad(format!("a list of {}", values.len()), "as many as there are tokens"));
    }
    let score = |value: &Value| match value {
        Value::Float(score) if score.is_finite() => Ok(*score),
        other => Err(bad(format!("a list with {}", other.describe()), "a list of finite numbers")),
    };
    values.iter().map(score).collect()
}

/// Pairs of pieces that join into a piece, best first.
fn merges<'token>(vocabulary: &'token Vocabulary<'_>, scores: &[f64]) -> Vec<(&'token str, &'token str)> {
    // Tokens that never arise from text are no part of a merge.
    let is_piece =
        |id: usize| !matches!(vocabulary.types.get(id), Some(&(UNKNOWN | CONTROL | USER_DEFINED | BYTE)));
    let pieces = || vocabulary.tokens.iter().enumerate().filter(|(id, _)| is_piece(*id));
    let known: HashSet<&str> = pieces().map(|(_, token)| token.as_ref()).collect();
    let mut merges = Vec::new();
    for (id, token) in pieces() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains(left) && known.contains(right) {
                merges.push((scores[id], left, right));
            }
        }
    }
    let length = |text: &str| text.chars().count();
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| length(b.1).cmp(&length(a.1)))
            .then_with(|| length(b.2).cmp(&length(a.2)))
    });
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde::Deserialize;

    use crate::format::gguf::Value;
    use crate::format::gguf_writer::{F32, tiny_llama};
    use crate::tokenizer::{Message, Specials, Tokenizer};

    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }

    fn golden(name: &str) -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tokenizer")).join(name)
    }

    /// Ids from the sentencepiece library itself (`tests/golden/tokenizer_golden.py`).
    fn check(name: &str) {
        let tokenizer = Tokenizer::open(&golden(&format!("{name}.gguf"))).unwrap();
        let saved = tempfile::tempdir().unwrap();
        tokenizer.save(saved.path()).unwrap();
        let saved = Tokenizer::open(saved.path()).unwrap();
        let cases = std::fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
        let cases: Vec<Case> = serde_json::from_str(&cases).unwrap();
        assert!(cases.len() > 20);
        for Case { text, ids, decoded } in cases {
            for tokenizer in [&tokenizer, &saved] {
                assert_eq!(tokenizer.encode(&text, Specials::Parse).unwrap(), ids, "{name}: {text:?}");
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), decoded, "{name}: {text:?}");
            }
        }
        assert!(tokenizer.adds_bos());
    }

    #[test]
    fn llama_vocabulary_gives_sentencepiece_ids() {
        check("spm_llama");
    }

    #[test]
    fn gemma_vocabulary_gives_sentencepiece_ids() {
        check("spm_gemma");
    }

    #[test]
    fn answers_are_told_apart_where_spaces_are_rewritten() {
        for name in ["spm_llama", "spm_gemma"] {
            let folder = tempfile::tempdir().unwrap();
            Tokenizer::open(&golden(&format!("{name}.gguf"))).unwrap().save(folder.path()).unwrap();
            let template = "{% for m in messages %}{{ '[' + m.role + ']: ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]:{% endif %}";
            std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            let chat = [Message::new("user", "日本 and 12"), Message::new("assistant", " The quick fox.")];
            let supervised = tokenizer.supervise(&chat).unwrap();
            let ids: Vec<u32> = supervised
                .tokens
                .iter()
                .zip(&supervised.supervised)
                .filter_map(|(id, learnt)| learnt.then_some(*id))
                .collect();
            assert_eq!(tokenizer.decode(&ids, false).unwrap().trim_start(), "The quick fox.</s>", "{name}");
            let prompt = tokenizer.prompt_ids(&chat[..1]).unwrap();
            assert_eq!(prompt, supervised.tokens[..prompt.len()], "{name}");
            assert_eq!(prompt.len() + ids.len(), supervised.tokens.len(), "{name}");
            assert_eq!(prompt.iter().filter(|&&id| Some(id) == tokenizer.bos_id()).count(), 1);
        }
    }

    #[test]
    fn broken_scores_are_refused_by_name() {
        let refused = |change: &dyn Fn(&mut crate::format::gguf_writer::GgufWriter), part: &str| {
            let mut file = tiny_llama(F32);
            file.text("tokenizer.ggml.model", "llama");
            change(&mut file);
            let error = crate::tokenizer::tests::open(&file).err().expect("must be refused").to_string();
            assert!(error.contains(part), "{error}");
        };
        let key = "tokenizer.ggml.scores";
        refused(&|_| (), "`tokenizer.ggml.scores` is missing");
        refused(&|file| _ = file.set(key, Value::List(vec![Value::Float(0.0); 3])), "a list of 3");
        refused(&|file| _ = file.set(key, Value::List(vec![Value::Float(f64::NAN); 270])), "`NaN`");
        refused(&|file| _ = file.set(key, Value::List(vec![Value::Bool(true); 270])), "finite numbers");
    }
}
