//! Seeded random numbers: SplitMix64 (Steele, Lea, Flood 2014), a counter stepped by the golden ratio and
//! mixed. A stream is named by a few integers, `(seed, purpose, epoch)` or `(seed, prompt)`, so any point of a
//! run can be reached again without replaying what came before it. Knows nothing of what the numbers are for.
//! Our own dozen lines, because artifacts must not change when a random-number crate does.

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: u64,
}

/// 2⁶⁴ over the golden ratio: the step of the counter.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// splitmix64's output function.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Random {
    /// The stream named by `parts`; order matters, and so does their number.
    pub(crate) fn new(parts: &[u64]) -> Self {
        let state = parts.iter().fold(mix(parts.len() as u64 ^ GOLDEN), |state, part| {
            mix(state.wrapping_add(GOLDEN) ^ mix(part.wrapping_add(GOLDEN)))
        });
        Self { state }
    }

    /// The next 64 bits.
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// An integer in 0..bound, each equally likely (Lemire 2019: multiply, reject the short remainder).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "BUG: an empty range has no member");
        let short = bound.wrapping_neg() % bound;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            if (wide as u64) >= short {
                return (wide >> 64) as u64;
            }
        }
    }

    /// A number in [0, 1) with 53 random bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Puts `items` into a random order (Fisher-Yates, from the back).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixing_is_splitmix64() {
        // First outputs of the reference implementation for state 0.
        let mut random = Random { state: 0 };
        assert_eq!(random.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next_u64(), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(random.next_u64(), 0x06c4_5d18_8009_454f);
    }

    #[test]
    fn streams_differ_by_every_part() {
        let first = |parts: &[u64]| Random::new(parts).next_u64();
        let streams = [first(&[]), first(&[0]), first(&[1]), first(&[0, 0]), first(&[0, 1]), first(&[1, 0])];
        for (index, stream) in streams.iter().enumerate() {
            assert!(!streams[..index].contains(stream), "stream {index} repeats an earlier one");
        }
        assert_eq!(first(&[7, 2]), first(&[7, 2]));
    }

    #[test]
    fn below_is_uniform_and_in_range() {
        let mut random = Random::new(&[3]);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[random.below(7) as usize] += 1;
        }
        // Standard deviation of a count is about 93.
        assert!(counts.iter().all(|count| count.abs_diff(10_000) < 500), "{counts:?}");
    }

    #[test]
    fn shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Random::new(&[5]).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
