//! `glu.cu` against loops in f64.

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::in_both_orders;
use crate::harness::{Random, Tolerance, assert_close, download_bf16, kernels, round_bf16s, upload_bf16};

/// The gate's value and slope.
fn gated(x: f64, gelu: bool) -> (f64, f64) {
    if gelu {
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
        let inner = root * (1.0 + 3.0 * 0.044715 * x * x);
        return (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh + x * (1.0 - tanh * tanh) * inner));
    }
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

fn launch(n: usize) -> Launch {
    Launch { grid: [n.div_ceil(2048) as u32, 1, 1], block: [256, 1, 1], shared: 0 }
}

/// gate, up and dy; gates from the middle and from far out.
fn inputs(n: usize) -> [Vec<f32>; 3] {
    let mut random = Random::new(n as u64);
    let spread = |(index, x): (usize, f32)| if index % 7 == 0 { x * 30.0 } else { x * 2.0 };
    let gate: Vec<f32> = random.normals(n).into_iter().enumerate().map(spread).collect();
    [gate, random.normals(n), random.normals(n)].map(|values| round_bf16s(&values))
}

/// The error of a gate: exp and the division are within 2 ulp each, exp's argument of up to 90 is rounded before (90 ·
/// 2⁻²⁴ relative, which only matters where the sigmoid is tiny), and values are below 100 times that.
const TOLERANCE: f64 = 100.0 * 8.0 / (1 << 24) as f64;

fn forward(device: &mut Device, [gate, up, _]: &[Vec<f32>; 3], gelu: bool) -> (Vec<f32>, Counts) {
    let n = gate.len();
    let arrays = [device.allocate(n * 2), upload_bf16(device, gate), upload_bf16(device, up)];
    let arguments =
        [&arrays.map(Arg::Pointer)[..], &[Arg::I64(n as i64), Arg::I32(i32::from(gelu))]].concat();
    let counts = device.launch(kernels("glu.cu"), "glu", &launch(n), &arguments).expect("no fault");
    (download_bf16(device, arrays[0], n), counts)
}

/// dgate and dup.
fn backward(device: &mut Device, inputs: &[Vec<f32>; 3], gelu: bool) -> ([Vec<f32>; 2], Counts) {
    let n = inputs[0].len();
    let arrays = inputs.each_ref().map(|values| upload_bf16(device, values));
    let arguments =
        [&arrays.map(Arg::Pointer)[..], &[Arg::I64(n as i64), Arg::I32(i32::from(gelu))]].concat();
    let counts = device.launch(kernels("glu.cu"), "glu_backward", &launch(n), &arguments).expect("no fault");
    ([arrays[0], arrays[1]].map(|at| download_bf16(device, at, n)), counts)
}

#[test]
fn both_gates_are_right_near_and_far() {
    for n in [1, 7, 2048, 4099] {
        for gelu in [false, true] {
            let inputs = inputs(n);
            let [gate, up, dy] =
                inputs.each_ref().map(|values| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            let (got, _) = in_both_orders(|device| forward(device, &inputs, gelu));
            let expected: Vec<f64> = (0..n).map(|i| gated(gate[i], gelu).0 * up[i]).collect();
            assert_close(&format!("glu {n} {gelu}"), &got, &expected, Tolerance::bf16(TOLERANCE));
            let ([dgate, dup], _) = in_both_orders(|device| backward(device, &inputs, gelu));
            let expected: Vec<f64> = (0..n).map(|i| dy[i] * up[i] * gated(gate[i], gelu).1).collect();
            assert_close(&format!("dgate {n} {gelu}"), &dgate, &expected, Tolerance::bf16(TOLERANCE));
            let expected: Vec<f64> = (0..n).map(|i| dy[i] * gated(gate[i], gelu).0).collect();
            assert_close(&format!("dup {n} {gelu}"), &dup, &expected, Tolerance::bf16(TOLERANCE));
        }
    }
}

#[test]
fn a_gate_uses_whole_sectors() {
    let inputs = inputs(8192);
    for gelu in [false, true] {
        let (_, counts) = forward(&mut Device::new(), &inputs, gelu);
        assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0));
        assert!(counts.lane_instructions < 20 * 8192, "{gelu}: {} instructions", counts.lane_instructions);
        let (_, counts) = backward(&mut Device::new(), &inputs, gelu);
        assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0));
        assert!(counts.lane_instructions < 32 * 8192, "{gelu}: {} instructions", counts.lane_instructions);
    }
}
