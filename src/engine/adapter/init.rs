//! Initial values of an adapter: a counter-based generator, so a module's values depend on the seed and its
//! own name alone, not on which other modules are adapted or in what order they are filled.
//!
//! Value i of a tensor is `mix(key + (i + 1) * GOLDEN)`, splitmix64's output function, with the key from the
//! first 8 bytes of blake3(seed as 8 little-endian bytes ‖ name). Its top 24 bits give u in [0, 1).

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Fills A (R, in) with values uniform in ±1/sqrt(in): PEFT's kaiming_uniform(a = sqrt 5).
pub(super) fn uniform(a: &mut [f32], rank: usize, seed: u64, name: &str) {
    let bound = 1.0 / ((a.len() / rank) as f32).sqrt();
    let key = key_of(seed, name);
    for (i, value) in a.iter_mut().enumerate() {
        let bits = mix(key.wrapping_add((i as u64 + 1).wrapping_mul(GOLDEN)));
        let unit = (bits >> 40) as f32 / (1 << 24) as f32;
        *value = bound * (2.0 * unit - 1.0);
    }
}

fn key_of(seed: u64, name: &str) -> u64 {
    let digest = blake3::Hasher::new().update(&seed.to_le_bytes()).update(name.as_bytes()).finalize();
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(seed: u64, name: &str) -> Vec<f32> {
        let mut a = vec![0.0; 16 * 576];
        uniform(&mut a, 16, seed, name);
        a
    }

    #[test]
    fn values_depend_on_seed_and_name_alone() {
        assert_eq!(filled(7, "x"), filled(7, "x"));
        assert_ne!(filled(7, "x"), filled(8, "x"));
        assert_ne!(filled(7, "x"), filled(7, "y"));
    }

    #[test]
    fn values_fill_the_interval_evenly() {
        let (a, bound) = (filled(7, "x"), 1.0 / 24.0);
        assert!(a.iter().all(|value| value.abs() <= bound));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|value| value * value).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.02 * bound, "mean {mean}");
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.03, "variance {variance}");
    }
}
