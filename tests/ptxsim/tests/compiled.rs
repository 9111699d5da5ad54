//! What NVRTC makes of ordinary CUDA C, against the same in Rust: the instructions that no kernel of ours writes down,
//! but that the compiler puts in.

use ptxsim::{Arg, Counts, Device, Launch, Module};

use crate::harness::{Element, Random, compile, download, upload};

const COUNT: usize = 300;

fn module() -> &'static Module {
    compile("language.cu", include_str!("planted/language.cu"))
}

/// `per` results of each of the values.
fn run<T: Element, R: Element>(kernel: &str, values: &[T], per: usize) -> (Vec<R>, Counts) {
    let mut device = Device::new();
    let y = device.allocate(values.len() * per * R::BYTES);
    let x = upload(&mut device, values);
    let launch = Launch { grid: [values.len().div_ceil(128) as u32, 1, 1], block: [128, 1, 1], shared: 0 };
    let arguments = [Arg::Pointer(y), Arg::Pointer(x), Arg::I32(values.len() as i32)];
    let counts = device.launch(module(), kernel, &launch, &arguments).unwrap();
    (download(&device, y, values.len() * per), counts)
}

#[test]
fn functions_of_the_library_are_within_their_bounds() {
    let mut values = Random::new(5).ranges(COUNT, -20.0, 20.0);
    values.extend([0.001, -0.5, 1e-20, 85.0, -100.0]);
    let (got, _) = run::<f32, f32>("mathematics", &values, 16);
    for (x, got) in values.iter().zip(got.chunks_exact(16)) {
        let v = f64::from(*x);
        let positive = f64::from(x.abs() + 0.1);
        // What the compiler computes first in f32 is rounded here too. The units are those of CUDA's manual.
        let expected: [(f64, f64); 16] = [
            (v.exp(), 3.0),
            (f64::from(x.abs() + 0.5).ln(), 3.0),
            (v.sin(), 3.0),
            (f64::from(x * 1e6).cos(), 3.0),
            (v.tanh(), 3.0),
            (error_function(v), 4.0),
            (positive.powf(f64::from(1.7f32)), 5.0),
            (v.abs().ln_1p(), 3.0),
            (1.0 / v, 0.5),
            (v.abs().sqrt(), 0.5),
            (1.0 / v.abs().sqrt(), 2.0),
            (v % f64::from(0.37f32), 0.0),
            // 2 + |x · log2 e| units.
            (v.exp(), 4.0 + 2.0 * v.abs()),
            (v.floor(), 0.0),
            (v.round_ties_even(), 0.0),
            (v.exp_m1(), 2.0),
        ];
        for (index, ((expected, units), got)) in expected.iter().zip(got).enumerate() {
            // A unit of the last place is up to twice as large as that of the next power of two below. `__expf` flushes
            // what is below the normal numbers.
            let bound =
                (units * 2.0 * expected.abs() * f64::from(f32::EPSILON)).max(f64::from(f32::MIN_POSITIVE));
            let same = f64::from(*got) == *expected || (expected.abs() > 3.5e38 && got.is_infinite());
            assert!(
                same || (f64::from(*got) - expected).abs() <= bound,
                "function {index} of {x:e}: {got:e}, not {expected:e}"
            );
        }
    }
}

/// Right to 1e-12: the Taylor series, and beyond 3 the continued fraction of what is missing to 1.
fn error_function(x: f64) -> f64 {
    if x.abs() > 3.0 {
        let fraction = (1..60).rev().fold(0.0, |rest, k| f64::from(k) / 2.0 / (x.abs() + rest));
        let complement = (-x * x).exp() / (x.abs() + fraction) / std::f64::consts::PI.sqrt();
        return (1.0 - complement).copysign(x);
    }
    let mut term = x;
    let mut sum = x;
    for k in 1..100 {
        term *= -x * x / f64::from(k);
        sum += term / f64::from(2 * k + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn doubles_are_right_to_the_last_places() {
    let values = Random::new(6).ranges(COUNT, -9.0, 9.0);
    let (got, _) = run::<f32, f64>("doubles", &values, 4);
    for (x, got) in values.iter().zip(got.chunks_exact(4)) {
        let v = f64::from(*x);
        let expected = [v.exp(), 1.0 / v, v.abs().sqrt(), (v.abs() + 0.25).ln()];
        for (got, expected) in got.iter().zip(expected) {
            assert!(
                (got - expected).abs() <= 2.0 * f64::EPSILON * expected.abs(),
                "{x}: {got}, not {expected}"
            );
        }
    }
}

#[test]
fn branches_calls_and_local_arrays_are_those_of_the_language() {
    let mut random = Random::new(7);
    let values: Vec<i32> = (0..COUNT).map(|_| 1 + random.below(100_000) as i32).collect();
    let (got, counts) = run::<i32, i32>("control", &values, 4);
    for (v, got) in values.iter().copied().zip(got.chunks_exact(4)) {
        let digits = |digit: char| v.to_string().chars().filter(|found| *found == digit).count() as i32;
        let last = char::from_digit((v % 10) as u32, 10).unwrap();
        let chosen =
            [digits('0') * 3, v / 3, -v, v ^ 0x55, v.count_ones() as i32 * 100, v << 2, digits(last)];
        let steps = std::iter::successors(Some(i64::from(v)), |n| {
            (*n != 1).then_some(if n % 2 == 1 { 3 * n + 1 } else { n / 2 })
        });
        let bits = v.leading_zeros() + 100 * (v.trailing_zeros() + 1) + (v as u32).reverse_bits() % 100;
        let expected =
            [chosen[(v % 7) as usize], steps.count() as i32 - 1, digits('1') * 10 + digits('9'), bits as i32];
        assert_eq!(got, expected, "{v}");
    }
    assert!(counts.opcodes.keys().any(|opcode| opcode.starts_with("st.local")), "{:?}", counts.opcodes);
}

#[test]
fn integers_of_64_bits_are_those_of_the_host() {
    let mut random = Random::new(8);
    let values: Vec<u64> = (0..COUNT).map(|_| random.bits() >> random.below(60)).collect();
    let (got, _) = run::<u64, u64>("integers", &values, 8);
    for (v, got) in values.iter().copied().zip(got.chunks_exact(8)) {
        let signed = v as i64;
        let high = (u128::from(v) * 0x9e37_79b9_7f4a_7c15) >> 64;
        let expected = [
            v / 12345,
            v % 1_000_003,
            (signed / -77) as u64,
            (signed >> 13) as u64,
            high as u64,
            v as i16 as u64,
            u64::from((v >> 5) as u8),
            v.rotate_left(17) ^ (v & 0xffff),
        ];
        assert_eq!(got, expected, "{v}");
    }
}
