//! `attention.cu` against plain loops in f64, and the list of query tiles its grid is made of.

use std::ops::Range;

use ptxsim::{Arg, Counts, Device, Fault, FaultKind, Launch, Module, Order};

use crate::harness::{
    Random, Tolerance, assert_close, compile, download, download_bf16, kernels, round_bf16s, source, upload,
    upload_bf16,
};

/// Queries of a tile.
pub(super) const QUERIES: usize = 64;

/// As the engine's: queries are the last positions of prefix and keys together.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) prefix: Range<usize>,
}

impl Span {
    pub(super) fn whole(rows: Range<usize>) -> Self {
        Self { queries: rows.clone(), keys: rows, prefix: 0..0 }
    }

    /// Positions before that of the first query.
    pub(super) fn past(&self) -> usize {
        self.prefix.len() + self.keys.len() - self.queries.len()
    }

    fn key_row(&self, position: usize) -> usize {
        match position.checked_sub(self.prefix.len()) {
            None => self.prefix.start + position,
            Some(own) => self.keys.start + own,
        }
    }

    /// As `struct Span` of `common.cuh`.
    fn device(&self) -> [i32; 6] {
        [&self.queries, &self.keys, &self.prefix]
            .map(|rows| [rows.start as i32, rows.end as i32])
            .concat()
            .try_into()
            .expect("three pairs")
    }
}

/// `(span, first query of the tile within the span)`, those with the most keys first.
pub(super) fn query_tiles(spans: &[Span]) -> Vec<[i32; 2]> {
    let mut tiles: Vec<(usize, usize)> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        tiles.extend((0..span.queries.len()).step_by(QUERIES).map(|first| (index, first)));
    }
    tiles.sort_by_key(|&(span, first)| std::cmp::Reverse(spans[span].past() + first));
    tiles.iter().map(|&(span, first)| [span as i32, first as i32]).collect()
}

/// Parts `(span, first row, first position, keys)` for spans of few queries, and joins `(span, first row,
/// first part, parts)`. Rows are those of `group` heads a query.
pub(super) fn parts(spans: &[Span], group: usize, window: usize) -> (Vec<[i32; 4]>, Vec<[i32; 4]>) {
    let (mut parts, mut joins) = (Vec::new(), Vec::new());
    for (index, span) in spans.iter().enumerate() {
        let rows = span.queries.len() * group;
        for row in (0..rows).step_by(16) {
            let end = span.past() + (rows.min(row + 16) - 1) / group + 1;
            let seen = span.past() + row / group + 1;
            let begin = if window > 0 { seen.saturating_sub(window) } else { 0 };
            let keys = (end - begin).div_ceil(64).next_multiple_of(16).max(64);
            let first_part = parts.len();
            let part = |first: usize| [index, row, first, keys.min(end - first)].map(|number| number as i32);
            parts.extend((begin..end).step_by(keys).map(part));
            joins.push([index, row, first_part, parts.len() - first_part].map(|number| number as i32));
        }
    }
    (parts, joins)
}

/// Spans of `lengths` rows that all see `shared` rows before them, whose own span is the first.
pub(super) fn sharing(shared: usize, lengths: &[usize]) -> Vec<Span> {
    let mut spans: Vec<Span> = (shared > 0).then(|| Span::whole(0..shared)).into_iter().collect();
    let mut start = shared;
    for len in lengths {
        spans.push(Span { prefix: 0..shared, ..Span::whole(start..start + len) });
        start += len;
    }
    spans
}

#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) window: usize,
    pub(super) spans: Vec<Span>,
}

impl Shape {
    pub(super) fn plain(heads: usize, kv_heads: usize, dim: usize, spans: Vec<Span>) -> Self {
        Self { heads, kv_heads, dim, scale: 1.0 / (dim as f32).sqrt(), softcap: 0.0, window: 0, spans }
    }

    /// The same without and with a window, a cap, and both with another scale.
    pub(super) fn kinds(self) -> [Self; 4] {
        [
            self.clone(),
            Self { window: 5, ..self.clone() },
            Self { softcap: 0.7, ..self.clone() },
            Self { window: 67, softcap: 5.0, scale: 0.9, ..self },
        ]
    }

    pub(super) fn query_rows(&self) -> usize {
        self.spans.iter().map(|span| span.queries.end).max().expect("a span")
    }

    pub(super) fn key_rows(&self) -> usize {
        self.spans.iter().map(|span| span.keys.end).max().expect("a span")
    }

    /// The sizes and numbers that end every entry's arguments.
    pub(super) fn arguments(&self) -> [Arg; 5] {
        [
            Arg::I32(self.heads as i32),
            Arg::I32(self.kv_heads as i32),
            Arg::F32(self.scale),
            Arg::F32(self.softcap),
            Arg::I32(self.window as i32),
        ]
    }

    /// The bytes of the spans as the device reads them.
    pub(super) fn device_spans(&self) -> Vec<i32> {
        self.spans.iter().flat_map(Span::device).collect()
    }

    /// Visits each query row and head: the row, the head, where its values begin in q, and where the values
    /// of each key it sees begin in k.
    pub(super) fn each_query(&self, mut visit: impl FnMut(usize, usize, usize, &[usize])) {
        for span in &self.spans {
            for (i, row) in span.queries.clone().enumerate() {
                let end = span.past() + i + 1;
                let begin = if self.window > 0 { end.saturating_sub(self.window) } else { 0 };
                for head in 0..self.heads {
                    let kv_head = head / (self.heads / self.kv_heads);
                    let keys: Vec<usize> = (begin..end)
                        .map(|position| (span.key_row(position) * self.kv_heads + kv_head) * self.dim)
                        .collect();
                    visit(row, head, (row * self.heads + head) * self.dim, &keys);
                }
            }
        }
    }

    /// The score of a query and a key.
    pub(super) fn score(&self, query: &[f32], key: &[f32]) -> f64 {
        let score = dot(query, key) * f64::from(self.scale);
        let cap = f64::from(self.softcap);
        if self.softcap > 0.0 { cap * (score / cap).tanh() } else { score }
    }
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Values as the device has them.
pub(super) struct Inputs {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

impl Inputs {
    pub(super) fn new(shape: &Shape) -> Self {
        let mut random = Random::new(1);
        let keys = shape.key_rows() * shape.kv_heads * shape.dim;
        let mut values = |count| round_bf16s(&random.normals(count));
        let q =
            values(shape.query_rows() * shape.heads * shape.dim).iter().map(|value| 2.0 * value).collect();
        Self { q, k: values(keys), v: values(keys) }
    }
}

/// The output, the log-sum-exp, and how far each output may be off.
pub(super) struct Expected {
    pub(super) out: Vec<f64>,
    pub(super) logsumexp: Vec<f64>,
    pub(super) bound: Vec<f64>,
}

/// How far a factor of a product on tensor cores is off: its rounding to bf16, and that of the score behind
/// it, which is below 32 and summed in f32.
pub(super) const FACTOR_ERROR: f64 = 1.0 / 256.0 + 1.0 / 8192.0;

pub(super) fn expected(shape: &Shape, inputs: &Inputs) -> Expected {
    let (rows, dim) = (shape.query_rows(), shape.dim);
    let mut out = vec![f64::NAN; rows * shape.heads * dim];
    let mut bound = out.clone();
    let mut logsumexp = vec![f64::NAN; rows * shape.heads];
    shape.each_query(|row, head, query, keys| {
        let q = &inputs.q[query..query + dim];
        let scores: Vec<f64> = keys.iter().map(|&key| shape.score(q, &inputs.k[key..key + dim])).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        logsumexp[row * shape.heads + head] = most + sum.ln();
        for d in 0..dim {
            let terms = scores
                .iter()
                .zip(keys)
                .map(|(score, key)| (score - most).exp() / sum * f64::from(inputs.v[key + d]));
            let (total, size) =
                terms.fold((0.0, 0.0), |(total, size), term| (total + term, size + term.abs()));
            out[query + d] = total;
            bound[query + d] = total.abs() / 256.0 + FACTOR_ERROR * size;
        }
    });
    Expected { out, logsumexp, bound }
}

/// Each element within its own bound. Elements of no span must be as they were.
#[track_caller]
pub(super) fn assert_within(name: &str, got: &[f32], expected: &[f64], bound: &[f64]) {
    let in_bounds = |value: f64, bound: f64| if bound.is_nan() { value } else { value / bound.max(1e-30) };
    let got: Vec<f32> =
        got.iter().zip(bound).map(|(&got, &bound)| in_bounds(f64::from(got), bound) as f32).collect();
    let expected: Vec<f64> =
        expected.iter().zip(bound).map(|(&value, &bound)| in_bounds(value, bound)).collect();
    // The quotients are rounded to f32.
    assert_close(name, &got, &expected, Tolerance { relative: 1e-7, absolute: 1.0 });
}

struct Outcome {
    out: Vec<f32>,
    logsumexp: Vec<f32>,
    counts: Counts,
}

fn launch(module: &Module, shape: &Shape, inputs: &Inputs, order: Order) -> Result<Outcome, Fault> {
    let mut device = Device::new();
    device.order(order);
    let rows = shape.query_rows();
    let width = rows * shape.heads * shape.dim;
    let out = upload(&mut device, &vec![0x7fc0u16; width]);
    let logsumexp = upload(&mut device, &vec![f32::NAN; rows * shape.heads]);
    let tiles = query_tiles(&shape.spans);
    let launch = Launch {
        grid: [tiles.len() as u32, shape.heads as u32, 1],
        block: [128, 1, 1],
        shared: 256 * shape.dim as u32,
    };
    let mut arguments: Vec<Arg> = vec![Arg::Pointer(out), Arg::Pointer(logsumexp)];
    for values in [&inputs.q, &inputs.k, &inputs.v] {
        arguments.push(Arg::Pointer(upload_bf16(&mut device, values)));
    }
    arguments.push(Arg::Pointer(upload(&mut device, &shape.device_spans())));
    arguments.push(Arg::Pointer(upload(&mut device, &tiles.concat())));
    arguments.extend(shape.arguments());
    let counts = device.launch(module, &format!("attention_{}", shape.dim), &launch, &arguments)?;
    let out = download_bf16(&device, out, width);
    Ok(Outcome { out, logsumexp: download(&device, logsumexp, rows * shape.heads), counts })
}

/// The same by parts: the counts are those of the parts.
fn launch_parts(module: &Module, shape: &Shape, inputs: &Inputs, order: Order) -> Result<Outcome, Fault> {
    let mut device = Device::new();
    device.order(order);
    let (rows, group) = (shape.query_rows(), shape.heads / shape.kv_heads);
    let width = rows * shape.heads * shape.dim;
    let out = upload(&mut device, &vec![0x7fc0u16; width]);
    let logsumexp = upload(&mut device, &vec![f32::NAN; rows * shape.heads]);
    let spans = Arg::Pointer(upload(&mut device, &shape.device_spans()));
    let (parts, joins) = parts(&shape.spans, group, shape.window);
    let (count, kv_heads) = (parts.len() as u32, shape.kv_heads as u32);
    let partial = Arg::Pointer(device.allocate(parts.len() * shape.kv_heads * 16 * (shape.dim + 2) * 4));

    let size =
        Launch { grid: [count.div_ceil(4), kv_heads, 1], block: [128, 1, 1], shared: 256 * shape.dim as u32 };
    let mut arguments = vec![partial];
    for values in [&inputs.q, &inputs.k, &inputs.v] {
        arguments.push(Arg::Pointer(upload_bf16(&mut device, values)));
    }
    arguments.extend([spans, Arg::Pointer(upload(&mut device, &parts.concat())), Arg::I32(count as i32)]);
    arguments.extend(shape.arguments());
    let counts = device.launch(module, &format!("attention_parts_{}", shape.dim), &size, &arguments)?;

    let size = Launch { grid: [joins.len() as u32, kv_heads, 1], block: [128, 1, 1], shared: 0 };
    let joins = upload(&mut device, &joins.concat());
    let mut arguments = vec![Arg::Pointer(out), Arg::Pointer(logsumexp), partial, spans, Arg::Pointer(joins)];
    arguments
        .extend([count, shape.heads as u32, kv_heads, shape.dim as u32].map(|size| Arg::I32(size as i32)));
    device.launch(module, "attention_join", &size, &arguments)?;
    let out = download_bf16(&device, out, width);
    Ok(Outcome { out, logsumexp: download(&device, logsumexp, rows * shape.heads), counts })
}

fn check(shape: &Shape) {
    let inputs = Inputs::new(shape);
    let expected = expected(shape, &inputs);
    let name = format!("{shape:?}");
    for (way, launch) in [("whole", launch as fn(_, _, _, _) -> _), ("in parts", launch_parts)] {
        let run = |order| launch(kernels("attention.cu"), shape, &inputs, order).expect("no fault");
        let (got, reverse): (Outcome, Outcome) = (run(Order::Forward), run(Order::Reverse));
        assert_within(&format!("out of {name}, {way}"), &got.out, &expected.out, &expected.bound);
        // Scores below 32 with an error of some units in the last place.
        let tolerance = Tolerance::f32(2.0, 2e-5);
        assert_close(&format!("logsumexp of {name}, {way}"), &got.logsumexp, &expected.logsumexp, tolerance);
        assert_eq!(bits(&got.out), bits(&reverse.out), "out of {name}, {way}, in reverse");
        assert_eq!(bits(&got.logsumexp), bits(&reverse.logsumexp), "logsumexp of {name}, {way}, in reverse");
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_kind_of_attention_over_ragged_spans() {
    for (shared, lengths) in [(0, &[1][..]), (0, &[3, 1, 70]), (15, &[3, 1, 70]), (70, &[66, 1, 16])] {
        for shape in Shape::plain(4, 2, 16, sharing(shared, lengths)).kinds() {
            check(&shape);
        }
    }
}

#[test]
fn every_head_dim() {
    for dim in [16, 32, 64, 96, 128, 256] {
        let [plain, .., mixed] = Shape::plain(3, 1, dim, sharing(21, &[70, 5])).kinds();
        check(&plain);
        check(&Shape { scale: plain.scale, ..mixed });
    }
}

#[test]
fn queries_at_the_end_of_a_cache() {
    let spans = vec![
        Span { queries: 0..1, keys: 0..5, prefix: 0..0 },
        Span { queries: 1..71, keys: 10..100, prefix: 0..0 },
        Span { queries: 71..72, keys: 100..101, prefix: 0..0 },
        Span { queries: 72..73, keys: 101..400, prefix: 0..0 },
        Span { queries: 73..76, keys: 400..410, prefix: 3..90 },
    ];
    for shape in Shape::plain(2, 1, 32, spans).kinds() {
        check(&shape);
    }
}

/// Products on tensor cores that the pairs of queries and keys need at least, `factors` a pair, 2048
/// multiplications each.
pub(super) fn useful_products(shape: &Shape, factors: usize) -> f64 {
    let mut pairs = 0;
    shape.each_query(|_, _, _, keys| pairs += keys.len());
    (factors * pairs * shape.dim) as f64 / 2048.0
}

#[test]
fn memory_is_met_in_whole_sectors_and_without_bank_conflicts() {
    for dim in [16, 32, 64, 96, 128, 256] {
        let shape = Shape::plain(1, 1, dim, vec![Span::whole(0..192)]);
        let counts =
            launch(kernels("attention.cu"), &shape, &Inputs::new(&shape), Order::Forward).unwrap().counts;
        assert_eq!(counts.bank_conflicts, 0, "D = {dim}");
        // All but the spans, which the lanes of a warp read together.
        assert!(counts.load_efficiency() >= 1.0, "D = {dim}: {}", counts.load_efficiency());
        assert_eq!(counts.store_efficiency(), 1.0, "D = {dim}");
        // The diagonal is cut 16 by 16: of 192 keys and queries, 78 such squares, half of the twelve on it
        // wasted.
        assert_eq!(
            counts.mma as f64,
            useful_products(&shape, 2) * (78.0 * 256.0) / (193.0 * 96.0),
            "D = {dim}"
        );
        assert!(
            counts.warp_instructions < counts.mma * 14 + 15_000,
            "D = {dim}: {}",
            counts.warp_instructions
        );
    }
}

#[test]
fn parts_read_keys_once_for_all_heads_of_a_group() {
    let spans = vec![Span { queries: 0..1, keys: 0..256, prefix: 0..0 }];
    let shape = Shape::plain(4, 1, 64, spans);
    let counts =
        launch_parts(kernels("attention.cu"), &shape, &Inputs::new(&shape), Order::Forward).unwrap().counts;
    assert_eq!((counts.bank_conflicts, counts.barriers), (0, 0));
    // 256 keys and values of 128 bytes in sectors of 32; the queries and the lists are little beside them.
    let sectors = counts.global_load_sectors;
    assert!((2 * 256 * 4..2 * 256 * 4 * 11 / 10).contains(&sectors), "{sectors}");
    assert!(counts.store_efficiency() > 0.95, "{}", counts.store_efficiency());
}

#[test]
fn a_window_and_short_queries_leave_out_what_is_not_seen() {
    let mma = |window, spans| {
        let shape = Shape { window, ..Shape::plain(1, 1, 32, spans) };
        launch(kernels("attention.cu"), &shape, &Inputs::new(&shape), Order::Forward).unwrap().counts.mma
    };
    // Pieces of 16 keys and 16 queries: two products of 16 x 16 x 32 each, that is eight instructions.
    assert_eq!(mma(0, vec![Span { queries: 0..1, keys: 0..300, prefix: 0..0 }]), 19 * 8);
    assert_eq!(mma(20, vec![Span { queries: 0..1, keys: 0..300, prefix: 0..0 }]), 2 * 8);
    // The 12 warps' own piece, that before it, and where 17 keys back begin: the last of one further.
    assert_eq!(mma(17, vec![Span::whole(0..192)]), (12 + 11) * 8);
}

/// A file of attention kernels with a mistake planted, and only its entries of head dim 16: the others take
/// long to compile.
pub(super) fn planted(file: &str, from: &str, to: &str) -> &'static Module {
    let source = source(file);
    assert_eq!(source.matches(from).count(), 1, "`{from}` in `{file}`");
    compile(file, &format!("#define HEAD_DIM 16\n{}", source.replacen(from, to, 1)))
}

#[test]
fn mistakes_are_reported() {
    let shape = Shape::plain(1, 1, 16, vec![Span::whole(0..130)]);
    let inputs = Inputs::new(&shape);
    let fault = |from: &str, to: &str| {
        launch(planted("attention.cu", from, to), &shape, &inputs, Order::Forward)
            .err()
            .map(|fault| fault.kind)
    };
    let values_are_here =
        "        wait_for_copies<0>();\n        __syncthreads();\n        if (at + KEYS < end)";
    let without = |line: &str| values_are_here.replace(line, "");
    assert_eq!(fault(values_are_here, &without("        __syncthreads();\n")), Some(FaultKind::SharedRace));
    let unwaited = fault(values_are_here, &without("wait_for_copies<0>();"));
    assert!(matches!(unwaited, Some(FaultKind::PendingCopy | FaultKind::SharedRace)), "{unwaited:?}");
    assert!(fault("queries_end - row, QUERIES)", "queries_end - row + 1, QUERIES)").is_some());
}
