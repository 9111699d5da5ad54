//! How text is cut before byte-level byte-pair encoding, by llama.cpp's `tokenizer.ggml.pre`. Knows the names and
//! the patterns the models' own `tokenizer.json` have for them; nothing of vocabularies.
//!
//! A name that is not here is refused: cut otherwise, a text has other tokens than the model learnt. `default`
//! is not here either, since a converter writes it where it did not know the model.

use serde_json::{Value as Json, json};

/// Names that `Cut::named` knows, for errors.
pub(super) const SUPPORTED: &str = "gpt-2, phi-2, olmo, mpt, smollm, refact, starcoder, codeshell, llama-bpe, llama3, llama-v3, falcon3, lfm2, dbrx, smaug-bpe, qwen2, deepseek-r1-qwen, stablelm2, tekken, gpt-4o, llama4";

/// Llama 3 takes digits by three, Qwen 2 one by one.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words are cut where lower case turns to upper; Mistral takes digits one by one, GPT-4o by three.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How text is cut before byte-pair encoding.
pub(super) struct Cut {
    pub(super) pre_tokenizer: Json,
    pub(super) normalizer: Json,
    /// Whole words are looked up before merges are tried.
    pub(super) ignore_merges: bool,
    pub(super) adds_bos: bool,
}

impl Cut {
    /// llama.cpp's `tokenizer.ggml.pre`.
    pub(super) fn named(pre: &str) -> Option<Self> {
        let plain = |pre_tokenizer| Self {
            pre_tokenizer,
            normalizer: Json::Null,
            ignore_merges: false,
            adds_bos: false,
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        Some(match pre {
            "gpt-2" | "phi-2" | "olmo" | "mpt" => plain(byte_level(true)),
            "smollm" | "refact" | "starcoder" | "codeshell" => {
                plain(json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}))
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "lfm2" => {
                Self { ignore_merges: true, adds_bos: true, ..plain(split(LLAMA3)) }
            }
            "dbrx" | "smaug-bpe" => plain(split(LLAMA3)),
            "qwen2" | "deepseek-r1-qwen" => {
                Self { normalizer: json!({"type": "NFC"}), ..plain(split(QWEN2)) }
            }
            "stablelm2" => plain(split(QWEN2)),
            "tekken" => Self { ignore_merges: true, adds_bos: true, ..plain(split(TEKKEN)) },
            "gpt-4o" | "llama4" => plain(split(GPT4O)),
            _ => return None,
        })
    }
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Matches of the pattern are pieces, and so is what lies between them.
fn split(pattern: &str) -> Json {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        byte_level(false),
    ]})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    use super::*;

    /// Pieces as Python's `regex` cuts them with each name's patterns (`tests/golden/tokenizer_golden.py`).
    #[test]
    fn text_is_cut_as_llama_cpp_cuts_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tokenizer/cuts.json");
        let golden: BTreeMap<String, BTreeMap<String, Vec<String>>> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(golden.keys().map(String::as_str).collect::<Vec<_>>(), {
            let mut names: Vec<&str> = SUPPORTED.split(", ").collect();
            names.sort_unstable();
            names
        });
        for (pre, texts) in golden {
            let cut = Cut::named(&pre).unwrap();
            let cutter: PreTokenizerWrapper = serde_json::from_value(cut.pre_tokenizer).unwrap();
            for (text, expected) in texts {
                let mut pieces = PreTokenizedString::from(text.as_str());
                cutter.pre_tokenize(&mut pieces).unwrap();
                let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let pieces: Vec<&str> =
                    pieces.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
                assert_eq!(pieces, expected, "{pre}: {text:?}");
            }
        }
    }

    #[test]
    fn unknown_ways_to_cut_are_refused() {
        assert!(Cut::named("default").is_none() && Cut::named("gemma4").is_none());
    }
}
