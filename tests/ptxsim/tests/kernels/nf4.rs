//! `nf4.cu` against the formulas of bitsandbytes, bit for bit.

use ptxsim::{Arg, Counts, Device, FaultKind, Launch, Order};

use crate::harness::{
    Random, Tolerance, assert_close, download, download_bf16, kernels, planted, round_bf16, round_bf16s,
    upload, upload_bf16,
};

const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Codes of a tensor and its scales, plain and nested.
struct Coded {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax_codes: Vec<u8>,
    code: Vec<f32>,
    absmax2: Vec<f32>,
    offset: f32,
}

impl Coded {
    fn random(values: usize) -> Self {
        let mut random = Random::new(values as u64);
        let blocks = values.div_ceil(64);
        let mut code = random.ranges(256, -1.0, 1.0);
        code.sort_by(f32::total_cmp);
        Self {
            packed: random.bytes(values.div_ceil(2)),
            absmax: random.ranges(blocks, 0.01, 0.2),
            absmax_codes: random.bytes(blocks),
            code,
            absmax2: random.ranges(blocks.div_ceil(256), 0.001, 0.05),
            offset: 0.07,
        }
    }

    fn scale(&self, block: usize, nested: bool) -> f32 {
        if nested {
            self.code[usize::from(self.absmax_codes[block])] * self.absmax2[block / 256] + self.offset
        } else {
            self.absmax[block]
        }
    }

    fn value(&self, at: usize, nested: bool) -> f32 {
        let byte = self.packed[at / 2];
        let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        round_bf16(CODE[usize::from(code)] * self.scale(at / 64, nested))
    }
}

fn dequantize(rows: usize, cols: usize, ld: usize, nested: bool, order: Order) -> Counts {
    let coded = Coded::random(rows * cols);
    let mut device = Device::new();
    device.order(order);
    let packed = Arg::Pointer(upload(&mut device, &coded.packed));
    let untouched = 7.5;
    let out = upload_bf16(&mut device, &vec![untouched; rows * ld]);
    let shape = [Arg::Pointer(out), Arg::I32(rows as i32), Arg::I32(cols as i32), Arg::I32(ld as i32)];
    let (kernel, scales) = if nested {
        let codes = Arg::Pointer(upload(&mut device, &coded.absmax_codes));
        let code = Arg::Pointer(upload(&mut device, &coded.code));
        let absmax2 = Arg::Pointer(upload(&mut device, &coded.absmax2));
        ("nf4_dequantize_nested", vec![codes, code, absmax2, Arg::F32(coded.offset)])
    } else {
        ("nf4_dequantize", vec![Arg::Pointer(upload(&mut device, &coded.absmax))])
    };
    let launch = Launch { grid: [(rows * cols).div_ceil(8192) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
    let arguments = [&[packed], &scales[..], &shape].concat();
    let counts = device
        .launch(kernels("nf4.cu"), kernel, &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let got = download_bf16(&device, out, rows * ld);
    for (i, got) in got.into_iter().enumerate() {
        let (row, col) = (i / ld, i % ld);
        let want = if col < cols { coded.value(row * cols + col, nested) } else { untouched };
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "({row},{col}) of ({rows},{cols}) by {ld}, nested {nested}"
        );
    }
    counts
}

#[test]
fn decoded_values_are_exact_in_any_shape() {
    let shapes = [
        (1, 1, 1),
        (3, 64, 64),
        (5, 30, 30),
        (7, 37, 40),
        (70, 72, 88),
        (129, 128, 128),
        (2, 8200, 8200),
        (9, 999, 999),
    ];
    for (rows, cols, ld) in shapes {
        for nested in [false, true] {
            for order in [Order::Forward, Order::Reverse] {
                dequantize(rows, cols, ld, nested, order);
            }
        }
    }
}

#[test]
fn decoding_uses_whole_sectors_and_few_instructions() {
    for nested in [false, true] {
        let counts = dequantize(64, 256, 256, nested, Order::Forward);
        assert_eq!(counts.store_efficiency(), 1.0);
        assert_eq!(counts.bank_conflicts, 0);
        let a_value = counts.lane_instructions as f64 / (64.0 * 256.0);
        assert!(a_value < 11.0, "{a_value} instructions a value");
    }
}

#[test]
fn the_code_book_must_be_there_before_it_is_read() {
    let module = planted("nf4.cu", "    __syncthreads();\n\n    bool in_words", "    bool in_words");
    let mut device = Device::new();
    let packed = upload(&mut device, &[0x12u8; 4096]);
    let absmax = upload(&mut device, &[1.0f32; 128]);
    let out = device.allocate(8192 * 2);
    let launch = Launch { grid: [1, 1, 1], block: [256, 1, 1], shared: 0 };
    let pointers = [packed, absmax, out].map(Arg::Pointer);
    let arguments = [&pointers[..], &[Arg::I32(128), Arg::I32(64), Arg::I32(64)]].concat();
    let fault = device.launch(module, "nf4_dequantize", &launch, &arguments).unwrap_err();
    assert!(
        matches!(fault.kind, FaultKind::SharedRace | FaultKind::UninitialisedShared | FaultKind::PendingCopy),
        "{fault}"
    );
}

/// The codes and scales as the CPU encodes: src/engine/quant.rs.
fn encode(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let nearest =
        |scaled: f32| CODE.windows(2).map(|pair| u8::from((pair[0] + pair[1]) / 2.0 < scaled)).sum::<u8>();
    let (mut packed, mut absmax) = (Vec::new(), Vec::new());
    for block in values.chunks(64) {
        let scale = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let reciprocal = (1.0 / scale).min(1e38);
        let mut codes = [7u8; 64];
        for (code, &value) in codes.iter_mut().zip(block) {
            if block.len() == 64 {
                *code = nearest(value * reciprocal);
            } else if scale > 0.0 {
                *code = nearest(value / scale);
            }
        }
        let bytes = codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).take(block.len().div_ceil(2));
        packed.extend(bytes);
        absmax.push(scale);
    }
    (packed, absmax)
}

#[test]
fn encoding_is_that_of_the_cpu() {
    for n in [1usize, 2, 10, 63, 64, 65, 128, 1000, 1024, 1025, 3333] {
        let mut random = Random::new(n as u64);
        let mut values: Vec<f32> = random.normals(n).iter().map(|x| x * 0.02).collect();
        // A block of nothing, one of denormals, and values on the midpoints of codes.
        if n >= 1000 {
            values[..64].fill(0.0);
            values[64..128].fill(1e-42);
            values[192] = 1.0;
            for i in 0..15 {
                values[193 + i] = (CODE[i] + CODE[i + 1]) / 2.0;
            }
        }
        let (packed, absmax) = encode(&values);
        let mut device = Device::new();
        let w = upload(&mut device, &values);
        let packed_at = upload(&mut device, &vec![0xeeu8; packed.len()]);
        let absmax_at = device.allocate(absmax.len() * 4);
        let launch = Launch { grid: [n.div_ceil(1024) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        let arguments =
            [Arg::Pointer(w), Arg::Pointer(packed_at), Arg::Pointer(absmax_at), Arg::I64(n as i64)];
        let counts = device
            .launch(kernels("nf4.cu"), "nf4_quantize", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(download::<u8>(&device, packed_at, packed.len()), packed, "{n} values");
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&download(&device, absmax_at, absmax.len())), bits(&absmax), "{n} values");
        if n == 1024 {
            assert_eq!(counts.load_efficiency(), 1.0);
        }
    }
}

#[test]
fn nested_scales_are_those_of_the_cpu() {
    for blocks in [1usize, 255, 256, 257, 700] {
        let mut random = Random::new(blocks as u64);
        let mut code = random.ranges(256, -1.0, 1.0);
        code.sort_by(f32::total_cmp);
        let mut values = random.ranges(blocks, 0.01, 0.2);
        let offset = 0.1f32;
        if blocks == 700 {
            values[256..512].fill(offset);
        }
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for block in values.chunks(256) {
            let scale = block.iter().fold(0.0f32, |most, value| most.max((value - offset).abs()));
            codes.extend(block.iter().map(|value| {
                let scaled = (value - offset) / scale;
                let below = code.windows(2).filter(|pair| (pair[0] + pair[1]) / 2.0 < scaled).count();
                if scale > 0.0 { below as u8 } else { 0 }
            }));
            scales.push(scale);
        }
        let mut device = Device::new();
        let absmax = upload(&mut device, &values);
        let code_at = upload(&mut device, &code);
        let codes_at = device.allocate(blocks);
        let scales_at = device.allocate(scales.len() * 4);
        let launch = Launch { grid: [scales.len() as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        let arguments = [
            Arg::Pointer(absmax),
            Arg::F32(offset),
            Arg::Pointer(code_at),
            Arg::Pointer(codes_at),
            Arg::Pointer(scales_at),
            Arg::I64(blocks as i64),
        ];
        device
            .launch(kernels("nf4.cu"), "absmax_nest", &launch, &arguments)
            .unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(download::<u8>(&device, codes_at, blocks), codes, "{blocks} scales");
        assert_eq!(download::<f32>(&device, scales_at, scales.len()), scales, "{blocks} scales");
    }
}

/// y (m,n) of x (m,k), a weight in codes and a pair of rank r.
fn product(kernel: &str, (m, n, k, r): (usize, usize, usize, usize), order: Order) -> Counts {
    let coded = Coded::random(n * k);
    let [x, h, b] =
        [(1, m * k), (2, m * r), (3, n * r)].map(|(seed, len)| round_bf16s(&Random::new(seed).normals(len)));
    let mut device = Device::new();
    device.order(order);
    let y = device.allocate(m * n * 2);
    let arguments = [
        Arg::Pointer(y),
        Arg::Pointer(upload_bf16(&mut device, &x)),
        Arg::Pointer(upload(&mut device, &coded.packed)),
        Arg::Pointer(upload(&mut device, &coded.absmax)),
        Arg::Pointer(upload_bf16(&mut device, &h)),
        Arg::Pointer(upload_bf16(&mut device, &b)),
        Arg::I32(m as i32),
        Arg::I32(n as i32),
        Arg::I32(k as i32),
        Arg::I32(r as i32),
    ];
    let launch = if kernel == "nf4_gemv" {
        Launch { grid: [n.div_ceil(16) as u32, 1, 1], block: [256, 1, 1], shared: 0 }
    } else {
        Launch { grid: [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1], block: [128, 1, 1], shared: 0 }
    };
    let counts = device
        .launch(kernels("nf4.cu"), kernel, &launch, &arguments)
        .unwrap_or_else(|fault| panic!("{kernel} {m}x{n}x{k}+{r}: {fault}"));
    let mut expected = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let own = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(coded.value(j * k + l, false)));
            let pair = (0..r).map(|l| f64::from(h[i * r + l]) * f64::from(b[j * r + l]));
            expected.push(own.chain(pair).sum::<f64>());
        }
    }
    // Products are below 1; every sum in f32 may err by half a unit of its size, which is below k + r.
    let terms = (k + r) as f64;
    let tolerance = Tolerance::bf16(terms * terms / f64::from(1 << 24));
    assert_close(
        &format!("{kernel} {m}x{n}x{k}+{r}"),
        &download_bf16(&device, y, m * n),
        &expected,
        tolerance,
    );
    counts
}

#[test]
fn products_with_few_rows_are_right_in_any_shape() {
    for (i, shape) in [(1, 1, 64, 0), (1, 40, 192, 16), (3, 33, 576, 5), (8, 16, 1216, 0), (5, 70, 320, 64)]
        .into_iter()
        .enumerate()
    {
        let order = if i % 2 == 0 { Order::Forward } else { Order::Reverse };
        product("nf4_gemv", shape, order);
        product("nf4_gemm", shape, order);
    }
    for shape in [(64, 64, 64, 16), (70, 130, 128, 70), (33, 50, 192, 3), (130, 60, 64, 8)] {
        product("nf4_gemm", shape, Order::Forward);
        product("nf4_gemm", shape, Order::Reverse);
    }
}

#[test]
fn products_with_few_rows_read_the_weight_once_without_conflicts() {
    for (kernel, m) in [("nf4_gemv", 1), ("nf4_gemv", 8), ("nf4_gemm", 64)] {
        let [few, many] = [512, 1536].map(|k| product(kernel, (m, 64, k, 16), Order::Forward));
        assert_eq!(few.bank_conflicts, many.bank_conflicts, "{kernel}");
        let values = (64 * 1024) as f64;
        let instructions = (many.lane_instructions - few.lane_instructions) as f64 / values;
        let bytes = (many.global_load_bytes - few.global_load_bytes) as f64 / values;
        // Half a byte of code and a sixteenth of scale, and x: 2 bytes a row, read once for 16 or 64 rows of the weight.
        let rows = if kernel == "nf4_gemv" { 16.0 } else { 64.0 };
        assert!(bytes < 0.5625 + 2.0 * m as f64 / rows + 0.25, "{kernel} of {m}: {bytes} bytes a value");
        assert!(instructions < 11.0, "{kernel} of {m}: {instructions} instructions a value");
    }
}

#[test]
fn codes_must_be_waited_for() {
    let text = "wait_for_copies<WIDE_STAGES - 2>();";
    let module = planted("nf4.cu", text, "wait_for_copies<WIDE_STAGES - 1>();");
    let mut device = Device::new();
    let y = device.allocate(64 * 64 * 2);
    let x = upload_bf16(&mut device, &[1.0; 64 * 256]);
    let packed = upload(&mut device, &[0x12u8; 64 * 128]);
    let absmax = upload(&mut device, &[1.0f32; 64 * 4]);
    let pointers = [y, x, packed, absmax, 0, 0].map(Arg::Pointer);
    let arguments = [&pointers[..], &[64, 64, 256, 0].map(Arg::I32)].concat();
    let launch = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared: 0 };
    let fault = device.launch(module, "nf4_gemm", &launch, &arguments).unwrap_err();
    let kinds = [FaultKind::SharedRace, FaultKind::UninitialisedShared, FaultKind::PendingCopy];
    assert!(kinds.contains(&fault.kind), "{fault}");
}
