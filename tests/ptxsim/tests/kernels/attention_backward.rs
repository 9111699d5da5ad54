//! `attention_backward.cu` against plain loops in f64, and the list of key tiles its grid is made of.

use std::cmp::Reverse;

use ptxsim::{Arg, Counts, Device, Fault, FaultKind, Launch, Module, Order};

use super::attention::{
    FACTOR_ERROR, Inputs, Shape, Span, assert_within, bits, dot, expected, query_tiles, sharing,
    useful_products,
};
use crate::harness::{
    Random, Tolerance, assert_close, download, download_bf16, kernels, planted, round_bf16, round_bf16s,
    upload, upload_bf16,
};

/// Rows of a key tile.
const KEYS: usize = 64;

/// Key tiles `(first row, rows, visits from, visits to)`, those that most queries visit first, and visits
/// `(first query row, queries, offset, 0)`.
pub(super) fn key_tiles(spans: &[Span]) -> (Vec<[i32; 4]>, Vec<[i32; 4]>) {
    let mut tiles = Vec::new();
    for span in spans {
        // No tile lies across the end of a prefix.
        let edges = spans.iter().flat_map(|span| [span.prefix.start, span.prefix.end]);
        let mut cuts: Vec<usize> = edges.filter(|edge| span.keys.contains(edge)).collect();
        cuts.extend([span.keys.start, span.keys.end]);
        cuts.sort_unstable();
        for cut in cuts.windows(2) {
            for row in (cut[0]..cut[1]).step_by(KEYS) {
                let visits: Vec<[i32; 4]> = spans.iter().filter_map(|span| visit(span, row)).collect();
                tiles.push((row, KEYS.min(cut[1] - row), visits));
            }
        }
    }
    tiles.sort_by_key(|(_, _, visits)| Reverse(visits.iter().map(|visit| visit[1]).sum::<i32>()));
    let mut all = Vec::new();
    let tiles = tiles.into_iter().map(|(row, rows, visits)| {
        let from = all.len() as i32;
        all.extend(visits);
        [row as i32, rows as i32, from, all.len() as i32]
    });
    (tiles.collect(), all)
}

/// The queries of a span that see the key at `row`, and with it any of its tile.
fn visit(span: &Span, row: usize) -> Option<[i32; 4]> {
    let position = if span.prefix.contains(&row) {
        row - span.prefix.start
    } else if span.keys.contains(&row) {
        span.prefix.len() + row - span.keys.start
    } else {
        return None;
    };
    let first = position.saturating_sub(span.past());
    let queries = span.queries.len().checked_sub(first).filter(|&queries| queries > 0)?;
    Some([(span.queries.start + first) as i32, queries as i32, (span.past() + first - position) as i32, 0])
}

/// What the backward reads besides q, k and v, as the device has it.
struct Saved {
    dout: Vec<f32>,
    logsumexp: Vec<f32>,
    delta: Vec<f32>,
}

impl Saved {
    fn new(shape: &Shape, inputs: &Inputs) -> Self {
        let forward = expected(shape, inputs);
        let out: Vec<f32> = forward.out.iter().map(|&value| round_bf16(value as f32)).collect();
        let dout = round_bf16s(&Random::new(2).normals(out.len()));
        let delta =
            out.chunks(shape.dim).zip(dout.chunks(shape.dim)).map(|(out, dout)| dot(out, dout) as f32);
        let logsumexp = forward.logsumexp.iter().map(|&value| value as f32).collect();
        Self { delta: delta.collect(), logsumexp, dout }
    }
}

/// A gradient and how far each of its values may be off.
struct Gradient {
    values: Vec<f64>,
    bound: Vec<f64>,
}

impl Gradient {
    fn new(len: usize) -> Self {
        Self { values: vec![0.0; len], bound: vec![0.0; len] }
    }

    fn add(&mut self, at: usize, term: f64, bound: f64) {
        self.values[at] += term;
        self.bound[at] += bound;
    }

    /// One more rounding, that of the sum.
    fn rounded(mut self) -> Self {
        self.bound.iter_mut().zip(&self.values).for_each(|(bound, value)| *bound += value.abs() / 256.0);
        self
    }
}

/// `dout · v` and delta are below 64 and the slope of a cap is right to 2^-22: how far their combination is off.
const SLOPE_ERROR: f64 = 1.0 / 32768.0;

fn gradients(shape: &Shape, inputs: &Inputs, saved: &Saved) -> [Gradient; 3] {
    let dim = shape.dim;
    let Inputs { q, k, v } = inputs;
    let (mut dq, mut dk, mut dv) = (Gradient::new(q.len()), Gradient::new(k.len()), Gradient::new(k.len()));
    shape.each_query(|row, head, query, keys| {
        let (queries, dout) = (&q[query..query + dim], &saved.dout[query..query + dim]);
        let logsumexp = f64::from(saved.logsumexp[row * shape.heads + head]);
        let delta = f64::from(saved.delta[row * shape.heads + head]);
        let scale = f64::from(shape.scale);
        for &key in keys {
            let score = shape.score(queries, &k[key..key + dim]);
            let slope =
                if shape.softcap > 0.0 { 1.0 - (score / f64::from(shape.softcap)).powi(2) } else { 1.0 };
            let probability = (score - logsumexp).exp();
            let dscore = scale * probability * (dot(dout, &v[key..key + dim]) - delta) * slope;
            let off = FACTOR_ERROR * dscore.abs() + SLOPE_ERROR * scale * probability;
            for d in 0..dim {
                let (q, k, dout) = (f64::from(queries[d]), f64::from(k[key + d]), f64::from(dout[d]));
                dq.add(query + d, dscore * k, off * k.abs());
                dk.add(key + d, dscore * q, off * q.abs());
                dv.add(key + d, probability * dout, FACTOR_ERROR * probability * dout.abs());
            }
        }
    });
    [dq.rounded(), dk.rounded(), dv.rounded()]
}

/// What the kernels made, and the counts of both.
struct Outcome {
    gradients: [Vec<f32>; 3],
    queries: Counts,
    keys: Counts,
}

fn launch(
    module: &Module,
    shape: &Shape,
    inputs: &Inputs,
    saved: &Saved,
    order: Order,
) -> Result<Outcome, Fault> {
    let mut device = Device::new();
    device.order(order);
    let [dq, dk, dv] = [inputs.q.len(), inputs.k.len(), inputs.k.len()]
        .map(|len| upload(&mut device, &vec![0x7fc0u16; len]));
    let mut read: Vec<Arg> = [&saved.dout, &inputs.q, &inputs.k, &inputs.v]
        .map(|values| Arg::Pointer(upload_bf16(&mut device, values)))
        .into();
    read.extend([&saved.logsumexp, &saved.delta].map(|values| Arg::Pointer(upload(&mut device, values))));
    let stages = if shape.dim <= 64 { 512 } else { 384 } * shape.dim as u32;

    let tiles = query_tiles(&shape.spans);
    let grid = [tiles.len() as u32, shape.heads as u32, 1];
    let lists = [shape.device_spans(), tiles.concat()].map(|list| Arg::Pointer(upload(&mut device, &list)));
    let arguments = [&[Arg::Pointer(dq)][..], &read, &lists, &shape.arguments()].concat();
    let name = format!("attention_backward_queries_{}", shape.dim);
    let size = Launch { grid, block: [128, 1, 1], shared: stages };
    let queries = device.launch(module, &name, &size, &arguments)?;

    let (tiles, visits) = key_tiles(&shape.spans);
    let grid = [tiles.len() as u32, shape.kv_heads as u32, shape.dim.div_ceil(128) as u32];
    let lists = [tiles.concat(), visits.concat()].map(|list| Arg::Pointer(upload(&mut device, &list)));
    let arguments = [&[Arg::Pointer(dk), Arg::Pointer(dv)][..], &read, &lists, &shape.arguments()].concat();
    let name = format!("attention_backward_keys_{}", shape.dim);
    let size = Launch { grid, block: [128, 1, 1], shared: stages + 512 };
    let keys = device.launch(module, &name, &size, &arguments)?;

    let gradients = [(dq, inputs.q.len()), (dk, inputs.k.len()), (dv, inputs.k.len())]
        .map(|(address, len)| download_bf16(&device, address, len));
    Ok(Outcome { gradients, queries, keys })
}

fn check(shape: &Shape) {
    let inputs = Inputs::new(shape);
    let saved = Saved::new(shape, &inputs);
    let run = |order| launch(kernels("attention_backward.cu"), shape, &inputs, &saved, order).unwrap();
    let (got, reverse) = (run(Order::Forward), run(Order::Reverse));
    let expected = gradients(shape, &inputs, &saved);
    for (name, i) in [("dq", 0), ("dk", 1), ("dv", 2)] {
        let name = format!("{name} of {shape:?}");
        assert_within(&name, &got.gradients[i], &expected[i].values, &expected[i].bound);
        assert_eq!(bits(&got.gradients[i]), bits(&reverse.gradients[i]), "{name}, warps in reverse");
    }
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
fn a_prefix_may_be_a_part_of_a_span() {
    let spans = vec![Span::whole(0..100), Span { prefix: 10..90, ..Span::whole(100..130) }];
    check(&Shape::plain(2, 1, 16, spans));
}

#[test]
fn delta_is_the_product_of_the_output_and_its_gradient() {
    for (t, heads, dim) in [(1, 1, 16), (37, 3, 64), (20, 2, 96), (9, 5, 256), (70, 1, 8)] {
        let len = t * heads * dim;
        let (out, dout) =
            (round_bf16s(&Random::new(1).normals(len)), round_bf16s(&Random::new(2).normals(len)));
        let expected: Vec<f64> = out.chunks(dim).zip(dout.chunks(dim)).map(|(a, b)| dot(a, b)).collect();
        let mut device = Device::new();
        let delta = upload(&mut device, &vec![f32::NAN; t * heads]);
        let arguments = [
            Arg::Pointer(delta),
            Arg::Pointer(upload_bf16(&mut device, &out)),
            Arg::Pointer(upload_bf16(&mut device, &dout)),
            Arg::I32(t as i32),
            Arg::I32(heads as i32),
            Arg::I32(dim as i32),
        ];
        let size = Launch { grid: [(t * heads).div_ceil(64) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        let counts =
            device.launch(kernels("attention_backward.cu"), "attention_delta", &size, &arguments).unwrap();
        // A lane adds up to 64 products of up to 16 each.
        let tolerance = Tolerance::f32(1.0, 64.0 * 256.0 / f64::from(1 << 24));
        assert_close("delta", &download(&device, delta, t * heads), &expected, tolerance);
        if dim % 16 == 0 {
            assert_eq!((counts.load_efficiency(), counts.store_efficiency() > 0.9), (1.0, t * heads >= 8));
        }
    }
}
