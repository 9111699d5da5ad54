//! What only the trained model itself can show: that the adapter changes its logits, that it ends its turns, and
//! that it does not go on to speak for the user. Run once after training, on a few of the rows trained on, where
//! a model that has learnt anything must do well. Knows the tokenizer (what a user's turn looks like).

use crate::adapter::Adapter;
use crate::generate::{GenerateError, GenerateHooks, GenerateOptions, StopReason, generate};
use crate::model::{Model, ModelError, Pack, Workspace};
use crate::tokenizer::{Message, Tokenizer, TokenizerError};

use super::examples::TokenizedExample;
use super::gates::Severity;

/// How to probe.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeOptions {
    /// Rows whose prompts are answered, spread evenly over all.
    pub prompts: usize,
    /// Tokens within which an answer should end.
    pub max_new_tokens: usize,
    /// Share of the answers, 0 to 1, that must end by themselves. A lightly trained model may ramble on one.
    pub stopped_share: f64,
    /// What a model that does not stop, or that speaks for the user, does to the run.
    pub never_stops: Severity,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self { prompts: 4, max_new_tokens: 256, stopped_share: 0.5, never_stops: Severity::Error }
    }
}

/// What the probes found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ProbeReport {
    /// Largest absolute difference that the adapter makes to the logits after the canary prompt.
    pub canary_logit_delta: f64,
    /// Answers asked for.
    pub asked: usize,
    /// Answers that ended by themselves.
    pub stopped: usize,
    /// Rows whose answers did not end in time.
    pub endless: Vec<String>,
    /// Rows whose answers opened a turn of the user.
    pub spoke_for_user: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Why a trained adapter is refused.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nothing to probe with.
    #[error("there are no rows to probe the adapter with")]
    NoRows,
    /// The adapter is loaded and does nothing.
    #[error(
        "the adapter does not change a single logit after the prompt of row `{row}`; train longer, or with targets \
         that this model has"
    )]
    AdapterChangesNothing { row: String },
    /// Answers go on and on.
    #[error(
        "{} of {asked} answers did not end within {max_new_tokens} tokens (rows {}); train longer, or check that \
         the chat template ends each turn", .endless.len(), .endless.join(", ")
    )]
    NeverStops { asked: usize, max_new_tokens: usize, endless: Vec<String> },
    /// Answers go on with a question of their own.
    #[error("the answers to rows {} open a turn of the user; check the chat template", .rows.join(", "))]
    SpeaksForUser { rows: Vec<String> },
    /// The tokenizer could not say what a turn looks like.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Generation failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl ProbeError {
    /// A stable word for what happened: `never_stops`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoRows => "no_rows",
            Self::AdapterChangesNothing { .. } => "adapter_changes_nothing",
            Self::NeverStops { .. } | Self::SpeaksForUser { .. } => "never_stops",
            Self::Tokenizer(_) => "tokenizer",
            Self::Generate(GenerateError::Cancelled) => "cancelled",
            Self::Generate(_) | Self::Model(_) => "model",
        }
    }
}

/// Probes `adapter` on some of `rows`.
/// Errors: there are no rows; the adapter changes nothing; the model does not stop, or speaks for the user, where that is an error.
pub fn probe(
    model: &Model,
    adapter: &Adapter,
    tokenizer: &Tokenizer,
    rows: &[TokenizedExample],
    options: &ProbeOptions,
    hooks: &mut dyn GenerateHooks,
) -> Result<ProbeReport, ProbeError> {
    let chosen: Vec<&TokenizedExample> =
        spread(rows.len(), options.prompts.max(1)).into_iter().map(|row| &rows[row]).collect();
    let canary = chosen.first().ok_or(ProbeError::NoRows)?;
    let canary_logit_delta = canary_delta(model, adapter, canary.prompt())?;
    if canary_logit_delta == 0.0 {
        return Err(ProbeError::AdapterChangesNothing { row: canary.id.clone() });
    }
    let prompts: Vec<Vec<u32>> = chosen.iter().map(|row| row.prompt().to_vec()).collect();
    let stop_ids = [tokenizer.end_of_turn_ids(), &model.config().eos_token_ids].concat();
    let generate_options = GenerateOptions::greedy(options.max_new_tokens, stop_ids);
    let answers = generate(model, Some(adapter), &prompts, &generate_options, hooks)?;
    let header = user_header(tokenizer)?;
    let (mut endless, mut spoke_for_user) = (Vec::new(), Vec::new());
    for (row, answer) in chosen.iter().zip(&answers) {
        if answer.stopped == StopReason::MaxTokens {
            endless.push(row.id.clone());
        }
        let text = dense(&tokenizer.decode(&answer.tokens, false)?);
        if !header.is_empty() && text.contains(&header) {
            spoke_for_user.push(row.id.clone());
        }
    }
    let report = ProbeReport {
        canary_logit_delta,
        asked: chosen.len(),
        stopped: chosen.len() - endless.len(),
        endless,
        spoke_for_user,
        warnings: Vec::new(),
    };
    judge(report, options)
}

fn judge(mut report: ProbeReport, options: &ProbeOptions) -> Result<ProbeReport, ProbeError> {
    let needed = options.stopped_share * report.asked as f64;
    let mut failures = Vec::new();
    if !report.spoke_for_user.is_empty() {
        failures.push(ProbeError::SpeaksForUser { rows: report.spoke_for_user.clone() });
    }
    if !report.endless.is_empty() {
        let never_stops = ProbeError::NeverStops {
            asked: report.asked,
            max_new_tokens: options.max_new_tokens,
            endless: report.endless.clone(),
        };
        if (report.stopped as f64) < needed {
            failures.push(never_stops);
        } else {
            report.warnings.push(never_stops.to_string());
        }
    }
    match options.never_stops {
        Severity::Error if !failures.is_empty() => Err(failures.remove(0)),
        _ => {
            report.warnings.extend(failures.iter().map(ToString::to_string));
            Ok(report)
        }
    }
}

/// Largest absolute difference between the last logits of `prompt` with and without the adapter.
fn canary_delta(model: &Model, adapter: &Adapter, prompt: &[u32]) -> Result<f64, ModelError> {
    let marks = vec![false; prompt.len()];
    let pack = Pack::new(&[(prompt, &marks)]);
    let mut workspace = Workspace::default();
    let last = [prompt.len() - 1];
    let tuned = model.logits(Some(adapter), &pack, &last, &mut workspace)?;
    let base = model.logits(None, &pack, &last, &mut workspace)?;
    let deltas = tuned.iter().zip(&base).map(|(tuned, base)| f64::from((tuned - base).abs()));
    Ok(deltas.fold(0.0, f64::max))
}

/// Indices of `count` rows spread evenly over `rows`; all if there are fewer.
fn spread(rows: usize, count: usize) -> Vec<usize> {
    let count = count.min(rows);
    (0..count).map(|index| index * rows / count).collect()
}

/// How the chat template opens a user's turn after an answer, without white space: what two conversations that
/// differ only in the second question share beyond the first answer.
fn user_header(tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
    let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    let answered = [message("user", "one"), message("assistant", "two")];
    let asked =
        |question: &str| tokenizer.render(&[&answered[..], &[message("user", question)]].concat(), false);
    let (left, right, before) = (asked("alpha")?, asked("9")?, tokenizer.render(&answered, false)?);
    let shared = |left: &str, right: &str| -> String {
        left.chars()
            .zip(right.chars())
            .take_while(|(left, right)| left == right)
            .map(|(left, _)| left)
            .collect()
    };
    let opened = shared(&left, &right);
    let answer_end = shared(&opened, &before).len();
    Ok(dense(&opened[answer_end..]))
}

/// The text without white space, which tokenizers treat each in their own way around special tokens.
fn dense(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_whitespace()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, TrainOptions, prepare, train};
    use super::*;
    use crate::adapter::{LoraConfig, Targets};
    use crate::backend::Compute;

    fn model() -> Model {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama");
        Model::open(&golden, &Compute::cpu(1)).unwrap()
    }

    fn lora() -> LoraConfig {
        LoraConfig {
            rank: 4,
            alpha: 8.0,
            targets: Targets::AllLinear,
            rslora: false,
            seed: 1,
            ..LoraConfig::default()
        }
    }

    fn report(asked: usize, endless: usize, spoke: usize) -> ProbeReport {
        let names = |count| (0..count).map(|index| format!("row{index}")).collect::<Vec<_>>();
        ProbeReport {
            canary_logit_delta: 1.0,
            asked,
            stopped: asked - endless,
            endless: names(endless),
            spoke_for_user: names(spoke),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn a_model_that_mostly_stops_passes_with_a_warning() {
        let options = ProbeOptions::default();
        assert!(judge(report(4, 0, 0), &options).unwrap().warnings.is_empty());
        let warned = judge(report(4, 2, 0), &options).unwrap();
        assert!(warned.warnings[0].starts_with("2 of 4 answers did not end within 256 tokens"));
    }

    #[test]
    fn a_model_that_mostly_goes_on_is_refused() {
        let error = judge(report(4, 3, 0), &ProbeOptions::default()).unwrap_err();
        assert_eq!(error.code(), "never_stops");
        let lenient = ProbeOptions { never_stops: Severity::Warning, ..ProbeOptions::default() };
        assert_eq!(judge(report(4, 3, 1), &lenient).unwrap().warnings.len(), 2);
    }

    #[test]
    fn one_answer_that_speaks_for_the_user_is_refused() {
        let error = judge(report(4, 0, 1), &ProbeOptions::default()).unwrap_err();
        assert!(matches!(error, ProbeError::SpeaksForUser { rows } if rows == ["row0"]));
    }

    #[test]
    fn canary_tells_a_fresh_adapter_from_a_trained_one() {
        let model = model();
        let mut adapter = Adapter::new(&model, &lora()).unwrap();
        assert_eq!(canary_delta(&model, &adapter, &[5, 6, 7]).unwrap(), 0.0);
        adapter.parameters_mut().for_each(|(_, values)| values.fill(0.01));
        assert!(canary_delta(&model, &adapter, &[5, 6, 7]).unwrap() > 0.0);
    }

    #[test]
    fn probed_rows_are_spread_evenly() {
        assert_eq!(spread(10, 4), [0, 2, 5, 7]);
        assert_eq!(spread(2, 4), [0, 1]);
        assert!(spread(0, 4).is_empty());
    }

    /// A folder with a tokenizer of a few words, ChatML's marks and its template.
    fn words_tokenizer() -> (tempfile::TempDir, Tokenizer) {
        let specials = ["<unk>", "<|im_start|>", "<|im_end|>"];
        let words = ["system", "user", "assistant", "say", "after", "one", "two", "three", "four", "five"];
        let vocab: serde_json::Map<String, serde_json::Value> = specials
            .iter()
            .chain(&words)
            .enumerate()
            .map(|(id, word)| ((*word).to_owned(), id.into()))
            .collect();
        let added = specials.iter().enumerate().map(|(id, content)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        });
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": added.collect::<Vec<_>>(),
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        });
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs_err::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<|im_end|>"}"#).unwrap();
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        (dir, tokenizer)
    }

    #[test]
    fn header_of_a_user_turn_is_read_from_the_template() {
        let (_dir, tokenizer) = words_tokenizer();
        assert_eq!(user_header(&tokenizer).unwrap(), "<|im_start|>user");
    }

    #[test]
    fn trained_model_stops_and_an_untrained_one_is_refused() {
        let (_dir, tokenizer) = words_tokenizer();
        let model = model();
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let row = |left: &str, right: &str| {
            let asked = message("user", &format!("say after {left}"));
            (left.to_owned(), vec![asked, message("assistant", right)])
        };
        let conversations =
            [row("one", "two"), row("two", "three"), row("three", "four"), row("four", "five")];
        let rows = prepare(&tokenizer, &conversations, 60).unwrap();
        let problems = prepare(&tokenizer, &[conversations[0].clone(), row("one", "")], 5).unwrap_err();
        assert!(problems[0].to_string().starts_with("row `one` has"), "{}", problems[0]);
        let train_options = TrainOptions {
            learning_rate: 1e-2,
            epochs: 40,
            batch: Batch::Rows(4),
            ..TrainOptions::new(lora())
        };
        let trained = train(&model, &rows, &[], &train_options, &mut ()).unwrap().adapter;
        let options = ProbeOptions { max_new_tokens: 20, stopped_share: 1.0, ..ProbeOptions::default() };
        let found = probe(&model, &trained, &tokenizer, &rows, &options, &mut ()).unwrap();
        assert_eq!((found.asked, found.stopped), (4, 4));
        assert!(found.canary_logit_delta > 0.0 && found.warnings.is_empty());
        let mut untrained = Adapter::new(&model, &lora()).unwrap();
        let refused =
            |adapter: &Adapter| probe(&model, adapter, &tokenizer, &rows, &options, &mut ()).unwrap_err();
        assert_eq!(refused(&untrained).code(), "adapter_changes_nothing");
        untrained.parameters_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value += 1e-3));
        assert_eq!(refused(&untrained).code(), "never_stops");
    }
}
