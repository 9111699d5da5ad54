//! `run --watch`: runs, waits until something a stage reads is another, and runs again. What is another is
//! said by the plan: a key that changed. So a touched file, or a comment, is no reason.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tunesmith_pipeline::digest::Digest;
use tunesmith_pipeline::runner::{self, RunOptions, RunReport};
use tunesmith_pipeline::store::Store;

use super::ManifestArgs;
use super::exit_code::Failure;
use super::print::{self, Paint};

/// How often the files are looked at.
const PAUSE: Duration = Duration::from_millis(400);

/// Keys of stages by name; none for one that waits for another.
type Keys = BTreeMap<String, Option<Digest>>;

/// Runs again and again until the user stops it. `once` runs the pipeline and gives its report, if it got so far.
pub(super) fn watch(
    manifest: &ManifestArgs,
    store: &Store,
    run: &RunOptions,
    cancelled: &AtomicBool,
    mut once: impl FnMut() -> Result<RunReport, Failure>,
) {
    while !cancelled.load(Ordering::Relaxed) {
        let ran: Keys = match once() {
            Ok(report) => report.stages.into_iter().map(|stage| (stage.name, stage.key)).collect(),
            Err(Failure::Run | Failure::Usage) => Keys::new(),
        };
        if cancelled.load(Ordering::Relaxed) {
            return;
        }
        print::note(&format!("{} for changes; Ctrl-C ends it", Paint::stderr().dim("watching")));
        let standing = keys(manifest, store, run);
        loop {
            std::thread::sleep(PAUSE);
            let now = keys(manifest, store, run);
            // An edit while the run went on stands between the run's keys and the first look after it.
            let differs = |keys: &Keys| {
                keys.iter().any(|(name, key)| {
                    key.is_some() && ran.get(name).is_some_and(|old| old.is_some() && old != key)
                })
            };
            if cancelled.load(Ordering::Relaxed) {
                return;
            }
            if now != standing || now.as_ref().is_some_and(differs) {
                break;
            }
        }
    }
}

/// The keys as things stand; none while the manifest or a source cannot be used.
fn keys(manifest: &ManifestArgs, store: &Store, run: &RunOptions) -> Option<Keys> {
    let pipeline = manifest.read().ok()?.pipeline;
    let plan = runner::plan(&pipeline, store, run)
        .map_err(|error| tracing::debug!("nothing can be planned now: {error}"))
        .ok()?;
    Some(plan.stages.into_iter().map(|stage| (stage.name, stage.key)).collect())
}
