//! The tokenizer on a tiny vocabulary, read from GGUF, saved and read back.

use super::*;
use crate::format::Checkpoint;
use crate::format::gguf::Value;
use crate::format::gguf_writer::{F32, GgufWriter, tiny_llama};

pub(crate) fn open(file: &GgufWriter) -> Result<Tokenizer, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    Tokenizer::open(&path)
}

/// The tiny vocabulary with another chat template.
pub(crate) fn with_template(template: &str) -> Tokenizer {
    open(tiny_llama(F32).text("tokenizer.chat_template", template)).unwrap()
}

const TEXTS: [&str; 8] = [
    "",
    "the hello user",
    "Hello, the 2024 world!\n\n  the\tthe ",
    "naïve café — 日本語 🦀",
    "a<|im_start|>user\nthe<|im_end|>b",
    "  leading and trailing  ",
    "don't you'll it's",
    "\u{0}\u{7f}\u{a0}\u{2028}",
];

#[test]
fn merges_digits_and_specials_are_cut_as_the_model_was_taught() {
    let tokenizer = open(&tiny_llama(F32)).unwrap();
    let cut = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, Specials::Parse).unwrap();
        ids.into_iter().map(|id| tokenizer.token(id).unwrap()).collect()
    };
    assert_eq!(cut("the hello 24"), ["the", "Ġhello", "Ġ", "2", "4"]);
    assert_eq!(cut("user<|im_end|>\n"), ["user", "<|im_end|>", "Ċ"]);
    let literal = tokenizer.encode("<|im_end|>", Specials::AsText).unwrap();
    assert!(literal.len() > 1 && literal.iter().all(|&id| !tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&literal, true).unwrap(), "<|im_end|>");
}

#[test]
fn decoding_gives_every_text_back() {
    let tokenizer = open(&tiny_llama(F32)).unwrap();
    for text in TEXTS {
        let ids = tokenizer.encode(text, Specials::Parse).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    let ids = tokenizer.encode("a<|im_end|>b", Specials::Parse).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab");
}

#[test]
fn saved_tokenizer_reads_back_with_equal_ids() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        for add_bos in [false, true] {
            let mut file = tiny_llama(F32);
            file.text("tokenizer.ggml.pre", pre).set("tokenizer.ggml.add_bos_token", Value::Bool(add_bos));
            let original = open(&file).unwrap();
            let folder = tempfile::tempdir().unwrap();
            original.save(folder.path()).unwrap();
            let copy = Tokenizer::open(folder.path()).unwrap();
            assert_eq!(copy.settings, original.settings);
            assert_eq!((copy.adds_bos(), copy.vocab_size()), (add_bos, 270));
            for text in TEXTS {
                for specials in [Specials::Parse, Specials::AsText] {
                    assert_eq!(
                        copy.encode(text, specials).unwrap(),
                        original.encode(text, specials).unwrap()
                    );
                }
            }
            // Saving again changes no byte, so the artifact's digest is stable.
            let again = tempfile::tempdir().unwrap();
            copy.save(again.path()).unwrap();
            for name in ["tokenizer.json", "tokenizer_config.json"] {
                let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(name)).unwrap();
                assert!(read(&folder) == read(&again), "{pre} {name}");
            }
        }
    }
}

#[test]
fn bos_is_never_doubled() {
    let chat = [Message::new("user", "the")];
    let begins = |template: &str| {
        let mut file = tiny_llama(F32);
        file.unsigned("tokenizer.ggml.bos_token_id", 0)
            .set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        let tokenizer = open(file.text("tokenizer.chat_template", template)).unwrap();
        let ids = tokenizer.prompt_ids(&chat).unwrap();
        ids.iter().take_while(|&&id| Some(id) == tokenizer.bos_id()).count()
    };
    assert_eq!(begins("{{ bos_token }}{{ messages[0].content }}"), 1);
    assert_eq!(begins("{{ messages[0].content }}"), 1);
    let without = open(&tiny_llama(F32)).unwrap().prompt_ids(&chat).unwrap();
    assert_eq!(without[0], 1, "the template's own <|im_start|>, once");
    assert_ne!(without[1], 1);
}

#[test]
fn post_processor_decides_where_the_config_is_silent() {
    let mut file = tiny_llama(F32);
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    let folder = tempfile::tempdir().unwrap();
    open(&file).unwrap().save(folder.path()).unwrap();
    let config = r#"{"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>",
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.chat_template(), Some("D"));
    std::fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
    assert_eq!(Tokenizer::open(folder.path()).unwrap().chat_template(), Some("J"));
}

#[test]
fn chatml_tokens_stand_in_for_a_missing_template() {
    let mut file = tiny_llama(F32);
    let tokenizer = open(file.remove("tokenizer.chat_template")).unwrap();
    let text = tokenizer.render(&[Message::new("user", "the")], true).unwrap();
    assert_eq!(text, "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(tokenizer.end_of_turn_ids(), [2]);

    let tokens = ["a", "b", "c"].map(str::to_owned);
    file.texts("tokenizer.ggml.tokens", &tokens).texts("tokenizer.ggml.merges", &[]);
    let plain = file.remove("tokenizer.ggml.token_type");
    let error = open(plain).unwrap().render(&[], true).unwrap_err();
    assert!(matches!(error, TokenizerError::NoChatTemplate), "{error}");
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let refused = |file: &GgufWriter, part: &str| {
        let error = open(file).err().expect("must be refused").to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(tiny_llama(F32).text("tokenizer.ggml.model", "t5"), "tokenizer.ggml.model `t5`");
    refused(tiny_llama(F32).text("tokenizer.ggml.pre", "default"), "tokenizer.ggml.pre `default`");
    refused(tiny_llama(F32).unsigned("tokenizer.ggml.eos_token_id", 270), "tokenizer.ggml.eos_token_id");
    refused(tiny_llama(F32).texts("tokenizer.ggml.merges", &["the".to_owned()]), "tokenizer.ggml.merges");
    refused(tiny_llama(F32).texts("tokenizer.ggml.merges", &["q zz".to_owned()]), "tiny.gguf");
    refused(tiny_llama(F32).texts("tokenizer.ggml.tokens", &vec!["a".to_owned(); 270]), "`a` appears twice");
    refused(tiny_llama(F32).text("tokenizer.chat_template", "{% for %}"), "chat template");

    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json` is missing"), "{error}");
    std::fs::write(folder.path().join("tokenizer.model"), b"x").unwrap();
    assert!(Tokenizer::open(folder.path()).err().unwrap().to_string().contains("SentencePiece"));
    std::fs::write(folder.path().join("tokenizer.json"), b"{}").unwrap();
    assert!(matches!(Tokenizer::open(folder.path()), Err(TokenizerError::Invalid { .. })));
    open(&tiny_llama(F32)).unwrap().save(folder.path()).unwrap();
    let json = std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
    for (from, to) in
        [("\"decoder\": {", "\"decoder\": {,"), ("\"ByteLevel\"", "\"Odd\""), ("\"vocab\"", "\"v\"")]
    {
        std::fs::write(folder.path().join("tokenizer.json"), json.replace(from, to)).unwrap();
        let error = Tokenizer::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json`: "), "{error}");
    }
}

#[test]
fn tokenizer_and_model_must_fit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, tiny_llama(F32).finish()).unwrap();
    let tokenizer = Tokenizer::open(&path).unwrap();
    let config = Checkpoint::open(&path).unwrap().config().clone();
    tokenizer.check_fits(&config).unwrap();
    let small = ModelConfig { vocab_size: 269, ..config.clone() };
    assert!(matches!(tokenizer.check_fits(&small), Err(TokenizerError::TooLarge { tokens: 270, rows: 269 })));
    let odd = ModelConfig { eos_token_ids: vec![2, 300], vocab_size: 512, ..config };
    assert!(matches!(tokenizer.check_fits(&odd), Err(TokenizerError::UnknownSpecialId { id: 300, .. })));
}
