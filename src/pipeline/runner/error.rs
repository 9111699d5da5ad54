//! Why a run could not even begin. Each error knows its code, its hint and its place in the manifest.

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceOffset};

use crate::graph::{Pipeline, Place, Stage};
use crate::store::StoreError;

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// A stage was named that the pipeline does not have.
    #[error("the pipeline `{pipeline}` has no stage `{name}`")]
    UnknownStage {
        /// Name of the pipeline.
        pipeline: String,
        /// The name asked for.
        name: String,
        /// The next step for the user.
        hint: String,
    },
    /// A source of a stage has no files.
    #[error("stage `{stage}` finds no files: `{param}` matches nothing ({patterns})")]
    EmptySource {
        /// The stage.
        stage: String,
        /// The parameter with the patterns.
        param: String,
        /// The patterns, in backticks.
        patterns: String,
        /// Where they are written.
        place: Box<Option<Located>>,
    },
    /// A pattern is no glob.
    #[error("stage `{stage}`: `{param}` has a pattern that cannot be used: {source}")]
    Pattern {
        /// The stage.
        stage: String,
        /// The parameter with the pattern.
        param: String,
        /// What is wrong with it.
        source: globset::Error,
        /// Where it is written.
        place: Box<Option<Located>>,
    },
    /// A source file cannot be read.
    #[error("stage `{stage}` cannot read its sources (`{param}`): {source}")]
    Source {
        /// The stage.
        stage: String,
        /// The parameter with the patterns.
        param: String,
        /// What went wrong; the text names the file.
        source: StoreError,
        /// Where the patterns are written.
        place: Box<Option<Located>>,
    },
    /// Sources kept changing.
    #[error("the source files change faster than they can be read")]
    Restless,
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RunnerError {
    pub(super) fn unknown_stage(pipeline: &Pipeline, name: &str) -> Self {
        let nearest = pipeline
            .stages
            .iter()
            .map(|stage| (strsim::damerau_levenshtein(&stage.name, name), stage.name.as_str()))
            .min()
            .filter(|(distance, nearest)| *distance <= nearest.len().max(3) / 3);
        let hint = match nearest {
            Some((_, nearest)) => format!("did you mean `{nearest}`?"),
            None => {
                let names: Vec<String> =
                    pipeline.stages.iter().map(|stage| format!("`{}`", stage.name)).collect();
                format!("it has {}", names.join(", "))
            }
        };
        Self::UnknownStage { pipeline: pipeline.name.clone(), name: name.to_owned(), hint }
    }

    /// A stable code.
    pub fn stable_code(&self) -> &'static str {
        match self {
            Self::UnknownStage { .. } => "run::unknown_stage",
            Self::EmptySource { .. } => "source::empty",
            Self::Pattern { .. } => "source::pattern",
            Self::Source { .. } => "source::unreadable",
            Self::Restless => "source::restless",
            Self::Store(error) => error.code(),
        }
    }

    /// The next step for the user.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownStage { hint, .. } => Some(hint.clone()),
            Self::EmptySource { .. } => Some(
                "paths are relative to the manifest's folder; a folder takes everything below it, `**/*.md` \
                 takes files by pattern, and hidden files are left out"
                    .to_owned(),
            ),
            Self::Pattern { .. } => {
                Some("`*`, `?`, `[a-z]`, `{a,b}` and `**` are special; put others in `[...]`".to_owned())
            }
            Self::Source { source, .. } => source.hint().map(str::to_owned),
            Self::Restless => Some("run again once they are at rest".to_owned()),
            Self::Store(error) => error.hint().map(str::to_owned),
        }
    }

    /// Where in a manifest the cause is written.
    pub fn place(&self) -> Option<&Place> {
        self.located().map(|located| &located.place)
    }

    /// The stage it is about.
    pub fn stage(&self) -> Option<&str> {
        match self {
            Self::EmptySource { stage, .. } | Self::Pattern { stage, .. } | Self::Source { stage, .. } => {
                Some(stage)
            }
            Self::UnknownStage { .. } | Self::Restless | Self::Store(_) => None,
        }
    }

    fn located(&self) -> Option<&Located> {
        match self {
            Self::EmptySource { place, .. } | Self::Pattern { place, .. } | Self::Source { place, .. } => {
                (**place).as_ref()
            }
            Self::UnknownStage { .. } | Self::Restless | Self::Store(_) => None,
        }
    }
}

impl Diagnostic for RunnerError {
    fn code<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        Some(Box::new(self.stable_code()))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        self.hint().map(|hint| Box::new(hint) as Box<dyn std::fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.located().and_then(|located| located.text.as_ref()).map(|text| text as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let located = self.located()?;
        located.text.as_ref()?;
        let label = LabeledSpan::new(Some("here".to_owned()), located.offset, 1);
        Some(Box::new(std::iter::once(label)))
    }
}

/// A place in a manifest together with the manifest's text.
#[derive(Debug)]
pub struct Located {
    place: Place,
    text: Option<NamedSource<String>>,
    offset: usize,
}

impl Located {
    /// The place of a stage's parameter, or of the nearest thing around it that has a place.
    pub(super) fn parameter(stage: &Stage, param: &str) -> Option<Self> {
        let place = place_of(stage, param)?.clone();
        // The text is for show; if it cannot be read any more the place alone has to do.
        let text = fs_err::read_to_string(&place.file).ok();
        let offset = text
            .as_ref()
            .map_or(0, |text| SourceOffset::from_location(text, place.line, place.column).offset());
        let text = text.map(|text| NamedSource::new(place.file.display().to_string(), text));
        Some(Self { place, text, offset })
    }
}

/// Where a parameter is written: its own place, else that of what surrounds it, else that of the stage.
pub(super) fn place_of<'s>(stage: &'s Stage, param: &str) -> Option<&'s Place> {
    let mut path = param;
    loop {
        if let Some(place) = stage.places.get(path) {
            return Some(place);
        }
        if path.is_empty() {
            return None;
        }
        path = path.rsplit_once('.').map_or("", |(outer, _)| outer);
    }
}
