//! How sure a figure is. Proportions get Wilson's score interval (E. B. Wilson, 1927); means get a percentile
//! bootstrap over examples with a fixed seed, so the same values give the same interval.

/// A figure with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Estimate {
    /// The figure.
    pub(crate) value: f64,
    /// Lower end of the 95 % interval.
    pub(crate) low: f64,
    /// Upper end of the 95 % interval.
    pub(crate) high: f64,
}

impl Estimate {
    /// True when the two intervals do not touch.
    pub(crate) fn apart_from(&self, other: &Self) -> bool {
        self.low > other.high || other.low > self.high
    }
}

/// 97.5 % quantile of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;
/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

/// The proportion `hits / n` with Wilson's interval. `n` 0 gives the whole range.
pub(crate) fn wilson(hits: usize, n: usize) -> Estimate {
    if n == 0 {
        return Estimate { value: 0.0, low: 0.0, high: 1.0 };
    }
    let n = n as f64;
    let p = hits as f64 / n;
    let denominator = 1.0 + Z * Z / n;
    let centre = (p + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    Estimate { value: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
}

/// `sum(numerators) / sum(denominators)`, resampling pairs: the loss of a set of examples from the summed
/// loss and the token count of each. Returns `None` when there is nothing to divide by.
pub(crate) fn bootstrap_ratio(pairs: &[(f64, f64)], seed: u64) -> Option<Estimate> {
    let ratio = |sum: (f64, f64)| (sum.1 > 0.0).then(|| sum.0 / sum.1);
    let add = |sum: (f64, f64), pair: &(f64, f64)| (sum.0 + pair.0, sum.1 + pair.1);
    let value = ratio(pairs.iter().fold((0.0, 0.0), add))?;
    let mut state = seed;
    let mut resampled: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let sum = (0..pairs.len()).fold((0.0, 0.0), |sum, _| {
                add(sum, &pairs[(next_random(&mut state) % pairs.len() as u64) as usize])
            });
            ratio(sum)
        })
        .collect();
    resampled.sort_by(f64::total_cmp);
    let at = |share: f64| resampled[((resampled.len() - 1) as f64 * share).round() as usize];
    Some(Estimate { value, low: at(0.025), high: at(0.975) })
}

/// The mean of `values` with a bootstrap interval.
pub(crate) fn bootstrap_mean(values: &[f64], seed: u64) -> Option<Estimate> {
    let pairs: Vec<(f64, f64)> = values.iter().map(|&value| (value, 1.0)).collect();
    bootstrap_ratio(&pairs, seed)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_agrees_with_statsmodels() {
        // statsmodels.stats.proportion.proportion_confint(hits, n, method="wilson")
        for (hits, n, low, high) in [
            (8, 10, 0.490_162_471_534_181_3, 0.943_317_822_345_618_1),
            (0, 60, 0.0, 0.060_172_011_126_541_17),
            (60, 60, 0.939_827_988_873_458_8, 1.0),
        ] {
            let estimate = wilson(hits, n);
            assert!((estimate.low - low).abs() < 1e-3, "{estimate:?} {low}");
            assert!((estimate.high - high).abs() < 1e-3, "{estimate:?} {high}");
        }
    }

    #[test]
    fn bootstrap_repeats_and_surrounds_the_ratio() {
        let pairs: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i % 7) * 3.0, 3.0)).collect();
        let first = bootstrap_ratio(&pairs, 7).unwrap();
        assert_eq!(first, bootstrap_ratio(&pairs, 7).unwrap());
        assert!(first.low < first.value && first.value < first.high, "{first:?}");
        assert!(bootstrap_ratio(&[], 7).is_none());
    }

    #[test]
    fn intervals_that_touch_are_not_apart() {
        let low = wilson(2, 60);
        assert!(low.apart_from(&wilson(40, 60)));
        assert!(!low.apart_from(&wilson(3, 60)));
    }
}
