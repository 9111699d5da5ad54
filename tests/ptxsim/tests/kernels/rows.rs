//! `rows.cu` against loops.

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::in_both_orders;
use crate::harness::{
    Random, Tolerance, assert_close, bf16_value, download, download_bf16, kernels, round_bf16s, upload,
    upload_bf16,
};

/// Rows and columns, dense and ragged.
const SHAPES: [(usize, usize); 5] = [(3, 64), (5, 7), (33, 24), (1, 2056), (70, 1)];

fn values(seed: usize, count: usize) -> Vec<f32> {
    round_bf16s(&Random::new(seed as u64).normals(count))
}

fn run(device: &mut Device, kernel: &str, grid: [usize; 2], block: u32, arguments: &[Arg]) -> Counts {
    let [x, y] = grid.map(|size| size as u32);
    let launch = Launch { grid: [x, y, 1], block: [block, 1, 1], shared: 0 };
    device.launch(kernels("rows.cu"), kernel, &launch, arguments).expect("no fault")
}

/// One thread for eight columns of a row.
fn pieces(rows: usize, columns: usize) -> [usize; 2] {
    [(rows * columns.div_ceil(8)).div_ceil(256), 1]
}

fn int(value: usize) -> Arg {
    Arg::I32(value as i32)
}

/// One rounding to bf16 after a few in f32.
fn bf16() -> Tolerance {
    Tolerance::bf16(1e-6)
}

#[test]
fn sums_scales_and_biases() {
    for (rows, n) in SHAPES {
        let (y, x, bias) = (values(1, rows * n), values(2, rows * n), Random::new(3).normals(n));
        let count = Arg::I64((rows * n) as i64);
        let got = in_both_orders(|device| {
            let (to, from) = (upload_bf16(device, &y), upload_bf16(device, &x));
            let counts = run(
                device,
                "add",
                [(rows * n).div_ceil(2048), 1],
                256,
                &[Arg::Pointer(to), Arg::Pointer(from), count],
            );
            if rows * n % 16 == 0 {
                assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0), "{rows}x{n}");
            }
            download_bf16(device, to, y.len())
        });
        let expected: Vec<f64> = y.iter().zip(&x).map(|(&y, &x)| f64::from(y) + f64::from(x)).collect();
        assert_close("add", &got, &expected, bf16());
        let got = in_both_orders(|device| {
            let to = upload_bf16(device, &y);
            run(
                device,
                "scale",
                [(rows * n).div_ceil(2048), 1],
                256,
                &[Arg::Pointer(to), Arg::F32(0.3), count],
            );
            download_bf16(device, to, y.len())
        });
        let expected: Vec<f64> = y.iter().map(|&y| f64::from(y) * f64::from(0.3f32)).collect();
        assert_close("scale", &got, &expected, bf16());
        let got = in_both_orders(|device| {
            let (to, from) = (upload_bf16(device, &y), upload(device, &bias));
            run(
                device,
                "add_bias",
                pieces(rows, n),
                256,
                &[Arg::Pointer(to), Arg::Pointer(from), int(rows), int(n)],
            );
            download_bf16(device, to, y.len())
        });
        let expected: Vec<f64> =
            y.iter().enumerate().map(|(i, &y)| f64::from(y) + f64::from(bias[i % n])).collect();
        assert_close("add_bias", &got, &expected, bf16());
    }
}

#[test]
fn columns_go_where_they_are_sent() {
    // (to_ld, to_first), (from_ld, from_first), width: aligned, shifted, odd.
    for (to, from, width) in
        [((64, 16), (48, 8), 24), ((70, 3), (48, 8), 24), ((9, 1), (13, 2), 7), ((256, 0), (256, 0), 256)]
    {
        let rows = 5;
        let (before, x) = (values(4, rows * to.0), values(5, rows * from.0));
        let got = in_both_orders(|device| {
            let (y, source) = (upload_bf16(device, &before), upload_bf16(device, &x));
            let sizes = [to.0, to.1, from.0, from.1, rows, width].map(int);
            let arguments = [&[Arg::Pointer(y)], &sizes[..2], &[Arg::Pointer(source)], &sizes[2..]].concat();
            let counts = run(device, "copy_columns", pieces(rows, width), 256, &arguments);
            if to.0 == 256 {
                assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0));
            }
            download_bf16(device, y, before.len())
        });
        let mut expected = before.clone();
        for row in 0..rows {
            for i in 0..width {
                expected[row * to.0 + to.1 + i] = x[row * from.0 + from.1 + i];
            }
        }
        assert_eq!(got, expected, "{to:?} {from:?} {width}");
    }
}

#[test]
fn rows_are_gathered_and_scattered() {
    for c in [64, 7, 24] {
        let (all, few) = (9, [7, 0, 3, 8]);
        let (x, before) = (values(6, all * c), values(7, all * c));
        let index: Vec<i32> = few.iter().map(|&row| row as i32).collect();
        let got = in_both_orders(|device| {
            let (y, from) = (device.allocate(few.len() * c * 2), upload_bf16(device, &x));
            let (back, rows) = (upload_bf16(device, &before), upload(device, &index));
            let sizes = [int(few.len()), int(c)];
            let arguments = [&[y, from, rows].map(Arg::Pointer)[..], &sizes].concat();
            run(device, "gather_rows", pieces(few.len(), c), 256, &arguments);
            let arguments = [&[back, y, rows].map(Arg::Pointer)[..], &sizes].concat();
            run(device, "scatter_rows", pieces(few.len(), c), 256, &arguments);
            (download_bf16(device, y, few.len() * c), download_bf16(device, back, all * c))
        });
        let mut expected = before.clone();
        for (i, &row) in few.iter().enumerate() {
            assert_eq!(got.0[i * c..(i + 1) * c], x[row * c..(row + 1) * c]);
            expected[row * c..(row + 1) * c].copy_from_slice(&x[row * c..(row + 1) * c]);
        }
        assert_eq!(got.1, expected);
    }
}

#[test]
fn columns_are_combined_by_their_factors() {
    for (rows, n) in SHAPES {
        let (y, x, factors) = (values(8, rows * n), values(9, rows * n), Random::new(10).normals(n));
        for (keep, sign, scaled) in [(0.0, 1.0, true), (1.0, -1.0, false), (1.0, 1.0, true)] {
            let got = in_both_orders(|device| {
                // What is not kept may be anything.
                let to = if keep == 0.0 { vec![f32::NAN; rows * n] } else { y.clone() };
                let (to, from) = (upload_bf16(device, &to), upload_bf16(device, &x));
                let by = if scaled { upload(device, &factors) } else { 0 };
                let arguments = [
                    &[to, from, by].map(Arg::Pointer)[..],
                    &[int(rows), int(n), Arg::F32(keep), Arg::F32(sign)],
                ]
                .concat();
                run(device, "combine_columns", pieces(rows, n), 256, &arguments);
                download_bf16(device, to, rows * n)
            });
            let term = |i: usize| f64::from(x[i]) * if scaled { f64::from(factors[i % n]) } else { 1.0 };
            let expected: Vec<f64> = (0..rows * n)
                .map(|i| f64::from(keep) * f64::from(y[i]) + f64::from(sign) * term(i))
                .collect();
            assert_close("combine_columns", &got, &expected, bf16());
        }
    }
}

#[test]
fn magnitudes_get_the_dots_of_their_columns() {
    for (rows, n) in SHAPES {
        let (dy, z) = (values(11, rows * n), values(12, rows * n));
        let (before, norms) = (Random::new(13).normals(n), Random::new(14).ranges(n, 0.5, 2.0));
        let parts = rows.div_ceil(32);
        let got = in_both_orders(|device| {
            let partial = device.allocate(parts * n * 4);
            let (x, y) = (upload_bf16(device, &dy), upload_bf16(device, &z));
            let arguments = [&[partial, x, y].map(Arg::Pointer)[..], &[int(rows), int(n)]].concat();
            run(device, "column_dots", [n.div_ceil(1024), parts], 128, &arguments);
            let (gradient, by) = (upload(device, &before), upload(device, &norms));
            let arguments = [&[gradient, partial, by].map(Arg::Pointer)[..], &[int(parts), int(n)]].concat();
            run(device, "add_column_dots", [n.div_ceil(256), 1], 256, &arguments);
            download::<f32>(device, gradient, n)
        });
        let expected: Vec<f64> = (0..n)
            .map(|i| {
                let sum: f64 =
                    (0..rows).map(|row| f64::from(dy[row * n + i]) * f64::from(z[row * n + i])).sum();
                f64::from(before[i]) + sum / f64::from(norms[i])
            })
            .collect();
        // At most 70 terms below 20 each, over norms of half at least.
        assert_close(
            "column_dots",
            &got,
            &expected,
            Tolerance::f32(2.0, 70.0 * 20.0 * 2.0 / f64::from(1 << 24)),
        );
    }
}

#[test]
fn one_bad_value_is_found_wherever_it_is() {
    for n in [1, 7, 8200, 20001] {
        for bad in
            [None, Some((0, 0x7f80u16)), Some((n - 1, 0xff80)), Some((n / 2, 0x7fc1)), Some((n / 3, 0xffff))]
        {
            let mut bits = vec![0x7f7fu16; n];
            if let Some((at, pattern)) = bad {
                bits[at] = pattern;
            }
            let wide: Vec<f32> = bits.iter().map(|&bits| bf16_value(bits)).collect();
            let got = in_both_orders(|device| {
                let flags = [upload(device, &[0u32]), upload(device, &[0u32])];
                let (x, y) = (upload(device, &bits), upload(device, &wide));
                let count = Arg::I64(n as i64);
                let grid = [n.div_ceil(8192), 1];
                run(device, "not_finite", grid, 256, &[Arg::Pointer(flags[0]), Arg::Pointer(x), count]);
                run(device, "not_finite_f32", grid, 256, &[Arg::Pointer(flags[1]), Arg::Pointer(y), count]);
                flags.map(|flag| download::<u32>(device, flag, 1)[0])
            });
            assert_eq!(got, [u32::from(bad.is_some()); 2], "{n} {bad:?}");
        }
    }
}
