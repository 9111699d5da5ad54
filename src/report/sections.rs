//! The sections of the report, each made from the files one kind of stage leaves behind. A stage that has
//! none of them gives no section.

use std::collections::BTreeMap;
use std::path::Path;

use maud::{Markup, html};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::chart::{self, Series};
use super::{ReportError, Shown};
use crate::corpus::read_table;
use crate::evaluate::intervals::Estimate;
use crate::evaluate::results::{Answered, ArmAnswer, Prompted, Summary};

/// One part of the page.
pub(crate) struct Section {
    /// Its `id` on the page.
    pub(crate) anchor: String,
    /// Its heading.
    pub(crate) title: String,
    /// Its content.
    pub(crate) body: Markup,
}

/// Makes the body of a section from one stage's artifact.
type Maker = fn(&Shown<'_>) -> Result<Markup, ReportError>;

/// Findings shown per defect before the list is cut.
const FINDINGS_MAX: usize = 8;

/// Every section the artifacts give, in the order a reader wants them: results, training, data.
pub(crate) fn all(shown: &[Shown<'_>]) -> Result<Vec<Section>, ReportError> {
    let makers: [(&str, &str, Maker); 4] = [
        ("answers.jsonl", "Evaluation", evaluation),
        ("training.json", "Training", training),
        ("findings.jsonl", "Data quality", findings),
        ("leaks.json", "Split and leaks", leaks),
    ];
    let mut sections = Vec::new();
    for (file, title, make) in makers {
        for one in shown.iter().filter(|one| one.folder.join(file).exists()) {
            sections.push(Section {
                anchor: one.stage.to_owned(),
                title: format!("{title}: {}", one.stage),
                body: make(one)?,
            });
        }
    }
    Ok(sections)
}

fn json<T: DeserializeOwned>(shown: &Shown<'_>, file: &str) -> Result<T, ReportError> {
    let bytes = fs_err::read(shown.folder.join(file))?;
    serde_json::from_slice(&bytes).map_err(|source| ReportError::Shape {
        stage: shown.stage.to_owned(),
        file: file.to_owned(),
        source,
    })
}

fn table<T: DeserializeOwned>(folder: &Path, file: &str) -> Result<Vec<T>, ReportError> {
    let path = folder.join(file);
    if path.exists() { Ok(read_table(&path)?) } else { Ok(Vec::new()) }
}

fn evaluation(shown: &Shown<'_>) -> Result<Markup, ReportError> {
    let summary: Summary = json(shown, "summary.json")?;
    let answers: Vec<Answered> = table(shown.folder, "answers.jsonl")?;
    let prompts: Vec<Prompted> = table(shown.folder, "prompts.jsonl")?;
    let latency = |arm: &str| shown.metrics.get(&format!("{arm}.latency_seconds")).and_then(Value::as_f64);
    Ok(html! {
        @if summary.flags.is_empty() {
            p .fine { "No red flag was raised." }
        }
        @for flag in &summary.flags { p .flag { strong { (flag.name) } ": " (flag.detail) } }
        table {
            thead { tr {
                th { "arm" } th .number { "held-out loss" } th .number { "key-fact accuracy" }
                th .number { "words an answer" } th .number { "tokens an answer" } th .number { "seconds an answer, asked alone" }
            } }
            tbody {
                @for arm in &summary.arms {
                    tr {
                        td { (arm.name) @if let Some(system) = &arm.system { div .interval { "system: " (system) } } }
                        td .number { (estimate(arm.loss, 1.0, 3, "")) }
                        td .number { (estimate(arm.accuracy, 100.0, 1, " %")) }
                        td .number { (estimate(arm.words, 1.0, 1, "")) }
                        td .number { (estimate(arm.tokens, 1.0, 1, "")) }
                        td .number { @if let Some(seconds) = latency(&arm.name) { (format!("{seconds:.2}")) } @else { "–" } }
                    }
                }
            }
        }
        p .interval { (summary.questions) " questions with key facts, " (summary.prompts) " free prompts. Brackets are 95 % intervals: Wilson for accuracy, bootstrap over questions for the rest." }
        h3 { "Leak check" }
        p {
            (summary.leak_check.test_questions) " test questions against " (summary.leak_check.train_rows) " training rows: "
            strong { (summary.leak_check.exact) " equal" } ", " (summary.leak_check.near) " close; highest word-trigram similarity "
            (format!("{:.2}", summary.leak_check.max_similarity)) "."
        }
        @if !prompts.is_empty() { (categories(&prompts)) h3 { "Side by side" } @for prompt in &prompts {
            details { summary { "[" (prompt.category) "] " (first_words(&prompt.prompt, 16)) }
                p .answer { (prompt.prompt) } (side_by_side(&prompt.arms)) }
        } }
        h3 { "Every question" }
        @for answered in &answers {
            details {
                summary { (mark(tuned_right(answered))) " " (answered.question) }
                p { "Reference: " (answered.reference) }
                (side_by_side(&answered.arms))
                p .place {
                    "From " (answered.places.join(", "))
                    @if let Some((nearest, similarity)) = &answered.nearest_train {
                        " · nearest training question (" (format!("{similarity:.2}")) "): " (nearest)
                    }
                }
            }
        }
    })
}

fn categories(prompts: &[Prompted]) -> Markup {
    let mut words: BTreeMap<&str, Vec<(&str, Vec<usize>)>> = BTreeMap::new();
    for prompt in prompts {
        let arms = words.entry(&prompt.category).or_default();
        for answer in &prompt.arms {
            match arms.iter_mut().find(|(arm, _)| *arm == answer.arm) {
                Some((_, lengths)) => lengths.push(answer.words),
                None => arms.push((&answer.arm, vec![answer.words])),
            }
        }
    }
    let names: Vec<&str> =
        words.values().next().map(|arms| arms.iter().map(|(arm, _)| *arm).collect()).unwrap_or_default();
    html! {
        h3 { "Length by category (mean words an answer)" }
        table {
            thead { tr { th { "category" } @for name in &names { th .number { (name) } } } }
            tbody { @for (category, arms) in &words { tr {
                td { (category) }
                @for (_, lengths) in arms { td .number { (format!("{:.0}", lengths.iter().sum::<usize>() as f64 / lengths.len() as f64)) } }
            } } }
        }
    }
}

fn side_by_side(arms: &[ArmAnswer]) -> Markup {
    html! {
        table { tbody { @for arm in arms { tr {
            td { (arm.arm) " " (mark(arm.right)) }
            td .answer { (arm.answer) @if !arm.stopped { span .wrong { " [cut at the token limit]" } } }
            td .number { (arm.words) " words" }
        } } } }
    }
}

fn tuned_right(answered: &Answered) -> Option<bool> {
    answered.arms.iter().find(|arm| arm.arm == "tuned").and_then(|arm| arm.right)
}

fn mark(right: Option<bool>) -> Markup {
    html! {
        @match right {
            Some(true) => span .right { "✓ right" },
            Some(false) => span .wrong { "✗ wrong" },
            None => span {},
        }
    }
}

fn estimate(estimate: Option<Estimate>, scale: f64, digits: usize, unit: &str) -> Markup {
    html! {
        @match estimate {
            Some(estimate) => {
                (format!("{:.digits$}{unit}", estimate.value * scale))
                div .interval { (format!("[{:.digits$}, {:.digits$}]", estimate.low * scale, estimate.high * scale)) }
            },
            None => "–",
        }
    }
}

fn first_words(text: &str, count: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() <= count { words.join(" ") } else { format!("{} …", words[..count].join(" ")) }
}

/// The part of a training log the report draws.
#[derive(Deserialize)]
struct TrainingLog {
    steps: Vec<LoggedStep>,
    evals: Vec<LoggedEval>,
    #[serde(default)]
    warnings: Vec<String>,
    #[serde(default)]
    facts: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct LoggedStep {
    step: u64,
    loss: f64,
    learning_rate: f64,
}

#[derive(Deserialize)]
struct LoggedEval {
    step: u64,
    loss: f64,
}

fn training(shown: &Shown<'_>) -> Result<Markup, ReportError> {
    let log: TrainingLog = json(shown, "training.json")?;
    let curve = |label: &str, points: Vec<(f64, f64)>| Series { label: label.to_owned(), points };
    let losses = curve("training loss", log.steps.iter().map(|step| (step.step as f64, step.loss)).collect());
    let evals =
        curve("validation loss", log.evals.iter().map(|eval| (eval.step as f64, eval.loss)).collect());
    let rates = curve(
        "learning rate × 1000",
        log.steps.iter().map(|step| (step.step as f64, step.learning_rate * 1e3)).collect(),
    );
    let measured = ["tokens_per_second", "step_seconds", "peak_rss_bytes", "planned_memory_bytes"];
    Ok(html! {
        @for warning in &log.warnings { p .flag { (warning) } }
        figure { (chart::lines(&[losses, evals], "steps", "loss")) figcaption { "Loss in nats per supervised token." } }
        details { summary { "Learning rate" } figure { (chart::lines(&[rates], "steps", "learning rate")) } }
        table { tbody {
            @for (name, value) in log.facts.iter().chain(shown.metrics.iter().filter(|(name, _)| measured.contains(&name.as_str()))) {
                tr { td { (name.replace('_', " ")) } td .number { (plain(name, value)) } }
            }
        } }
    })
}

/// A value for a reader: bytes as MiB, fractions with three digits.
fn plain(name: &str, value: &Value) -> String {
    match value.as_f64() {
        Some(bytes) if name.ends_with("_bytes") => format!("{:.0} MiB", bytes / 1024.0 / 1024.0),
        Some(number) if number.fract() != 0.0 => format!("{number:.3}"),
        _ => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    }
}

#[derive(Deserialize)]
struct Finding {
    id: String,
    defect: String,
    explanation: String,
    excerpt: String,
    #[serde(default)]
    place: String,
}

fn findings(shown: &Shown<'_>) -> Result<Markup, ReportError> {
    let findings: Vec<Finding> = table(shown.folder, "findings.jsonl")?;
    let mut by_defect: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
    for finding in &findings {
        by_defect.entry(&finding.defect).or_default().push(finding);
    }
    let count = |name: &str| shown.metrics.get(name).map(ToString::to_string);
    Ok(html! {
        p {
            @if let (Some(rows), Some(kept)) = (count("rows"), count("kept")) { (rows) " rows checked, " (kept) " kept. " }
            (findings.len()) " findings."
        }
        @for (defect, rows) in &by_defect {
            details {
                summary { (defect) " · " (rows.len()) }
                table { tbody {
                    @for finding in rows.iter().take(FINDINGS_MAX) {
                        tr { td .place { (finding.id) br; (finding.place) } td { (finding.explanation) } td .answer { (finding.excerpt) } }
                    }
                    @if rows.len() > FINDINGS_MAX { tr { td colspan="3" { "… and " (rows.len() - FINDINGS_MAX) " more in findings.jsonl" } } }
                } }
            }
        }
    })
}

fn leaks(shown: &Shown<'_>) -> Result<Markup, ReportError> {
    let names = ["train", "validation", "test", "groups", "leaks_exact", "leaks_near", "max_similarity"];
    Ok(html! {
        table { tbody { @for name in names {
            @if let Some(value) = shown.metrics.get(name) { tr { td { (name.replace('_', " ")) } td .number { (plain(name, value)) } } }
        } } }
    })
}
