//! `ldmatrix` and `mma.sync` against plain loops over fragments laid out as the PTX ISA draws them.

use ptxsim::{Arg, Device, Launch};

use crate::lanes::{kernel_with, module, words};

/// Small whole numbers, so that every format and every sum is exact.
fn number(index: usize) -> f32 {
    ((index * 7 + index / 5) % 9) as f32 - 4.0
}

/// Runs one `mma` on a (16,K) and b (K,8) whose values are `number`s of `left` and `right` indices.
fn product(instruction: &str, depth: usize, bits: impl Fn(f32) -> u32, per_register: usize) -> Vec<f32> {
    let a_count = 16 * depth / 32 / per_register;
    let b_count = 8 * depth / 32 / per_register;
    let pack = |values: &[f32]| match per_register {
        1 => bits(values[0]),
        _ => bits(values[0]) | bits(values[1]) << 16,
    };
    let mut input = vec![];
    for lane in 0..32 {
        let (group, inside) = (lane / 4, lane % 4 * per_register);
        let step = 4 * per_register;
        for register in 0..a_count {
            let (row, column) = (group + register % 2 * 8, inside + register / 2 * step);
            let values: Vec<f32> = (0..per_register).map(|i| number(row * depth + column + i)).collect();
            input.push(pack(&values));
        }
        for register in 0..b_count {
            let row = inside + register * step;
            let values: Vec<f32> = (0..per_register).map(|i| number((row + i) * 8 + group + 3)).collect();
            input.push(pack(&values));
        }
    }
    let loads: String = (0..a_count + b_count)
        .map(|index| format!("ld.global.u32 %r{index}, [%x1+{}];", index * 4))
        .collect();
    let list = |first: usize, count: usize| {
        (first..first + count).map(|index| format!("%r{index}")).collect::<Vec<_>>().join(", ")
    };
    let bytes = (a_count + b_count) * 4;
    let text = kernel_with(
        "",
        &format!(
            "mul.wide.u32 %x1, %t, {bytes}; add.s64 %x1, %x1, %x; {loads}
             mov.u32 %r20, 0f3F800000; mov.u32 %r21, 0f40000000;
             {instruction} {{%r24, %r25, %r26, %r27}}, {{{}}}, {{{}}}, {{%r20, %r20, %r21, %r21}};
             mul.wide.u32 %x1, %t, 16; add.s64 %x1, %x1, %x; st.global.v4.u32 [%x1+4096], {{%r24, %r25, %r26, %r27}};",
            list(0, a_count),
            list(a_count, b_count)
        ),
    );
    let mut device = Device::new();
    let x = device.allocate(4096 + 512);
    let bytes: Vec<u8> = input.iter().flat_map(|word| word.to_le_bytes()).collect();
    device.write(x, &bytes);
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], shared: 0 };
    let counts = device.launch(&module(&text), "test", &launch, &[Arg::Pointer(x)]).unwrap();
    assert_eq!(counts.mma, 1);
    let words = device.read(x + 4096, 512).chunks_exact(4);
    words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

#[track_caller]
fn assert_product(got: &[f32], depth: usize) {
    for lane in 0..32 {
        for register in 0..4 {
            let (row, column) = (lane / 4 + register / 2 * 8, lane % 4 * 2 + register % 2);
            let sum: f32 = (0..depth).map(|k| number(row * depth + k) * number(k * 8 + column + 3)).sum();
            let added = if register < 2 { 1.0 } else { 2.0 };
            assert_eq!(got[lane * 4 + register], sum + added, "lane {lane}, register {register}");
        }
    }
}

fn bf16(x: f32) -> u32 {
    x.to_bits() >> 16
}

/// Of a whole number below 8.
fn f16(x: f32) -> u32 {
    let bits = x.to_bits();
    if x == 0.0 { 0 } else { bits >> 16 & 0x8000 | ((bits >> 13 & 0x3ffff) - (112 << 10)) }
}

#[test]
fn products_of_every_format_are_exact() {
    let text = |shape: &str, of: &str| format!("mma.sync.aligned.{shape}.row.col.f32.{of}.{of}.f32");
    assert_product(&product(&text("m16n8k16", "bf16"), 16, bf16, 2), 16);
    assert_product(&product(&text("m16n8k16", "f16"), 16, f16, 2), 16);
    assert_product(&product(&text("m16n8k8", "bf16"), 8, bf16, 2), 8);
    assert_product(&product(&text("m16n8k8", "tf32"), 8, f32::to_bits, 1), 8);
    assert_product(&product(&text("m16n8k4", "tf32"), 4, f32::to_bits, 1), 4);
}

/// The words that `ldmatrix` gives; the value at row r, column c of matrix m is 64m + 8r + c.
fn matrices(instruction: &str, count: usize) -> Vec<u32> {
    let registers = (4..4 + count).map(|index| format!("%r{index}")).collect::<Vec<_>>().join(", ");
    let stores: String =
        (0..count).map(|index| format!("st.global.u32 [%at+{}], %r{};", index * 128, index + 4)).collect();
    let lines = format!(
        "mov.u32 %r0, tile; shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %r0;
         mov.u32 %r2, 0; shl.b32 %r3, %t, 3; cvt.u16.u32 %h0, %r3;
         $fill: st.shared.u16 [%r1], %h0; add.u16 %h0, %h0, 1; add.u32 %r1, %r1, 2; add.u32 %r2, %r2, 1;
         setp.lt.u32 %p0, %r2, 8; @%p0 bra $fill;
         bar.sync 0; shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %r0;
         {instruction} {{{registers}}}, [%r1]; {stores}"
    );
    words(&kernel_with(".shared .align 16 .b8 tile[512];", &lines), 128, 1, 32).unwrap().0
}

#[test]
fn matrices_are_spread_over_the_lanes() {
    for count in [1, 2, 4] {
        let plain = matrices(&format!("ldmatrix.sync.aligned.m8n8.x{count}.shared.b16"), count);
        let transposed =
            matrices(&format!("ldmatrix.sync.aligned.m8n8.x{count}.trans.shared::cta.b16"), count);
        for matrix in 0..count {
            for lane in 0..32 {
                let (row, column) = (lane / 4, lane % 4 * 2);
                let value = |row: usize, column: usize| (matrix * 64 + row * 8 + column) as u32;
                let at = matrix * 32 + lane;
                assert_eq!(plain[at], value(row, column) | value(row, column + 1) << 16);
                assert_eq!(transposed[at], value(column, row) | value(column + 1, row) << 16);
            }
        }
    }
}
