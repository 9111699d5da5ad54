//! Tests of the scheduler, with work that only keeps a diary.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;

/// Work whose stages all run, and behave as told.
#[derive(Default)]
struct Diary {
    heavy: BTreeSet<u32>,
    cached: BTreeSet<u32>,
    fail: BTreeSet<u32>,
    /// Stage → the need it finds damaged, and how often.
    damaged: BTreeMap<u32, (u32, usize)>,
    lines: Vec<String>,
}

impl Work for Diary {
    type Job = u32;
    type Done = u32;

    fn resolve(&mut self, stage: StageId) -> Verdict<u32> {
        if self.cached.contains(&stage.0) {
            self.lines.push(format!("cached {}", stage.0));
            return Verdict::Settled;
        }
        let cost = if self.heavy.contains(&stage.0) { Cost::Heavy } else { Cost::Light };
        Verdict::Start(stage.0, cost)
    }

    fn settle(&mut self, stage: StageId, done: Result<u32, String>) -> Settlement {
        if let Err(message) = done {
            self.lines.push(format!("panic {}: {message}", stage.0));
            return Settlement::Failed;
        }
        if self.fail.contains(&stage.0) {
            self.lines.push(format!("failed {}", stage.0));
            return Settlement::Failed;
        }
        if let Some((need, times)) = self.damaged.get_mut(&stage.0)
            && *times > 0
        {
            *times -= 1;
            self.cached.remove(need);
            self.lines.push(format!("damaged {need}"));
            return Settlement::Remake(vec![StageId(*need)]);
        }
        self.lines.push(format!("ran {}", stage.0));
        Settlement::Settled { changed: false }
    }

    fn skipped(&mut self, stage: StageId, failed: Option<StageId>) {
        self.lines.push(format!("skipped {} {:?}", stage.0, failed.map(|stage| stage.0)));
    }

    fn remade_too_often(&mut self, stage: StageId) {
        self.lines.push(format!("gave up {}", stage.0));
    }
}

fn tasks(needs: &[&[u32]]) -> Vec<(StageId, Vec<StageId>)> {
    let id = |n: &u32| StageId(*n);
    (0..).zip(needs).map(|(n, needs)| (StageId(n), needs.iter().map(id).collect())).collect()
}

fn check(mut diary: Diary, needs: &[&[u32]], keep_going: bool, expected: &[&str]) {
    let limits = Limits { jobs: 1, keep_going };
    schedule(&tasks(needs), limits, &AtomicBool::new(false), &mut diary, &|job| job);
    assert_eq!(diary.lines, expected);
}

#[test]
fn stages_run_after_their_needs() {
    check(Diary::default(), &[&[], &[0], &[0], &[1, 2]], false, &["ran 0", "ran 1", "ran 2", "ran 3"]);
}

#[test]
fn first_failure_stops_the_run() {
    let diary = || Diary { fail: [0].into(), ..Diary::default() };
    let needs: &[&[u32]] = &[&[], &[], &[0], &[2], &[1]];
    let stopped = ["failed 0", "skipped 1 None", "skipped 2 Some(0)", "skipped 3 Some(0)", "skipped 4 None"];
    check(diary(), needs, false, &stopped);
    let kept = ["failed 0", "ran 1", "ran 4", "skipped 2 Some(0)", "skipped 3 Some(0)"];
    check(diary(), needs, true, &kept);
}

#[test]
fn damaged_need_is_made_again_first() {
    let diary = |times| Diary { cached: [0].into(), damaged: [(1, (0, times))].into(), ..Diary::default() };
    check(diary(1), &[&[], &[0]], false, &["cached 0", "damaged 0", "ran 0", "ran 1"]);
    let mut diary = diary(9);
    schedule(
        &tasks(&[&[], &[0]]),
        Limits { jobs: 1, keep_going: false },
        &AtomicBool::new(false),
        &mut diary,
        &|job| job,
    );
    assert_eq!(diary.lines.last().unwrap(), "gave up 1");
}

#[test]
fn heavy_stages_run_one_at_a_time_with_light_ones_beside() {
    let (heavy_now, heavy_most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let met = Mutex::new(BTreeSet::new());
    let barrier = std::sync::Barrier::new(2);
    let mut diary = Diary { heavy: [0, 1, 2].into(), ..Diary::default() };
    let run = |job: u32| {
        if job <= 2 {
            heavy_most.fetch_max(heavy_now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        }
        if job == 0 || job == 3 {
            // Passes only if the heavy 0 and the light 3 run at the same time.
            barrier.wait();
        }
        if job <= 2 {
            heavy_now.fetch_sub(1, Ordering::SeqCst);
        }
        met.lock().unwrap().insert(job);
        job
    };
    let limits = Limits { jobs: 4, keep_going: false };
    schedule(&tasks(&[&[], &[], &[], &[]]), limits, &AtomicBool::new(false), &mut diary, &run);
    assert_eq!(heavy_most.load(Ordering::SeqCst), 1);
    assert_eq!(met.into_inner().unwrap().len(), 4);
}

#[test]
fn panic_of_a_stage_is_its_failure() {
    let mut diary = Diary::default();
    let run = |job: u32| {
        assert!(job != 1, "row {job} is odd");
        job
    };
    let limits = Limits { jobs: 2, keep_going: true };
    let states = schedule(&tasks(&[&[], &[], &[1]]), limits, &AtomicBool::new(false), &mut diary, &run);
    assert!(diary.lines.contains(&"panic 1: row 1 is odd".to_owned()), "{:?}", diary.lines);
    assert_eq!(states[&StageId(0)], State::Settled);
    assert_eq!(states[&StageId(1)], State::Failed);
    assert_eq!(states[&StageId(2)], State::Skipped);
}

#[test]
fn cancelled_run_starts_nothing_new() {
    let cancelled = AtomicBool::new(false);
    let mut diary = Diary::default();
    let run = |job: u32| {
        cancelled.store(true, Ordering::Relaxed);
        job
    };
    let limits = Limits { jobs: 1, keep_going: false };
    schedule(&tasks(&[&[], &[0], &[]]), limits, &cancelled, &mut diary, &run);
    assert_eq!(diary.lines, ["ran 0", "skipped 1 None", "skipped 2 None"]);
}

#[test]
fn long_chains_and_wide_fans_settle() {
    let chain: Vec<Vec<u32>> = (0..2000u32).map(|n| n.checked_sub(1).into_iter().collect()).collect();
    let chain: Vec<&[u32]> = chain.iter().map(Vec::as_slice).collect();
    let mut diary = Diary { cached: (0..2000).collect(), ..Diary::default() };
    let limits = Limits { jobs: 2, keep_going: false };
    let states = schedule(&tasks(&chain), limits, &AtomicBool::new(false), &mut diary, &|job| job);
    assert!(states.values().all(|state| *state == State::Settled));
}
