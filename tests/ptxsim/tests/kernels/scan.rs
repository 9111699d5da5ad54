//! `scan.cu` against loops in f64.

use std::ops::Range;

use ptxsim::{Arg, Counts, Device, Fault, Launch, Module};

use super::orders::{in_both_orders, is_unordered};
use super::scan_case::Case;
use super::spans::{spans, words};
use crate::harness::{
    Tolerance, assert_close, download, download_bf16, kernels, planted, upload, upload_bf16,
};

/// y, the states after, and what it cost.
fn run(
    device: &mut Device,
    module: &Module,
    case: &Case,
    carried: bool,
) -> Result<(Vec<f32>, Vec<f32>, Counts), Fault> {
    let arrays = [device.allocate(case.x.len() * 2)]
        .into_iter()
        .chain([&case.x, &case.b, &case.c, &case.dt].map(|values| upload_bf16(device, values)))
        .chain([&case.dt_bias, &case.rate, &case.skip].map(|values| upload(device, values)))
        .collect::<Vec<_>>();
    let (rows, next) = (upload(device, &words(&case.spans)), upload(device, &case.past));
    let carry =
        if carried { [upload(device, &case.slots), upload(device, &case.past), next] } else { [0; 3] };
    let sizes = [case.heads, case.head_dim, case.groups, case.states].map(|size| Arg::I32(size as i32));
    let limits = [case.dt_limits.0, case.dt_limits.1].map(Arg::F32);
    let pointers = [&arrays[..], &[rows], &carry].concat();
    let arguments: Vec<Arg> = pointers.into_iter().map(Arg::Pointer).chain(sizes).chain(limits).collect();
    let grid = [(case.heads * case.head_dim.div_ceil(64)) as u32, case.spans.len() as u32, 1];
    let name = format!("scan_{}", case.states.next_power_of_two().max(16));
    let counts = device.launch(module, &name, &Launch { grid, block: [256, 1, 1], shared: 0 }, &arguments)?;
    Ok((download_bf16(device, arrays[0], case.x.len()), download(device, next, case.past.len()), counts))
}

/// Sums of terms of this size in f32: each of at most 64 rows decays and adds, and is summed over at most 256 states.
const TERMS: f64 = (2 * 64 + 64 + 8) as f64 / (1 << 24) as f64;

fn check(lengths: &[usize], sizes: [usize; 4]) {
    let case = Case::new(lengths, sizes);
    for carried in [false, true] {
        let name = format!("scan {lengths:?} {sizes:?} {carried}");
        let (y, next, _) =
            in_both_orders(|device| run(device, kernels("scan.cu"), &case, carried).expect("no fault"));
        let (expected, states) = case.forward(carried);
        let (most, state_most) = case.sizes().forward(carried);
        let largest = |values: &[f64]| values.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        assert_close(&name, &y, &expected, Tolerance::bf16(TERMS * largest(&most)));
        assert_close(
            &format!("{name} next"),
            &next,
            &states,
            Tolerance::f32(1.0, TERMS * largest(&state_most)),
        );
    }
}

#[test]
fn a_scan_is_right_at_any_size() {
    check(&[20, 1, 35, 2], [4, 64, 1, 128]);
    check(&[17, 3], [6, 24, 2, 13]);
    check(&[18], [2, 7, 2, 32]);
    check(&[5], [1, 80, 1, 256]);
    check(&[33], [3, 16, 3, 48]);
}

#[test]
fn a_sequence_in_pieces_is_the_sequence() {
    let whole = Case::new(&[40], [2, 16, 1, 32]);
    let alone = |case: &Case| run(&mut Device::new(), kernels("scan.cu"), case, true).expect("no fault");
    let start = Case { past: vec![0.0; whole.past.len()], ..Case::new(&[40], [2, 16, 1, 32]) };
    let (y, state, _) = alone(&start);
    let (mut got, mut past) = (Vec::new(), start.past);
    for rows in [0..1, 1..17, 17..19, 19..40] {
        let cut = |values: &[f32], width: usize| values[rows.start * width..rows.end * width].to_vec();
        let part = Case {
            spans: spans(&[Range::len(&rows)]),
            x: cut(&whole.x, 32),
            b: cut(&whole.b, 32),
            c: cut(&whole.c, 32),
            dt: cut(&whole.dt, 2),
            past,
            slots: vec![0],
            dt_bias: whole.dt_bias.clone(),
            rate: whole.rate.clone(),
            skip: whole.skip.clone(),
            dy: Vec::new(),
            ..whole
        };
        let (y, next, _) = alone(&part);
        got.extend(y);
        past = next;
    }
    assert!((got, past) == (y, state), "the pieces differ from the whole");
}

#[test]
fn a_step_of_generation_moves_its_states_once() {
    let case = Case::new(&[1, 1], [2, 64, 1, 128]);
    let (_, _, counts) = run(&mut Device::new(), kernels("scan.cu"), &case, true).expect("no fault");
    let states = (2 * 2 * 64 * 128 * 4 / 32) as u64;
    assert_eq!(counts.global_store_sectors, states + 2 * 2 * 64 * 2 / 32);
    assert!(counts.global_load_sectors < states + states / 8, "{}", counts.global_load_sectors);
    assert_eq!(counts.bank_conflicts, 0);
}

#[test]
fn a_missing_barrier_is_reported() {
    let broken = planted(
        "scan.cu",
        "        }\n        __syncthreads();\n        if (row < rows)",
        "        }\n        if (row < rows)",
    );
    let case = Case::new(&[40], [1, 64, 1, 64]);
    let fault = run(&mut Device::new(), broken, &case, false).expect_err("a barrier is missing");
    assert!(is_unordered(&fault), "{fault}");
}
