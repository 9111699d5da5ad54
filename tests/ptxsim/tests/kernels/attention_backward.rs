//! `attention_backward.cu` against plain loops in f64, and the list of key tiles its grid is made of.

use std::cmp::Reverse;

use ptxsim::{Arg, Counts, Device, Fault, FaultKind, Launch, Module, Order};

use super::attention::{
    FACTOR_ERROR, Inputs, Shape, Span, assert_within, bits, dot, expected, planted, query_tiles, sharing,
    useful_products,
};
use crate::harness::{
    Random, Tolerance, assert_close, download, download_bf16, kernels, round_bf16, round_bf16s, upload,
    upload_bf16,
};

/// Rows of a key tile.
const KEYS: usize = 64;

/// What the grid of the keys' gradients is made of.
pub(super) struct KeyLists {
    /// (first row, rows, visits from, visits to, slot or -1), those that most queries visit first.
    pub(super) tiles: Vec<[i32; 5]>,
    /// (first query row, queries, offset, 0)
    pub(super) visits: Vec<[i32; 4]>,
    /// (first row, rows, first slot, slots)
    pub(super) sums: Vec<[i32; 4]>,
    /// Partial sums to make room for: (slots, kv_heads, 2, 64, D) f32.
    pub(super) slots: usize,
}

/// Tiles that more than `most` queries visit are cut; `None`: those that would keep the others waiting, at
/// most 128 slots.
pub(super) fn key_lists(spans: &[Span], most: Option<usize>) -> KeyLists {
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
                let queries: usize = visits.iter().map(|visit| visit[1] as usize).sum();
                tiles.push((queries, row, KEYS.min(cut[1] - row), visits));
            }
        }
    }
    tiles.sort_by_key(|&(queries, ..)| Reverse(queries));
    let all: usize = tiles.iter().map(|&(queries, ..)| queries).sum();
    let most = most.unwrap_or_else(|| (all / 64).next_multiple_of(64).max(512));
    let mut lists = KeyLists { tiles: Vec::new(), visits: Vec::new(), sums: Vec::new(), slots: 0 };
    for (queries, row, rows, visits) in tiles {
        let (row, rows, parts) = (row as i32, rows as i32, cut(&visits, most));
        if queries > most {
            lists.sums.push([row, rows, lists.slots as i32, parts.len() as i32]);
        }
        for part in parts {
            let from = lists.visits.len() as i32;
            lists.visits.extend(part);
            let slot = if queries > most { lists.slots as i32 } else { -1 };
            lists.tiles.push([row, rows, from, lists.visits.len() as i32, slot]);
            lists.slots += usize::from(queries > most);
        }
    }
    lists
}

/// Visits in parts of `most` queries.
fn cut(visits: &[[i32; 4]], most: usize) -> Vec<Vec<[i32; 4]>> {
    let (mut parts, mut room) = (vec![Vec::new()], most as i32);
    for &[mut row, mut queries, mut offset, _] in visits {
        while queries > 0 {
            if room == 0 {
                parts.push(Vec::new());
                room = most as i32;
            }
            let taken = queries.min(room);
            parts.last_mut().expect("one from the beginning").push([row, taken, offset, 0]);
            (row, queries, offset, room) = (row + taken, queries - taken, offset + taken, room - taken);
        }
    }
    parts
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

/// `dout · v` and delta are below 64 and the slope of a cap is right to 2^-22: how far their combination is
/// off.
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

/// What the kernels made, and the counts of those of queries and of keys.
struct Outcome {
    gradients: [Vec<f32>; 3],
    queries: Counts,
    keys: Counts,
}

/// One shape's values, and how many queries of a key tile are too many for one block.
struct Problem<'a> {
    shape: &'a Shape,
    inputs: Inputs,
    saved: Saved,
    most: Option<usize>,
}

impl<'a> Problem<'a> {
    fn new(shape: &'a Shape, most: Option<usize>) -> Self {
        let inputs = Inputs::new(shape);
        Self { shape, saved: Saved::new(shape, &inputs), inputs, most }
    }

    fn launch(&self, module: &Module, order: Order) -> Result<Outcome, Fault> {
        let Self { shape, inputs, saved, most } = self;
        let mut device = Device::new();
        device.order(order);
        let (dim, kv_heads) = (shape.dim as u32, shape.kv_heads as u32);
        let lengths = [inputs.q.len(), inputs.k.len(), inputs.k.len()];
        let gradients = lengths.map(|len| upload(&mut device, &vec![0x7fc0u16; len]));
        let [dq, dk, dv] = gradients.map(Arg::Pointer);
        let mut read: Vec<Arg> = [&saved.dout, &inputs.q, &inputs.k, &inputs.v]
            .map(|values| Arg::Pointer(upload_bf16(&mut device, values)))
            .into();
        read.extend([&saved.logsumexp, &saved.delta].map(|values| Arg::Pointer(upload(&mut device, values))));
        let stages = if dim <= 64 { 512 } else { 384 } * dim;
        let run = |device: &mut Device, entry: &str, grid, block, shared, arguments: &[&[Arg]]| {
            let size = Launch { grid, block: [block, 1, 1], shared };
            device.launch(module, entry, &size, &arguments.concat())
        };

        let tiles = query_tiles(&shape.spans);
        let grid = [tiles.len() as u32, shape.heads as u32, 1];
        let lists =
            [shape.device_spans(), tiles.concat()].map(|list| Arg::Pointer(upload(&mut device, &list)));
        let entry = format!("attention_backward_queries_{dim}");
        let queries =
            run(&mut device, &entry, grid, 128, stages, &[&[dq], &read, &lists, &shape.arguments()])?;

        let KeyLists { tiles, visits, sums, slots } = key_lists(&shape.spans, *most);
        let grid = [tiles.len() as u32, kv_heads, dim.div_ceil(128)];
        let partial = Arg::Pointer(device.allocate(slots * shape.kv_heads * 2 * KEYS * shape.dim * 4));
        let lists = [tiles.concat(), visits.concat()].map(|list| Arg::Pointer(upload(&mut device, &list)));
        let entry = format!("attention_backward_keys_{dim}");
        let arguments: [&[Arg]; 4] = [&[dk, dv, partial], &read, &lists, &shape.arguments()];
        let keys = run(&mut device, &entry, grid, 128, stages + 512, &arguments)?;
        if !sums.is_empty() {
            let grid = [sums.len() as u32, kv_heads, 2];
            let list = Arg::Pointer(upload(&mut device, &sums.concat()));
            let sizes = [Arg::I32(kv_heads as i32), Arg::I32(dim as i32), Arg::F32(shape.scale)];
            let arguments: [&[Arg]; 2] = [&[dk, dv, partial, list], &sizes];
            let counts = run(&mut device, "attention_backward_sums", grid, 256, 0, &arguments)?;
            assert_eq!(counts.store_efficiency(), 1.0);
        }
        let mut lengths = lengths.into_iter();
        let gradients =
            gradients.map(|address| download_bf16(&device, address, lengths.next().expect("three")));
        Ok(Outcome { gradients, queries, keys })
    }

    fn check(&self) {
        let run = |order| self.launch(kernels("attention_backward.cu"), order).expect("no fault");
        let (got, reverse) = (run(Order::Forward), run(Order::Reverse));
        let expected = gradients(self.shape, &self.inputs, &self.saved);
        for (name, i) in [("dq", 0), ("dk", 1), ("dv", 2)] {
            let name = format!("{name} of {:?}", self.shape);
            assert_within(&name, &got.gradients[i], &expected[i].values, &expected[i].bound);
            assert_eq!(bits(&got.gradients[i]), bits(&reverse.gradients[i]), "{name}, in reverse");
        }
    }
}

#[test]
fn every_kind_of_attention_over_ragged_spans() {
    for (shared, lengths) in [(0, &[1][..]), (0, &[3, 1, 70]), (15, &[3, 1, 70]), (70, &[66, 1, 16])] {
        for shape in Shape::plain(4, 2, 16, sharing(shared, lengths)).kinds() {
            Problem::new(&shape, None).check();
        }
    }
}

#[test]
fn every_head_dim() {
    for dim in [16, 32, 64, 96, 128, 256] {
        let [plain, .., mixed] = Shape::plain(3, 1, dim, sharing(21, &[70, 5])).kinds();
        Problem::new(&plain, None).check();
        Problem::new(&Shape { scale: plain.scale, ..mixed }, Some(64)).check();
    }
}

#[test]
fn a_prefix_may_be_a_part_of_a_span() {
    let spans = vec![Span::whole(0..100), Span { prefix: 10..90, ..Span::whole(100..130) }];
    Problem::new(&Shape::plain(2, 1, 16, spans), None).check();
}

#[test]
fn keys_that_many_see_are_cut_and_their_parts_added() {
    let shape = Shape::plain(4, 2, 16, sharing(70, &[66, 1, 40]));
    let lists = key_lists(&shape.spans, Some(50));
    // Of the prefix, 177 queries see the first 64 keys, 113 the other 6; 66 those of the next span, 2 its
    // last two.
    assert_eq!(lists.sums, [[0, 64, 0, 4], [64, 6, 4, 3], [70, 64, 7, 2]]);
    assert_eq!((lists.tiles.len(), lists.slots), (4 + 3 + 2 + 3, 9));
    for shape in shape.kinds() {
        Problem::new(&shape, Some(50)).check();
    }
    let prompt = key_lists(&sharing(128, &[63; 128]), None);
    assert_eq!((prompt.sums.len(), prompt.slots), (2, 2 * 16));
    assert_eq!(key_lists(&[Span::whole(0..8192)], None).slots, 0);
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
        if dim.is_multiple_of(16) {
            assert_eq!((counts.load_efficiency(), counts.store_efficiency() > 0.9), (1.0, t * heads >= 8));
        }
    }
}

#[test]
fn memory_is_met_in_whole_sectors_and_without_bank_conflicts() {
    for dim in [16, 32, 64, 96, 128, 256] {
        let shape = Shape::plain(1, 1, dim, vec![Span::whole(0..192)]);
        let problem = Problem::new(&shape, None);
        let counts = problem.launch(kernels("attention_backward.cu"), Order::Forward).unwrap();
        // Scores are made twice where D is cut in two.
        let factors = if dim > 128 { 6 } else { 4 };
        for (counts, factors) in [(counts.queries, 3), (counts.keys, factors)] {
            assert_eq!(counts.bank_conflicts, 0, "D = {dim}");
            // Indices and what is saved of queries are read by several lanes together.
            assert!(counts.load_efficiency() >= 1.0, "D = {dim}: {}", counts.load_efficiency());
            assert_eq!(counts.store_efficiency(), 1.0, "D = {dim}");
            // As in the forward: the diagonal is cut 16 by 16.
            let useful = useful_products(&shape, factors);
            assert_eq!(counts.mma as f64, useful * (78.0 * 256.0) / (193.0 * 96.0), "D = {dim}");
            let instructions = counts.warp_instructions;
            assert!(instructions < counts.mma * 15 + 15_000, "D = {dim}: {instructions}");
        }
    }
}

#[test]
fn mistakes_are_reported() {
    let shape = Shape::plain(1, 1, 16, vec![Span::whole(0..130)]);
    let problem = Problem::new(&shape, None);
    let fault = |from: &str, to: &str| {
        let module = planted("attention_backward.cu", from, to);
        problem.launch(module, Order::Forward).err().map(|fault| fault.kind)
    };
    for then in ["        if (at == begin)", "        if (head == head_begin"] {
        let here = format!("        wait_for_copies<0>();\n        __syncthreads();\n{then}");
        let unwaited = fault(&here, &here.replace("wait_for_copies<0>();", "wait_for_copies<1>();"));
        assert!(matches!(unwaited, Some(FaultKind::PendingCopy | FaultKind::SharedRace)), "{unwaited:?}");
        let unmet = fault(&here, &here.replace("__syncthreads();", ""));
        assert!(matches!(unmet, Some(FaultKind::UninitialisedShared | FaultKind::SharedRace)), "{unmet:?}");
    }
    let next = "copy_queries(stage ^ 1, head, visit, base)";
    let overwritten = fault(next, &next.replace("stage ^ 1", "stage"));
    assert!(matches!(overwritten, Some(FaultKind::PendingCopy | FaultKind::SharedRace)), "{overwritten:?}");
}
