//! `lora.cu` against plain sums in f64 over the same bf16 values.

use ptxsim::{Arg, Counts, Device, Launch, Order};

use crate::harness::{Random, Tolerance, assert_close, download_bf16, kernels, round_bf16s, upload_bf16};

/// h (t,r) of x (t,k), rows of both `pad` values longer than they need be.
fn narrow(kernel: &str, (t, r, k): (usize, usize, usize), pad: usize, order: Order) -> Counts {
    let down = kernel == "lora_down";
    let (ldh, ldx) = (r + pad, k + pad);
    let x = round_bf16s(&Random::new(1).normals(t * ldx));
    let a = round_bf16s(&Random::new(2).normals(r * k));
    let old = round_bf16s(&Random::new(3).normals(t * ldh));
    let scale = 0.5f32;
    let mut device = Device::new();
    device.order(order);
    let h = upload_bf16(&mut device, &old);
    let x_at = upload_bf16(&mut device, &x[..t * ldx - pad]);
    let a_at = upload_bf16(&mut device, &a);
    let arguments = [
        Arg::Pointer(h),
        Arg::I32(ldh as i32),
        Arg::Pointer(x_at),
        Arg::I32(ldx as i32),
        Arg::Pointer(a_at),
        Arg::F32(scale),
        Arg::I32(t as i32),
        Arg::I32(r as i32),
        Arg::I32(k as i32),
    ];
    let width = if r <= 16 {
        16
    } else if r <= 32 {
        32
    } else {
        64
    };
    let grid = [r.div_ceil(64) as u32, t.div_ceil(32) as u32, 1];
    let launch = Launch { grid, block: [128, 1, 1], shared: (32 + width) * 512 };
    let counts = device
        .launch(kernels("lora.cu"), kernel, &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{kernel} {t}x{r}x{k}: {fault}"));
    let mut expected: Vec<f64> = old.iter().map(|&old| f64::from(old)).collect();
    for i in 0..t {
        for j in 0..r {
            let a_of = |l: usize| f64::from(if down { a[j * k + l] } else { a[l * r + j] });
            let sum: f64 = (0..k).map(|l| f64::from(x[i * ldx + l]) * a_of(l)).sum();
            expected[i * ldh + j] = f64::from(scale) * sum;
        }
    }
    // Products are about 1 each; every sum in f32 may err by half a unit of its size, which is below k.
    let tolerance = Tolerance::bf16((k * k) as f64 / f64::from(1 << 24));
    assert_close(&format!("{kernel} {t}x{r}x{k}"), &download_bf16(&device, h, t * ldh), &expected, tolerance);
    counts
}

const KERNELS: [&str; 2] = ["lora_down", "lora_up_transposed"];

#[test]
fn products_are_right_in_any_shape() {
    for kernel in KERNELS {
        let shapes = [
            (1, 1, 1),
            (33, 16, 200),
            (40, 8, 64),
            (5, 20, 130),
            (32, 32, 320),
            (50, 64, 96),
            (7, 100, 72),
            (3, 130, 33),
        ];
        for shape in shapes {
            for (pad, order) in
                [(0, Order::Forward), (0, Order::Reverse), (8, Order::Forward), (3, Order::Forward)]
            {
                narrow(kernel, shape, pad, order);
            }
        }
    }
}

#[test]
fn whole_tiles_meet_no_conflicts_and_use_whole_sectors() {
    for kernel in KERNELS {
        for r in [16, 32, 64] {
            let counts = narrow(kernel, (64, r, 512), 0, Order::Forward);
            let shallow = narrow(kernel, (64, r, 256), 0, Order::Forward);
            // Only the sums of 16 columns meet some when warps add theirs, once at the end.
            let end = if r == 16 { 128 } else { 0 };
            assert_eq!((counts.bank_conflicts, shallow.bank_conflicts), (end, end), "{kernel} {r}");
            assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0), "{kernel} {r}");
            println!(
                "{kernel} {r}: {:.2} lane instructions a value of x",
                counts.lane_instructions as f64 / 64.0 / 512.0
            );
        }
    }
}
