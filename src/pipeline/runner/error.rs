//! Why a run could not even begin. Each error knows its code, its hint and its place in the manifest.

use std::path::PathBuf;

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
    /// The sources of a stage cannot be used.
    #[error(transparent)]
    Source(#[from] Box<SourceError>),
    /// A stage wants more than there is.
    #[error("stage `{stage}` wants {wanted}, and there is {available}")]
    TooMuch {
        /// The stage.
        stage: String,
        /// What it wants.
        wanted: String,
        /// What there is.
        available: String,
        /// The option that says what there is.
        option: &'static str,
        /// Where the stage is written.
        place: Option<Place>,
    },
    /// Sources kept changing.
    #[error("the source files change faster than they can be read")]
    Restless,
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The sources of a stage cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("stage `{stage}` cannot use its sources: {problem}")]
pub struct SourceError {
    /// The stage.
    pub stage: String,
    /// The parameter with the patterns.
    pub param: String,
    /// What is wrong.
    pub problem: SourceProblem,
    /// Where the parameter is written.
    place: Option<Located>,
}

impl SourceError {
    pub(super) fn new(stage: &Stage, param: &str, problem: SourceProblem) -> Box<Self> {
        let place = Located::parameter(stage, param);
        Box::new(Self { stage: stage.name.clone(), param: param.to_owned(), problem, place })
    }
}

/// What is wrong with the sources of a stage.
#[derive(Debug, thiserror::Error)]
pub enum SourceProblem {
    /// Nothing matches.
    #[error("`{param}` matches no file below `{}` ({patterns})", folder.display())]
    Empty {
        /// The parameter with the patterns.
        param: String,
        /// The patterns, in backticks.
        patterns: String,
        /// The manifest's folder.
        folder: PathBuf,
    },
    /// A pattern is no glob.
    #[error("{0}")]
    Pattern(#[from] globset::Error),
    /// A file cannot be read or taken into the store; the text names it.
    #[error("{0}")]
    File(#[from] StoreError),
}

impl RunnerError {
    pub(super) fn unknown_stage(pipeline: &Pipeline, name: &str) -> Self {
        let nearest = pipeline
            .stages
            .iter()
            .map(|stage| (strsim::damerau_levenshtein(&stage.name, name), stage.name.as_str()))
            .min()
            .filter(|(distance, nearest)| *distance <= nearest.len().max(3) / 3);
        let of_group = |stage: &&Stage| stage.group.as_deref() == Some(name);
        let nodes: Vec<String> =
            pipeline.stages.iter().filter(of_group).map(|stage| format!("`{}`", stage.name)).collect();
        let hint = match nearest {
            _ if !nodes.is_empty() => format!("by its matrix it is {}", nodes.join(", ")),
            Some((_, nearest)) => format!("did you mean `{nearest}`?"),
            None => {
                let names: Vec<String> =
                    pipeline.stages.iter().map(|stage| format!("`{}`", stage.name)).collect();
                format!("it has {}", names.join(", "))
            }
        };
        Self::UnknownStage { pipeline: pipeline.name.clone(), name: name.to_owned(), hint }
    }

    pub(super) fn too_much(stage: &Stage, wanted: String, available: String, option: &'static str) -> Self {
        let place = place_of(stage, "").cloned();
        Self::TooMuch { stage: stage.name.clone(), wanted, available, option, place }
    }

    /// A stable code.
    pub fn stable_code(&self) -> &'static str {
        match self {
            Self::TooMuch { .. } => "run::too_much",
            Self::UnknownStage { .. } => "run::unknown_stage",
            Self::Source(error) => match error.problem {
                SourceProblem::Empty { .. } => "source::empty",
                SourceProblem::Pattern(_) => "source::pattern",
                SourceProblem::File(_) => "source::unreadable",
            },
            Self::Restless => "source::restless",
            Self::Store(error) => error.code(),
        }
    }

    /// The next step for the user.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownStage { hint, .. } => Some(hint.clone()),
            Self::Source(error) => match &error.problem {
                SourceProblem::Empty { .. } => Some(
                    "paths are relative to the folder of the manifest that is run; a folder takes everything below it, \
                     `**/*.md` takes files by pattern, and hidden files are left out"
                        .to_owned(),
                ),
                SourceProblem::Pattern(_) => {
                    Some("`*`, `?`, `[a-z]`, `{a,b}` and `**` are special; put others in `[...]`".to_owned())
                }
                SourceProblem::File(error) => error.hint().map(str::to_owned),
            },
            Self::TooMuch { option, .. } => {
                Some(format!("take less in the stage's `resources`, or say with `{option}` what there is"))
            }
            Self::Restless => Some("run again once they are at rest".to_owned()),
            Self::Store(error) => error.hint().map(str::to_owned),
        }
    }

    /// Where in a manifest the cause is written.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::TooMuch { place, .. } => place.as_ref(),
            _ => self.located().map(|located| &located.place),
        }
    }

    /// The stage it is about.
    pub fn stage(&self) -> Option<&str> {
        match self {
            Self::Source(error) => Some(&error.stage),
            Self::TooMuch { stage, .. } => Some(stage),
            Self::UnknownStage { .. } | Self::Restless | Self::Store(_) => None,
        }
    }

    fn located(&self) -> Option<&Located> {
        match self {
            Self::Source(error) => error.place.as_ref(),
            Self::TooMuch { .. } | Self::UnknownStage { .. } | Self::Restless | Self::Store(_) => None,
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
        let label = LabeledSpan::new(Some("here".to_owned()), located.offset, located.width);
        Some(Box::new(std::iter::once(label)))
    }
}

/// A place in a manifest together with the manifest's text.
#[derive(Debug)]
struct Located {
    place: Place,
    text: Option<NamedSource<String>>,
    offset: usize,
    width: usize,
}

impl Located {
    /// The place of a stage's parameter, or of the nearest thing around it that has a place.
    fn parameter(stage: &Stage, param: &str) -> Option<Self> {
        let place = place_of(stage, param)?.clone();
        // The text is for show; if it cannot be read any more the place alone has to do.
        let text = fs_err::read_to_string(&place.file).ok();
        let offset = text
            .as_ref()
            .map_or(0, |text| SourceOffset::from_location(text, place.line, place.column).offset());
        let word = text.as_ref().and_then(|text| text.get(offset..)).unwrap_or_default();
        let width =
            word.find(|c: char| !(c.is_alphanumeric() || "_-".contains(c))).unwrap_or(word.len()).max(1);
        let text = text.map(|text| NamedSource::new(place.file.display().to_string(), text));
        Some(Self { place, text, offset, width })
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
