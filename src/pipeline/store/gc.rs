//! `cache gc`: removes what nothing is likely to ask for again.
//!
//! ```text
//! always kept     actions of the last N runs of each pipeline, and of pinned runs
//! goes first      checkpoints of finished actions, damaged objects, objects of no action
//! goes then       actions of older runs, oldest first
//! goes last       newest results of stages that no kept run has; only for age or size
//! ```
//!
//! An object goes when no action that stays needs it. Nobody else uses the store meanwhile, so that no
//! object in use can go. The row memo stays: its rows were paid for.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rusqlite::params;
use serde::Serialize;

use crate::digest::Digest;

use super::audit::{files_below, named_digest};
use super::index::digest_at;
use super::objects::object_name;
use super::{ActionRecord, Store, StoreError, remove_tree, tree_decode};

/// What may go.
#[derive(Debug, Clone, Copy)]
pub struct GcPolicy {
    /// Runs of each pipeline whose results are kept whatever else is asked for.
    pub keep_last: usize,
    /// Older actions go only until the store is this small.
    pub bytes_max: Option<u64>,
    /// Actions older than this go.
    pub age_max: Option<Duration>,
    /// Nothing is removed, only counted.
    pub dry_run: bool,
}

/// What went, and what stayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Whether nothing was removed, only counted.
    pub dry_run: bool,
    /// Actions removed, by stage name and key, sorted.
    pub actions: Vec<(String, Digest)>,
    /// Objects removed.
    pub objects: u64,
    /// Bytes of all that was removed.
    pub bytes: u64,
    /// Objects that stay.
    pub kept_objects: u64,
    /// Their size together.
    pub kept_bytes: u64,
    /// Bytes above the size asked for, which only kept runs and pins hold.
    pub bytes_over: u64,
}

/// An action in the store.
struct Action {
    path: PathBuf,
    record: ActionRecord,
    made: SystemTime,
    objects: HashSet<Digest>,
}

/// How firmly an action is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hold {
    /// By nothing.
    None,
    /// As the newest result of a stage.
    Newest,
    /// By a run that is kept.
    Kept,
}

impl Store {
    /// Removes what the policy lets go.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another process uses the store.
    pub fn gc(&self, policy: &GcPolicy) -> Result<GcReport, StoreError> {
        self.files.flush()?;
        let alone = self.usage.alone(|| self.collect(policy))?;
        alone.unwrap_or_else(|| Err(StoreError::InUse { path: self.root.clone() }))
    }

    /// Keeps the results of a run, or no longer.
    pub fn pin(&self, run: &str, pinned: bool) -> Result<(), StoreError> {
        let mark = self.root.join("runs").join(run).join("pinned");
        if pinned {
            fs_err::write(mark, "")?;
        } else if mark.exists() {
            fs_err::remove_file(mark)?;
        }
        Ok(())
    }

    /// Whether the results of a run are kept.
    pub fn is_pinned(&self, run: &str) -> bool {
        self.root.join("runs").join(run).join("pinned").exists()
    }

    fn collect(&self, policy: &GcPolicy) -> Result<GcReport, StoreError> {
        let sizes = self.object_sizes()?;
        let mut actions = self.actions()?;
        actions.sort_by_key(|action| (action.made, action.record.key));
        let holds = self.holds(policy.keep_last)?;
        let hold = |action: &Action| holds.get(&action.record.key).copied().unwrap_or(Hold::None);

        let mut uses: HashMap<Digest, usize> = HashMap::new();
        for digest in actions.iter().flat_map(|action| &action.objects) {
            *uses.entry(*digest).or_default() += 1;
        }
        let mut left: u64 =
            sizes.iter().filter(|(digest, _)| uses.contains_key(digest)).map(|(_, bytes)| bytes).sum();
        let is_old = |action: &Action| {
            policy.age_max.is_some_and(|age| action.made.elapsed().is_ok_and(|since| since > age))
        };
        let has_limit = policy.bytes_max.is_some() || policy.age_max.is_some();
        let mut removed = BTreeSet::new();
        for tier in [Hold::None, Hold::Newest] {
            for (position, action) in actions.iter().enumerate().filter(|(_, action)| hold(action) == tier) {
                let is_too_much = policy.bytes_max.is_some_and(|most| left > most);
                let goes = is_old(action) || is_too_much || (tier == Hold::None && !has_limit);
                if !goes {
                    continue;
                }
                removed.insert(position);
                for digest in &action.objects {
                    let count = uses.get_mut(digest).expect("counted just above");
                    *count -= 1;
                    if *count == 0 {
                        left -= sizes.get(digest).copied().unwrap_or(0);
                    }
                }
            }
        }
        let goes = |digest: &Digest| uses.get(digest).is_none_or(|count| *count == 0);
        let objects: Vec<Digest> = sizes.keys().copied().filter(goes).collect();
        let finished: HashSet<Digest> = actions.iter().map(|action| action.record.key).collect();
        let folders = self.stale_checkpoints(&finished, policy.age_max)?;
        let mut named: Vec<(String, Digest)> = removed
            .iter()
            .map(|position| (actions[*position].record.stage.clone(), actions[*position].record.key))
            .collect();
        named.sort();
        let rest: u64 = folders.iter().map(|(_, bytes)| bytes).sum();
        let report = GcReport {
            dry_run: policy.dry_run,
            actions: named,
            objects: objects.len() as u64,
            bytes: rest + objects.iter().map(|digest| sizes[digest]).sum::<u64>(),
            kept_objects: (sizes.len() - objects.len()) as u64,
            kept_bytes: left,
            bytes_over: policy.bytes_max.map_or(0, |most| left.saturating_sub(most)),
        };
        if !policy.dry_run {
            // Records first: should the process be killed, an object too many stays, never one too few.
            for position in removed {
                fs_err::remove_file(&actions[position].path)?;
            }
            self.remove_objects(&objects)?;
            folders.iter().try_for_each(|(folder, _)| remove_tree(folder))?;
        }
        Ok(report)
    }

    fn object_sizes(&self) -> Result<BTreeMap<Digest, u64>, StoreError> {
        let files = files_below(&self.root.join("objects"))?;
        Ok(files.into_iter().filter_map(|(path, bytes)| Some((named_digest(&path)?, bytes))).collect())
    }

    fn actions(&self) -> Result<Vec<Action>, StoreError> {
        let mut actions = Vec::new();
        for (path, _) in files_below(&self.root.join("actions"))? {
            let made = fs_err::metadata(&path)?.modified()?;
            // A record that cannot be read is none; what it held goes.
            let Ok(record) = serde_json::from_slice::<ActionRecord>(&fs_err::read(&path)?) else { continue };
            let objects = self.objects_of(&record)?;
            actions.push(Action { path, record, made, objects });
        }
        Ok(actions)
    }

    /// What an action needs to be used and to be explained: outputs, trees, and the sources it read.
    fn objects_of(&self, record: &ActionRecord) -> Result<HashSet<Digest>, StoreError> {
        let mut objects: HashSet<Digest> = record.outputs.iter().map(|file| file.digest).collect();
        objects.insert(record.tree);
        for part in record.parts.iter().filter(|part| part.name.starts_with("source.")) {
            let Ok(tree) = part.value.parse::<Digest>() else { continue };
            objects.insert(tree);
            let listing = self.read_object(tree)?.and_then(|bytes| tree_decode(&bytes));
            objects.extend(listing.into_iter().flatten().map(|file| file.digest));
        }
        Ok(objects)
    }

    /// How firmly each action is held.
    fn holds(&self, keep_last: usize) -> Result<HashMap<Digest, Hold>, StoreError> {
        type Run = (String, String, Option<String>);
        let (newest, runs): (Vec<Digest>, Vec<Run>) = self.index.with(|connection| {
            let newest = connection
                .prepare_cached("SELECT key FROM latest")?
                .query_map([], |row| digest_at(row, 0))?
                .collect::<rusqlite::Result<_>>()?;
            let runs = connection
                .prepare_cached("SELECT id, pipeline, stages FROM runs ORDER BY id DESC")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
                .collect::<rusqlite::Result<_>>()?;
            Ok((newest, runs))
        })?;
        let mut holds: HashMap<Digest, Hold> = newest.into_iter().map(|key| (key, Hold::Newest)).collect();
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (run, pipeline, stages) in runs {
            let count = seen.entry(pipeline).or_default();
            *count += 1;
            if *count > keep_last && !self.is_pinned(&run) {
                continue;
            }
            let stages: serde_json::Value =
                stages.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
            let keys = stages.as_array().into_iter().flatten().filter_map(|stage| stage["key"].as_str());
            holds.extend(keys.filter_map(|key| Some((key.parse().ok()?, Hold::Kept))));
        }
        Ok(holds)
    }

    /// Checkpoints of finished actions, old ones of others, and damaged objects, with their sizes.
    fn stale_checkpoints(
        &self,
        finished: &HashSet<Digest>,
        age_max: Option<Duration>,
    ) -> Result<Vec<(PathBuf, u64)>, StoreError> {
        let mut stale = Vec::new();
        for entry in fs_err::read_dir(self.root.join("checkpoints"))? {
            let entry = entry?;
            let is_finished = named_digest(&entry.path()).is_some_and(|key| finished.contains(&key));
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if is_finished || age_max.is_some_and(|most| age > most) {
                stale.push(entry.path());
            }
        }
        for entry in fs_err::read_dir(self.root.join("damaged"))? {
            stale.push(entry?.path());
        }
        let size = |path: &PathBuf| Ok(files_below(path)?.iter().map(|(_, bytes)| bytes).sum());
        let sizes: Vec<u64> = stale.iter().map(size).collect::<Result<_, StoreError>>()?;
        Ok(stale.into_iter().zip(sizes).collect())
    }

    fn remove_objects(&self, objects: &[Digest]) -> Result<(), StoreError> {
        self.index.write(|transaction| {
            let mut statement = transaction.prepare_cached("DELETE FROM files WHERE path = ?1")?;
            for digest in objects {
                statement.execute(params![object_name(*digest)])?;
            }
            Ok(())
        })?;
        for digest in objects {
            fs_err::remove_file(self.object_path(*digest))?;
        }
        Ok(())
    }
}
