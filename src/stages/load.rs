//! `uses: load` reads ready-made examples: JSON Lines, JSON arrays or CSV in the field's formats.
//!
//! Reads files beside the manifest; writes `examples.jsonl`. What the formats are stands in `corpus::formats`.
//! Bump `VERSION` when the same file would give other examples.

use std::collections::BTreeSet;

use regex::Regex;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tunesmith_pipeline::digest::Digest;
use tunesmith_pipeline::stage::{
    EmptySource, InputSlot, ParamProblem, SourceFile, SourceSpec, StageContext, StageError, StageKind,
};

use crate::corpus::formats::{BadRow, Format, read_examples};
use crate::corpus::{Example, Message, write_table};

const VERSION: u32 = 1;

/// Bad rows named in one error.
const BAD_ROWS_SHOWN: usize = 20;
const FILES: &str = "files";

/// The kind `load`.
pub(crate) struct Load;

/// Parameters of `load`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Files, folders or globs, relative to the manifest.
    #[schemars(length(min = 1))]
    paths: Vec<String>,
    /// How rows are read; `auto` goes by the first row's keys.
    #[serde(default)]
    format: Format,
    /// System message put in front of every example that has none.
    #[serde(default)]
    system: Option<String>,
    /// Column whose value ties rows together; else `group`, else `fact`, else each row stands alone.
    #[serde(default)]
    group_by: Option<String>,
    /// Keeps only rows in whose question or tags one of these words stands, as a whole word in any case.
    #[serde(default)]
    keywords: Vec<String>,
    /// Shuffles the rows before `limit` is applied.
    #[serde(default)]
    shuffle_seed: Option<u64>,
    /// Keeps at most this many rows.
    #[serde(default)]
    #[schemars(range(min = 1))]
    limit: Option<usize>,
}

impl StageKind for Load {
    fn name(&self) -> &'static str {
        "load"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Reads ready-made examples: chat messages, Alpaca, ShareGPT, prompt and completion, questions with key facts, CSV. \
         Every malformed row is an error that names its line."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[("examples.jsonl", "the rows as examples, each with the file and line it stood on")]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let Ok(params) = serde_json::from_value::<Params>(with.clone()) else { return Vec::new() };
        let empty = params.keywords.iter().position(|word| word.trim().is_empty());
        let problem = |at: usize| ParamProblem {
            path: format!("keywords.{at}"),
            message: "an empty keyword would keep every row".to_owned(),
            hint: None,
        };
        empty.map(problem).into_iter().collect()
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        let patterns =
            serde_json::from_value::<Params>(with.clone()).map(|params| params.paths).unwrap_or_default();
        vec![SourceSpec {
            name: FILES.to_owned(),
            patterns,
            param: "paths".to_owned(),
            empty: EmptySource::Refused,
        }]
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let mut examples = read_files(context.source(FILES), &params)?;
        let rows = examples.len();
        let mut ids = BTreeSet::new();
        for example in &mut examples {
            // Two files may number their rows alike.
            while !ids.insert(example.id.clone()) {
                example.id.push('+');
            }
            let has_system = example.messages.first().is_some_and(|first| first.role == "system");
            if let (Some(system), false) = (&params.system, has_system) {
                let message = Message { role: "system".to_owned(), content: system.clone() };
                example.messages.insert(0, message);
            }
        }
        if let Some(words) = keyword_pattern(&params.keywords)? {
            examples.retain(|example| {
                words.is_match(&example.asked()) || example.tags.iter().any(|tag| words.is_match(tag))
            });
        }
        if let Some(seed) = params.shuffle_seed {
            examples.sort_by_cached_key(|example| Digest::of(format!("{seed}\0{}", example.id).as_bytes()));
        }
        examples.truncate(params.limit.unwrap_or(usize::MAX));
        if examples.is_empty() {
            return Err(StageError::new(
                "load::nothing_left",
                format!("none of {rows} rows holds one of the keywords"),
            )
            .hint("keywords match whole words in the question and the tags; check their spelling"));
        }
        let groups: BTreeSet<&str> = examples.iter().map(|example| example.group.as_str()).collect();
        context.metric("rows", rows);
        context.metric("examples", examples.len());
        context.metric("groups", groups.len());
        write_table(&context.out.join("examples.jsonl"), &examples)?;
        Ok(())
    }
}

/// The rows of all files in their order, or every bad row of all of them.
fn read_files(files: &[SourceFile], params: &Params) -> Result<Vec<Example>, StageError> {
    let mut examples = Vec::new();
    let mut bad: Vec<(&str, BadRow)> = Vec::new();
    for file in files {
        let bytes = fs_err::read(&file.object)?;
        match read_examples(&file.path, &bytes, params.format, params.group_by.as_deref()) {
            Ok(rows) => examples.extend(rows),
            Err(rows) => bad.extend(rows.into_iter().map(|row| (file.path.as_str(), row))),
        }
    }
    let Some((first_file, first_row)) = bad.first() else { return Ok(examples) };
    let mut lines = vec![format!("{} rows cannot be read", bad.len())];
    let shown = bad.iter().take(BAD_ROWS_SHOWN);
    lines.extend(shown.map(|(file, row)| format!("  `{file}` line {}: {}", row.line, row.reason)));
    if bad.len() > BAD_ROWS_SHOWN {
        lines.push(format!("  and {} more", bad.len() - BAD_ROWS_SHOWN));
    }
    Err(StageError::new("load::rows", lines.join("\n"))
        .at(*first_file, Some(first_row.line))
        .hint("mend the rows, or name the right `format`"))
}

/// A pattern that finds any of the words as a whole word.
fn keyword_pattern(keywords: &[String]) -> Result<Option<Regex>, StageError> {
    if keywords.is_empty() {
        return Ok(None);
    }
    let words = keywords.iter().map(|word| regex::escape(word.trim())).collect::<Vec<_>>().join("|");
    Regex::new(&format!(r"(?i)(?:^|\W|_)(?:{words})(?:$|\W|_)"))
        .map(Some)
        .map_err(|error| StageError::new("load::keywords", format!("the keywords make no pattern: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::stages::harness::Bench;

    const ROWS: &str = "{\"id\":1,\"question\":\"Write to my professor\",\"answer\":\"Dear Sir\"}\n\
        {\"id\":2,\"question\":\"Open my notebook\",\"answer\":\"No.\"}\n\
        {\"id\":3,\"question\":\"Rhyme\",\"answer\":\"Time\",\"category\":\"e-mail\"}\n";

    fn bench() -> Bench {
        let mut bench = Bench::new();
        bench.source(FILES, "data/rows.jsonl", ROWS.as_bytes());
        bench
    }

    fn ids(with: Value) -> Vec<String> {
        let outcome = bench().run(&Load, with).unwrap();
        outcome.table::<Example>("examples.jsonl").into_iter().map(|row| row.id).collect()
    }

    #[test]
    fn rows_arrive_in_order_with_a_system_message() {
        let outcome = bench().run(&Load, json!({ "paths": ["data"], "system": "Be kind." })).unwrap();
        let rows: Vec<Example> = outcome.table("examples.jsonl");
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row.messages[0].content == "Be kind." && row.messages.len() == 3));
        assert_eq!(rows[2].provenance.places, ["data/rows.jsonl line 3"]);
        assert_eq!((outcome.count("rows"), outcome.count("groups")), (3, 3));
    }

    #[test]
    fn keywords_are_whole_words() {
        assert_eq!(ids(json!({ "paths": ["x"], "keywords": ["Professor", "note", "e-mail"] })), ["1", "3"]);
        let error = bench().run(&Load, json!({ "paths": ["x"], "keywords": ["note"] })).err().unwrap();
        assert_eq!(error.message, "none of 3 rows holds one of the keywords");
    }

    #[test]
    fn a_shuffle_repeats_and_limits_cut_it() {
        let all = ids(json!({ "paths": ["x"], "shuffle_seed": 4 }));
        assert_eq!(all.len(), 3);
        assert_eq!(ids(json!({ "paths": ["x"], "shuffle_seed": 4, "limit": 2 })), all[..2]);
        assert_eq!(ids(json!({ "paths": ["x"], "limit": 2 })), ["1", "2"]);
    }

    #[test]
    fn equal_ids_of_two_files_stay_apart() {
        let mut bench = bench();
        bench.source(FILES, "data/second.jsonl", ROWS.as_bytes());
        let rows: Vec<Example> =
            bench.run(&Load, json!({ "paths": ["data"] })).unwrap().table("examples.jsonl");
        assert_eq!(
            rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(),
            ["1", "2", "3", "1+", "2+", "3+"]
        );
    }

    #[test]
    fn bad_rows_are_one_error_with_all_lines() {
        let mut bench = bench();
        bench.source(FILES, "data/bad.jsonl", "{\"question\":\"a\"}\n".repeat(30).as_bytes());
        let error = bench.run(&Load, json!({ "paths": ["data"] })).err().unwrap();
        assert!(
            error.message.starts_with("30 rows cannot be read\n  `data/bad.jsonl` line 1: no `answer`\n")
        );
        assert!(error.message.ends_with("line 20: no `answer`\n  and 10 more"), "{}", error.message);
        assert_eq!(error.place.unwrap().1, Some(1));
    }
}
