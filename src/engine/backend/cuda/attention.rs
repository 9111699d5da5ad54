//! Attention over spans: lists of tiles made here, tiles computed there.

use super::super::{AttentionGradient, AttentionSaved, AttentionShape, Buffer, Precision, Span};
use super::Cuda;
use super::device::{Arg, Launch};
use super::linear::int;

use Precision::{Exact, Rounded};

/// Queries a tile takes.
const QUERIES: usize = 64;

/// The entry points of each head dimension.
struct Kernels {
    head_dim: usize,
    forward: &'static str,
}

const KERNELS: [Kernels; 6] = [
    Kernels { head_dim: 16, forward: "attention_16" },
    Kernels { head_dim: 32, forward: "attention_32" },
    Kernels { head_dim: 64, forward: "attention_64" },
    Kernels { head_dim: 96, forward: "attention_96" },
    Kernels { head_dim: 128, forward: "attention_128" },
    Kernels { head_dim: 256, forward: "attention_256" },
];

fn kernels(head_dim: usize) -> &'static Kernels {
    let kernels = KERNELS.iter().find(|kernels| kernels.head_dim == head_dim);
    kernels.expect("BUG: models with other head dimensions are refused")
}

/// (span, first query within it) of each tile.
fn query_tiles(spans: &[Span]) -> Vec<[usize; 2]> {
    let of_span = |(index, span): (usize, &Span)| {
        (0..span.queries.len()).step_by(QUERIES).map(move |first| [index, first]).collect::<Vec<_>>()
    };
    spans.iter().enumerate().flat_map(of_span).collect()
}

impl Cuda {
    pub(super) fn attend(
        &self,
        out: &mut Buffer,
        logsumexp: &mut Buffer,
        (q, k, v): (&Buffer, &Buffer, &Buffer),
        shape: &AttentionShape<'_>,
    ) {
        let tiles = query_tiles(shape.spans);
        let (spans, list) = (self.spans(shape.spans), self.list(tiles.iter().flatten().copied()));
        let (q, k, v) = (self.input(q, Rounded), self.input(k, Rounded), self.input(v, Rounded));
        let (out, logsumexp) = (self.output(out, Rounded), self.output(logsumexp, Exact));
        let args = [
            out.arg(),
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
            shared: (256 * shape.head_dim) as u32,
        };
        self.start(kernels(shape.head_dim).forward, launch, &args);
    }

    pub(super) fn attend_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
    ) {
        let _ = (gradient, dout, saved, shape);
        unimplemented!()
    }
}
