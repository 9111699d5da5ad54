//! A small deterministic fuzzer: sound files, changed at random, must open or be refused, without a panic and
//! without an allocation out of proportion to the file. Knows nothing of formats; the targets are the tests.
//!
//! Each target runs a few hundred rounds with the other tests. `FUZZ_SECONDS=600 cargo test -p tunesmith-engine
//! --lib fuzz -- --ignored` runs each for ten minutes and leaves the number of rounds beside the input of a
//! failure in the folder for temporary files.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::format::gguf_writer::{F32, GgufWriter, Q4_1, tiny_llama};
use crate::format::safetensors::TensorFiles;
use crate::format::{Checkpoint, Tensor};
use crate::random::Random;

/// The system's allocator, remembering the largest single allocation of each thread.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn watch(bytes: usize) {
    // A thread that is ending has no slot left, and nothing to watch.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        watch(size);
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// How long a target runs.
#[derive(Clone, Copy)]
pub(crate) enum Budget {
    Rounds(u64),
    /// As long as `FUZZ_SECONDS` says, or five seconds.
    Seconds,
}

/// Runs `target` on changed seeds. `largest` bounds a single allocation by the size of the input.
pub(crate) fn fuzz(
    name: &str,
    seeds: &[Vec<u8>],
    budget: Budget,
    largest: impl Fn(usize) -> usize,
    mut target: impl FnMut(&[u8]),
) {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let (start, limit) = (Instant::now(), Duration::from_secs(seconds));
    let stream = name.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut round = 0;
    while match budget {
        Budget::Rounds(rounds) => round < rounds,
        Budget::Seconds => start.elapsed() < limit,
    } {
        let mut random = Random::new(&[stream, round]);
        let mut input = seeds[random.below(seeds.len() as u64) as usize].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut random, &mut input);
        }
        LARGEST.set(0);
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&input)));
        let (allocated, allowed) = (LARGEST.get(), largest(input.len()));
        let slow = began.elapsed() > Duration::from_secs(20);
        if outcome.is_err() || allocated > allowed || slow {
            let path = std::env::temp_dir().join(format!("fuzz-{name}-{round}"));
            std::fs::write(&path, &input).unwrap();
            panic!(
                "{name} round {round}: panic {}, largest allocation {allocated} of {allowed}, slow {slow}; input {}",
                outcome.is_err(),
                path.display()
            );
        }
        round += 1;
    }
    assert!(round > 0, "{name} did not run");
    if matches!(budget, Budget::Seconds) {
        let report = std::env::temp_dir().join(format!("fuzz-{name}.rounds"));
        std::fs::write(report, format!("{round} rounds in {seconds} s")).unwrap();
    }
}

/// One change: bits, numbers at their limits, or whole ranges.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return bytes.push(random.next_u64() as u8);
    }
    let len = bytes.len();
    // Headers come first, so half of the changes go there.
    let reach = if random.below(2) == 0 { len.min(600) } else { len };
    let at = random.below(reach as u64) as usize;
    let end = (at + 1 + random.below(64) as usize).min(len);
    match random.below(9) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'9'][random.below(9) as usize],
        2 | 3 => {
            let limits = [
                0,
                1,
                9,
                255,
                1 << 16,
                (1 << 31) - 1,
                u64::from(u32::MAX),
                1 << 40,
                1 << 62,
                u64::MAX,
                len as u64,
            ];
            let value = limits[random.below(limits.len() as u64) as usize]
                .wrapping_add(random.below(3))
                .wrapping_sub(1);
            let width = [2, 4, 8][random.below(3) as usize].min(len - at);
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        4 => bytes.truncate(at),
        5 => _ = bytes.drain(at..end),
        6 => {
            let range = bytes[at..end].to_vec();
            let to = random.below(reach as u64 + 1) as usize;
            bytes.splice(to..to, range);
        }
        7 => {
            let number = random.next_u64().to_string();
            bytes.splice(at..end.min(at + 2), number.bytes());
        }
        _ => {
            let from = random.below(len as u64) as usize;
            let count = (end - at).min(len - from);
            bytes.copy_within(from..from + count, at);
        }
    }
}

fn decode(tensor: &Tensor) {
    // Zero columns give no rows to decode.
    if tensor.cols() == 0 {
        return;
    }
    let mut row = vec![0.0; tensor.cols()];
    for index in 0..tensor.rows().min(64) {
        tensor.decode_rows(index, &mut row);
    }
}

fn open_checkpoint(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            decode(&tensor);
            let _ = (checkpoint.matrix(name).map(|matrix| matrix.to_f32().len()), checkpoint.vector(name));
        }
    }
}

/// Decoded blocks are up to 25 times as large as the file has them (Q2_K), and vectors double as they grow.
fn in_proportion(len: usize) -> usize {
    (1 << 20) + 64 * len
}

fn gguf(budget: Budget) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut small = GgufWriter::default();
    small.text("general.architecture", "llama").floats("token_embd.weight", &[2, 2], &[0.5; 4]);
    let seeds = [tiny_llama(Q4_1).finish(), tiny_llama(F32).finish(), small.finish()];
    fuzz("gguf", &seeds, budget, in_proportion, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        open_checkpoint(&path);
    });
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../../tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn safetensors(budget: Budget) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(folder.path().join("config.json"), golden("llama/config.json")).unwrap();
    let seeds = [golden("linear4bit_state_dict.safetensors"), golden("llama/model.safetensors")];
    fuzz("safetensors", &seeds, budget, in_proportion, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        open_checkpoint(&path);
    });
}

fn index(budget: Budget) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a-1.safetensors", "a-2.safetensors"];
    for (file, tensor) in names.iter().zip(["a", "b"]) {
        let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
        std::fs::write(folder.path().join(file), bytes).unwrap();
    }
    let seed = format!(
        r#"{{"metadata":{{"total_size":16}},"weight_map":{{"a":"{}","b":"{}"}}}}"#,
        names[0], names[1]
    );
    fuzz("index", &[seed.into_bytes()], budget, in_proportion, |bytes| {
        std::fs::write(folder.path().join("model.safetensors.index.json"), bytes).unwrap();
        if let Ok(files) = TensorFiles::open_folder(folder.path()) {
            for name in files.names() {
                if let Ok(Some(tensor)) = files.tensor(name) {
                    decode(&tensor);
                }
            }
        }
    });
}

#[test]
fn changed_files_open_or_are_refused() {
    gguf(Budget::Rounds(200));
    safetensors(Budget::Rounds(300));
    index(Budget::Rounds(1500));
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_gguf() {
    gguf(Budget::Seconds);
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_safetensors() {
    safetensors(Budget::Seconds);
}

#[test]
#[ignore = "runs as long as FUZZ_SECONDS says"]
fn long_index() {
    index(Budget::Seconds);
}
