//! `gemm.cu` against plain sums in f64 over the same bf16 values.

use ptxsim::{Arg, Counts, Device, FaultKind, Launch, Module, Order};

use crate::harness::{
    Random, Tolerance, assert_close, compile, download, download_bf16, kernels, round_bf16s, source, upload,
    upload_bf16,
};

/// (m,n,k,k2)
type Shape = (usize, usize, usize, usize);

/// Values (rows,cols) of bf16, by element.
struct Matrix {
    values: Vec<f32>,
    ld: usize,
}

impl Matrix {
    /// `pad` more values a row than there are columns.
    fn random(seed: u64, rows: usize, cols: usize, pad: usize) -> Self {
        let ld = cols + pad;
        Self { values: round_bf16s(&Random::new(seed).normals(rows * ld)), ld }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        f64::from(self.values[row * self.ld + col])
    }

    /// Pointer and `ld`; nothing beyond the last row's last column is there.
    fn upload(&self, device: &mut Device, cols: usize) -> [Arg; 2] {
        let len = self.values.len().saturating_sub(self.ld - cols);
        [Arg::Pointer(upload_bf16(device, &self.values[..len])), Arg::I32(self.ld as i32)]
    }
}

struct Case<'a> {
    kernel: &'a str,
    /// Rows of a tile, and its columns.
    tile: usize,
    add: bool,
    pad: usize,
    order: Order,
}

impl Case<'_> {
    fn new(kernel: &str) -> Case<'_> {
        let tile = if kernel.ends_with("small") { 64 } else { 128 };
        Case { kernel, tile, add: false, pad: 0, order: Order::Forward }
    }

    /// Runs the product and holds it against the oracle.
    fn check(&self, (m, n, k, k2): Shape) -> Counts {
        let nn = self.kernel.starts_with("gemm_nn");
        let single = self.kernel.contains("f32");
        let (a, a2) = (Matrix::random(1, m, k, self.pad), Matrix::random(2, m, k2, self.pad));
        let right = |seed, k| {
            if nn { Matrix::random(seed, k, n, self.pad) } else { Matrix::random(seed, n, k, self.pad) }
        };
        let (b, b2) = (right(3, k), right(4, k2));
        let old = Matrix::random(5, m, n, self.pad);
        let mut device = Device::new();
        device.order(self.order);
        let c = if single { upload(&mut device, &old.values) } else { upload_bf16(&mut device, &old.values) };
        let mut arguments = vec![Arg::Pointer(c), Arg::I32(old.ld as i32)];
        let width = |k| if nn { n } else { k };
        for (matrix, cols) in [(&a, k), (&b, width(k)), (&a2, k2), (&b2, width(k2))] {
            arguments.extend(matrix.upload(&mut device, cols));
        }
        arguments.extend([m, n, k, k2, usize::from(self.add)].map(|size| Arg::I32(size as i32)));
        let tiles = m.div_ceil(self.tile) * n.div_ceil(self.tile);
        let launch = Launch { grid: [tiles as u32, 1, 1], block: [128, 1, 1], shared: 0 };
        let counts = device
            .launch(kernels("gemm.cu"), self.kernel, &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{} {m}x{n}x{k}+{k2}: {fault}", self.kernel));
        let factor = |b: &Matrix, l: usize, j: usize| if nn { b.at(l, j) } else { b.at(j, l) };
        let mut expected: Vec<f64> = old.values.iter().map(|&old| f64::from(old)).collect();
        for i in 0..m {
            for j in 0..n {
                let first: f64 = (0..k).map(|l| a.at(i, l) * factor(&b, l, j)).sum();
                let second: f64 = (0..k2).map(|l| a2.at(i, l) * factor(&b2, l, j)).sum();
                let before = if self.add { old.at(i, j) } else { 0.0 };
                expected[i * old.ld + j] = before + first + second;
            }
        }
        // Products are about 1 each; every sum in f32 may err by half a unit of its size, which is below k + k2.
        let terms = (k + k2 + 1) as f64;
        let absolute = terms * terms / f64::from(1 << 24);
        let name = format!("{} {m}x{n}x{k}+{k2} by {}", self.kernel, old.ld);
        if single {
            let tolerance = Tolerance::f32(1.0, absolute);
            assert_close(&name, &download::<f32>(&device, c, m * old.ld), &expected, tolerance);
        } else {
            assert_close(&name, &download_bf16(&device, c, m * old.ld), &expected, Tolerance::bf16(absolute));
        }
        counts
    }
}

const RAGGED: [Shape; 7] = [
    (1, 1, 1, 0),
    (64, 64, 32, 16),
    (70, 136, 96, 8),
    (3, 200, 40, 0),
    (130, 65, 33, 3),
    (17, 9, 200, 64),
    (129, 130, 7, 1),
];

#[test]
fn products_are_right_in_any_shape() {
    for kernel in ["gemm_nt", "gemm_nt_small", "gemm_nn", "gemm_nn_small", "gemm_nt_f32", "gemm_nt_f32_small"]
    {
        for (i, shape) in RAGGED.into_iter().enumerate() {
            let order = if i % 2 == 0 { Order::Reverse } else { Order::Forward };
            Case { add: i % 3 == 1, order, ..Case::new(kernel) }.check(shape);
        }
    }
}

#[test]
fn rows_may_lie_apart() {
    for kernel in ["gemm_nt_small", "gemm_nn_small", "gemm_nt_f32_small"] {
        for pad in [8, 3] {
            Case { pad, add: true, ..Case::new(kernel) }.check((66, 72, 48, 24));
        }
    }
}

#[test]
fn tiles_are_walked_once_each() {
    // 11 rows of tiles: a group of 8 and one of 3.
    Case::new("gemm_nt_small").check((64 * 10 + 5, 130, 16, 0));
}

#[test]
fn whole_tiles_meet_no_conflicts_and_use_whole_sectors() {
    for (kernel, shape) in [
        ("gemm_nt", (128, 128, 128, 32)),
        ("gemm_nn", (128, 128, 128, 32)),
        ("gemm_nt_f32", (128, 128, 128, 32)),
        ("gemm_nt_small", (64, 64, 128, 32)),
        ("gemm_nn_small", (64, 64, 128, 32)),
    ] {
        for add in [false, true] {
            let counts = Case { add, ..Case::new(kernel) }.check(shape);
            assert_eq!(counts.bank_conflicts, 0, "{kernel}");
            assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0), "{kernel}");
        }
    }
}

#[test]
fn a_step_takes_few_instructions_beside_its_products() {
    for kernel in ["gemm_nt", "gemm_nn"] {
        let [few, many] = [128, 512].map(|k| Case::new(kernel).check((128, 128, k, 0)));
        let other = (many.warp_instructions - few.warp_instructions) as f64 / (many.mma - few.mma) as f64;
        assert!(other < 4.5, "{kernel}: {other} instructions an mma");
    }
}

/// `gemm_nt_small` alone, which compiles sooner, with a mistake planted.
fn small_with(from: &str, to: &str) -> &'static Module {
    let source = source("gemm.cu");
    let (source, _) = source.split_once("// One of m and n is a rank").expect("the file's last part");
    let others = |line: &&str| !line.starts_with("GEMM(") || line.starts_with("GEMM(gemm_nt_small,");
    let source: String = source.lines().filter(others).map(|line| format!("{line}\n")).collect();
    assert_eq!(source.matches(from).count(), 1, "`{from}`");
    compile("gemm.cu", &source.replacen(from, to, 1))
}

#[test]
fn a_stage_must_be_waited_for_and_released() {
    let fault = |from, to| {
        let (mut device, _, arguments) = square(64, 256);
        let launch = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared: 0 };
        device.launch(small_with(from, to), "gemm_nt_small", &launch, &arguments).unwrap_err()
    };
    let early = fault("wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();");
    assert_eq!(early.kind, FaultKind::PendingCopy, "{early}");
    let race = fault(
        "                __syncthreads();\n            }\n            int next",
        "            }\n            int next",
    );
    let kinds = [FaultKind::SharedRace, FaultKind::PendingCopy, FaultKind::UninitialisedShared];
    assert!(kinds.contains(&race.kind), "{race}");
}

/// (m,n,k,split)
fn transposed(m: usize, n: usize, k: usize, split: usize, pad: usize, order: Order) -> Counts {
    let (a, b) = (Matrix::random(6, k, m, pad), Matrix::random(7, k, n, pad));
    let splits = k.div_ceil(split);
    let mut device = Device::new();
    device.order(order);
    let partial = device.allocate(splits * m * n * 4);
    let mut arguments = vec![Arg::Pointer(partial)];
    arguments.extend(a.upload(&mut device, m));
    arguments.extend(b.upload(&mut device, n));
    arguments.extend([m, n, k, split].map(|size| Arg::I32(size as i32)));
    let (rows, cols) = if m > n { (128, 64) } else { (64, 128) };
    let grid = [(m.div_ceil(rows) * n.div_ceil(cols)) as u32, 1, splits as u32];
    let launch = Launch { grid, block: [128, 1, 1], shared: 0 };
    let counts = device
        .launch(kernels("gemm.cu"), "gemm_tn_partial", &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let old = Random::new(8).normals(m * n);
    let c = upload(&mut device, &old);
    let scale = 0.5f32;
    let launch = Launch { grid: [(m * n).div_ceil(256) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
    let arguments = [
        Arg::Pointer(c),
        Arg::Pointer(partial),
        Arg::F32(scale),
        Arg::I64((m * n) as i64),
        Arg::I32(splits as i32),
    ];
    device
        .launch(kernels("gemm.cu"), "add_partials", &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<f64> = (0..m * n)
        .map(|at| {
            let (i, j) = (at / n, at % n);
            let sum: f64 = (0..k).map(|l| a.at(l, i) * b.at(l, j)).sum();
            f64::from(old[at]) + f64::from(scale) * sum
        })
        .collect();
    let tolerance = Tolerance::f32(2.0, (k * k) as f64 / f64::from(1 << 24));
    assert_close(&format!("tn {m}x{n}x{k} by {split}"), &download(&device, c, m * n), &expected, tolerance);
    counts
}

#[test]
fn gradients_of_pairs_are_right_in_any_shape() {
    for (m, n, k, split) in [
        (1, 1, 1, 32),
        (200, 16, 100, 64),
        (16, 200, 100, 64),
        (8, 300, 65, 32),
        (130, 70, 40, 96),
        (33, 4, 50, 20),
    ] {
        for order in [Order::Forward, Order::Reverse] {
            transposed(m, n, k, split, 0, order);
        }
        transposed(m, n, k, split, 5, Order::Forward);
    }
    let counts = transposed(256, 64, 64, 64, 0, Order::Forward);
    assert_eq!((counts.bank_conflicts, counts.load_efficiency(), counts.store_efficiency()), (0, 1.0, 1.0));
}

/// Two pairs of factors of a product (side,side), depths `k` and 16; the device, where it goes, the arguments.
fn square(side: usize, k: usize) -> (Device, u64, Vec<Arg>) {
    let mut device = Device::new();
    let values = Random::new(9).normals(side * k);
    let [a, b] = [&values[..], &values[..]].map(|values| upload_bf16(&mut device, values));
    let c = device.allocate(side * side * 2);
    let (side, k) = (Arg::I32(side as i32), Arg::I32(k as i32));
    let [c_at, a, b] = [c, a, b].map(Arg::Pointer);
    let sizes = [side, side, k, Arg::I32(16), Arg::I32(0)];
    (device, c, [&[c_at, side, a, k, b, k, b, k, a, k][..], &sizes].concat())
}

#[test]
fn bits_depend_neither_on_the_order_of_warps_nor_on_the_tile() {
    let run = |kernel, tile: u32, order| {
        let (mut device, c, arguments) = square(128, 72);
        device.order(order);
        let launch = Launch { grid: [(128 / tile).pow(2), 1, 1], block: [128, 1, 1], shared: 0 };
        device.launch(kernels("gemm.cu"), kernel, &launch, &arguments).unwrap();
        download::<u16>(&device, c, 128 * 128)
    };
    let bits = run("gemm_nt", 128, Order::Forward);
    assert!(bits == run("gemm_nt", 128, Order::Reverse));
    assert!(bits == run("gemm_nt_small", 64, Order::Forward));
}
