//! One comparison for all kernels: every element within its bound, the worst one named.

/// How far a value may be from what is expected: `relative * |expected| + absolute`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tolerance {
    pub(crate) relative: f64,
    pub(crate) absolute: f64,
}

impl Tolerance {
    pub(crate) const EXACT: Self = Self { relative: 0.0, absolute: 0.0 };

    /// One rounding to bf16 (half of 2^-7 relative), and `absolute` for the sums in f32 before it.
    pub(crate) fn bf16(absolute: f64) -> Self {
        Self { relative: 1.0 / 256.0, absolute }
    }

    /// `roundings` roundings to f32, and `absolute`.
    pub(crate) fn f32(roundings: f64, absolute: f64) -> Self {
        Self { relative: roundings / f64::from(1 << 24), absolute }
    }
}

/// Asserts that `got` is `expected` element by element; names the element farthest outside of its bound.
#[track_caller]
pub(crate) fn assert_close(name: &str, got: &[f32], expected: &[f64], tolerance: Tolerance) {
    assert_eq!(got.len(), expected.len(), "{name}: number of elements");
    let mut outside = 0;
    let mut worst: Option<(f64, usize)> = None;
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let got = f64::from(got);
        let same = got == expected || got.is_nan() && expected.is_nan();
        let error = if same { 0.0 } else { (got - expected).abs() };
        let bound = tolerance.relative * expected.abs() + tolerance.absolute;
        // A NaN is outside of any bound.
        if error <= bound {
            continue;
        }
        outside += 1;
        let excess = if error.is_nan() { f64::INFINITY } else { error - bound };
        if worst.is_none_or(|(most, _)| excess > most) {
            worst = Some((excess, index));
        }
    }
    if let Some((_, index)) = worst {
        panic!(
            "{name}: {outside} of {} elements outside of their bounds; worst at {index}: got {}, expected {} ({tolerance:?})",
            got.len(),
            got[index],
            expected[index],
        );
    }
}
