//! One suite for every backend: `Cpu`, with the machine's instructions and without, against the plain loops of
//! `Reference` over ragged shapes and all encodings, and against itself under other thread counts, bit for bit.
//! A set that rounds factors may err twice as far as plain loops that round them.

use std::cell::Cell;
use std::sync::Arc;

use half::bf16;

use super::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, Buffer, Compute, Cpu, LogitMap,
    Lora, LoraGradient, Reference, RopeTable, Rotation, Span, Write,
};
use crate::matrix::{Bytes, Matrix, Values};
use crate::quant::Nf4;

mod recurrent;

/// Values in ±1 that repeat for the same seed.
fn noise(seed: u64, len: usize) -> Buffer {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
        if ROUNDED.get() { bf16::from_f32(value).to_f32() } else { value }
    };
    (0..len).map(|_| next()).collect()
}

/// What an operation is to overwrite.
fn nines(len: usize) -> Buffer {
    vec![9.0; len].into()
}

thread_local! {
    /// Whether noise is rounded to bfloat16.
    static ROUNDED: Cell<bool> = const { Cell::new(false) };
}

/// What an operation on a device may be off by, of the largest value: a few roundings to bfloat16 (2⁻⁹ each), for what
/// it hands on to the next one is rounded as well.
const DEVICE_TOLERANCE: f32 = 1.5e-2;
/// Added to that value: over one or two keys, gradients of scores are small differences of rounded values near 1.
const DEVICE_FLOOR: f32 = 2e-2;

/// Runs `operation`, which gives its outputs, on every backend.
fn check(what: &str, tolerance: f32, operation: impl Fn(&dyn Backend) -> Vec<Buffer>) {
    check_on_hosts(what, tolerance, &operation);
    check_on_device(what, &operation);
}

/// Runs `operation` on the reference and on a device, both from values that bfloat16 has; twice on the device.
fn check_on_device(what: &str, operation: impl Fn(&dyn Backend) -> Vec<Buffer>) {
    ROUNDED.set(true);
    let expected = operation(&Reference::EXACT);
    let once = operation(&*device());
    close(&format!("{what}, device"), (DEVICE_TOLERANCE, DEVICE_FLOOR), &once, &expected);
    assert!(bits(&once) == bits(&operation(&*device())), "{what}: a device gives other bits the second time");
    ROUNDED.set(false);
}

fn device() -> Arc<dyn Backend> {
    Compute::test_device().backend().unwrap()
}

/// Runs `operation`, which gives its outputs, on the reference and, for every instruction set of this CPU, on
/// `Cpu` with 1, 2 and 3 threads.
fn check_on_hosts(what: &str, tolerance: f32, operation: impl Fn(&dyn Backend) -> Vec<Buffer>) {
    let expected = operation(&Reference::EXACT);
    let mut bits_by_set = Vec::new();
    for (set, cpu) in Cpu::all(1) {
        let (one, what) = (operation(&cpu), format!("{what}, {set}"));
        if cpu.rounds() {
            within_twice_naive(&what, tolerance, &one, &operation(&Reference::BF16), &expected);
        } else {
            close(&what, (tolerance, 1e-3), &one, &expected);
        }
        bits_by_set.push((set, bits(&one)));
    }
    for threads in [2, 3] {
        for ((set, cpu), (_, one)) in Cpu::all(threads).iter().zip(&bits_by_set) {
            assert!(bits(&operation(cpu)) == *one, "{what}, {set}: {threads} threads give other bits");
        }
    }
    let of = |name| bits_by_set.iter().find(|(set, _)| *set == name);
    if let (Some((_, avx2)), Some((_, avx512))) = (of("avx2"), of("avx512")) {
        assert!(avx2 == avx512, "{what}: avx512 gives other bits than avx2");
    }
}

fn bits(outputs: &[Buffer]) -> Vec<u32> {
    outputs.iter().flat_map(|output| output.iter().map(|value| value.to_bits())).collect()
}

fn close(what: &str, (tolerance, floor): (f32, f32), got: &[Buffer], expected: &[Buffer]) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (place, (got, expected)) in got.iter().zip(&**expected).enumerate() {
            let allowed = tolerance * (largest + floor);
            let error = (got - expected).abs();
            assert!(error <= allowed, "{what}: output {index} at {place} is {got}, reference {expected}");
        }
    }
}

fn within_twice_naive(what: &str, tolerance: f32, got: &[Buffer], naive: &[Buffer], expected: &[Buffer]) {
    for (index, ((got, naive), expected)) in got.iter().zip(naive).zip(expected).enumerate() {
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let worst = |values: &[f32]| {
            let errors = values.iter().zip(&**expected).map(|(value, expected)| (value - expected).abs());
            errors.fold(0.0f32, |worst, error| if error > worst || error.is_nan() { error } else { worst })
        };
        // What nothing was rounded for is as exact as elsewhere.
        let allowed = (2.0 * worst(naive)).max(tolerance * (largest + 1e-3));
        let error = worst(got);
        assert!(
            error <= allowed,
            "{what}: output {index} is off by {error}, naive rounding by {}",
            worst(naive)
        );
    }
}

fn encodings(rows: usize, cols: usize) -> [(&'static str, Matrix); 4] {
    let values = noise(1, rows * cols);
    let narrow = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
    let f16 = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    [
        ("f32", Matrix::from_f32(rows, cols, &values)),
        ("bf16", Matrix { rows, cols, values: Values::Bf16(Bytes::owned(narrow)) }),
        ("f16", Matrix { rows, cols, values: Values::F16(Bytes::owned(f16)) }),
        ("nf4", Matrix { rows, cols, values: Values::Nf4(Nf4::encode(&values)) }),
    ]
}

#[test]
fn linear_and_its_backward() {
    for (tokens, n, k) in
        [(1, 1, 1), (1, 97, 70), (3, 100, 33), (70, 5, 576), (257, 193, 96), (9, 130, 1100), (40, 64, 2112)]
    {
        for (encoding, weight) in encodings(n, k) {
            for write in [Write::Overwrite, Write::Add] {
                check(&format!("linear {tokens}x{n}x{k} {encoding}"), 1e-5, |backend| {
                    let (mut y, mut dx) = (noise(2, tokens * n), noise(3, tokens * k));
                    let (x, dy) = (noise(4, tokens * k), noise(5, tokens * n));
                    backend.linear(&mut y, &x, &weight, write);
                    backend.linear_backward(&mut dx, &dy, &weight, write);
                    vec![y, dx]
                });
            }
        }
    }
}

#[test]
fn products_of_few_rows() {
    // Whole bands of 32 outputs and some over; whole sweeps of the depth and parts of one; depths of no band's.
    for (n, k) in [(32, 8), (64, 64), (97, 160), (131, 1184), (40, 36), (96, 576), (33, 296)] {
        for (encoding, weight) in encodings(n, k) {
            for (tokens, write) in
                [(1, Write::Overwrite), (2, Write::Add), (4, Write::Overwrite), (5, Write::Add)]
            {
                check(&format!("thin linear {tokens}x{n}x{k} {encoding}"), 1e-5, |backend| {
                    let mut y = noise(2, tokens * n);
                    backend.linear(&mut y, &noise(4, tokens * k), &weight, write);
                    vec![y]
                });
            }
        }
    }
}

#[test]
fn row_of_a_product_does_not_depend_on_the_rows_beside_it() {
    let tokens = 103;
    for (n, k) in [(97, 160), (40, 36), (130, 1184), (64, 584)] {
        for (encoding, weight) in encodings(n, k) {
            for (set, cpu) in Cpu::all(2) {
                let (x, before) = (noise(4, tokens * k), noise(2, tokens * n));
                let mut together = before.clone();
                cpu.linear(&mut together, &x, &weight, Write::Add);
                for step in [1, 2, 3, 4, 7, 50] {
                    let mut apart = Vec::new();
                    for (y, x) in before.chunks(step * n).zip(x.chunks(step * k)) {
                        let (mut y, x) = (Buffer::from(y.to_vec()), x.to_vec().into());
                        cpu.linear(&mut y, &x, &weight, Write::Add);
                        apart.extend_from_slice(&y);
                    }
                    let same = apart.iter().zip(&*together).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{set} {n}x{k} {encoding}: {step} rows at a time give other bits");
                }
            }
        }
    }
}

#[test]
fn lora_and_its_backward() {
    for (tokens, n, k, rank) in [(1, 3, 5, 1), (65, 200, 30, 4), (130, 7, 193, 5), (300, 64, 64, 16)] {
        check(&format!("lora {tokens}x{n}x{k} rank {rank}"), 2e-5, |backend| {
            let (a, b) = (noise(1, rank * k), noise(2, n * rank));
            let lora = Lora { a: &a, b: &b, rank, scale: 0.7 };
            let (x, dy) = (noise(3, tokens * k), noise(4, tokens * n));
            let (mut y, mut h) = (noise(5, tokens * n), nines(tokens * rank));
            backend.lora(&mut y, &mut h, &x, &lora);
            let (mut da, mut db, mut dx) = (noise(6, rank * k), noise(7, n * rank), noise(8, tokens * k));
            let mut dh = nines(tokens * rank);
            let gradient = LoraGradient { da: &mut da, db: &mut db };
            backend.lora_backward(gradient, Some(&mut dx), &mut dh, &dy, &x, &h, &lora);
            let gradient = LoraGradient { da: &mut da, db: &mut db };
            backend.lora_backward(gradient, None, &mut dh, &dy, &x, &h, &lora);
            vec![y, da, db, dh, dx]
        });
    }
}

#[test]
fn adapted_linear_and_its_backward() {
    for (tokens, n, k, rank) in [
        (1, 3, 5, 1),
        (1, 64, 64, 4),
        (3, 97, 160, 8),
        (65, 200, 30, 4),
        (130, 7, 193, 5),
        (600, 112, 320, 16),
    ] {
        for (encoding, weight) in encodings(n, k) {
            check(&format!("adapted {tokens}x{n}x{k} rank {rank} {encoding}"), 2e-5, |backend| {
                let (a, b) = (noise(11, rank * k), noise(12, n * rank));
                let lora = Lora { a: &a, b: &b, rank, scale: 0.7 };
                let (x, dy) = (noise(3, tokens * k), noise(4, tokens * n));
                let (mut y, mut h) = (nines(tokens * n), nines(tokens * rank));
                backend.adapted(&mut y, &mut h, &x, &weight, &lora);
                let (mut da, mut db, mut dx) = (noise(6, rank * k), noise(7, n * rank), noise(8, tokens * k));
                let mut dh = nines(tokens * rank);
                for write in [Write::Add, Write::Overwrite] {
                    let gradient = LoraGradient { da: &mut da, db: &mut db };
                    let dx = (&mut dx, write);
                    backend.adapted_backward(gradient, dx, &mut dh, &dy, &x, &h, &weight, &lora);
                }
                vec![y, da, db, dh, dx]
            });
        }
    }
}

#[test]
fn norm_and_its_backward() {
    // Whole rows, heads of a row, groups of channels.
    for (tokens, c, group) in
        [(1, 1, 1), (3, 20, 20), (70, 576, 576), (33, 37, 37), (900, 6, 6), (70, 96, 32)]
    {
        check(&format!("norm {tokens}x{c} by {group}"), 1e-5, |backend| {
            let (x, weight, dy) = (noise(1, tokens * c), noise(2, c), noise(3, tokens * c));
            let (mut y, mut dx) = (nines(tokens * c), noise(4, tokens * c));
            backend.rms_norm(&mut y, &x, &weight, group, 1e-5);
            backend.rms_norm_backward(&mut dx, &dy, &x, &weight, group, 1e-5);
            vec![y, dx]
        });
    }
}

#[test]
fn elementwise_operations() {
    for len in [1, 15, 16, 100, 40_003] {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            check(&format!("elementwise {len} {activation:?}"), 1e-5, |backend| {
                let wide = |seed| -> Buffer { noise(seed, len).iter().map(|value| 20.0 * value).collect() };
                let (mut gate, mut up, dy) = (wide(1), wide(2), noise(3, len));
                let mut y = nines(len);
                backend.glu(&mut y, &gate, &up, activation);
                backend.glu_backward(&mut gate, &mut up, &dy, activation);
                let mut sum = dy.clone();
                backend.add(&mut sum, &y);
                let mut biased = sum.clone();
                backend.add_bias(&mut biased, &gate);
                let mut scaled = biased.clone();
                backend.scale(&mut scaled, -0.3);
                let mut mapped = wide(4);
                backend.map_logits(&mut mapped, LogitMap { scale: 0.7, softcap: Some(3.0) });
                let mut smaller = wide(5);
                backend.map_logits(&mut smaller, LogitMap { scale: 0.125, softcap: None });
                vec![y, gate, up, sum, biased, scaled, mapped, smaller]
            });
        }
    }
}

#[test]
fn split_is_what_join_puts_together() {
    for (rows, widths) in [(1, [1, 1, 1]), (3, [5, 2, 7]), (100, [64, 80, 3])] {
        check(&format!("split {rows} rows into {widths:?}"), 0.0, |backend| {
            let x = noise(1, rows * widths.iter().sum::<usize>());
            let mut parts = widths.map(|width| nines(rows * width));
            let [a, b, c] = &mut parts;
            backend.split(&mut [a, b, c], &x, rows);
            let mut joined = nines(x.len());
            let [a, b, c] = &parts;
            backend.join(&mut joined, &[a, b, c], rows);
            assert_eq!(joined, x);
            parts.to_vec()
        });
    }
}

#[test]
fn rotation_and_back() {
    let (heads, dim, positions) = (3, 10, [0, 1, 2, 0, 1, 7, 3]);
    let angles = noise(1, 8 * dim / 2);
    let table = RopeTable {
        cos: angles.iter().map(|angle| angle.cos()).collect(),
        sin: angles.iter().map(|angle| angle.sin()).collect(),
    };
    let turned = |backend: &dyn Backend| {
        let mut there = noise(2, positions.len() * heads * dim);
        backend.rope(&mut there, heads, dim, &table, &positions, Rotation::Forward);
        let mut back = there.clone();
        backend.rope(&mut back, heads, dim, &table, &positions, Rotation::Backward);
        vec![there, back]
    };
    check("rope", 1e-6, turned);
    let x = noise(2, positions.len() * heads * dim);
    assert!(turned(&Reference::EXACT)[1].iter().zip(&*x).all(|(back, x)| (back - x).abs() < 1e-5));
}

/// Plain attention, a window, a cap, and all at once with a scale that is not 1 / sqrt(D).
fn attention_kinds(shape: AttentionShape<'_>) -> [AttentionShape<'_>; 4] {
    [
        shape,
        AttentionShape { window: Some(5), ..shape },
        AttentionShape { softcap: Some(0.4), ..shape },
        AttentionShape { window: Some(67), softcap: Some(0.7), scale: 0.9, ..shape },
    ]
}

/// Spans of sequences of `lengths` tokens after `shared` that all begin with, and the rows they take.
fn sharing(shared: usize, lengths: &[usize]) -> (Vec<Span>, usize) {
    let mut spans: Vec<Span> = (shared > 0).then(|| Span::whole(0..shared)).into_iter().collect();
    let mut tokens = shared;
    for len in lengths {
        spans.push(Span { prefix: 0..shared, ..Span::whole(tokens..tokens + len) });
        tokens += len;
    }
    (spans, tokens)
}

#[test]
fn attention_and_its_backward() {
    // Tokens of a common beginning, and of each sequence by itself.
    let cases: [(usize, &[usize], usize, usize, usize); 9] = [
        (0, &[1], 1, 1, 2),
        (0, &[3, 1, 70], 4, 2, 6),
        (0, &[130], 9, 3, 64),
        (0, &[64, 65, 2], 6, 1, 17),
        (1, &[1, 2], 2, 2, 2),
        (15, &[3, 1, 70], 4, 2, 6),
        (70, &[130, 1, 64], 6, 2, 17),
        (70, &[130, 1, 64], 6, 2, 32),
        (3, &[65], 4, 4, 16),
    ];
    for (shared, lengths, heads, kv_heads, head_dim) in cases {
        let (spans, tokens) = sharing(shared, lengths);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let plain =
            AttentionShape { heads, kv_heads, head_dim, scale, softcap: None, window: None, spans: &spans };
        for shape in attention_kinds(plain) {
            let (window, softcap) = (shape.window, shape.softcap);
            let what = format!("{shared} {lengths:?} {heads}/{kv_heads}x{head_dim} {window:?} {softcap:?}");
            check(&format!("attention {what}"), 2e-5, |backend| {
                let (width, kv_width) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
                let (q, k, v) = (noise(1, width), noise(2, kv_width), noise(3, kv_width));
                let (mut out, mut logsumexp) = (nines(width), nines(tokens * heads));
                backend.attention(&mut out, &mut logsumexp, &q, &k, &v, &shape);
                let (mut dq, mut dk, mut dv) = (nines(width), nines(kv_width), nines(kv_width));
                let gradient = AttentionGradient { dq: &mut dq, dk: &mut dk, dv: &mut dv };
                let saved = AttentionSaved { q: &q, k: &k, v: &v, out: &out, logsumexp: &logsumexp };
                backend.attention_backward(gradient, &noise(4, width), &saved, &shape, &mut Vec::new());
                vec![out, logsumexp, dq, dk, dv]
            });
        }
    }
}

#[test]
fn attention_over_a_cache() {
    let spans = [
        Span { queries: 0..1, keys: 0..5, prefix: 0..0 },
        Span { queries: 1..71, keys: 10..100, prefix: 0..0 },
        Span { queries: 71..72, keys: 100..101, prefix: 0..0 },
    ];
    let plain = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        scale: 0.4,
        softcap: None,
        window: None,
        spans: &spans,
    };
    for shape in attention_kinds(plain) {
        check(&format!("cached attention {:?}", shape.window), 1e-5, |backend| {
            let (q, k, v) = (noise(1, 72 * 24), noise(2, 120 * 12), noise(3, 120 * 12));
            let (mut out, mut logsumexp) = (nines(72 * 24), nines(72 * 4));
            backend.attention(&mut out, &mut logsumexp, &q, &k, &v, &shape);
            vec![out, logsumexp]
        });
    }
}

#[test]
fn window_hides_what_lies_before_it() {
    let spans = [Span::whole(0..70)];
    let shape = |window| AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        scale: 0.5,
        softcap: None,
        window,
        spans: &spans,
    };
    let (q, k) = (noise(1, 70 * 8), noise(2, 70 * 4));
    for backend in [&Reference::EXACT as &dyn Backend, &Cpu::new(2).unwrap()] {
        let run = |window, v: &Buffer| {
            let (mut out, mut logsumexp) = (nines(70 * 8), nines(70 * 2));
            backend.attention(&mut out, &mut logsumexp, &q, &k, v, &shape(window));
            out
        };
        let v = noise(3, 70 * 4);
        let mut changed = v.clone();
        changed[30 * 4] += 1.0;
        let (before, after) = (run(Some(7), &v), run(Some(7), &changed));
        for row in 0..70 {
            let same = before[row * 8..(row + 1) * 8] == after[row * 8..(row + 1) * 8];
            assert_eq!(same, !(30..37).contains(&row), "row {row}");
        }
        assert_eq!(run(Some(70), &v), run(None, &v));
    }
}

#[test]
fn embedding_and_cross_entropy() {
    for (rows, vocabulary, c) in [(1, 3, 2), (40, 1000, 33), (5, 97, 64)] {
        let capped = LogitMap { scale: 0.6, softcap: Some(0.8) };
        let maps = [LogitMap::IDENTITY, LogitMap { scale: 0.3, softcap: None }, capped, LogitMap::IDENTITY];
        for ((encoding, head), map) in encodings(vocabulary, c).into_iter().zip(maps) {
            check(&format!("cross-entropy {rows}x{vocabulary}x{c} {encoding} {map:?}"), 1e-5, |backend| {
                let targets: Vec<u32> = (0..rows).map(|row| (row * 37 % vocabulary) as u32).collect();
                let mut hidden = nines(rows * c);
                backend.embed(&mut hidden, &head, &targets);
                // Small logits, or the target's would stand out so far that its loss is all rounding.
                hidden.iter_mut().for_each(|value| *value *= 0.1);
                let (mut nll, mut again) = (vec![9.0; rows], vec![9.0; rows]);
                let mut dhidden = nines(rows * c);
                let gradient = Some((&mut dhidden, 0.3));
                backend.cross_entropy(&mut nll, gradient, &hidden, &targets, &head, map, &mut Vec::new());
                backend.cross_entropy(&mut again, None, &hidden, &targets, &head, map, &mut Vec::new());
                assert_eq!(nll, again);
                vec![hidden, nll.iter().map(|nll| *nll as f32).collect(), dhidden]
            });
        }
    }
}
