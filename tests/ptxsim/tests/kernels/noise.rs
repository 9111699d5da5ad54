//! `noise.cu` against the formula of the CPU, written out once more.

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::in_both_orders;
use crate::harness::{Random, download_bf16, kernels, round_bf16, round_bf16s, upload, upload_bf16};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn bits(stream: u64, index: usize) -> u64 {
    mix(stream.wrapping_add((index as u64 + 1).wrapping_mul(GOLDEN)))
}

fn launch(rows: usize, columns: usize) -> Launch {
    let pieces = rows * columns.div_ceil(8);
    Launch { grid: [pieces.div_ceil(256) as u32, 1, 1], block: [256, 1, 1], shared: 0 }
}

fn streams(rows: usize) -> Vec<u64> {
    let mut random = Random::new(rows as u64);
    (0..rows).map(|_| random.bits()).collect()
}

#[test]
fn the_values_that_the_cpu_drops_are_dropped() {
    let (linear, threshold) = (3u64, 19661);
    let scale = 65536.0 / (65536.0 - threshold as f32);
    for (t, k) in [(3, 64), (5, 13), (70, 8), (2, 1027)] {
        let mut random = Random::new((t + k) as u64);
        let (x, y) = (round_bf16s(&random.normals(t * k)), round_bf16s(&random.normals(t * k)));
        let rows = streams(t);
        for add in [false, true] {
            let run = |device: &mut Device| -> (Vec<f32>, Counts) {
                let arrays = [upload_bf16(device, &y), upload_bf16(device, &x), upload(device, &rows)];
                let rest = [
                    Arg::I32(t as i32),
                    Arg::I32(k as i32),
                    Arg::U64(mix(linear + 1)),
                    Arg::I32(threshold),
                    Arg::F32(scale),
                    Arg::I32(i32::from(add)),
                ];
                let arguments = [&arrays.map(Arg::Pointer)[..], &rest].concat();
                let counts = device.launch(kernels("noise.cu"), "dropout", &launch(t, k), &arguments);
                (download_bf16(device, arrays[0], t * k), counts.expect("no fault"))
            };
            let (got, _) = in_both_orders(run);
            let mut dropped = 0;
            for (i, &got) in got.iter().enumerate() {
                let stream = mix(rows[i / k] ^ mix(linear + 1));
                let own = bits(stream, i % k / 4) >> (16 * (i % k % 4)) & 0xffff;
                let factor = if own < threshold as u64 { 0.0 } else { scale };
                dropped += u32::from(factor == 0.0);
                let kept = factor * x[i];
                let expected = if add { y[i] + kept } else { kept };
                assert_eq!(got, round_bf16(expected), "{t}x{k} at {i}");
            }
            assert!(dropped > 0 && (dropped as usize) < t * k, "{dropped} of {} dropped", t * k);
        }
    }
}

#[test]
fn embeddings_get_the_noise_of_the_cpu() {
    for (t, c) in [(3, 64), (5, 13), (2, 1032)] {
        let x = round_bf16s(&Random::new((t * c) as u64).normals(t * c));
        let (rows, lengths) = (streams(t), (0..t as i32).map(|row| 2 + row).collect::<Vec<_>>());
        let got = in_both_orders(|device| {
            let arrays = [upload_bf16(device, &x), upload(device, &rows), upload(device, &lengths)];
            let rest = [Arg::I32(t as i32), Arg::I32(c as i32), Arg::F32(5.0)];
            let arguments = [&arrays.map(Arg::Pointer)[..], &rest].concat();
            let counts = device
                .launch(kernels("noise.cu"), "embedding_noise", &launch(t, c), &arguments)
                .expect("no fault");
            (download_bf16(device, arrays[0], t * c), counts.store_efficiency())
        });
        for (i, &value) in got.0.iter().enumerate() {
            let bound = 5.0 / ((lengths[i / c] as usize * c) as f32).sqrt();
            let unit = (bits(rows[i / c], i % c) >> 40) as f32 / (1 << 24) as f32;
            assert_eq!(value, round_bf16(x[i] + bound * (2.0 * unit - 1.0)), "{t}x{c} at {i}");
        }
        if c % 16 == 0 {
            assert_eq!(got.1, 1.0);
        }
    }
}
