//! Row-wise and elementwise loops, written so that the compiler vectorises them, each compiled for the
//! baseline, AVX2 and AVX-512 and chosen at run time. No fused multiply-add and a fixed order of lanes: all
//! versions give the same bits. Knows nothing of threads.

use crate::backend::LogitMap;

/// Lanes of every sum: sixteen partial sums, added pairwise at the end.
const LANES: usize = 16;

/// Compiles one body for several instruction sets behind one safe function.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
                fn avx512($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512bw") {
                    // SAFETY: the CPU has these instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has AVX2.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

/// e^x to about 2 units in the last place, without branches: Cephes' polynomial after reduction by ln 2.
/// Below -87 it stays at the smallest normal number; NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(0x4B40_0000).wrapping_add(127);
    value * f32::from_bits((exponent as u32) << 23)
}

/// tanh to about 2 units in the last place, without branches: Cephes' polynomial near zero, where
/// 1 - 2 / (e^2x + 1) would cancel.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let square = x * x;
    let p = -5.704_988_7e-3;
    let p = p * square + 2.063_909e-2;
    let p = p * square - 5.373_971_6e-2;
    let p = p * square + 1.333_144_2e-1;
    let p = p * square - 3.333_328e-1;
    let near = p * square * x + x;
    let far = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < 0.625 { near } else { far }
}

#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `term(i)` over `0..len` in lanes.
#[inline(always)]
fn sum_of(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for lane in 0..LANES {
            lanes[lane] += term(start + lane);
        }
    }
    for i in whole..len {
        lanes[i - whole] += term(i);
    }
    sum_lanes(lanes)
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    sum_of(len, |i| a[i] * b[i])
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    for (i, &value) in chunks.remainder().iter().enumerate() {
        lanes[i] = value;
    }
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

vectorised! {
    /// a · b.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_body(a, b)
    }
}

vectorised! {
    /// y += x.
    fn add(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

vectorised! {
    /// y *= factor.
    fn scale(y: &mut [f32], factor: f32) {
        for y in y {
            *y *= factor;
        }
    }
}

vectorised! {
    /// y (rows,C) = x / sqrt(mean(x²) + epsilon) * weight (C), the mean that of a group of channels.
    fn rms_norm(y: &mut [f32], x: &[f32], weight: &[f32], group: usize, epsilon: f32) {
        let c = weight.len();
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for start in (0..c).step_by(group) {
                let x = &x[start..start + group];
                let inverse = 1.0 / (dot_body(x, x) / group as f32 + epsilon).sqrt();
                for ((y, x), weight) in y[start..start + group].iter_mut().zip(x).zip(&weight[start..]) {
                    *y = x * inverse * weight;
                }
            }
        }
    }
}

vectorised! {
    /// dx (rows,C) += the gradient through `rms_norm`.
    fn rms_norm_backward(
        dx: &mut [f32],
        dy: &[f32],
        x: &[f32],
        weight: &[f32],
        group: usize,
        epsilon: f32
    ) {
        let c = weight.len();
        for ((dx, dy), x) in dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c)) {
            for start in (0..c).step_by(group) {
                let (dy, x) = (&dy[start..start + group], &x[start..start + group]);
                let (dx, weight) = (&mut dx[start..start + group], &weight[start..start + group]);
                let inverse = 1.0 / (dot_body(x, x) / group as f32 + epsilon).sqrt();
                let product = sum_of(group, |i| dy[i] * weight[i] * x[i]);
                let pull = product * inverse * inverse * inverse / group as f32;
                for i in 0..group {
                    dx[i] += inverse * (weight[i] * dy[i]) - pull * x[i];
                }
            }
        }
    }
}

vectorised! {
    /// Rotates the halves of each head of x (positions, heads·D); `sign` -1 rotates back.
    fn rope(
        x: &mut [f32],
        heads: usize,
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
        positions: &[usize],
        sign: f32
    ) {
        let half = head_dim / 2;
        for (row, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
            let cos = &cos[position * half..(position + 1) * half];
            let sin = &sin[position * half..(position + 1) * half];
            for head in row.chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b, sin) = (low[i], high[i], sign * sin[i]);
                    low[i] = a * cos[i] - b * sin;
                    high[i] = b * cos[i] + a * sin;
                }
            }
        }
    }
}

vectorised! {
    /// y = silu(gate) * up.
    fn swiglu(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

vectorised! {
    /// gate and up become their gradients.
    fn swiglu_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u) = (*gate, *up);
            let sigmoid = 1.0 / (1.0 + exp(-g));
            *gate = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
            *up = dy * g * sigmoid;
        }
    }
}

/// sqrt(2 / pi)
const GELU_ROOT: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

vectorised! {
    /// y = gelu(gate) * up, by tanh.
    fn geglu(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = 0.5 * gate * (1.0 + tanh(GELU_ROOT * (gate + GELU_CUBE * gate * gate * gate))) * up;
        }
    }
}

vectorised! {
    /// gate and up become their gradients.
    fn geglu_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u) = (*gate, *up);
            let tanh = tanh(GELU_ROOT * (g + GELU_CUBE * g * g * g));
            let inner = GELU_ROOT * (1.0 + 3.0 * GELU_CUBE * g * g);
            *gate = dy * u * 0.5 * (1.0 + tanh + g * (1.0 - tanh * tanh) * inner);
            *up = dy * 0.5 * g * (1.0 + tanh);
        }
    }
}

vectorised! {
    /// Logits, or scores, become softcap * tanh(scale * x / softcap), or scale * x.
    fn map_logits(logits: &mut [f32], map: LogitMap) {
        match map.softcap {
            None => logits.iter_mut().for_each(|logit| *logit *= map.scale),
            Some(cap) => {
                let inner = map.scale / cap;
                logits.iter_mut().for_each(|logit| *logit = cap * tanh(*logit * inner));
            }
        }
    }
}

vectorised! {
    /// d becomes factor * (d - delta) * the slope of `map_logits` where it gave `mapped`.
    fn map_logits_backward(d: &mut [f32], mapped: &[f32], delta: f32, factor: f32, map: LogitMap) {
        let factor = factor * map.scale;
        let inverse = map.softcap.map_or(0.0, |cap| 1.0 / cap);
        for (d, mapped) in d.iter_mut().zip(mapped) {
            let tanh = mapped * inverse;
            *d = factor * (*d - delta) * (1.0 - tanh * tanh);
        }
    }
}

vectorised! {
    /// The scores from `first` to `end` become probabilities of scale * scores, the rest 0; gives log-sum-exp.
    fn softmax(scores: &mut [f32], first: usize, end: usize, scale: f32) -> f32 {
        scores[..first].fill(0.0);
        scores[end..].fill(0.0);
        let seen = &mut scores[first..end];
        let largest = largest(seen) * scale;
        for score in seen.iter_mut() {
            *score = exp(*score * scale - largest);
        }
        let sum = sum_of(seen.len(), |i| seen[i]);
        let inverse = 1.0 / sum;
        for score in seen.iter_mut() {
            *score *= inverse;
        }
        largest + sum.ln()
    }
}

vectorised! {
    /// Scores become exp(scale * score - logsumexp).
    fn probabilities(scores: &mut [f32], scale: f32, logsumexp: f32) {
        for score in scores {
            *score = exp(*score * scale - logsumexp);
        }
    }
}

vectorised! {
    /// d becomes the gradient of the scores: probability * (d - delta) * scale.
    fn score_gradient(d: &mut [f32], probabilities: &[f32], delta: f32, scale: f32) {
        for (d, probability) in d.iter_mut().zip(probabilities) {
            *d = probability * (*d - delta) * scale;
        }
    }
}

vectorised! {
    /// y *= x.
    fn multiply(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y *= x;
        }
    }
}

vectorised! {
    /// A tap of a convolution: y += x * weight, channel by channel.
    fn multiply_add(y: &mut [f32], x: &[f32], weight: &[f32]) {
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y += x * weight;
        }
    }
}

vectorised! {
    /// y = silu(x).
    fn silu(y: &mut [f32]) {
        for y in y {
            *y /= 1.0 + exp(-*y);
        }
    }
}

vectorised! {
    /// u becomes dy * the slope of silu at u.
    fn silu_backward(u: &mut [f32], dy: &[f32]) {
        for (u, dy) in u.iter_mut().zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp(-*u));
            *u = dy * sigmoid * (1.0 + *u * (1.0 - sigmoid));
        }
    }
}

vectorised! {
    /// A row of Mamba2's scan: state (P,N) = decay * state + dt * x (P) ⊗ b (N).
    fn scan_advance(state: &mut [f32], x: &[f32], b: &[f32], dt: f32, decay: f32) {
        for (row, x) in state.chunks_exact_mut(b.len()).zip(x) {
            let x = dt * x;
            for (s, b) in row.iter_mut().zip(b) {
                *s = *s * decay + x * b;
            }
        }
    }
}

vectorised! {
    /// y (P) = state (P,N) · c (N) + skip * x (P).
    fn scan_read(y: &mut [f32], state: &[f32], x: &[f32], c: &[f32], skip: f32) {
        for ((y, x), row) in y.iter_mut().zip(x).zip(state.chunks_exact(c.len())) {
            *y = dot_body(row, c) + skip * x;
        }
    }
}

vectorised! {
    /// One row i of the state's backward, given dy: dstate += dy * c; adds to dc and db; then dstate decays.
    /// Gives dstate · b and dstate · before, of the dstate that has not yet decayed.
    fn scan_row_backward(
        dstate: &mut [f32],
        dc: &mut [f32],
        db: &mut [f32],
        after: &[f32],
        before: &[f32],
        b: &[f32],
        c: &[f32],
        dy: f32,
        dt_x: f32,
        decay: f32
    ) -> (f32, f32) {
        for ((d, dc), ((db, after), c)) in
            dstate.iter_mut().zip(dc.iter_mut()).zip(db.iter_mut().zip(after).zip(c))
        {
            *d += dy * c;
            *dc += dy * after;
            *db += dt_x * *d;
        }
        let sums = (dot_body(dstate, b), dot_body(dstate, before));
        dstate.iter_mut().for_each(|d| *d *= decay);
        sums
    }
}

vectorised! {
    /// The largest of some logits, and their sum of exp(logit - largest) in f64 by blocks of 256.
    fn sum_of_exponentials(logits: &[f32]) -> (f32, f64) {
        let (largest, mut sum) = (largest(logits), 0.0);
        // A loop, for an iterator's sum would be a function of its own, compiled without these instructions.
        for block in logits.chunks(256) {
            sum += f64::from(sum_of(block.len(), |i| exp(block[i] - largest)));
        }
        (largest, sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        for i in -86_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37);
    }

    #[test]
    fn tanh_is_within_three_units_in_the_last_place() {
        for i in -20_000..20_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - exact).abs();
            assert!(error <= 3.0 * f64::from(f32::EPSILON) * exact.abs(), "tanh({x}) is off by {error}");
        }
        assert!(tanh(f32::NAN).is_nan());
        assert_eq!((tanh(1e30), tanh(-1e30)), (1.0, -1.0));
    }

    #[test]
    fn largest_sees_every_lane_and_the_rest() {
        for len in 1..40 {
            for at in 0..len {
                let mut values = vec![-1.0; len];
                values[at] = 2.0;
                assert_eq!(largest(&values), 2.0, "{len} values, largest at {at}");
            }
        }
    }
}
