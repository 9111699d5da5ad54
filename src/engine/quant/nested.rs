//! Double quantisation: the absmax of NF4 blocks, themselves stored in 8 bits. Knows only lists of f32.
//!
//! The 8-bit code is bitsandbytes' dynamic map: many values near zero, few near one, so that a list of scales
//! with a few outliers keeps its small ones. decode: `map[code] * absmax + offset`, two f32 roundings.

/// Scales that share one second-level scale.
pub const NESTED_BLOCK: usize = 256;

/// A list of f32 in 8-bit codes.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantized {
    /// One code a value, an index into the signed `dynamic_map`.
    pub codes: Vec<u8>,
    /// One f32 for 256 values.
    pub absmax: Vec<f32>,
    /// Mean of the values, taken off before coding.
    pub offset: f32,
}

impl DoubleQuantized {
    /// Encodes finite values; each takes the nearest code.
    pub fn encode(values: &[f32]) -> Self {
        let offset = mean(values);
        let map = dynamic_map(true);
        let midpoints: Vec<f32> = map.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let mut codes = Vec::with_capacity(values.len());
        let mut absmax = Vec::with_capacity(values.len().div_ceil(NESTED_BLOCK));
        for block in values.chunks(NESTED_BLOCK) {
            let scale = block.iter().fold(0.0f32, |max, value| max.max((value - offset).abs()));
            // bitsandbytes gives a block without spread code 0; with a scale of 0 any code decodes alike.
            let code = |value: &f32| {
                let scaled = (value - offset) / scale;
                if scale > 0.0 { midpoints.partition_point(|&midpoint| midpoint < scaled) as u8 } else { 0 }
            };
            codes.extend(block.iter().map(code));
            absmax.push(scale);
        }
        Self { codes, absmax, offset }
    }

    /// The values, decoded with `map` (of the file, or `dynamic_map(true)`).
    pub fn decode(&self, map: &[f32; 256]) -> Vec<f32> {
        let blocks = self.codes.chunks(NESTED_BLOCK).zip(&self.absmax);
        blocks
            .flat_map(|(codes, scale)| {
                codes.iter().map(move |&code| map[usize::from(code)] * scale + self.offset)
            })
            .collect()
    }
}

/// bitsandbytes' `create_dynamic_map(signed, 7, 8)`: 256 sorted values from -0.99296875 (signed) or 0 to 1.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for i in 0..7i32 {
        let fractions = if signed { (1usize << i) + 1 } else { (1usize << (i + 1)) + 1 };
        let boundaries = linspace(fractions);
        let power = 10f64.powi(i - 6) as f32;
        for pair in boundaries.windows(2) {
            let value = power * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("1 + 2 + ... + 64 values (twice or doubled), and two more")
}

/// torch.linspace(0.1, 1, steps) in f32: the upper half counts down from the end, and each value is one fused
/// multiply-add, as torch's vectorised code does it; two roundings would miss 42 of the 256 values by a bit.
fn linspace(steps: usize) -> Vec<f32> {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / (steps - 1) as f32;
    let value = |i: usize| {
        if i < steps / 2 {
            step.mul_add(i as f32, start)
        } else {
            step.mul_add(-((steps - 1 - i) as f32), end)
        }
    };
    (0..steps).map(value).collect()
}

/// Summed in f64, in order, so that the result depends on nothing but the values.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    (values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsigned_map_has_no_negative_and_twice_the_steps() {
        let map = dynamic_map(false);
        assert_eq!((map[0], map[255]), (0.0, 1.0));
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn every_value_takes_its_nearest_code() {
        let values: Vec<f32> = (0..600).map(|i| (i as f32 * 0.37).sin().abs() * 0.05).collect();
        let coded = DoubleQuantized::encode(&values);
        let map = dynamic_map(true);
        for (i, (value, decoded)) in values.iter().zip(coded.decode(&map)).enumerate() {
            let scale = coded.absmax[i / NESTED_BLOCK];
            let error = (decoded - value).abs();
            let best =
                map.iter().map(|code| (code * scale + coded.offset - value).abs()).fold(f32::MAX, f32::min);
            assert!(error <= best + 1e-8, "{i}: {error} {best}");
        }
    }

    #[test]
    fn equal_values_survive_exactly() {
        let coded = DoubleQuantized::encode(&[0.25; 300]);
        assert_eq!(coded.decode(&dynamic_map(true)), vec![0.25; 300]);
    }
}
