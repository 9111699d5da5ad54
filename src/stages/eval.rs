//! `uses: eval`: asks the base model, the base model with a system prompt, and the tuned model the same
//! held-out questions and free prompts, and says how much better which one is, with intervals.
//!
//! Reads: the base folder, the adapter, a split with `test.jsonl` and `train.jsonl`, and a table of prompts.
//! Writes: `summary.json`, `answers.jsonl`, `prompts.jsonl`. Timings are metrics, never bytes of the artifact.
//! Bump `VERSION` when the written bytes change.

mod ask;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tunesmith_pipeline::stage::{
    Arity, Cost, EmptySource, InputSlot, SourceSpec, StageContext, StageError, StageKind,
};

use crate::corpus::split::{NEAR, closeness};
use crate::corpus::{Example, Message, read_table, write_table};
use crate::evaluate::flags::{self, Seen};
use crate::evaluate::intervals::{bootstrap_mean, bootstrap_ratio, wilson};
use crate::evaluate::results::{Answered, ArmAnswer, ArmSummary, LeakCheck, Prompted, Summary};
use crate::evaluate::scoring::holds_key_facts;
use ask::{Arm, Asked, Asker};

const VERSION: u32 = 1;

/// The `eval` kind.
pub(crate) struct Eval;

/// Parameters of `eval`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// System message of the `prompted` arm; without it the arm is left out.
    system_prompt: Option<String>,
    /// JSON Lines of free prompts beside the manifest: `{"id", "category", "prompt"}`.
    prompts: Option<String>,
    /// Tokens an answer to a question may have.
    #[serde(default = "default_answer_tokens")]
    #[schemars(range(min = 1, max = 4096))]
    max_answer_tokens: usize,
    /// Tokens an answer to a free prompt may have.
    #[serde(default = "default_prompt_tokens")]
    #[schemars(range(min = 1, max = 4096))]
    max_prompt_tokens: usize,
    /// Questions and free prompts answered together.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = 256))]
    batch: usize,
    /// Questions answered once more, one at a time, to measure the latency a user sees: the median counts.
    #[serde(default = "default_latency_samples")]
    #[schemars(range(max = 100))]
    latency_samples: usize,
    /// Seed of the bootstrap.
    #[serde(default)]
    seed: u64,
}

fn default_answer_tokens() -> usize {
    48
}

fn default_prompt_tokens() -> usize {
    96
}

fn default_batch() -> usize {
    32
}

fn default_latency_samples() -> usize {
    1
}

/// A row of the prompts table.
#[derive(Debug, Deserialize)]
struct PromptRow {
    id: String,
    category: String,
    prompt: String,
}

impl StageKind for Eval {
    fn name(&self) -> &'static str {
        "eval"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Compares base, base with a system prompt, and tuned on held-out questions and free prompts: loss, key-fact accuracy, length, latency."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[
            InputSlot { name: "adapter", doc: "the trained adapter", arity: Arity::One },
            InputSlot { name: "base", doc: "the base model it was trained on", arity: Arity::One },
            InputSlot { name: "data", doc: "a split; its `test.jsonl` is asked", arity: Arity::One },
        ]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("summary.json", "each arm's figures with intervals, red flags, leak check"),
            ("answers.jsonl", "every question with every arm's answer"),
            ("prompts.jsonl", "every free prompt with every arm's answer"),
        ]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        with.get("prompts")
            .and_then(Value::as_str)
            .map(|path| SourceSpec {
                name: "prompts".to_owned(),
                patterns: vec![path.to_owned()],
                param: "prompts".to_owned(),
                empty: EmptySource::Refused,
            })
            .into_iter()
            .collect()
    }

    fn numerics(&self, _with: &Value) -> Option<String> {
        Some(super::device::numerics())
    }

    fn cost(&self) -> Cost {
        Cost::Heavy
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let data = context.input("data")?;
        let questions: Vec<Example> = read_table(&data.file("test.jsonl")?)?;
        let train: Vec<Example> = read_table(&data.file("train.jsonl")?)?;
        let prompts = if params.prompts.is_some() { read_prompts(context)? } else { Vec::new() };
        if questions.is_empty() && prompts.is_empty() {
            return Err(StageError::new(
                "eval::nothing_to_ask",
                "the split has no test rows and no prompts are named",
            )
            .hint("give `split` a `test` share or a `test` input, or name `prompts`"));
        }
        let arms = arms(&params, &train);
        let asker = Asker::open(context, &params)?;
        let (mut answered, leak_check) = unanswered(&questions, &train);
        let mut prompted: Vec<Prompted> = prompts
            .iter()
            .map(|row| Prompted {
                id: row.id.clone(),
                category: row.category.clone(),
                prompt: row.prompt.clone(),
                arms: Vec::new(),
            })
            .collect();
        let mut tokens = vec![0; questions.len()];
        for arm in &arms {
            let asked: Vec<(Vec<Message>, usize)> = questions
                .iter()
                .map(|example| (arm.conversation(&example.messages), params.max_answer_tokens))
                .chain(
                    prompts
                        .iter()
                        .map(|row| (arm.conversation(&[user(&row.prompt)]), params.max_prompt_tokens)),
                )
                .collect();
            let mut answers = asker.answers(arm, &asked)?.into_iter();
            for ((row, tokens), answer) in answered.iter_mut().zip(&mut tokens).zip(&mut answers) {
                let right =
                    (!row.key_facts.is_empty()).then(|| holds_key_facts(&answer.text, &row.key_facts));
                *tokens = answer.reference.map_or(0, |loss| loss.supervised);
                row.arms.push(arm_answer(arm, answer, right));
            }
            for (row, answer) in prompted.iter_mut().zip(answers) {
                row.arms.push(arm_answer(arm, answer, None));
            }
            let samples = asked.into_iter().take(params.latency_samples.min(questions.len()));
            if let Some(seconds) = asker.latency(arm, samples)? {
                context.metric(&format!("{}.latency_seconds", arm.name), seconds);
            }
        }
        let summary = summarise(&arms, &answered, &prompted, &tokens, leak_check, params.seed);
        report_metrics(context, &summary);
        write_table(&context.out.join("answers.jsonl"), &answered)?;
        write_table(&context.out.join("prompts.jsonl"), &prompted)?;
        let json = serde_json::to_vec_pretty(&summary).map_err(std::io::Error::from)?;
        fs_err::write(context.out.join("summary.json"), json)?;
        Ok(())
    }
}

fn read_prompts(context: &StageContext<'_>) -> Result<Vec<PromptRow>, StageError> {
    let mut prompts = Vec::new();
    for file in context.source("prompts") {
        prompts.extend(read_table::<PromptRow>(&file.object).map_err(|error| {
            match error {
                crate::corpus::TableError::Row { line, source, .. } => {
                    StageError::new("eval::prompts", source.to_string())
                        .at(&file.path, Some(line))
                        .hint("each line is {\"id\", \"category\", \"prompt\"}")
                }
                crate::corpus::TableError::Io(error) => error.into(),
            }
        })?);
    }
    Ok(prompts)
}

/// The tuned arm is asked with the system message it was trained with.
fn arms(params: &Params, train: &[Example]) -> Vec<Arm> {
    let trained_with =
        train.first().and_then(|example| example.messages.iter().find(|message| message.role == "system"));
    let mut arms = vec![Arm { name: "base", system: None, tuned: false }];
    if let Some(system) = &params.system_prompt {
        arms.push(Arm { name: "prompted", system: Some(system.clone()), tuned: false });
    }
    arms.push(Arm {
        name: "tuned",
        system: trained_with.map(|message| message.content.clone()),
        tuned: true,
    });
    arms
}

fn user(text: &str) -> Message {
    Message { role: "user".to_owned(), content: text.to_owned() }
}

/// The questions with the training question closest to each, and how close they come on the whole. Measured
/// here once more, on what is really asked and was really trained on.
fn unanswered(questions: &[Example], train: &[Example]) -> (Vec<Answered>, LeakCheck) {
    let (asked, trained): (Vec<&Example>, Vec<&Example>) =
        (questions.iter().collect(), train.iter().collect());
    let mut check =
        LeakCheck { test_questions: asked.len(), train_rows: trained.len(), ..LeakCheck::default() };
    let rows = asked
        .iter()
        .zip(closeness(&trained, &asked))
        .map(|(example, close)| {
            let similarity = close.nearest.map_or(0.0, |(_, similarity)| similarity);
            check.exact += u64::from(close.equal.is_some());
            check.near += u64::from(close.equal.is_none() && similarity >= NEAR);
            check.max_similarity = check.max_similarity.max(similarity);
            Answered {
                id: example.id.clone(),
                question: example.question().to_owned(),
                reference: example.answer().to_owned(),
                key_facts: example.key_facts.clone(),
                places: example.provenance.places.clone(),
                nearest_train: close
                    .nearest
                    .map(|(row, similarity)| (trained[row].question().to_owned(), similarity)),
                arms: Vec::new(),
            }
        })
        .collect();
    (rows, check)
}

fn arm_answer(arm: &Arm, asked: Asked, right: Option<bool>) -> ArmAnswer {
    ArmAnswer {
        arm: arm.name.to_owned(),
        words: asked.text.split_whitespace().count(),
        answer: asked.text,
        right,
        loss: asked.reference.map(|loss| loss.nll),
        tokens: asked.tokens,
        stopped: asked.stopped,
    }
}

/// The figures of each arm; `tokens[i]` is the number of supervised tokens of question `i`'s reference.
fn summarise(
    arms: &[Arm],
    answered: &[Answered],
    prompted: &[Prompted],
    tokens: &[usize],
    leak_check: LeakCheck,
    seed: u64,
) -> Summary {
    let questions = answered.iter().filter(|row| !row.key_facts.is_empty()).count();
    let summaries: Vec<ArmSummary> = arms
        .iter()
        .enumerate()
        .map(|(index, arm)| {
            let of_arm = || answered.iter().map(|row| &row.arms[index]);
            let everything = || of_arm().chain(prompted.iter().map(|row| &row.arms[index]));
            let losses: Vec<(f64, f64)> = of_arm()
                .zip(tokens)
                .filter_map(|(answer, &tokens)| answer.loss.map(|loss| (loss, tokens as f64)))
                .collect();
            let right = of_arm().filter(|answer| answer.right == Some(true)).count();
            let words: Vec<f64> = everything().map(|answer| answer.words as f64).collect();
            let lengths: Vec<f64> = everything().map(|answer| answer.tokens as f64).collect();
            ArmSummary {
                name: arm.name.to_owned(),
                system: arm.system.clone(),
                loss: bootstrap_ratio(&losses, seed),
                accuracy: (questions > 0).then(|| wilson(right, questions)),
                right,
                words: bootstrap_mean(&words, seed),
                tokens: bootstrap_mean(&lengths, seed),
            }
        })
        .collect();
    let (base, tuned) = (&summaries[0], &summaries[summaries.len() - 1]);
    let seen = Seen {
        questions,
        tuned_right: tuned.right,
        base_right: base.right,
        leaks_exact: leak_check.exact,
        leaks_near: leak_check.near,
        unfinished: answered
            .iter()
            .filter(|row| row.arms.last().is_some_and(|answer| !answer.stopped))
            .count(),
        losses: tuned.loss.zip(base.loss).map(|(tuned, base)| (tuned.value, base.value)),
        accuracies_apart: tuned
            .accuracy
            .zip(base.accuracy)
            .is_none_or(|(tuned, base)| tuned.apart_from(&base)),
    };
    Summary { questions, prompts: prompted.len(), flags: flags::raise(&seen), leak_check, arms: summaries }
}

/// Every figure as `<arm>.<measure>`, with `.low` and `.high` where it has an interval.
fn report_metrics(context: &StageContext<'_>, summary: &Summary) {
    for arm in &summary.arms {
        let measures =
            [("loss", arm.loss), ("accuracy", arm.accuracy), ("words", arm.words), ("tokens", arm.tokens)];
        for (measure, estimate) in measures {
            if let Some(estimate) = estimate {
                let name = format!("{}.{measure}", arm.name);
                context.metric(&name, estimate.value);
                context.metric(&format!("{name}.low"), estimate.low);
                context.metric(&format!("{name}.high"), estimate.high);
            }
        }
    }
    for flag in &summary.flags {
        context.warn(&format!("{}: {}", flag.name, flag.detail));
    }
}
