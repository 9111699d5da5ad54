//! Asks a language model, or a recording of one. A [`Generator`] turns a [`Request`] into answers; what is asked
//! and what an answer must look like is the caller's. Keys come from the environment, live in [`openai`] alone,
//! and reach no log, no memo key and no artifact. HTTP stays in here.

mod openai;
mod replay;

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tunesmith_pipeline::stage::{EmptySource, ParamProblem, SourceFile, SourceSpec, StageError};

pub(crate) use openai::OpenAi;
#[cfg(test)]
pub(crate) use openai::tests as test_server;
pub(crate) use replay::Replay;

/// One question to a model.
#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    /// The system message.
    pub(crate) system: Option<String>,
    /// The user message.
    pub(crate) user: String,
    /// JSON Schema the answer must match; `None` for free text.
    pub(crate) schema: Option<Value>,
    /// Sampling temperature; the server's default where absent.
    pub(crate) temperature: Option<f64>,
    /// Most tokens of the answer; the server's default where absent.
    pub(crate) max_tokens: Option<u32>,
    /// The passage the question is about; recordings are looked up by it.
    pub(crate) passage: Option<Passage<'a>>,
}

/// A passage of a note.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passage<'a> {
    /// Path of the note, relative to the manifest.
    pub(crate) path: &'a str,
    /// The passage.
    pub(crate) text: &'a str,
    /// Whether it is the note's first passage.
    pub(crate) is_first: bool,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The text, as it is.
    pub(crate) text: String,
    /// True where the model was cut off at the token limit.
    pub(crate) is_cut_off: bool,
    /// What it cost.
    pub(crate) usage: Usage,
}

/// Tokens paid for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: u64,
    /// Tokens of the answer.
    pub(crate) completion_tokens: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
    }
}

/// Something that answers. `stop` is asked during waits and ends them with [`LlmError::Cancelled`].
pub(crate) trait Generator: Sync {
    /// Answers a request: a model once, a recording as often as it has rows for the passage (also never).
    fn answers(
        &self,
        request: &Request<'_>,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Answer>, LlmError>;
    /// Its name in provenance, `openai:gpt-x`. Never a secret.
    fn identity(&self) -> String;
    /// All that an answer depends on besides the request's own words; part of memo keys. Never a secret.
    fn key(&self, request: &Request<'_>) -> String;
    /// Whether asking again may give another answer.
    fn is_live(&self) -> bool;
    /// What it could answer and none of these passages asks for, in words; a model has no such list.
    fn unused(&self, _passages: &[Passage<'_>]) -> Vec<String> {
        Vec::new()
    }
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Provider {
    /// Any server with an OpenAI-compatible `chat/completions` route.
    OpenAi {
        /// Where the route is, usually ending in `/v1`.
        base_url: String,
        /// The model's name on that server.
        model: String,
        /// Name of the environment variable that holds the key; absent for servers without one.
        #[serde(default)]
        api_key_env: Option<String>,
        /// Most requests sent in a minute.
        #[serde(default)]
        #[schemars(range(min = 1))]
        requests_per_minute: Option<u32>,
        /// Seconds until a request without an answer is given up.
        #[serde(default = "default_timeout_seconds")]
        #[schemars(range(min = 1, max = 3600))]
        timeout_seconds: u64,
        /// How often a request is sent again after a failure that may pass (429, 5xx, no connection).
        #[serde(default = "default_retries")]
        #[schemars(range(max = 20))]
        retries: usize,
    },
    /// Recorded answers: a JSON Lines file of `{"source", "quote", "response"}`. A row answers each passage of
    /// the note `source` that holds `quote`; a row without `quote` answers the note's first passage.
    Replay {
        /// The recording, relative to the manifest; `source` is relative to the recording's folder or the manifest.
        path: String,
    },
}

fn default_timeout_seconds() -> u64 {
    120
}

fn default_retries() -> usize {
    5
}

/// Name of the source that holds the recording.
pub(crate) const RECORDING: &str = "recording";

impl Provider {
    /// What the schema cannot say. `path` is where the provider stands in `with`.
    pub(crate) fn problems(&self, path: &str) -> Vec<ParamProblem> {
        let Self::OpenAi { base_url, .. } = self else { return Vec::new() };
        let problem = |message: String, hint: &str| ParamProblem {
            path: format!("{path}.base_url"),
            message,
            hint: Some(hint.to_owned()),
        };
        match reqwest::Url::parse(base_url) {
            Err(error) => vec![problem(
                format!("`{base_url}` is no URL: {error}"),
                "write it whole, like `http://127.0.0.1:8080/v1`",
            )],
            Ok(url) if !matches!(url.scheme(), "http" | "https") => {
                vec![problem(
                    format!("`{}` is neither http nor https", url.scheme()),
                    "use an http or https URL",
                )]
            }
            Ok(url) if !url.username().is_empty() || url.password().is_some() || url.query().is_some() => {
                vec![problem(
                    "a URL with credentials or a query would end up in keys and logs".to_owned(),
                    "put the key into an environment variable and name it in `api_key_env`",
                )]
            }
            Ok(_) => Vec::new(),
        }
    }

    /// The files it reads. `path` is where the provider stands in `with`.
    pub(crate) fn sources(&self, path: &str) -> Vec<SourceSpec> {
        match self {
            Self::OpenAi { .. } => Vec::new(),
            Self::Replay { path: recording } => vec![SourceSpec {
                name: RECORDING.to_owned(),
                patterns: vec![recording.clone()],
                param: format!("{path}.path"),
                empty: EmptySource::Refused,
            }],
        }
    }

    /// Makes it ready. `recording` are the files of the source [`RECORDING`].
    pub(crate) fn connect(&self, recording: &[SourceFile]) -> Result<Box<dyn Generator>, LlmError> {
        match self {
            Self::OpenAi { base_url, model, api_key_env, requests_per_minute, timeout_seconds, retries } => {
                Ok(Box::new(OpenAi::new(openai::Settings {
                    base_url: base_url.clone(),
                    model: model.clone(),
                    api_key_env: api_key_env.clone(),
                    requests_per_minute: *requests_per_minute,
                    timeout: Duration::from_secs(*timeout_seconds),
                    retries: *retries,
                    first_delay: Duration::from_secs(1),
                })?))
            }
            Self::Replay { .. } => Ok(Box::new(Replay::read(recording)?)),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LlmError {
    /// The named variable is absent or empty.
    #[error("the environment variable `{variable}`, named by `api_key_env`, is not set")]
    MissingKey {
        /// Its name.
        variable: String,
    },
    /// The HTTP client could not be made.
    #[error("no HTTP client for `{url}`: {reason}")]
    Client {
        /// The endpoint.
        url: String,
        /// Why.
        reason: String,
    },
    /// No connection, or it broke.
    #[error("`{url}` cannot be reached: {reason}")]
    Unreachable {
        /// The endpoint.
        url: String,
        /// Why.
        reason: String,
    },
    /// The server answered with an error.
    #[error("`{url}` answered with status {status}: {excerpt}")]
    Status {
        /// The endpoint.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The beginning of its body.
        excerpt: String,
        /// How long the server asked to wait.
        retry_after: Option<Duration>,
    },
    /// The server answered something that is no chat completion.
    #[error("`{url}` answered with something that is no chat completion: {reason}")]
    Malformed {
        /// The endpoint.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// A row of a recording cannot be used.
    #[error("`{path}` line {line} is no recorded answer: {reason}")]
    Recording {
        /// The recording.
        path: String,
        /// 1-based.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The recording cannot be read.
    #[error("the recording cannot be read")]
    Io(#[from] std::io::Error),
    /// The user asked to stop.
    #[error("stopped before an answer came")]
    Cancelled,
}

impl LlmError {
    /// True if asking again later may help.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Malformed { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 409 | 429 | 500..=599),
            _ => false,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::MissingKey { .. } => "set it, or remove `api_key_env` if the server needs no key",
            Self::Unreachable { .. } => {
                "check that the server runs and that `base_url` is right; what was answered so far is kept"
            }
            Self::Status { status: 401 | 403, .. } => "check the key in the variable named by `api_key_env`",
            Self::Status { status: 404, .. } => {
                "check `model`, and that `base_url` ends where the server's API starts, often `/v1`"
            }
            Self::Status { status: 429, .. } => {
                "lower `requests_per_minute` or `concurrency`, or run again later"
            }
            Self::Malformed { .. } => {
                "check that `base_url` is an OpenAI-compatible API, often ending in `/v1`"
            }
            Self::Recording { .. } => {
                "each line needs `source` and `response`, and may have `quote`, a phrase of the passage"
            }
            _ => return None,
        })
    }
}

impl From<LlmError> for StageError {
    fn from(error: LlmError) -> Self {
        let code = match &error {
            LlmError::Cancelled => return Self::cancelled(),
            LlmError::Io(_) => "llm::io",
            LlmError::MissingKey { .. } => "llm::missing_key",
            LlmError::Client { .. } => "llm::client",
            LlmError::Unreachable { .. } => "llm::unreachable",
            LlmError::Status { .. } => "llm::status",
            LlmError::Malformed { .. } => "llm::malformed",
            LlmError::Recording { .. } => "llm::recording",
        };
        let mut stage_error = Self::new(code, error.to_string());
        stage_error.hint = error.hint().map(str::to_owned);
        stage_error.transient = error.is_transient();
        if let LlmError::Recording { path, line, .. } = &error {
            stage_error.place = Some((PathBuf::from(path), Some(*line)));
        }
        stage_error.caused_by(error)
    }
}
