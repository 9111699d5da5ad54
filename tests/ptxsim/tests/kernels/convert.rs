//! `convert.cu`, bit for bit.

use ptxsim::{Arg, Counts, Device, Launch};

use crate::harness::{Random, bf16_bits, bf16_value, download, kernels, upload};

/// Runs a conversion of `x`, both arrays `offset` elements into their buffers.
fn convert<X, Y>(kernel: &str, x: &[X], offset: usize) -> (Vec<Y>, Counts)
where
    X: crate::harness::Element,
    Y: crate::harness::Element,
{
    let n = x.len();
    let mut device = Device::new();
    let padded = [&vec![x[0]; offset], x].concat();
    let from = upload(&mut device, &padded) + (offset * X::BYTES) as u64;
    let to = device.allocate((n + offset) * Y::BYTES) + (offset * Y::BYTES) as u64;
    let launch = Launch { grid: [n.div_ceil(4096) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
    let arguments = [Arg::Pointer(to), Arg::Pointer(from), Arg::I64(n as i64)];
    let counts = device
        .launch(kernels("convert.cu"), kernel, &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    (download(&device, to, n), counts)
}

/// An IEEE half as f64, by its definition.
fn half_value(bits: u16) -> f64 {
    let (sign, exponent, fraction) = (bits >> 15, i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = if exponent == 0 {
        fraction * 2f64.powi(-24)
    } else {
        (1024.0 + fraction) * 2f64.powi(exponent - 25)
    };
    if sign == 1 { -magnitude } else { magnitude }
}

#[test]
fn every_value_is_rounded_once() {
    for n in [1usize, 3, 4, 1023, 4096, 5001] {
        for offset in [0, 1] {
            let mut values = Random::new(n as u64).normals(n);
            values[0] = f32::INFINITY;
            let (got, _) = convert::<f32, u16>("bf16_from_f32", &values, offset);
            let want: Vec<u16> = values.iter().map(|&value| bf16_bits(value)).collect();
            assert_eq!(got, want, "{n} values from {offset}");
            let (got, _) = convert::<u16, f32>("f32_from_bf16", &want, offset);
            assert_eq!(got, want.iter().map(|&bits| bf16_value(bits)).collect::<Vec<_>>(), "{n} values");
            // All halves but infinities and NaN.
            let halves: Vec<u16> =
                (0..n).map(|i| (i * 13) as u16).filter(|bits| bits >> 10 & 31 < 31).collect();
            let (got, _) = convert::<u16, u16>("bf16_from_f16", &halves, offset);
            let want: Vec<u16> = halves.iter().map(|&bits| bf16_bits(half_value(bits) as f32)).collect();
            assert_eq!(got, want, "{n} halves");
        }
    }
}

#[test]
fn conversions_use_whole_sectors() {
    let (_, counts) = convert::<f32, u16>("bf16_from_f32", &[1.5; 8192], 0);
    assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0));
    let (_, counts) = convert::<u16, f32>("f32_from_bf16", &[0x3fc0; 8192], 0);
    assert_eq!((counts.load_efficiency(), counts.store_efficiency()), (1.0, 1.0));
}
