//! `entropy.cu` against the formulas in f64.

use ptxsim::{Arg, Counts, Device, FaultKind, Launch, Order};

use crate::harness::{Random, Tolerance, assert_close, download, download_bf16, kernels, planted, upload};

/// A logit and its slope.
fn mapped(x: f64, scale: f64, softcap: f64) -> (f64, f64) {
    if softcap == 0.0 {
        return (scale * x, scale);
    }
    let bent = (scale * x / softcap).tanh();
    (softcap * bent, scale * (1.0 - bent * bent))
}

struct Case {
    rows: usize,
    vocabulary: usize,
    /// Values from one row to the next, where they are not a vocabulary.
    ld: Option<usize>,
    scale: f32,
    softcap: f32,
    gradient: bool,
    order: Order,
}

impl Case {
    fn check(&self) -> Counts {
        let Self { rows, vocabulary, .. } = *self;
        let ld = self.ld.unwrap_or(vocabulary);
        let mut random = Random::new(vocabulary as u64);
        let logits: Vec<f32> = random.normals(rows * ld).iter().map(|x| 3.0 * x).collect();
        let targets: Vec<i32> = (0..rows).map(|_| random.below(vocabulary as u64) as i32).collect();
        let factor = 0.125f32;
        let mut device = Device::new();
        device.order(self.order);
        let nll = device.allocate(rows * 4);
        let dlogits = if self.gradient { upload(&mut device, &vec![0x4040u16; rows * ld]) } else { 0 };
        let (logits_at, targets_at) = (upload(&mut device, &logits), upload(&mut device, &targets));
        let mut arguments = [nll, dlogits, logits_at, targets_at].map(Arg::Pointer).to_vec();
        arguments.push(Arg::I32(vocabulary as i32));
        arguments.extend(self.ld.map(|ld| Arg::I32(ld as i32)));
        arguments.extend([self.scale, self.softcap, factor].map(Arg::F32));
        let kernel = if self.ld.is_some() { "cross_entropy_strided" } else { "cross_entropy" };
        let launch = Launch { grid: [rows as u32, 1, 1], block: [512, 1, 1], shared: 0 };
        let counts = device
            .launch(kernels("entropy.cu"), kernel, &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        for (row, &target) in logits.chunks(ld).zip(&targets) {
            let row = &row[..vocabulary];
            let map = |&x: &f32| mapped(f64::from(x), f64::from(self.scale), f64::from(self.softcap));
            let (row, slopes): (Vec<f64>, Vec<f64>) = row.iter().map(map).unzip();
            let logsumexp = row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            losses.push(logsumexp - row[target as usize]);
            gradients.extend((0..vocabulary).map(|id| {
                let hit = if id == target as usize { 1.0 } else { 0.0 };
                f64::from(factor) * slopes[id] * ((row[id] - logsumexp).exp() - hit)
            }));
            // What was there before.
            gradients.extend(vec![3.0; ld - vocabulary]);
        }
        // exp's argument is rounded twice: 2^-24 of 20 and of 29, and the sum of few hundred parts of a thread likewise.
        let name = format!("{rows}x{vocabulary} scale {} softcap {}", self.scale, self.softcap);
        assert_close(&name, &download(&device, nll, rows), &losses, Tolerance::f32(8.0, 6e-6));
        if self.gradient {
            let got = download_bf16(&device, dlogits, rows * ld);
            assert_close(&name, &got, &gradients, Tolerance::bf16(1e-6));
        }
        counts
    }
}

#[test]
fn losses_and_gradients_are_right_for_any_vocabulary() {
    for (i, vocabulary) in [1, 3, 31, 512, 1000, 2050, 5001].into_iter().enumerate() {
        for (scale, softcap) in [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0)] {
            let order = if i % 2 == 0 { Order::Forward } else { Order::Reverse };
            Case { rows: 3, vocabulary, ld: None, scale, softcap, gradient: i % 3 != 2, order }.check();
            let ld = Some(vocabulary.next_multiple_of(8));
            Case { rows: 2, vocabulary, ld, scale, softcap, gradient: true, order }.check();
        }
    }
}

#[test]
fn logits_are_read_twice_in_whole_sectors() {
    let case = Case {
        rows: 2,
        vocabulary: 8192,
        ld: None,
        scale: 1.0,
        softcap: 0.0,
        gradient: true,
        order: Order::Forward,
    };
    let counts = case.check();
    assert!(counts.load_efficiency() > 0.99 && counts.store_efficiency() > 0.99);
    // Two readings, the target's id and logit.
    assert!(counts.global_load_bytes <= 2 * 2 * 8192 * 4 + 2 * 512 * 8, "{}", counts.global_load_bytes);
    let a_logit = counts.lane_instructions as f64 / (2.0 * 8192.0);
    println!("{a_logit:.1} instructions a logit");
    assert!(a_logit < 40.0, "{a_logit} instructions a logit");
}

#[test]
fn large_logits_do_not_overflow() {
    let mut device = Device::new();
    let logits = upload(&mut device, &[1000.0f32, 999.0, -1e30, f32::NEG_INFINITY]);
    let targets = upload(&mut device, &[1i32]);
    let (nll, dlogits) = (device.allocate(4), device.allocate(8));
    let pointers = [nll, dlogits, logits, targets].map(Arg::Pointer);
    let arguments = [&pointers[..], &[Arg::I32(4), Arg::F32(1.0), Arg::F32(0.0), Arg::F32(1.0)]].concat();
    let launch = Launch { grid: [1, 1, 1], block: [512, 1, 1], shared: 0 };
    device
        .launch(kernels("entropy.cu"), "cross_entropy", &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let likely = 1.0 / (1.0 + (-1f64).exp());
    assert_close("nll", &download(&device, nll, 1), &[1.0 - likely.ln()], Tolerance::f32(8.0, 6e-5));
    let expected = [likely, -likely, 0.0, 0.0];
    assert_close("dlogits", &download_bf16(&device, dlogits, 4), &expected, Tolerance::bf16(1e-4));
}

#[test]
fn the_largest_of_all_warps_is_waited_for() {
    let module = planted(
        "entropy.cu",
        "block_max(softmax.largest, scratch)",
        "(scratch[threadIdx.x / WARP] = softmax.largest, scratch[0])",
    );
    let mut device = Device::new();
    let pointers =
        [device.allocate(4), 0, upload(&mut device, &vec![1.0f32; 4096]), upload(&mut device, &[1i32])]
            .map(Arg::Pointer);
    let arguments = [&pointers[..], &[Arg::I32(4096), Arg::F32(1.0), Arg::F32(0.0), Arg::F32(1.0)]].concat();
    let launch = Launch { grid: [1, 1, 1], block: [512, 1, 1], shared: 0 };
    let fault = device.launch(module, "cross_entropy", &launch, &arguments).unwrap_err();
    let kinds = [FaultKind::SharedRace, FaultKind::UninitialisedShared, FaultKind::PendingCopy];
    assert!(kinds.contains(&fault.kind), "{fault}");
}

#[test]
fn mapped_logits_are_those_of_the_formula() {
    for n in [1usize, 4, 1023, 1500] {
        for (scale, softcap) in [(0.5f32, 0.0f32), (2.0, 30.0)] {
            let logits: Vec<f32> = Random::new(n as u64).normals(n).iter().map(|x| 20.0 * x).collect();
            let mut device = Device::new();
            let at = upload(&mut device, &logits);
            let launch = Launch { grid: [n.div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
            let arguments = [Arg::Pointer(at), Arg::I64(n as i64), Arg::F32(scale), Arg::F32(softcap)];
            device
                .launch(kernels("entropy.cu"), "map_logits", &launch, &arguments)
                .unwrap_or_else(|fault| panic!("{fault}"));
            let map = |&x: &f32| mapped(f64::from(x), f64::from(scale), f64::from(softcap)).0;
            let expected: Vec<f64> = logits.iter().map(map).collect();
            assert_close("map_logits", &download(&device, at, n), &expected, Tolerance::f32(10.0, 0.0));
        }
    }
}
