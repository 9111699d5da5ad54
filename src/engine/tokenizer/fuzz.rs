//! Changed vocabularies and chat templates must be read or refused, without a panic (see `format::fuzz`, which
//! says how to run it for long).

use std::path::Path;

use crate::format::fuzz::{Budget, fuzz};
use crate::format::gguf_writer::{CHATML, F32, tiny_llama};
use crate::tokenizer::template::{Template, TemplateTokens};
use crate::tokenizer::{Message, Specials, Tokenizer};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");

/// Vocabularies are maps of maps, and the regular expressions of a cut have caches of their own.
fn in_proportion(len: usize) -> usize {
    (64 << 20) + 64 * len
}

fn chat() -> [Message; 3] {
    [
        Message::new("system", "Be brief."),
        Message::new("user", "Hello, the 2024 world!\n naïve 日本 🦀"),
        Message::new("assistant", "the hello"),
    ]
}

fn open(path: &Path) {
    let Ok(tokenizer) = Tokenizer::open(path) else { return };
    for specials in [Specials::Parse, Specials::AsText] {
        if let Ok(ids) = tokenizer.encode("the hello 42 <|im_end|> é🦀\n", specials) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
    let _ = tokenizer.decode(&[0, 5, u32::MAX], true);
    let _ = tokenizer.supervise(&chat());
}

fn gguf_vocabulary(budget: Budget) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // Without the weights, so that most changes meet the vocabulary.
    let mut whole = tiny_llama(F32);
    whole.keep_entries_alone();
    let spm = |name: &str| std::fs::read(format!("{GOLDEN}/tokenizer/{name}.gguf")).unwrap();
    let seeds = [whole.finish(), spm("spm_llama"), spm("spm_gemma")];
    fuzz("gguf_vocabulary", &seeds, budget, in_proportion, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        open(&path);
    });
}

fn tokenizer_json(budget: Budget) {
    let folder = tempfile::tempdir().unwrap();
    let seeds = ["spm_llama", "spm_gemma", "bpe"].map(|name| {
        let tokenizer = match name {
            "bpe" => crate::tokenizer::tests::with_template(CHATML),
            name => Tokenizer::open(Path::new(&format!("{GOLDEN}/tokenizer/{name}.gguf"))).unwrap(),
        };
        tokenizer.save(folder.path()).unwrap();
        // On one line the vocabulary does not drown the rest.
        let text = std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap().to_string().into_bytes()
    });
    fuzz("tokenizer_json", &seeds, budget, in_proportion, |bytes| {
        std::fs::write(folder.path().join("tokenizer.json"), bytes).unwrap();
        open(folder.path());
    });
}

fn template(budget: Budget) {
    let files = std::fs::read_dir(format!("{GOLDEN}/templates")).unwrap();
    let mut paths: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let tokens =
        TemplateTokens { bos_token: Some("<s>"), eos_token: Some("</s>"), ..TemplateTokens::default() };
    fuzz("template", &seeds, budget, in_proportion, |bytes| {
        let source = String::from_utf8_lossy(bytes);
        if let Ok(template) = Template::new(&source) {
            let _ = template.render(&chat(), true, &tokens);
        }
    });
}

#[test]
fn changed_vocabularies_and_templates_are_read_or_refused() {
    gguf_vocabulary(Budget::Rounds(100));
    tokenizer_json(Budget::Rounds(100));
    template(Budget::Rounds(300));
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_gguf_vocabulary() {
    gguf_vocabulary(Budget::Seconds);
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_tokenizer_json() {
    tokenizer_json(Budget::Seconds);
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_template() {
    template(Budget::Seconds);
}
