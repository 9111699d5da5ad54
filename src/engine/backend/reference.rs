//! The oracle: every operation as plain loops over whole f32 arrays, one thread. Slow, short and obvious;
//! `conformance` holds the fast backend against it. Sums run in f64 so that its own error is negligible.

use super::{
    Activation, AttentionGradient, AttentionSaved, AttentionShape, Backend, BackendKind, Buffer, Carry,
    Convolution, LogitMap, Lora, LoraGradient, RopeTable, Rotation, Scan, ScanGradient, ScanInput, Span,
    Write,
};
use crate::matrix::Matrix;

mod recurrent;

/// Plain loops.
#[derive(Debug, Clone, Copy)]
pub struct Reference {
    /// What becomes of the factors of the products that a fast backend may round.
    factor: fn(f32) -> f32,
}

impl Reference {
    /// The oracle.
    pub const EXACT: Self = Self { factor: |value| value };
    /// What rounding alone costs: a backend that rounds may err twice as far.
    #[cfg(test)]
    pub(crate) const BF16: Self = Self { factor: |value| half::bf16::from_f32(value).to_f32() };

    fn factors(self, values: &[f32]) -> Vec<f32> {
        values.iter().map(|value| (self.factor)(*value)).collect()
    }
}

/// c (m,n) = or += scale * a (m,k) · b, where `a_at` and `b_at` read elements (i,l) and (l,j).
fn product(
    c: &mut [f32],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    write: Write,
    a_at: impl Fn(usize, usize) -> f32,
    b_at: impl Fn(usize, usize) -> f32,
) {
    assert_eq!(c.len(), m * n, "BUG: shape of a product");
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|l| f64::from(a_at(i, l)) * f64::from(b_at(l, j))).sum();
            let value = scale * sum as f32;
            match write {
                Write::Overwrite => c[i * n + j] = value,
                Write::Add => c[i * n + j] += value,
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Backend for Reference {
    fn kind(&self) -> BackendKind {
        BackendKind::Reference
    }

    fn numerics(&self) -> String {
        "reference:f32".to_owned()
    }

    fn enter(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }

    fn linear(&self, y: &mut Buffer, x: &Buffer, weight: &Matrix, write: Write) {
        let (n, k) = (weight.rows, weight.cols);
        let (x, w) = (self.factors(x), self.factors(&weight.to_f32()));
        product(y, (x.len() / k, n, k), 1.0, write, |t, l| x[t * k + l], |l, j| w[j * k + l]);
    }

    fn linear_backward(&self, dx: &mut Buffer, dy: &Buffer, weight: &Matrix, write: Write) {
        let (n, k) = (weight.rows, weight.cols);
        let (dy, w) = (self.factors(dy), self.factors(&weight.to_f32()));
        product(dx, (dy.len() / n, k, n), 1.0, write, |t, l| dy[t * n + l], |l, j| w[l * k + j]);
    }

    fn lora(&self, y: &mut Buffer, h: &mut Buffer, x: &Buffer, lora: &Lora<'_>) {
        let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
        let t = x.len() / k;
        product(h, (t, r, k), 1.0, Write::Overwrite, |i, l| x[i * k + l], |l, j| lora.a[j * k + l]);
        product(y, (t, n, r), lora.scale, Write::Add, |i, l| h[i * r + l], |l, j| lora.b[j * r + l]);
    }

    fn lora_backward(
        &self,
        gradient: LoraGradient<'_>,
        dx: Option<&mut Buffer>,
        dh: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        h: &Buffer,
        lora: &Lora<'_>,
    ) {
        let (r, k, n) = (lora.rank, lora.a.len() / lora.rank, lora.b.len() / lora.rank);
        let t = x.len() / k;
        product(gradient.db, (n, r, t), lora.scale, Write::Add, |i, l| dy[l * n + i], |l, j| h[l * r + j]);
        product(dh, (t, r, n), lora.scale, Write::Overwrite, |i, l| dy[i * n + l], |l, j| lora.b[l * r + j]);
        product(gradient.da, (r, k, t), 1.0, Write::Add, |i, l| dh[l * r + i], |l, j| x[l * k + j]);
        if let Some(dx) = dx {
            product(dx, (t, k, r), 1.0, Write::Add, |i, l| dh[i * r + l], |l, j| lora.a[l * k + j]);
        }
    }

    fn add_bias(&self, y: &mut Buffer, bias: &Buffer) {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(&**bias).for_each(|(y, bias)| *y += bias);
        }
    }

    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, weight: &Buffer, group: usize, epsilon: f32) {
        let weights = weight.chunks_exact(group).cycle();
        for ((y, x), weight) in y.chunks_exact_mut(group).zip(x.chunks_exact(group)).zip(weights) {
            let inverse = inverse_rms(x, epsilon);
            for i in 0..group {
                y[i] = (f64::from(x[i]) * inverse) as f32 * weight[i];
            }
        }
    }

    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        weight: &Buffer,
        group: usize,
        epsilon: f32,
    ) {
        let weights = weight.chunks_exact(group).cycle();
        let rows = dx.chunks_exact_mut(group).zip(dy.chunks_exact(group)).zip(x.chunks_exact(group));
        for (((dx, dy), x), weight) in rows.zip(weights) {
            let inverse = inverse_rms(x, epsilon);
            let weighted: Vec<f32> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
            let pull = dot(&weighted, x) * inverse.powi(3) / group as f64;
            for i in 0..group {
                dx[i] += (inverse * f64::from(weighted[i]) - pull * f64::from(x[i])) as f32;
            }
        }
    }

    fn rope(
        &self,
        x: &mut Buffer,
        heads: usize,
        head_dim: usize,
        table: &RopeTable,
        positions: &[usize],
        rotation: Rotation,
    ) {
        let half = head_dim / 2;
        for (row, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
            for head in row.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let cos = table.cos[position * half + i];
                    let sin = match rotation {
                        Rotation::Forward => table.sin[position * half + i],
                        Rotation::Backward => -table.sin[position * half + i],
                    };
                    let (low, high) = (head[i], head[i + half]);
                    head[i] = low * cos - high * sin;
                    head[i + half] = high * cos + low * sin;
                }
            }
        }
    }

    fn attention(
        &self,
        out: &mut Buffer,
        logsumexp: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        shape: &AttentionShape<'_>,
    ) {
        each_query(shape, |at| {
            let scores: Vec<f64> = at.keys().map(|key| at.score(q, k, key)).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
            logsumexp[at.row * shape.heads + at.head] = (largest + sum.ln()) as f32;
            for d in 0..shape.head_dim {
                let weighted: f64 = at
                    .keys()
                    .zip(&scores)
                    .map(|(key, score)| {
                        let probability = ((score - largest).exp() / sum) as f32;
                        f64::from(probability) * f64::from(v[at.key_at(key) + d])
                    })
                    .sum();
                out[at.query_at() + d] = weighted as f32;
            }
        });
    }

    fn attention_backward(
        &self,
        gradient: AttentionGradient<'_>,
        dout: &Buffer,
        saved: &AttentionSaved<'_>,
        shape: &AttentionShape<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        let AttentionGradient { dq, dk, dv } = gradient;
        dq.fill(0.0);
        dk.fill(0.0);
        dv.fill(0.0);
        let dim = shape.head_dim;
        let AttentionSaved { q, k, v, .. } = *saved;
        each_query(shape, |at| {
            let query = at.query_at()..at.query_at() + dim;
            let delta = dot(&dout[query.clone()], &saved.out[query.clone()]);
            let logsumexp = f64::from(saved.logsumexp[at.row * shape.heads + at.head]);
            for key_row in at.keys() {
                let key = at.key_at(key_row)..at.key_at(key_row) + dim;
                let score = at.score(q, k, key_row);
                let probability = (score - logsumexp).exp();
                let dprobability = dot(&dout[query.clone()], &v[key.clone()]);
                let slope = shape.softcap.map_or(1.0, |cap| 1.0 - (score / f64::from(cap)).powi(2));
                let dscore = (probability * (dprobability - delta) * slope) as f32 * shape.scale;
                let probability = probability as f32;
                for d in 0..dim {
                    dq[query.start + d] += dscore * k[key.start + d];
                    dk[key.start + d] += dscore * q[query.start + d];
                    dv[key.start + d] += probability * dout[query.start + d];
                }
            }
        });
    }

    fn glu(&self, y: &mut Buffer, gate: &Buffer, up: &Buffer, activation: Activation) {
        for i in 0..y.len() {
            y[i] = activate(gate[i], activation).0 * up[i];
        }
    }

    fn glu_backward(&self, gate: &mut Buffer, up: &mut Buffer, dy: &Buffer, activation: Activation) {
        for i in 0..dy.len() {
            let (value, slope) = activate(gate[i], activation);
            gate[i] = dy[i] * up[i] * slope;
            up[i] = dy[i] * value;
        }
    }

    fn embed(&self, y: &mut Buffer, table: &Matrix, tokens: &[u32]) {
        for (row, &token) in y.chunks_exact_mut(table.cols).zip(tokens) {
            table.decode(token as usize * table.cols, row);
        }
    }

    fn cross_entropy(
        &self,
        nll: &mut [f64],
        mut gradient: Option<(&mut Buffer, f32)>,
        hidden: &Buffer,
        targets: &[u32],
        head: &Matrix,
        map: LogitMap,
        _scratch: &mut Vec<f32>,
    ) {
        let (vocabulary, c) = (head.rows, head.cols);
        let (hidden, w) = (self.factors(hidden), self.factors(&head.to_f32()));
        for (row, (&target, nll)) in targets.iter().zip(nll).enumerate() {
            let x = &hidden[row * c..(row + 1) * c];
            let plain = (0..vocabulary).map(|id| dot(x, &w[id * c..(id + 1) * c]));
            let (logits, slopes): (Vec<f64>, Vec<f64>) = plain.map(|logit| mapped(logit, map)).unzip();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let logsumexp = largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
            *nll = logsumexp - logits[target as usize];
            if let Some((dhidden, scale)) = &mut gradient {
                for i in 0..c {
                    let sum: f64 = (0..vocabulary)
                        .map(|id| {
                            let hit = if id == target as usize { 1.0 } else { 0.0 };
                            let dlogit = ((logits[id] - logsumexp).exp() - hit) * slopes[id];
                            let dlogit = (self.factor)((dlogit * f64::from(*scale)) as f32);
                            f64::from(dlogit) * f64::from(w[id * c + i])
                        })
                        .sum();
                    dhidden[row * c + i] = sum as f32;
                }
            }
        }
    }

    fn add(&self, y: &mut Buffer, x: &Buffer) {
        assert_eq!(y.len(), x.len(), "BUG: shape of a sum");
        for (y, x) in y.iter_mut().zip(&**x) {
            *y += x;
        }
    }

    fn map_logits(&self, logits: &mut Buffer, map: LogitMap) {
        for logit in &mut **logits {
            *logit = mapped(f64::from(*logit), map).0 as f32;
        }
    }

    fn scale(&self, y: &mut Buffer, factor: f32) {
        for y in &mut **y {
            *y *= factor;
        }
    }

    fn split(&self, parts: &mut [&mut Buffer], x: &Buffer, rows: usize) {
        let width = x.len() / rows;
        let mut start = 0;
        for part in parts {
            let cols = part.len() / rows;
            for (row, part) in part.chunks_exact_mut(cols).enumerate() {
                part.copy_from_slice(&x[row * width + start..row * width + start + cols]);
            }
            start += cols;
        }
        assert_eq!(start, width, "BUG: parts of a split");
    }

    fn join(&self, x: &mut Buffer, parts: &[&Buffer], rows: usize) {
        let width = x.len() / rows;
        let mut start = 0;
        for part in parts {
            let cols = part.len() / rows;
            for (row, part) in part.chunks_exact(cols).enumerate() {
                x[row * width + start..row * width + start + cols].copy_from_slice(part);
            }
            start += cols;
        }
        assert_eq!(start, width, "BUG: parts of a join");
    }

    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, conv: &Convolution<'_>, carry: Option<Carry<'_>>) {
        recurrent::conv(y, x, conv, carry);
    }

    fn causal_conv_backward(
        &self,
        dx: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        conv: &Convolution<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        recurrent::conv_backward(dx, dy, x, conv);
    }

    fn scan(&self, y: &mut Buffer, input: &ScanInput<'_>, scan: &Scan<'_>, carry: Option<Carry<'_>>) {
        recurrent::scan(y, input, scan, carry);
    }

    fn scan_backward(
        &self,
        gradient: ScanGradient<'_>,
        dy: &Buffer,
        input: &ScanInput<'_>,
        scan: &Scan<'_>,
        _scratch: &mut Vec<f32>,
    ) {
        recurrent::scan_backward(gradient, dy, input, scan);
    }
}

/// The gate's value and slope at x.
fn activate(x: f32, activation: Activation) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let sigmoid = sigmoid(x);
            (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
        }
        Activation::GeluTanh => {
            let (x, root) = (f64::from(x), (2.0 / std::f64::consts::PI).sqrt());
            let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
            let inner = root * (1.0 + 3.0 * 0.044715 * x * x);
            ((0.5 * x * (1.0 + tanh)) as f32, (0.5 * (1.0 + tanh + x * (1.0 - tanh * tanh) * inner)) as f32)
        }
    }
}

/// A logit and its slope.
fn mapped(logit: f64, map: LogitMap) -> (f64, f64) {
    let scale = f64::from(map.scale);
    match map.softcap.map(f64::from) {
        None => (logit * scale, scale),
        Some(cap) => {
            let tanh = (logit * scale / cap).tanh();
            (cap * tanh, scale * (1.0 - tanh * tanh))
        }
    }
}

fn inverse_rms(x: &[f32], epsilon: f32) -> f64 {
    1.0 / (dot(x, x) / x.len() as f64 + f64::from(epsilon)).sqrt()
}

/// One query of one head: which keys it sees and where its numbers lie.
struct Query<'a> {
    shape: &'a AttentionShape<'a>,
    span: &'a Span,
    row: usize,
    head: usize,
    /// Positions in the span.
    seen: std::ops::Range<usize>,
}

impl Query<'_> {
    /// The rows of the keys it sees.
    fn keys(&self) -> impl Iterator<Item = usize> {
        self.seen.clone().map(|position| self.span.key_row(position))
    }

    fn query_at(&self) -> usize {
        (self.row * self.shape.heads + self.head) * self.shape.head_dim
    }

    fn key_at(&self, row: usize) -> usize {
        let group = self.shape.heads / self.shape.kv_heads;
        (row * self.shape.kv_heads + self.head / group) * self.shape.head_dim
    }

    fn score(&self, q: &[f32], k: &[f32], key: usize) -> f64 {
        let dim = self.shape.head_dim;
        let (query, key) = (self.query_at(), self.key_at(key));
        let score = dot(&q[query..query + dim], &k[key..key + dim]) * f64::from(self.shape.scale);
        self.shape.softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
    }
}

fn each_query(shape: &AttentionShape<'_>, mut visit: impl FnMut(&Query<'_>)) {
    for span in shape.spans {
        for (i, row) in span.queries.clone().enumerate() {
            for head in 0..shape.heads {
                let seen = shape.seen(span.past() + i + 1);
                visit(&Query { shape, span, row, head, seen });
            }
        }
    }
}
