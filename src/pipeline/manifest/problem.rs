//! What can be wrong with a manifest, located: file, line, column, the line itself, a caret and a hint.
//!
//! While a manifest is read, problems gather in [`Problems`] as spans; at the end they become
//! [`ManifestProblem`]s, which carry their own line and need no file any more. The binary renders them with
//! miette or as JSON; nothing here prints.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use miette::{
    Diagnostic, LabeledSpan, MietteError, MietteSpanContents, Severity, SourceCode, SourceSpan, SpanContents,
};
use serde::Serialize;

use crate::manifest::source::{Excerpt, Sources, Span};

/// More problems than this are counted, not shown.
const PROBLEMS_MAX: usize = 100;
/// Of a longer list of known words, this many are shown.
const WORDS_SHOWN_MAX: usize = 12;
/// Suggestions look at this many candidates, and at words of at most this length.
const CANDIDATES_MAX: usize = 2_000;
const WORD_CHARS_MAX: usize = 80;

/// Everything that is wrong with a manifest, in the order of the files.
#[derive(Debug, Clone, thiserror::Error, Serialize)]
#[serde(transparent)]
#[error("{}", Self::summary(problems))]
pub struct ManifestErrors {
    /// At least one.
    pub problems: Vec<ManifestProblem>,
}

impl ManifestErrors {
    fn summary(problems: &[ManifestProblem]) -> String {
        match problems {
            [only] => format!("{}:{}:{}: {only}", only.file.display(), only.line, only.column),
            _ => format!("the manifest has {} problems", problems.len()),
        }
    }
}

impl Diagnostic for ManifestErrors {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.problems.iter().map(|problem| problem as &dyn Diagnostic)))
    }
}

/// One thing that is wrong, or (as a warning) doubtful, in a manifest. Serializes to the fields of the JSON
/// contract: `code, message, file, line, column, stage, hint`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("{message}")]
pub struct ManifestProblem {
    /// Stable: `manifest::unknown_key`.
    pub code: &'static str,
    /// What is wrong: a lowercase fragment without a period.
    pub message: String,
    /// The manifest, an included file, a params file, or `command line`.
    pub file: PathBuf,
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
    /// The stage it concerns.
    pub stage: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// The bytes of the file it concerns.
    #[serde(skip)]
    pub span: Range<usize>,
    /// True if the manifest can be used all the same.
    #[serde(skip)]
    pub is_warning: bool,
    #[serde(skip)]
    line_shown: Option<LineShown>,
}

/// The line of a problem, as miette's source: the line itself, never its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LineShown {
    name: String,
    excerpt: Excerpt,
    line: usize,
    column: usize,
}

impl SourceCode for LineShown {
    fn read_span<'a>(
        &'a self,
        _span: &SourceSpan,
        _lines_before: usize,
        _lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let text = self.excerpt.text.as_bytes();
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.clone(),
            text,
            (0, text.len()).into(),
            self.line - 1,
            self.column - 1,
            1,
        )))
    }
}

impl Diagnostic for ManifestProblem {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn severity(&self) -> Option<Severity> {
        Some(if self.is_warning { Severity::Warning } else { Severity::Error })
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.hint.as_ref().map(|hint| Box::new(hint) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.line_shown.as_ref().map(|line| line as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let label = &self.line_shown.as_ref()?.excerpt.label;
        let label = LabeledSpan::new_primary_with_span(None, (label.start, label.len()));
        Some(Box::new(std::iter::once(label)))
    }
}

/// A problem on its way into the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    code: &'static str,
    pub(crate) span: Span,
    message: String,
    pub(crate) hint: Option<String>,
    stage: Option<String>,
    is_warning: bool,
}

impl Problem {
    /// An error at `span`.
    pub(crate) fn new(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self { code, span, message: message.into(), hint: None, stage: None, is_warning: false }
    }

    /// A warning at `span`.
    pub(crate) fn warning(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self { is_warning: true, ..Self::new(code, span, message) }
    }

    /// Adds what to do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the stage it concerns.
    pub(crate) fn stage(mut self, name: &str) -> Self {
        self.stage = Some(name.to_owned());
        self
    }

    fn locate(self, sources: &Sources) -> ManifestProblem {
        let place = sources.place(self.span);
        let line_shown = sources.excerpt(self.span).map(|excerpt| LineShown {
            name: place.file.display().to_string(),
            excerpt,
            line: place.line,
            column: place.column,
        });
        ManifestProblem {
            code: self.code,
            message: printable(&self.message),
            file: place.file,
            line: place.line,
            column: place.column,
            stage: self.stage,
            hint: self.hint.as_deref().map(printable),
            span: self.span.start..self.span.end,
            is_warning: self.is_warning,
            line_shown,
        }
    }
}

/// Gathers problems, so that all of them are told at once.
#[derive(Default)]
pub(crate) struct Problems {
    list: Vec<Problem>,
    /// Apart, so that many of them leave room for errors.
    warnings: Vec<Problem>,
    errors: usize,
}

impl Problems {
    /// Adds one; beyond the limit errors are only counted, and warnings are dropped.
    pub(crate) fn push(&mut self, problem: Problem) {
        self.errors += usize::from(!problem.is_warning);
        let list = if problem.is_warning { &mut self.warnings } else { &mut self.list };
        if list.len() < PROBLEMS_MAX && !list.contains(&problem) {
            list.push(problem);
        }
    }

    /// True once more problems would only be counted: no use in working out hints.
    pub(crate) fn is_full(&self) -> bool {
        self.list.len() >= PROBLEMS_MAX
    }

    /// True if the manifest cannot be used.
    pub(crate) fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// A hint for an unknown word, unless the list is full anyway.
    pub(crate) fn suggest<'a>(
        &self,
        word: &str,
        known: impl Iterator<Item = &'a str> + Clone,
    ) -> Option<String> {
        if self.is_full() { None } else { suggestion(word, known) }
    }

    /// Everything, located and in the order of the files; the errors if there are any, else the warnings.
    pub(crate) fn into_located(self, sources: &Sources) -> Vec<ManifestProblem> {
        let mut list = if self.errors > 0 { self.list } else { self.warnings };
        list.sort_by_key(|problem| problem.span);
        let mut located: Vec<_> = list.into_iter().map(|problem| problem.locate(sources)).collect();
        if self.errors > PROBLEMS_MAX
            && located.len() == PROBLEMS_MAX
            && let Some(last) = located.last_mut()
        {
            let more = format!("{} more problems are not shown", self.errors - PROBLEMS_MAX);
            last.hint = Some(match last.hint.take() {
                Some(hint) => format!("{hint}; {more}"),
                None => more,
            });
        }
        located
    }
}

/// `did you mean ...?` if a known word is near, else what is known; nothing if nothing is.
pub(crate) fn suggestion<'a>(word: &str, known: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
    if let Some(near) = nearest(word, known.clone()) {
        return Some(format!("did you mean `{near}`?"));
    }
    let count = known.clone().count();
    let listed = known.take(WORDS_SHOWN_MAX).map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    match count {
        0 => None,
        1 => Some(format!("the only one there is: {listed}")),
        _ if count > WORDS_SHOWN_MAX => {
            Some(format!("there are {listed} and {} more", count - WORDS_SHOWN_MAX))
        }
        _ => Some(format!("there are {listed}")),
    }
}

/// The known word that is likely meant by `word`.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    if length == 0 || length > WORD_CHARS_MAX {
        return None;
    }
    let folded = word.to_lowercase().replace('-', "_");
    let distance_max = (length / 3).max(1);
    known
        .take(CANDIDATES_MAX)
        .filter(|candidate| candidate.len() <= 4 * WORD_CHARS_MAX)
        .map(|candidate| {
            let other = candidate.to_lowercase().replace('-', "_");
            (strsim::osa_distance(&folded, &other), candidate)
        })
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// A text of the user inside a message: cut when it is long.
pub(crate) fn quoted(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}

/// `text` without what could steer a terminal.
fn printable(text: &str) -> String {
    let is_plain = |character: char| !character.is_control() || character == '\n';
    let text: Cow<'_, str> = if text.chars().all(is_plain) {
        text.into()
    } else {
        text.chars().map(|c| if is_plain(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
    };
    text.into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::source::FileId;

    #[test]
    fn near_words_are_suggested_and_far_ones_listed() {
        let known = ["max_tokens", "overlap"];
        assert_eq!(suggestion("max-token", known.into_iter()).unwrap(), "did you mean `max_tokens`?");
        assert_eq!(suggestion("colour", known.into_iter()).unwrap(), "there are `max_tokens`, `overlap`");
        assert_eq!(suggestion("x", std::iter::empty()), None);
    }

    #[test]
    fn problems_beyond_the_limit_are_counted() {
        let mut sources = Sources::default();
        sources.add("a.yaml", "x".repeat(200));
        let mut problems = Problems::default();
        for index in 0..150 {
            problems.push(Problem::new("manifest::test", Span::new(FileId::ROOT, index..index + 1), "wrong"));
        }
        let located = problems.into_located(&sources);
        assert_eq!(located.len(), 100);
        assert_eq!(located[99].hint.as_deref(), Some("50 more problems are not shown"));
    }

    #[test]
    fn the_json_form_is_the_contract() {
        let mut sources = Sources::default();
        sources.add("a.yaml", "rank: -1".to_owned());
        let mut problems = Problems::default();
        let span = Span::new(FileId::ROOT, 6..8);
        problems.push(Problem::new("manifest::out_of_range", span, "too small").stage("train"));
        let errors = ManifestErrors { problems: problems.into_located(&sources) };
        assert_eq!(
            serde_json::to_string(&errors).unwrap(),
            r#"[{"code":"manifest::out_of_range","message":"too small","file":"a.yaml","line":1,"column":7,"stage":"train","hint":null}]"#
        );
    }
}
