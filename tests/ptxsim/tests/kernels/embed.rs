//! `embed.cu`, bit for bit.

use ptxsim::{Arg, Counts, Device, Launch};

use crate::harness::{Random, download_bf16, kernels, round_bf16s, upload, upload_bf16};

fn embed(c: usize) -> Counts {
    let tokens = [3i32, 0, 3, 6, 1];
    let table = round_bf16s(&Random::new(c as u64).normals(7 * c));
    let mut device = Device::new();
    let y = device.allocate(tokens.len() * c * 2);
    let arguments = [
        Arg::Pointer(y),
        Arg::Pointer(upload_bf16(&mut device, &table)),
        Arg::Pointer(upload(&mut device, &tokens)),
        Arg::I32(c as i32),
    ];
    let launch = Launch { grid: [tokens.len() as u32, 1, 1], block: [128, 1, 1], shared: 0 };
    let counts = device
        .launch(kernels("embed.cu"), "embed", &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let expected: Vec<f32> =
        tokens.iter().flat_map(|&token| table[token as usize * c..][..c].to_vec()).collect();
    assert_eq!(download_bf16(&device, y, tokens.len() * c), expected, "{c} channels");
    counts
}

#[test]
fn rows_are_those_of_the_tokens() {
    for c in [1, 7, 8, 64, 100, 576, 1300] {
        embed(c);
    }
    assert_eq!(embed(2048).store_efficiency(), 1.0);
}
