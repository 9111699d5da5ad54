//! Attention over spans: lists of tiles made here, tiles computed there.

use super::super::{AttentionGradient, AttentionSaved, AttentionShape, Buffer, Precision, Span};
use super::Cuda;
use std::cmp::Reverse;

use super::device::{Arg, DeviceBuffer, Launch};
use super::linear::int;

use Precision::{Exact, Rounded};

/// Queries a tile takes.
const QUERIES: usize = 64;
/// Keys a tile takes, at most.
const KEYS: usize = 64;

/// The entry points of each head dimension.
struct Kernels {
    head_dim: usize,
    forward: &'static str,
    queries: &'static str,
    keys: &'static str,
}

const fn of(head_dim: usize, [forward, queries, keys]: [&'static str; 3]) -> Kernels {
    Kernels { head_dim, forward, queries, keys }
}

const KERNELS: [Kernels; 6] = [
    of(16, ["attention_16", "attention_backward_queries_16", "attention_backward_keys_16"]),
    of(32, ["attention_32", "attention_backward_queries_32", "attention_backward_keys_32"]),
    of(64, ["attention_64", "attention_backward_queries_64", "attention_backward_keys_64"]),
    of(96, ["attention_96", "attention_backward_queries_96", "attention_backward_keys_96"]),
    of(128, ["attention_128", "attention_backward_queries_128", "attention_backward_keys_128"]),
    of(256, ["attention_256", "attention_backward_queries_256", "attention_backward_keys_256"]),
];

/// Those of the least head dimension that is not below; heads between are padded with zeros, which changes no score.
fn kernels(head_dim: usize) -> &'static Kernels {
    let kernels = KERNELS.iter().find(|kernels| kernels.head_dim >= head_dim);
    kernels.expect("BUG: models with larger heads are refused")
}

/// The largest head dimension that there are kernels for.
pub(super) const LARGEST_HEAD: usize = KERNELS[KERNELS.len() - 1].head_dim;

/// Heads as the kernels take them.
enum Heads {
    /// As they are.
    Own(Arg),
    /// Of another width.
    Padded { values: DeviceBuffer, rows: usize },
}

impl Heads {
    fn arg(&self) -> Arg {
        match self {
            Self::Own(at) => *at,
            Self::Padded { values, .. } => Arg::Pointer(values.at(Rounded)),
        }
    }
}

/// (span, first query within it) of each tile.
fn query_tiles(spans: &[Span]) -> Vec<[usize; 2]> {
    let of_span = |(index, span): (usize, &Span)| {
        (0..span.queries.len()).step_by(QUERIES).map(move |first| [index, first]).collect::<Vec<_>>()
    };
    spans.iter().enumerate().flat_map(of_span).collect()
}

/// What the grid of the keys' gradients is made of, as `attention_backward.cu` has it.
struct KeyLists {
    /// (first row, rows, visits from, visits to, slot or `WHOLE`) of each tile, those that most queries visit first.
    tiles: Vec<[usize; 5]>,
    /// (first row, queries, offset, 0): the queries of one span that see any key of a tile.
    visits: Vec<[usize; 4]>,
    /// (first row, rows, first slot, slots) of each tile that is cut.
    sums: Vec<[usize; 4]>,
    /// Partial sums to make room for.
    slots: usize,
}

/// The slot of a tile that is not cut: -1 on the device.
const WHOLE: usize = usize::MAX;

/// A tile that very many queries see, that of a prefix, is cut so that no block keeps the others waiting: into at most some
/// 128 parts in all.
fn key_lists(spans: &[Span]) -> KeyLists {
    let mut tiles = Vec::new();
    for span in spans {
        // No tile lies across the end of a prefix.
        let edges = spans.iter().flat_map(|span| [span.prefix.start, span.prefix.end]);
        let mut cuts: Vec<usize> = edges.filter(|edge| span.keys.contains(edge)).collect();
        cuts.extend([span.keys.start, span.keys.end]);
        cuts.sort_unstable();
        for cut in cuts.windows(2) {
            for row in (cut[0]..cut[1]).step_by(KEYS) {
                let visits: Vec<[usize; 4]> = spans.iter().filter_map(|span| visit(span, row)).collect();
                let queries: usize = visits.iter().map(|visit| visit[1]).sum();
                tiles.push((queries, row, KEYS.min(cut[1] - row), visits));
            }
        }
    }
    tiles.sort_by_key(|&(queries, ..)| Reverse(queries));
    let all: usize = tiles.iter().map(|&(queries, ..)| queries).sum();
    let most = (all / 64).next_multiple_of(64).max(512);
    let mut lists = KeyLists { tiles: Vec::new(), visits: Vec::new(), sums: Vec::new(), slots: 0 };
    for (queries, row, rows, visits) in tiles {
        let parts = cut(&visits, most);
        if queries > most {
            lists.sums.push([row, rows, lists.slots, parts.len()]);
        }
        for part in parts {
            let from = lists.visits.len();
            lists.visits.extend(part);
            let slot = if queries > most { lists.slots } else { WHOLE };
            lists.tiles.push([row, rows, from, lists.visits.len(), slot]);
            lists.slots += usize::from(queries > most);
        }
    }
    lists
}

/// Visits in parts of `most` queries.
fn cut(visits: &[[usize; 4]], most: usize) -> Vec<Vec<[usize; 4]>> {
    let (mut parts, mut part, mut room) = (Vec::new(), Vec::new(), most);
    for &[mut row, mut queries, mut offset, _] in visits {
        while queries > 0 {
            if room == 0 {
                parts.push(std::mem::take(&mut part));
                room = most;
            }
            let taken = queries.min(room);
            part.push([row, taken, offset, 0]);
            (row, queries, offset, room) = (row + taken, queries - taken, offset + taken, room - taken);
        }
    }
    parts.push(part);
    parts
}

/// The queries of a span that see the key at `row`, and with it any of its tile.
fn visit(span: &Span, row: usize) -> Option<[usize; 4]> {
    let position = if span.prefix.contains(&row) {
        row - span.prefix.start
    } else if span.keys.contains(&row) {
        span.prefix.len() + row - span.keys.start
    } else {
        return None;
    };
    let first = position.saturating_sub(span.past());
    let queries = span.queries.len().checked_sub(first).filter(|&queries| queries > 0)?;
    Some([span.queries.start + first, queries, span.past() + first - position, 0])
}

impl Cuda {
    /// `len` values at `at` in heads of `dim`, as heads of `wide`.
    fn heads(&self, at: Arg, len: usize, (dim, wide): (usize, usize)) -> Heads {
        let heads = self.room(at, len, (dim, wide));
        if let Heads::Padded { rows, .. } = heads {
            self.columns((heads.arg(), wide, 0), (at, dim, 0), (rows, dim));
        }
        heads
    }

    /// Where heads of `wide` are written, to go to `at` as `len` values in heads of `dim`.
    fn room(&self, at: Arg, len: usize, (dim, wide): (usize, usize)) -> Heads {
        if dim == wide {
            return Heads::Own(at);
        }
        let rows = len / dim;
        let values = DeviceBuffer::new(&self.device, rows * wide, Rounded);
        self.device.clear(values.at(Rounded), rows * wide * Rounded.bytes());
        Heads::Padded { values, rows }
    }

    /// Takes padded heads back to `at`.
    fn unpad(&self, at: Arg, heads: &Heads, (dim, wide): (usize, usize)) {
        if let Heads::Padded { rows, .. } = heads {
            self.columns((at, dim, 0), (heads.arg(), wide, 0), (*rows, dim));
        }
    }

    pub(super) fn attend(
        &self,
        out: &mut Buffer,
        logsumexp: &mut Buffer,
        (q, k, v): (&Buffer, &Buffer, &Buffer),
        shape: &AttentionShape<'_>,
    ) {
        let tiles = query_tiles(shape.spans);
        let (spans, list) = (self.spans(shape.spans), self.list(tiles.iter().flatten().copied()));
        let kernels = kernels(shape.head_dim);
        let dims = (shape.head_dim, kernels.head_dim);
        let lengths = [q.len(), k.len(), v.len()];
        let given = [q, k, v].map(|values| self.input(values, Rounded));
        let (out, logsumexp) = (self.output(out, Rounded), self.output(logsumexp, Exact));
        let [q, k, v] = [0, 1, 2].map(|i| self.heads(given[i].arg(), lengths[i], dims));
        let wide_out = self.room(out.arg(), lengths[0], dims);
        let args = [
            wide_out.arg(),
            logsumexp.arg(),
            q.arg(),
            k.arg(),
            v.arg(),
            spans.arg(),
            list.arg(),
            int(shape.heads),
            int(shape.kv_heads),
            Arg::F32(shape.scale),
            Arg::F32(shape.softcap.unwrap_or(0.0)),
            int(shape.window.unwrap_or(0)),
        ];
        let launch = Launch {
            grid: [tiles.len() as u32, shape.heads as u32, 1],
            block: 128,
            shared: (256 * kernels.head_dim) as u32,
        };
        self.start(kernels.forward, launch, &args);
        self.unpad(out.arg(), &wide_out, dims);
    }

    pub(super) fn attend_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
    ) {
        let AttentionGradient { dq, dk, dv } = gradient;
        let AttentionSaved { q, k, v, out, logsumexp } = *saved;
        let (dim, heads, t) = (shape.head_dim, shape.heads, dout.len() / (shape.heads * shape.head_dim));
        let kernels = kernels(dim);
        let (wide, dims) = (kernels.head_dim, (dim, kernels.head_dim));
        let lengths = [q.len(), k.len(), v.len(), out.len(), dout.len()];
        let given = [q, k, v, out, dout].map(|values| self.input(values, Rounded));
        let [q, k, v, out, dout] = [0, 1, 2, 3, 4].map(|i| self.heads(given[i].arg(), lengths[i], dims));
        let delta = DeviceBuffer::new(&self.device, t * heads, Exact);
        let delta = Arg::Pointer(delta.at(Exact));
        let args = [delta, out.arg(), dout.arg(), int(t), int(heads), int(wide)];
        self.launch("attention_delta", (t * heads).div_ceil(64), 256, &args);
        let logsumexp = self.input(logsumexp, Exact);
        let from = [dout.arg(), q.arg(), k.arg(), v.arg(), logsumexp.arg(), delta];
        let map = [
            int(heads),
            int(shape.kv_heads),
            Arg::F32(shape.scale),
            Arg::F32(shape.softcap.unwrap_or(0.0)),
            int(shape.window.unwrap_or(0)),
        ];
        let shared = (if wide >= 96 { 384 * wide } else { 512 * wide }) as u32;

        let tiles = query_tiles(shape.spans);
        let (spans, list) = (self.spans(shape.spans), self.list(tiles.iter().flatten().copied()));
        let dq = self.output(dq, Rounded);
        let wide_dq = self.room(dq.arg(), lengths[0], dims);
        let args = [&[wide_dq.arg()][..], &from, &[spans.arg(), list.arg()], &map].concat();
        let grid = [tiles.len() as u32, heads as u32, 1];
        self.start(kernels.queries, Launch { grid, block: 128, shared }, &args);
        self.unpad(dq.arg(), &wide_dq, dims);

        let KeyLists { tiles, visits, sums, slots } = key_lists(shape.spans);
        let list = self.list(tiles.iter().flatten().copied());
        let visits = self.list(visits.iter().flatten().copied());
        let (dk, dv) = (self.output(dk, Rounded), self.output(dv, Rounded));
        let [wide_dk, wide_dv] = [&dk, &dv].map(|values| self.room(values.arg(), lengths[1], dims));
        let partial =
            DeviceBuffer::new(&self.device, (slots * shape.kv_heads * 2 * KEYS * wide).max(1), Exact);
        let to = [wide_dk.arg(), wide_dv.arg(), Arg::Pointer(partial.at(Exact))];
        let args = [&to[..], &from, &[list.arg(), visits.arg()], &map].concat();
        let grid = [tiles.len() as u32, shape.kv_heads as u32, wide.div_ceil(128) as u32];
        self.start(kernels.keys, Launch { grid, block: 128, shared: shared + 512 }, &args);
        if !sums.is_empty() {
            let list = self.list(sums.iter().flatten().copied());
            let sizes = [int(shape.kv_heads), int(wide), Arg::F32(shape.scale)];
            let args = [&to[..], &[list.arg()], &sizes].concat();
            let grid = [sums.len() as u32, shape.kv_heads as u32, 2];
            self.start("attention_backward_sums", Launch { grid, block: 256, shared: 0 }, &args);
        }
        self.unpad(dk.arg(), &wide_dk, dims);
        self.unpad(dv.arg(), &wide_dv, dims);
    }
}
