//! `uses: chunk`: documents to passages that fit a token budget. Reads `documents.jsonl` of `documents`, and the
//! tokenizer of `base` where `needs` gives one; writes `chunks.jsonl`. One row a document. Bump `VERSION` whenever
//! the same document would be cut in another way.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_engine::tokenizer::Tokenizer;
use tunesmith_pipeline::stage::{
    Arity, Artifact, InputSlot, ParamProblem, StageContext, StageError, StageKind,
};

use crate::corpus::chunk::tokens::TokenCounter;
use crate::corpus::chunk::{Budget, cut};
use crate::corpus::{self, Document, read_table, write_table};

const VERSION: u32 = 1;

/// Cuts documents.
pub(crate) struct Chunk;

/// Parameters of `chunk`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Tokens of a passage at most. Only a single word that is longer goes beyond.
    #[serde(default = "max_tokens")]
    #[schemars(range(min = 16))]
    max_tokens: usize,
    /// Passages of fewer tokens are joined to a neighbour where the two fit `max_tokens`.
    #[serde(default = "min_tokens")]
    min_tokens: usize,
    /// Sentences at the end of a passage that the next one of the same section repeats.
    #[serde(default)]
    #[schemars(range(max = 16))]
    overlap_sentences: usize,
}

fn max_tokens() -> usize {
    320
}

fn min_tokens() -> usize {
    24
}

impl StageKind for Chunk {
    fn name(&self) -> &'static str {
        "chunk"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Cuts documents into passages of at most `max_tokens` tokens, at headings, paragraphs and sentences, \
         never inside a word. Each passage is an exact byte range of its document."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[
            InputSlot { name: "documents", doc: "a stage that writes `documents.jsonl`", arity: Arity::One },
            InputSlot {
                name: "base",
                doc: "the model whose tokenizer counts tokens",
                arity: Arity::Optional,
            },
        ]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[("chunks.jsonl", "passages with their document, place, headings, text and length in tokens")]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let number = |name: &str, default: usize| {
            with.get(name)
                .and_then(Value::as_u64)
                .map_or(default, |number| usize::try_from(number).unwrap_or(usize::MAX))
        };
        let (max, min) = (number("max_tokens", max_tokens()), number("min_tokens", min_tokens()));
        let problem = || ParamProblem {
            path: "min_tokens".to_owned(),
            message: format!("`min_tokens` ({min}) is more than `max_tokens` ({max})"),
            hint: Some(format!("set `min_tokens` to {} or less", max / 4)),
        };
        (min > max).then(problem).into_iter().collect()
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let documents: Vec<Document> = read_table(&context.input("documents")?.file("documents.jsonl")?)?;
        let base = context.optional_input("base");
        let counter = counter_of(base)?;
        let counted_by = base.map_or([0; 32], |base| *base.digest.as_bytes());
        let with = serde_json::to_vec(&params).expect("three numbers are JSON");
        let mut chunks = Vec::new();
        for (index, document) in documents.iter().enumerate() {
            context.check_cancelled()?;
            context.progress(index as u64, documents.len() as u64, "documents");
            let section = section_of(document);
            let row = serde_json::to_vec(&(&document.id, &document.source, section, &document.text))
                .expect("strings and numbers are JSON");
            chunks.extend(
                context.memo(&[&row, &with, &counted_by], || Ok(chunks_of(document, &params, &counter)))?,
            );
        }
        context.progress(documents.len() as u64, documents.len() as u64, "documents");
        report(context, &chunks);
        write_table(&context.out.join("chunks.jsonl"), &chunks)?;
        Ok(())
    }
}

/// Counts with the tokenizer of `base`, or by the approximate rule without one.
fn counter_of(base: Option<&Artifact>) -> Result<TokenCounter, StageError> {
    let Some(base) = base else { return Ok(TokenCounter::Approximate) };
    let tokenizer = Tokenizer::open(&base.folder).map_err(|error| {
        StageError::new(
            "chunk::tokenizer",
            format!("input `{}` has no usable tokenizer: {error}", base.stage),
        )
        .hint("let `base` name a stage of kind `model`, or leave it out to count by rule")
    })?;
    Ok(TokenCounter::Model(Box::new(tokenizer)))
}

/// The heading a PDF page goes on under, from a page before it.
fn section_of(document: &Document) -> Option<&str> {
    document.meta.get("section").and_then(Value::as_str)
}

fn chunks_of(document: &Document, params: &Params, counter: &TokenCounter) -> Vec<corpus::Chunk> {
    let budget = Budget {
        tokens_max: params.max_tokens,
        tokens_min: params.min_tokens,
        overlap_sentences: params.overlap_sentences,
    };
    let passages = cut(&document.text, budget, counter).into_iter();
    let chunk = |passage: corpus::chunk::Passage| corpus::Chunk {
        id: format!("{}@{}", document.id, passage.span.start),
        document: document.id.clone(),
        source: document.source.clone(),
        headings: match section_of(document) {
            Some(section) if passage.headings.is_empty() => vec![section.to_owned()],
            _ => passage.headings,
        },
        span: [passage.span.start, passage.span.end],
        text: document.text[passage.span].to_owned(),
        tokens: passage.tokens,
    };
    passages.map(chunk).collect()
}

fn report(context: &StageContext<'_>, chunks: &[corpus::Chunk]) {
    let tokens = chunks.iter().map(|chunk| chunk.tokens).sum::<usize>();
    let mean = tokens as f64 / chunks.len().max(1) as f64;
    context.metric("chunks", chunks.len());
    context.metric("tokens", tokens);
    context.metric("tokens_mean", (mean * 10.0).round() / 10.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Source;
    use crate::stages::harness::Bench;
    use serde_json::json;

    fn document(id: &str, text: &str) -> Document {
        let source = Source { path: id.to_owned(), page: None, digest: "d0".to_owned() };
        Document {
            id: id.to_owned(),
            source,
            title: id.to_owned(),
            text: text.to_owned(),
            meta: serde_json::Map::new(),
        }
    }

    #[test]
    fn chunks_carry_their_place() {
        let text = "# Leave\n\nAsk Ann first, in writing.\n\n## Travel\n\nBook the cheapest fare that suits.";
        let mut bench = Bench::new();
        bench.table("documents", "documents.jsonl", &[document("a.md", text)]);
        let outcome = bench.run(&Chunk, json!({ "max_tokens": 16, "min_tokens": 2 })).unwrap();
        let chunks = outcome.table::<corpus::Chunk>("chunks.jsonl");
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[1].id, format!("a.md@{}", text.find("## Travel").unwrap()));
        assert_eq!(chunks[1].headings, ["Leave", "Travel"]);
        assert!(chunks.iter().all(|chunk| text[chunk.span[0]..chunk.span[1]] == chunk.text));
        assert_eq!(outcome.count("chunks"), 2);
    }

    #[test]
    fn edited_note_reruns_only_its_chunks() {
        let mut bench = Bench::new();
        bench.table("documents", "documents.jsonl", &[document("a.md", "One."), document("b.md", "Two.")]);
        assert_eq!(bench.run(&Chunk, json!({})).unwrap().rows.new, 2);
        bench.table("documents", "documents.jsonl", &[document("a.md", "One."), document("b.md", "Two!")]);
        let rows = bench.run(&Chunk, json!({})).unwrap().rows;
        assert_eq!((rows.new, rows.remembered), (1, 1));
        assert_eq!(bench.run(&Chunk, json!({ "max_tokens": 99 })).unwrap().rows.new, 2);
    }

    #[test]
    fn the_tokenizer_of_base_counts() {
        // Every word is one token, so a long word counts one and not four.
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
        });
        let mut bench = Bench::new();
        bench.table(
            "documents",
            "documents.jsonl",
            &[document("a.md", "Responsibilities everywhere nevertheless.")],
        );
        assert_eq!(bench.run(&Chunk, json!({})).unwrap().count("tokens"), 8);
        bench.input("base", &[("tokenizer.json", tokenizer.to_string().as_bytes())]);
        let outcome = bench.run(&Chunk, json!({})).unwrap();
        assert_eq!((outcome.count("tokens"), outcome.rows.new), (4, 1));
        bench.input("base", &[("model.safetensors", b"")]);
        assert!(bench.run(&Chunk, json!({})).err().unwrap().message.contains("`base`"));
    }

    #[test]
    fn a_page_goes_on_under_the_heading_of_the_page_before() {
        let mut page = document("a.pdf#page=2", "It goes on.");
        page.meta.insert("section".to_owned(), "Leave".into());
        let mut bench = Bench::new();
        bench.table("documents", "documents.jsonl", &[page]);
        let outcome = bench.run(&Chunk, json!({})).unwrap();
        assert_eq!(outcome.table::<corpus::Chunk>("chunks.jsonl")[0].headings, ["Leave"]);
    }

    #[test]
    fn limits_that_contradict_are_refused() {
        let error = |with| Bench::new().run(&Chunk, with).err().unwrap().message;
        assert!(error(json!({ "max_tokens": 20, "min_tokens": 30 })).contains("min_tokens"));
        assert!(error(json!({ "max_tokens": 3 })).contains("max_tokens"));
    }
}
