//! `norm.cu` against loops in f64.

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::{in_both_orders, is_unordered};
use crate::harness::{
    Random, Tolerance, assert_close, download_bf16, kernels, planted, round_bf16s, upload, upload_bf16,
};

const EPSILON: f32 = 1e-5;

/// Inputs of one norm.
struct Case {
    groups: usize,
    group: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    /// The gradient before.
    dx: Vec<f32>,
    weight: Vec<f32>,
}

impl Case {
    fn new(groups: usize, group: usize, channels: usize) -> Self {
        let mut random = Random::new((groups * 31 + group * 7 + channels) as u64);
        let mut values = |count| round_bf16s(&random.normals(count));
        let n = groups * group;
        let (x, dy, dx) = (values(n), values(n), values(n));
        Self { groups, group, x, dy, dx, weight: random.ranges(channels, 0.5, 1.5) }
    }

    fn launch(&self, entry: &str) -> Launch {
        let (grid, block) = if entry.contains("heads") {
            let lanes = self.group.div_ceil(8).next_power_of_two();
            ((self.groups * lanes).div_ceil(256), 256)
        } else {
            (self.groups, self.group.div_ceil(16).next_multiple_of(32))
        };
        Launch { grid: [grid as u32, 1, 1], block: [block as u32, 1, 1], shared: 0 }
    }

    fn shape(&self) -> [Arg; 4] {
        let sizes = [self.groups, self.group, self.weight.len()];
        let [groups, group, channels] = sizes.map(|size| Arg::I32(size as i32));
        [groups, group, channels, Arg::F32(EPSILON)]
    }

    fn forward(&self, device: &mut Device, entry: &str) -> (Vec<f32>, Counts) {
        let y = device.allocate(self.x.len() * 2);
        let (x, weight) = (upload_bf16(device, &self.x), upload(device, &self.weight));
        let arguments = [&[y, x, weight].map(Arg::Pointer)[..], &self.shape()].concat();
        let counts =
            device.launch(kernels("norm.cu"), entry, &self.launch(entry), &arguments).expect("no fault");
        (download_bf16(device, y, self.x.len()), counts)
    }

    fn backward(&self, device: &mut Device, entry: &str) -> (Vec<f32>, Counts) {
        let arrays = [&self.dx, &self.dy, &self.x].map(|values| upload_bf16(device, values));
        let weight = upload(device, &self.weight);
        let arguments = [&arrays.map(Arg::Pointer)[..], &[Arg::Pointer(weight)], &self.shape()].concat();
        let counts =
            device.launch(kernels("norm.cu"), entry, &self.launch(entry), &arguments).expect("no fault");
        (download_bf16(device, arrays[0], self.x.len()), counts)
    }

    /// y, and dx after.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (mut y, mut dx) = (Vec::new(), Vec::new());
        for start in (0..self.x.len()).step_by(self.group) {
            let group = start..start + self.group;
            let x: Vec<f64> = self.x[group.clone()].iter().map(|&x| f64::from(x)).collect();
            let weight: Vec<f64> =
                group.clone().map(|i| f64::from(self.weight[i % self.weight.len()])).collect();
            let mean = x.iter().map(|x| x * x).sum::<f64>() / self.group as f64;
            let inverse = 1.0 / (mean + f64::from(EPSILON)).sqrt();
            let pull: f64 =
                group.clone().map(|i| f64::from(self.dy[i]) * weight[i - start] * x[i - start]).sum();
            let pull = pull * inverse.powi(3) / self.group as f64;
            for i in group {
                let (x, weight) = (x[i - start], weight[i - start]);
                y.push(x * inverse * weight);
                dx.push(f64::from(self.dx[i]) + inverse * weight * f64::from(self.dy[i]) - pull * x);
            }
        }
        (y, dx)
    }
}

/// Values are below 20 and sums of at most 16384 squares go through at most 16 + 5 + 32 additions: 53 · 2⁻²⁴ of
/// relative error, twice in a gradient.
const TOLERANCE: f64 = 20.0 * 2.0 * 53.0 / (1 << 24) as f64;

fn check(suffix: &str, (groups, group, channels): (usize, usize, usize)) {
    let case = Case::new(groups, group, channels);
    let (y, dx) = case.expected();
    let name = format!("rms_norm{suffix} {groups} of {group}");
    let (got, _) = in_both_orders(|device| case.forward(device, &format!("rms_norm{suffix}")));
    assert_close(&name, &got, &y, Tolerance::bf16(TOLERANCE));
    let (got, _) = in_both_orders(|device| case.backward(device, &format!("rms_norm{suffix}_backward")));
    assert_close(&format!("{name} backward"), &got, &dx, Tolerance::bf16(TOLERANCE));
}

#[test]
fn a_norm_of_rows_is_right_at_any_width() {
    for shape in
        [(3, 576, 576), (2, 1000, 1000), (1, 16384, 16384), (5, 7, 7), (2, 2057, 2057), (4, 384, 768)]
    {
        check("", shape);
    }
}

#[test]
fn a_norm_of_heads_is_right_at_any_width() {
    for shape in
        [(10, 64, 64), (9, 128, 128), (7, 80, 80), (5, 256, 256), (11, 20, 20), (6, 64, 192), (3, 1, 1)]
    {
        check("_heads", shape);
    }
}

#[test]
fn a_norm_reads_and_writes_each_value_once() {
    for (entry, (groups, group), shared) in [("rms_norm", (4, 2048), 1), ("rms_norm_heads", (64, 128), 2)] {
        let case = Case::new(groups, group, group);
        let n = (groups * group) as u64;
        // A thread's eight weights are two accesses of 16 bytes, 32 apart: each touches every sector of the row's weights,
        // which the groups in a warp have in common.
        let weights = 2 * n * 4 / 32 / shared;
        let (_, counts) = case.forward(&mut Device::new(), entry);
        assert_eq!(counts.global_load_sectors, n * 2 / 32 + weights, "{entry}");
        assert_eq!(counts.global_store_sectors, n * 2 / 32, "{entry}");
        assert_eq!(counts.bank_conflicts, 0, "{entry}");
        assert!(counts.lane_instructions < 22 * n, "{entry}: {} instructions", counts.lane_instructions);
        let (_, counts) = case.backward(&mut Device::new(), &format!("{entry}_backward"));
        assert_eq!(counts.global_load_sectors, 3 * n * 2 / 32 + weights, "{entry}");
        assert_eq!(counts.global_store_sectors, n * 2 / 32, "{entry}");
        assert_eq!(counts.bank_conflicts, 0, "{entry}");
        assert!(counts.lane_instructions < 40 * n, "{entry}: {} instructions", counts.lane_instructions);
    }
}

#[test]
fn a_sum_read_before_its_barrier_is_reported() {
    let broken = planted("norm.cu", "= x;\n    __syncthreads();\n", "= x;\n");
    let case = Case::new(2, 576, 576);
    let mut device = Device::new();
    let arrays = [&case.dx, &case.dy, &case.x].map(|values| upload_bf16(&mut device, values));
    let weight = upload(&mut device, &case.weight);
    let arguments = [&arrays.map(Arg::Pointer)[..], &[Arg::Pointer(weight)], &case.shape()].concat();
    let fault = device
        .launch(broken, "rms_norm_backward", &case.launch("rms_norm_backward"), &arguments)
        .expect_err("a barrier is missing");
    assert!(is_unordered(&fault), "{fault}");
}
