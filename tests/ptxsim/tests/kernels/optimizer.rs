//! `optimizer.cu` against the operations of src/engine/optimizer.rs, bit for bit.

use ptxsim::{Arg, Counts, Device, Launch, Order};

use crate::harness::{Random, bf16_bits, download, kernels, upload};

/// The scalars of a step as the CPU computes them.
struct Update {
    keep: f32,
    first_weight: f32,
    second_keep: f32,
    second_weight: f32,
    correction: f32,
    epsilon: f32,
    step_size: f32,
}

impl Update {
    fn new(step: i32, beta1: f64) -> Self {
        let (beta2, learning_rate, weight_decay) = (0.999f64, 2e-3, 0.05);
        Self {
            keep: (1.0 - learning_rate * weight_decay) as f32,
            first_weight: (1.0 - beta1) as f32,
            second_keep: beta2 as f32,
            second_weight: (1.0 - beta2) as f32,
            correction: (1.0 - beta2.powi(step)).sqrt() as f32,
            epsilon: 1e-8,
            step_size: -(learning_rate / (1.0 - beta1.powi(step))) as f32,
        }
    }

    fn arguments(&self) -> Vec<Arg> {
        [
            self.keep,
            self.first_weight,
            self.second_keep,
            self.second_weight,
            self.correction,
            self.epsilon,
            self.step_size,
        ]
        .map(Arg::F32)
        .to_vec()
    }

    fn apply(&self, parameter: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        *parameter *= self.keep;
        *first = if self.first_weight < 0.5 {
            *first + self.first_weight * (gradient - *first)
        } else {
            gradient - (gradient - *first) * (1.0 - self.first_weight)
        };
        *second = *second * self.second_keep + self.second_weight * gradient * gradient;
        let denominator = second.sqrt() / self.correction + self.epsilon;
        *parameter += self.step_size * *first / denominator;
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn rounded(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&value| bf16_bits(value)).collect()
}

/// Three steps over `n` values, each array `offset` values into its buffer.
fn adamw(n: usize, beta1: f64, offset: usize) -> Counts {
    let mut random = Random::new(n as u64);
    let mut w = random.normals(n);
    let (mut m, mut v) = (vec![0.0f32; n], vec![0.0f32; n]);
    let clip = 0.75f32;
    let mut device = Device::new();
    let place = |device: &mut Device, values: &[f32]| {
        upload(device, &[&vec![9.0f32; offset], values].concat()) + 4 * offset as u64
    };
    let [w_at, m_at, v_at] = [&w, &m, &v].map(|values| place(&mut device, values));
    let rounded_at = device.allocate(2 * (n + offset)) + 2 * offset as u64;
    let clip_at = upload(&mut device, &[clip]);
    let mut counts = Counts::default();
    for step in 1..=3 {
        let g: Vec<f32> = random.normals(n).iter().map(|x| x * 1e-3).collect();
        let update = Update::new(step, beta1);
        let g_at = place(&mut device, &g);
        let mut arguments = [w_at, rounded_at, g_at, m_at, v_at].map(Arg::Pointer).to_vec();
        arguments.push(Arg::I64(n as i64));
        arguments.extend(update.arguments());
        arguments.push(Arg::Pointer(clip_at));
        let launch = Launch { grid: [n.div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        counts = device
            .launch(kernels("optimizer.cu"), "adamw", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        for i in 0..n {
            update.apply(&mut w[i], g[i] * clip, &mut m[i], &mut v[i]);
        }
    }
    for (name, at, expected) in [("w", w_at, &w), ("m", m_at, &m), ("v", v_at, &v)] {
        assert_eq!(bits(&download(&device, at, n)), bits(expected), "{name} of {n}");
    }
    assert_eq!(download::<u16>(&device, rounded_at, n), rounded(&w));
    counts
}

#[test]
fn steps_are_those_of_the_cpu_to_the_bit() {
    for n in [1, 5, 1024, 1500] {
        adamw(n, 0.9, 0);
        adamw(n, 0.3, 1);
    }
    let counts = adamw(2048, 0.9, 0);
    // The clip factor is one broadcast a warp.
    assert!(counts.load_efficiency() > 0.99, "{}", counts.load_efficiency());
    assert_eq!(counts.store_efficiency(), 1.0);
}

#[test]
fn rounded_values_and_clipping_may_be_left_out() {
    let mut device = Device::new();
    let [w_at, g_at, m_at, v_at] = [1.0f32, 0.5, 0.0, 0.0].map(|value| upload(&mut device, &[value; 6]));
    let update = Update::new(1, 0.9);
    let mut arguments = [w_at, 0, g_at, m_at, v_at].map(Arg::Pointer).to_vec();
    arguments.push(Arg::I64(6));
    arguments.extend(update.arguments());
    arguments.push(Arg::Pointer(0));
    let launch = Launch { grid: [1, 1, 1], block: [256, 1, 1], shared: 0 };
    device
        .launch(kernels("optimizer.cu"), "adamw", &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let (mut w, mut m, mut v) = (1.0, 0.0, 0.0);
    update.apply(&mut w, 0.5, &mut m, &mut v);
    assert_eq!(download::<f32>(&device, w_at, 6), [w; 6]);
}

/// A list of values in codes: src/engine/optimizer/moments.rs.
struct Coded {
    map: Vec<f32>,
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Coded {
    fn decode(&self, block: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.map[usize::from(self.codes[block * 256 + i])] * self.absmax[block];
        }
    }

    fn encode(&mut self, block: usize, values: &[f32]) {
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = if largest == 0.0 { 1.0 } else { largest };
        self.absmax[block] = scale;
        let midpoints: Vec<f32> = self.map.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        for (i, value) in values.iter().enumerate() {
            let scaled = value / scale;
            self.codes[block * 256 + i] = midpoints.partition_point(|&midpoint| midpoint < scaled) as u8;
        }
    }
}

fn adamw8(n: usize, order: Order) -> Counts {
    let mut random = Random::new(n as u64);
    let mut w = random.normals(n);
    let mut map = |low: f32| {
        let mut map = random.ranges(255, low, 1.0);
        map.push(1.0);
        map.push(0.0);
        map.sort_by(f32::total_cmp);
        map.remove(128);
        map
    };
    let blocks = n.div_ceil(256);
    let coded = |map| Coded { map, codes: vec![0; n], absmax: vec![0.0; blocks] };
    let (mut m, mut v) = (coded(map(-1.0)), coded(map(0.0)));
    let mut device = Device::new();
    device.order(order);
    let w_at = upload(&mut device, &w);
    let rounded_at = device.allocate(2 * n);
    let [m_codes, v_codes] = [&m.codes, &v.codes].map(|codes| upload(&mut device, codes));
    let [m_absmax, v_absmax] = [&m.absmax, &v.absmax].map(|absmax| upload(&mut device, absmax));
    let [m_map, v_map] = [&m.map, &v.map].map(|map| upload(&mut device, map));
    let mut counts = Counts::default();
    for step in 1..=3 {
        let mut g: Vec<f32> = random.normals(n).iter().map(|x| x * 1e-3).collect();
        if n > 512 {
            g[256..512].fill(0.0);
        }
        let update = Update::new(step, 0.9);
        let g_at = upload(&mut device, &g);
        let mut arguments = [w_at, rounded_at, g_at, m_codes, m_absmax, v_codes, v_absmax, m_map, v_map]
            .map(Arg::Pointer)
            .to_vec();
        arguments.push(Arg::I64(n as i64));
        arguments.extend(update.arguments());
        arguments.push(Arg::Pointer(0));
        let launch = Launch { grid: [n.div_ceil(2048) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        counts = device
            .launch(kernels("optimizer.cu"), "adamw8", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        for block in 0..blocks {
            let values = block * 256..n.min(block * 256 + 256);
            let (mut first, mut second) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            m.decode(block, &mut first);
            v.decode(block, &mut second);
            for (i, at) in values.enumerate() {
                update.apply(&mut w[at], g[at], &mut first[i], &mut second[i]);
            }
            m.encode(block, &first);
            v.encode(block, &second);
        }
        assert_eq!(bits(&download(&device, w_at, n)), bits(&w), "w of {n}, step {step}");
        assert_eq!(download::<u16>(&device, rounded_at, n), rounded(&w), "{n}");
        for (name, codes, absmax, moment) in [("m", m_codes, m_absmax, &m), ("v", v_codes, v_absmax, &v)] {
            assert_eq!(download::<u8>(&device, codes, n), moment.codes, "{name} of {n}, step {step}");
            assert_eq!(bits(&download(&device, absmax, blocks)), bits(&moment.absmax), "{name} of {n}");
        }
    }
    counts
}

#[test]
fn eight_bit_steps_are_those_of_the_cpu_to_the_bit() {
    for n in [1, 255, 256, 600, 2048, 2500] {
        adamw8(n, Order::Forward);
    }
    let counts = adamw8(4096, Order::Reverse);
    assert!(counts.lane_instructions < 170 * 4096, "{}", counts.lane_instructions);
    // Beside the two scales of 256 values.
    assert!(counts.store_efficiency() > 0.95, "{}", counts.store_efficiency());
    assert!(counts.load_efficiency() > 0.85, "{}", counts.load_efficiency());
}

#[test]
fn norms_and_factors_are_those_of_torch() {
    for (n, max_norm) in [(1usize, 1.0f32), (4096, 0.0), (5000, 1.0), (4096 * 3 + 7, 1e6)] {
        let g = Random::new(n as u64).normals(n);
        let count = n.div_ceil(4096);
        let mut device = Device::new();
        let g_at = upload(&mut device, &g);
        let partial = device.allocate(count * 4);
        let out = device.allocate(8);
        let launch = Launch { grid: [count as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        let arguments = [Arg::Pointer(g_at), Arg::Pointer(partial), Arg::I64(n as i64)];
        let counts = device
            .launch(kernels("optimizer.cu"), "sum_of_squares", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        if n == 4096 {
            assert_eq!(counts.load_efficiency(), 1.0);
        }
        let launch = Launch { grid: [1, 1, 1], block: [256, 1, 1], shared: 0 };
        let arguments =
            [Arg::Pointer(out), Arg::Pointer(partial), Arg::I32(count as i32), Arg::F32(max_norm)];
        device
            .launch(kernels("optimizer.cu"), "clip_factor", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        let [norm, factor] = download::<f32>(&device, out, 2).try_into().unwrap();
        let expected = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        // 16 squares of a thread and 8 levels above it in f32.
        assert!(
            (f64::from(norm) - expected).abs() <= 24.0 * expected / f64::from(1 << 24),
            "{norm} {expected}"
        );
        let clipped = (f64::from(max_norm) / (expected + 1e-6)).min(1.0);
        let clipped = if max_norm == 0.0 { 1.0 } else { clipped };
        assert!(
            (f64::from(factor) - clipped).abs() <= 24.0 * clipped / f64::from(1 << 24),
            "{factor} {clipped}"
        );
    }
}
