//! The shapes in which an evaluation is written down: one summary, one table of questions, one of prompts.
//! Timings are not among them: they differ from run to run and travel as metrics.

use serde::{Deserialize, Serialize};

use super::flags::Flag;
use super::intervals::Estimate;

/// `summary.json`: what each arm reached, and what to be wary of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// The arms, in the order base, prompted, tuned.
    pub(crate) arms: Vec<ArmSummary>,
    /// Questions with key facts.
    pub(crate) questions: usize,
    /// Free prompts answered side by side.
    pub(crate) prompts: usize,
    /// Red flags, none when all is well.
    pub(crate) flags: Vec<Flag>,
    /// How the test questions compare with the training rows.
    pub(crate) leak_check: LeakCheck,
}

/// How the test questions compare with the training rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct LeakCheck {
    /// Test questions compared.
    pub(crate) test_questions: usize,
    /// Training rows compared with.
    pub(crate) train_rows: usize,
    /// Equal after normalising.
    pub(crate) exact: u64,
    /// Word-trigram Jaccard similarity at or above the split's threshold.
    pub(crate) near: u64,
    /// The highest similarity of any pair.
    pub(crate) max_similarity: f64,
}

/// One way of asking the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ArmSummary {
    /// `base`, `prompted` or `tuned`.
    pub(crate) name: String,
    /// The system message it was given, where it was given one.
    pub(crate) system: Option<String>,
    /// Nats per supervised token of the reference answers, bootstrapped over questions.
    pub(crate) loss: Option<Estimate>,
    /// Share of right answers, Wilson's interval.
    pub(crate) accuracy: Option<Estimate>,
    /// Right answers.
    pub(crate) right: usize,
    /// Words of an answer, mean over questions and prompts.
    pub(crate) words: Option<Estimate>,
    /// Tokens generated for an answer, mean over questions and prompts.
    pub(crate) tokens: Option<Estimate>,
}

/// A row of `answers.jsonl`: one question, every arm's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answered {
    /// Id of the question's example.
    pub(crate) id: String,
    /// The question.
    pub(crate) question: String,
    /// The reference answer.
    pub(crate) reference: String,
    /// What a right answer must hold.
    pub(crate) key_facts: Vec<Vec<String>>,
    /// The notes, with page, behind the fact.
    pub(crate) places: Vec<String>,
    /// The most similar training question and its similarity.
    pub(crate) nearest_train: Option<(String, f64)>,
    /// One entry per arm.
    pub(crate) arms: Vec<ArmAnswer>,
}

/// What one arm answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ArmAnswer {
    /// Name of the arm.
    pub(crate) arm: String,
    /// The text.
    pub(crate) answer: String,
    /// Whether it holds the key facts; absent where the question has none.
    pub(crate) right: Option<bool>,
    /// Summed loss of the reference answer, nats.
    pub(crate) loss: Option<f64>,
    /// Words.
    pub(crate) words: usize,
    /// Tokens generated.
    pub(crate) tokens: usize,
    /// Whether it ended by itself.
    pub(crate) stopped: bool,
}

/// A row of `prompts.jsonl`: one free prompt, every arm's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Prompted {
    /// Id of the prompt.
    pub(crate) id: String,
    /// Its category (`email-summary`).
    pub(crate) category: String,
    /// The prompt.
    pub(crate) prompt: String,
    /// One entry per arm.
    pub(crate) arms: Vec<ArmAnswer>,
}
