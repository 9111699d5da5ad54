//! Tests of the scheduler, with work that only keeps a diary.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;

const CORES: u32 = 4;

fn limits(jobs: usize, keep_going: bool) -> Limits {
    let gpus = vec!["0".to_owned(), "1".to_owned()];
    Limits { jobs, keep_going, machine: Machine { cpu: CORES, memory_bytes: 100, gpus } }
}

/// Work whose stages all run, and behave as told.
#[derive(Default)]
struct Diary {
    /// Stages that take every core.
    heavy: BTreeSet<u32>,
    demand: BTreeMap<u32, Demand>,
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
        let heavy = Demand { cpu: CORES, ..Demand::default() };
        let demand = self.demand.get(&stage.0).copied();
        let all = self.heavy.contains(&stage.0).then_some(heavy);
        Verdict::Start(stage.0, demand.or(all).unwrap_or_default())
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
    let limits = limits(1, keep_going);
    schedule(&tasks(needs), limits, &AtomicBool::new(false), &mut diary, &|job, _| job);
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
    schedule(&tasks(&[&[], &[0]]), limits(1, false), &AtomicBool::new(false), &mut diary, &|job, _| job);
    assert_eq!(diary.lines.last().unwrap(), "gave up 1");
}

#[test]
fn heavy_stages_run_one_at_a_time_with_light_ones_beside() {
    let (heavy_now, heavy_most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let met = Mutex::new(BTreeSet::new());
    let barrier = std::sync::Barrier::new(2);
    let mut diary = Diary { heavy: [0, 1, 2].into(), ..Diary::default() };
    let run = |job: u32, _: &[String]| {
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
    let limits = limits(4, false);
    schedule(&tasks(&[&[], &[], &[], &[]]), limits, &AtomicBool::new(false), &mut diary, &run);
    assert_eq!(heavy_most.load(Ordering::SeqCst), 1);
    assert_eq!(met.into_inner().unwrap().len(), 4);
}

#[test]
fn panic_of_a_stage_is_its_failure() {
    let mut diary = Diary::default();
    let run = |job: u32, _: &[String]| {
        assert!(job != 1, "row {job} is odd");
        job
    };
    let limits = limits(2, true);
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
    let run = |job: u32, _: &[String]| {
        cancelled.store(true, Ordering::Relaxed);
        job
    };
    let limits = limits(1, false);
    schedule(&tasks(&[&[], &[0], &[]]), limits, &cancelled, &mut diary, &run);
    assert_eq!(diary.lines, ["ran 0", "skipped 1 None", "skipped 2 None"]);
}

#[test]
fn long_chains_and_wide_fans_settle() {
    let chain: Vec<Vec<u32>> = (0..2000u32).map(|n| n.checked_sub(1).into_iter().collect()).collect();
    let chain: Vec<&[u32]> = chain.iter().map(Vec::as_slice).collect();
    let mut diary = Diary { cached: (0..2000).collect(), ..Diary::default() };
    let limits = limits(2, false);
    let states = schedule(&tasks(&chain), limits, &AtomicBool::new(false), &mut diary, &|job, _| job);
    assert!(states.values().all(|state| *state == State::Settled));
}

#[test]
fn no_more_is_lent_than_there_is_and_gpus_go_by_id() {
    let demand = |gpu, memory_bytes| Demand { gpu, memory_bytes, cpu: 1 };
    let lent = Mutex::new(BTreeSet::new());
    let (memory_now, memory_most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut diary = Diary {
        demand: (0..12).map(|n| (n, if n % 3 == 2 { demand(0, 60) } else { demand(1, 20) })).collect(),
        ..Diary::default()
    };
    let run = |job: u32, gpus: &[String]| {
        let memory = if job % 3 == 2 { 60 } else { 20 };
        memory_most.fetch_max(memory_now.fetch_add(memory, Ordering::SeqCst) + memory, Ordering::SeqCst);
        assert_eq!(gpus.len(), usize::from(job % 3 != 2));
        for gpu in gpus {
            assert!(lent.lock().unwrap().insert(gpu.clone()), "GPU {gpu} is lent twice");
        }
        std::thread::yield_now();
        gpus.iter().for_each(|gpu| assert!(lent.lock().unwrap().remove(gpu)));
        memory_now.fetch_sub(memory, Ordering::SeqCst);
        job
    };
    let needs: Vec<&[u32]> = vec![&[]; 12];
    let states = schedule(&tasks(&needs), limits(8, false), &AtomicBool::new(false), &mut diary, &run);
    assert!(states.values().all(|state| *state == State::Settled), "{:?}", diary.lines);
    assert!(memory_most.load(Ordering::SeqCst) <= 100);
}
