//! Mistakes planted in a kernel that is right: each must be reported, by its kind and at its line.

use ptxsim::{Arg, Counts, Device, Fault, FaultKind, Launch, Order};

use crate::harness::{
    Random, Tolerance, assert_close, compile, download_bf16, round_bf16, upload, upload_bf16,
};

const RIGHT: &str = include_str!("planted/lookup_gemm.cu");
const ROWS: usize = 64;
const COLUMNS: usize = 128;
const DEPTH: usize = 256;

/// What the kernel makes of the same numbers each time, and what it should.
struct Outcome {
    counts: Result<Counts, Fault>,
    got: Vec<f32>,
    expected: Vec<f64>,
    seconds: f64,
}

fn run(source: &str, order: Order) -> Outcome {
    let mut random = Random::new(11);
    let a: Vec<f32> = (0..ROWS * DEPTH).map(|_| round_bf16(random.range(-1.0, 1.0))).collect();
    let codes = random.bytes(COLUMNS * DEPTH / 2);
    let table: Vec<f32> = (0..16).map(|_| round_bf16(random.range(-1.0, 1.0))).collect();
    let mut device = Device::new();
    device.order(order);
    let arguments = [
        Arg::Pointer(device.allocate(ROWS * COLUMNS * 2)),
        Arg::Pointer(upload_bf16(&mut device, &a)),
        Arg::Pointer(upload(&mut device, &codes)),
        Arg::Pointer(upload(&mut device, &table)),
        Arg::I32(COLUMNS as i32),
        Arg::I32(DEPTH as i32),
    ];
    let launch =
        Launch { grid: [(COLUMNS / 64) as u32, (ROWS / 64) as u32, 1], block: [128, 1, 1], shared: 0 };
    let module = compile("lookup_gemm.cu", source);
    let before = processor_seconds();
    let counts = device.launch(module, "lookup_gemm", &launch, &arguments);
    let seconds = processor_seconds() - before;
    let Arg::Pointer(c) = arguments[0] else { unreachable!() };
    let value = |column: usize, depth: usize| {
        let byte = codes[(column * DEPTH + depth) / 2];
        table[usize::from([byte >> 4, byte & 15][depth % 2])]
    };
    let expected = (0..ROWS * COLUMNS)
        .map(|at| {
            let (row, column) = (at / COLUMNS, at % COLUMNS);
            let products = (0..DEPTH).map(|k| f64::from(a[row * DEPTH + k]) * f64::from(value(column, k)));
            products.sum()
        })
        .collect();
    Outcome { counts, got: download_bf16(&device, c, ROWS * COLUMNS), expected, seconds }
}

/// The time that this thread has had a processor, as Linux counts it: a busy machine does not change it.
fn processor_seconds() -> f64 {
    let counted = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = counted.split_whitespace().next().and_then(|first| first.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

/// The kernel with `from` replaced, and the line of the text that the fault is to be at.
fn planted(from: &str, to: &str) -> String {
    assert_eq!(RIGHT.matches(from).count(), 1, "`{from}`");
    RIGHT.replacen(from, to, 1)
}

fn line_of(source: &str, text: &str) -> u32 {
    let found = source.lines().position(|line| line.contains(text));
    found.unwrap_or_else(|| panic!("no line has `{text}`")) as u32 + 1
}

/// The mistake is found in both orders of the warps, at one of the lines that have these texts.
#[track_caller]
fn assert_found(source: &str, kind: FaultKind, at: &[&str]) {
    let lines: Vec<u32> = at.iter().map(|text| line_of(source, text)).collect();
    for order in [Order::Forward, Order::Reverse] {
        let fault = run(source, order).counts.expect_err("the mistake was not found");
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(lines.contains(&fault.source_line()), "not at {lines:?}: {fault}");
    }
}

// 256 products of values up to 1, summed in f32 in another order than here.
fn tolerance() -> Tolerance {
    Tolerance::bf16(256.0 * 16.0 / f64::from(1 << 24))
}

#[test]
fn the_kernel_is_right_before_anything_is_planted() {
    for order in [Order::Forward, Order::Reverse] {
        let outcome = run(RIGHT, order);
        let counts = outcome.counts.unwrap();
        assert_close("lookup_gemm", &outcome.got, &outcome.expected, tolerance());
        assert_eq!(counts.mma as usize, ROWS * COLUMNS * DEPTH / (16 * 8 * 16));
        assert_eq!(counts.store_efficiency(), 0.5);
    }
}

#[test]
fn a_missing_barrier_after_the_reads_is_a_race() {
    let source = planted("__syncthreads();  // all have read", "");
    assert_found(&source, FaultKind::SharedRace, &["* 2] = pair;", "load_matrices(rows"]);
}

#[test]
fn a_missing_barrier_after_the_table_is_a_race() {
    let source = planted("__syncthreads();  // the table", "");
    for (order, kind) in
        [(Order::Forward, FaultKind::SharedRace), (Order::Reverse, FaultKind::UninitialisedShared)]
    {
        // With the last warp first, the table is not there yet when it is read.
        let fault = run(&source, order).counts.unwrap_err();
        assert_eq!(fault.kind, kind, "{fault}");
        assert_eq!(fault.source_line(), line_of(&source, "values[packed[i] >> 4]"), "{fault}");
    }
}

#[test]
fn one_wait_too_few_reads_what_has_not_come() {
    let source = planted("wait_for_copies<1>()", "wait_for_copies<2>()");
    assert_found(&source, FaultKind::PendingCopy, &["load_matrices(rows"]);
}

#[test]
fn codes_beyond_the_end_are_out_of_bounds() {
    let source = planted("depth + half * 32) / 2;", "depth + half * 32) / 2 + 16;");
    assert_found(&source, FaultKind::OutOfBounds, &["u32 pair", "packed[i]"]);
}

#[test]
fn swapped_fragments_give_other_numbers() {
    let swapped = "columns[2 * j][0] = four[1], columns[2 * j][1] = four[0];";
    let source = planted("columns[2 * j][0] = four[0], columns[2 * j][1] = four[1];", swapped);
    let outcome = run(&source, Order::Forward);
    assert!(outcome.counts.is_ok());
    let wrong = outcome.got.iter().zip(&outcome.expected);
    assert!(wrong.filter(|(got, expected)| (f64::from(**got) - **expected).abs() > 0.1).count() > ROWS);
}

#[test]
fn without_padding_rows_share_their_banks() {
    let with = run(RIGHT, Order::Forward).counts.unwrap();
    let without = run(&planted("LINE = TILE + 8", "LINE = TILE"), Order::Forward).counts.unwrap();
    // Eight rows of 128 bytes begin in the same bank: seven passes more for each matrix that is read.
    let matrices = (ROWS / 64) * (COLUMNS / 64) * (DEPTH / 16) * 4 * 16;
    assert_eq!((without.bank_conflicts - with.bank_conflicts) as usize / 7 / matrices, 1);
}

/// `cargo test -p ptxsim --test kernels -- --ignored --nocapture speed`
#[test]
#[ignore = "a measurement"]
fn speed_of_the_interpreter() {
    let (mut lanes, mut warps, mut seconds) = (0.0, 0.0, 0.0);
    while seconds < 2.0 {
        let outcome = run(RIGHT, Order::Forward);
        let counts = outcome.counts.unwrap();
        lanes += counts.lane_instructions as f64;
        warps += counts.warp_instructions as f64;
        seconds += outcome.seconds;
    }
    println!(
        "{:.0} M lane instructions and {:.2} M warp instructions a second of one core",
        lanes / seconds / 1e6,
        warps / seconds / 1e6
    );
}
