//! `uses: generate` asks a model, or a recording of one, for questions and answers on each chunk.
//!
//! Reads `chunks.jsonl`; writes `examples.jsonl` and `rejected.jsonl`. A chunk is one memo row, keyed by who
//! answers, the rendered prompt (so by the chunk's text, not its id) and the sampling parameters; an answer is
//! never paid for twice, not even when the stage fails or is killed half-way. Knows no HTTP: that is `llm`.
//! Bump `VERSION` when the prompt's frame, the answer's schema or the form of an example changes.

mod prompt;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tunesmith_pipeline::digest::Digest;
use tunesmith_pipeline::stage::{
    Arity, InputSlot, ParamProblem, SourceSpec, StageContext, StageError, StageKind,
};

use self::prompt::{FactField, answer_schema, render};
use crate::corpus::words::excerpt;
use crate::corpus::{Chunk, Example, Message, Provenance, read_table, write_table};
use crate::llm::{Answer, Generator, Passage, Provider, RECORDING, Request, Usage};

const VERSION: u32 = 1;

/// After this many chunks in a row that failed, the provider is taken to be down.
const FAILURES_IN_A_ROW_MAX: usize = 3;

/// The kind `generate`.
pub(crate) struct Generate;

/// Parameters of `generate`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Who answers.
    provider: Provider,
    /// Facts to ask about per chunk (`{n}` of the prompt).
    #[serde(default = "default_questions")]
    #[schemars(range(min = 1, max = 50))]
    questions_per_chunk: usize,
    /// Prompt with `{chunk}`, and where wanted `{title}`, `{headings}` and `{n}`. The form of the answer is added.
    #[serde(default)]
    prompt: Option<String>,
    /// System message put in front of every example.
    #[serde(default)]
    system: Option<String>,
    /// Requests in flight at once. Never changes a result.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 64))]
    concurrency: usize,
    /// Sampling temperature; the server's default where absent.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f64>,
    /// Most tokens of one answer; the server's default where absent.
    #[serde(default)]
    #[schemars(range(min = 16))]
    max_tokens: Option<u32>,
}

fn default_questions() -> usize {
    3
}

fn default_concurrency() -> usize {
    4
}

/// What the memo keeps of one chunk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Harvest {
    drafts: Vec<Draft>,
    rejected: Vec<Rejected>,
    answers: usize,
    usage: Usage,
}

/// A question and its answer, as the model gave them.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Draft {
    question: String,
    answer: String,
    #[serde(default)]
    fact: Option<String>,
}

#[derive(Deserialize)]
struct Drafts {
    examples: Vec<Draft>,
}

/// An answer that could not be used.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Rejected {
    reason: String,
    response: String,
}

/// A row of `rejected.jsonl`.
#[derive(Serialize)]
struct RejectedRow<'a> {
    chunk: &'a str,
    reason: &'a str,
    response: &'a str,
}

impl StageKind for Generate {
    fn name(&self) -> &'static str {
        "generate"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Asks a language model (any OpenAI-compatible server) or a recording of one for questions and grounded answers \
         on each chunk. Answers are remembered chunk by chunk, so nothing is paid for twice."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[InputSlot { name: "chunks", doc: "passages, `chunks.jsonl` of a `chunk` stage", arity: Arity::One }]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("examples.jsonl", "questions and answers, each with the chunk it was made from"),
            ("rejected.jsonl", "answers that did not have the asked form, with the reason"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let Ok(params) = serde_json::from_value::<Params>(with.clone()) else { return Vec::new() };
        let mut problems = params.provider.problems("provider");
        if params.prompt.is_some_and(|prompt| !prompt.contains("{chunk}")) {
            problems.push(ParamProblem {
                path: "prompt".to_owned(),
                message: "the prompt has no `{chunk}`, so no passage would be shown".to_owned(),
                hint: Some("put `{chunk}` where the passage belongs".to_owned()),
            });
        }
        problems
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        serde_json::from_value::<Provider>(with["provider"].clone())
            .map_or_else(|_| Vec::new(), |provider| provider.sources("provider"))
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let chunks: Vec<Chunk> = read_table(&context.input("chunks")?.file("chunks.jsonl")?)?;
        let generator = params.provider.connect(context.source(RECORDING))?;
        let requests = requests(&chunks, &params);
        let harvests = ask_all(context, &params, generator.as_ref(), &requests)?;
        write(context, &params, generator.as_ref(), &chunks, &requests, &harvests)
    }
}

/// One request a chunk, in their order.
fn requests<'a>(chunks: &'a [Chunk], params: &Params) -> Vec<Request<'a>> {
    let mut first: BTreeMap<&str, (u32, usize)> = BTreeMap::new();
    let place = |chunk: &Chunk| (chunk.source.page.unwrap_or(0), chunk.span[0]);
    for chunk in chunks {
        let earliest = first.entry(&chunk.source.path).or_insert_with(|| place(chunk));
        *earliest = (*earliest).min(place(chunk));
    }
    chunks
        .iter()
        .map(|chunk| Request {
            system: None,
            user: render(params.prompt.as_deref(), chunk, params.questions_per_chunk),
            schema: Some(answer_schema(FactField::Required)),
            temperature: params.temperature,
            max_tokens: params.max_tokens,
            passage: Some(Passage {
                path: &chunk.source.path,
                text: &chunk.text,
                is_first: first.get(chunk.source.path.as_str()) == Some(&place(chunk)),
            }),
        })
        .collect()
}

/// Asks for every chunk on `concurrency` threads. What was answered is in the memo even if this fails.
fn ask_all(
    context: &StageContext<'_>,
    params: &Params,
    generator: &dyn Generator,
    requests: &[Request<'_>],
) -> Result<Vec<Harvest>, StageError> {
    let schema = answer_schema(FactField::Optional);
    let validator = jsonschema::validator_for(&schema)
        .map_err(|error| StageError::new("generate::schema", error.to_string()))?;
    let (next, failures_in_a_row, give_up) =
        (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    let mut results: Vec<Option<Result<Harvest, StageError>>> = requests.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        for _ in 0..params.concurrency.min(requests.len()) {
            let sender = sender.clone();
            let (next, failures_in_a_row, give_up, validator) =
                (&next, &failures_in_a_row, &give_up, &validator);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= requests.len()
                        || give_up.load(Ordering::Relaxed)
                        || context.services.cancelled()
                    {
                        break;
                    }
                    let result = ask_one(context, generator, validator, &requests[index]);
                    match &result {
                        Ok(_) => failures_in_a_row.store(0, Ordering::Relaxed),
                        Err(error) => {
                            let failures = failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
                            if !error.transient || failures >= FAILURES_IN_A_ROW_MAX {
                                give_up.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                    if sender.send((index, result)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (done, (index, result)) in receiver.iter().enumerate() {
            results[index] = Some(result);
            context.progress(done as u64 + 1, requests.len() as u64, "chunks");
        }
    });
    context.check_cancelled()?;
    all_or_error(results)
}

/// The harvests in order, or one error that counts what is missing.
fn all_or_error(results: Vec<Option<Result<Harvest, StageError>>>) -> Result<Vec<Harvest>, StageError> {
    let total = results.len();
    let mut harvests = Vec::with_capacity(total);
    let mut first: Option<StageError> = None;
    for result in results {
        match result {
            Some(Ok(harvest)) => harvests.push(harvest),
            Some(Err(error)) => {
                // A final error explains more than one that may pass.
                let is_better = first.as_ref().is_none_or(|held| held.transient && !error.transient);
                if is_better {
                    first = Some(error);
                }
            }
            None => {}
        }
    }
    let Some(mut error) = first else { return Ok(harvests) };
    let missing = total - harvests.len();
    error.message = format!("{missing} of {total} chunks have no answer: {}", error.message);
    if !harvests.is_empty() {
        let kept = format!("the {} answered chunks are kept; run again to go on", harvests.len());
        error.hint = Some(error.hint.map_or_else(|| kept.clone(), |hint| format!("{hint}; {kept}")));
    }
    Err(error)
}

/// Asks for one chunk, unless the memo has it.
fn ask_one(
    context: &StageContext<'_>,
    generator: &dyn Generator,
    validator: &jsonschema::Validator,
    request: &Request<'_>,
) -> Result<Harvest, StageError> {
    let sampling = json!([request.temperature, request.max_tokens]).to_string();
    let parts = [generator.key(request), request.user.clone(), sampling];
    context.memo(&parts.each_ref().map(String::as_bytes), || {
        let stop = || context.services.cancelled();
        let mut harvest = Harvest::default();
        for answer in generator.answers(request, &stop)? {
            harvest.answers += 1;
            harvest.usage += answer.usage;
            let mut drafts = drafts(&answer, validator);
            let mut last = answer;
            if let Err(reason) = &drafts
                && generator.is_live()
            {
                let mut again = request.clone();
                again.user = format!("{}\n\nYour last reply could not be used: {reason}.", request.user);
                if let Some(second) = generator.answers(&again, &stop)?.into_iter().next() {
                    harvest.usage += second.usage;
                    drafts = self::drafts(&second, validator);
                    last = second;
                }
            }
            match drafts {
                Ok(drafts) => harvest.drafts.extend(drafts),
                Err(reason) => {
                    harvest.rejected.push(Rejected { reason, response: excerpt(&last.text, 400) });
                }
            }
        }
        Ok(harvest)
    })
}

/// The drafts in an answer, or why it is none.
fn drafts(answer: &Answer, validator: &jsonschema::Validator) -> Result<Vec<Draft>, String> {
    if answer.is_cut_off {
        return Err("it was cut off at the token limit (`max_tokens`)".to_owned());
    }
    let value: Value = serde_json::from_str(answer.text.trim())
        .map_err(|error| format!("it is not one JSON object: {error}"))?;
    if let Some(error) = validator.iter_errors(&value).next() {
        return Err(format!("{} at `{}`", excerpt(&error.to_string(), 160), error.instance_path()));
    }
    serde_json::from_value::<Drafts>(value).map(|drafts| drafts.examples).map_err(|error| error.to_string())
}

fn write(
    context: &StageContext<'_>,
    params: &Params,
    generator: &dyn Generator,
    chunks: &[Chunk],
    requests: &[Request<'_>],
    harvests: &[Harvest],
) -> Result<(), StageError> {
    let mut examples = Vec::new();
    let mut rejected = Vec::new();
    let (mut usage, mut answered) = (Usage::default(), 0u64);
    let mut ids = BTreeSet::new();
    for ((chunk, request), harvest) in chunks.iter().zip(requests).zip(harvests) {
        usage += harvest.usage;
        answered += u64::from(harvest.answers > 0);
        rejected.extend(harvest.rejected.iter().map(|row| RejectedRow {
            chunk: &chunk.id,
            reason: &row.reason,
            response: &row.response,
        }));
        let prompt = Digest::of(request.user.as_bytes()).hex();
        for draft in &harvest.drafts {
            let mut example = example(chunk, draft, params.system.as_deref());
            example.provenance.generator = generator.identity();
            example.provenance.prompt.clone_from(&prompt);
            // The same words twice for one chunk: still two rows, for `dedupe` to report.
            while !ids.insert(example.id.clone()) {
                example.id.push('+');
            }
            examples.push(example);
        }
    }
    context.metric("chunks", chunks.len());
    context.metric("chunks_answered", answered);
    context.metric("examples", examples.len());
    context.metric("rejected", rejected.len());
    context.metric("prompt_tokens", usage.prompt_tokens);
    context.metric("completion_tokens", usage.completion_tokens);
    if examples.is_empty() {
        return Err(no_examples(chunks.len(), answered, &rejected, generator.is_live()));
    }
    let passages: Vec<Passage<'_>> = requests.iter().filter_map(|request| request.passage).collect();
    let unused = generator.unused(&passages);
    if let Some(first) = unused.first() {
        context.warn(&format!(
            "{} recorded answers belong to no chunk (the note is gone, or their quote is); the first: {first}",
            unused.len()
        ));
    }
    if let Some(row) = rejected.first() {
        context.warn(&format!(
            "{} answers did not have the asked form and are in `rejected.jsonl`; the first, for chunk `{}`: {}",
            rejected.len(),
            row.chunk,
            row.reason
        ));
    }
    write_table(&context.out.join("examples.jsonl"), &examples)?;
    write_table(&context.out.join("rejected.jsonl"), &rejected)?;
    Ok(())
}

fn example(chunk: &Chunk, draft: &Draft, system: Option<&str>) -> Example {
    let message =
        |role: &str, content: &str| Message { role: role.to_owned(), content: content.trim().to_owned() };
    let mut messages: Vec<Message> = system.map(|system| message("system", system)).into_iter().collect();
    messages.push(message("user", &draft.question));
    messages.push(message("assistant", &draft.answer));
    let identity = json!([draft.question, draft.answer, chunk.id]).to_string();
    let fact = draft.fact.as_deref().map(str::trim).filter(|fact| !fact.is_empty());
    Example {
        id: Digest::of(identity.as_bytes()).short(),
        messages,
        group: fact.unwrap_or(&chunk.id).to_owned(),
        tags: Vec::new(),
        key_facts: Vec::new(),
        provenance: Provenance {
            chunks: vec![chunk.id.clone()],
            places: vec![place(chunk)],
            evidence: Some(chunk.text.clone()),
            ..Provenance::default()
        },
    }
}

/// `notes/x.pdf page 3`, or `notes/x.md § Heading`.
fn place(chunk: &Chunk) -> String {
    let path = &chunk.source.path;
    match (chunk.source.page, chunk.headings.last()) {
        (Some(page), _) => format!("{path} page {page}"),
        (None, Some(_)) => format!("{path} § {}", chunk.headings.join(" > ")),
        (None, None) => path.clone(),
    }
}

fn no_examples(chunks: usize, answered: u64, rejected: &[RejectedRow<'_>], is_live: bool) -> StageError {
    let error = StageError::new(
        "generate::no_examples",
        match rejected.first() {
            Some(row) => format!(
                "no example from {chunks} chunks; the answer for chunk `{}`: {}",
                row.chunk, row.reason
            ),
            None => format!("no example from {chunks} chunks, of which {answered} were answered"),
        },
    );
    error.hint(match (is_live, answered) {
        (false, 0) => {
            "no row's `source` and `quote` are found in a chunk: `source` is a path relative to the recording or the manifest, `quote` a phrase of the note"
        }
        (true, _) if !rejected.is_empty() => "try another model or prompt, or raise `max_tokens`",
        _ => "check that the chunks hold text worth asking about, and the prompt",
    })
}

#[cfg(test)]
mod tests;
