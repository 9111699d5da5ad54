//! Which rows go into which optimizer step, and which of a step's rows share a pack. Pure functions of the row
//! lengths, the seed and the epoch: the position in the data is two integers. Knows nothing of tokens or models.
//!
//! ```text
//! rows ──shuffle(seed, epoch)──► order ──chunks of batch_examples──► steps ──first-fit decreasing──► packs
//! ```

use crate::random::Random;

/// Names the stream of random numbers that orders rows, so that no other use of the seed shares it.
const SHUFFLE: u64 = 0x0053_4855_4646_4c45;

/// The rows of every optimizer step of a run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    rows: usize,
    batch_examples: usize,
    epochs: usize,
    seed: u64,
    order: Option<(usize, Vec<usize>)>,
}

impl Plan {
    /// A run over `rows` rows, `batch_examples` to a step (the last step of an epoch may have fewer).
    pub(super) fn new(rows: usize, batch_examples: usize, epochs: usize, seed: u64) -> Self {
        assert!(rows > 0 && batch_examples > 0, "BUG: an empty plan");
        Self { rows, batch_examples, epochs, seed, order: None }
    }

    /// Optimizer steps of one epoch.
    pub(super) fn steps_per_epoch(&self) -> usize {
        self.rows.div_ceil(self.batch_examples)
    }

    /// Optimizer steps of the run.
    pub(super) fn total_steps(&self) -> usize {
        self.steps_per_epoch() * self.epochs
    }

    /// The epoch, from 0, that step `step` (from 0) is in.
    pub(super) fn epoch_of(&self, step: usize) -> usize {
        step / self.steps_per_epoch()
    }

    /// True if `done` steps end an epoch.
    pub(super) fn ends_epoch(&self, done: usize) -> bool {
        done.is_multiple_of(self.steps_per_epoch())
    }

    /// The rows of step `step` (from 0), in the epoch's order.
    pub(super) fn rows_of(&mut self, step: usize) -> &[usize] {
        let epoch = self.epoch_of(step);
        let start = step % self.steps_per_epoch() * self.batch_examples;
        let end = (start + self.batch_examples).min(self.rows);
        let known = self.order.take().filter(|(known, _)| *known == epoch);
        let order = known.unwrap_or_else(|| (epoch, epoch_order(self.rows, self.seed, epoch)));
        &self.order.insert(order).1[start..end]
    }
}

/// The order of `rows` rows in epoch `epoch`: a permutation that depends on nothing else but the seed.
pub(super) fn epoch_order(rows: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows).collect();
    Random::new(&[SHUFFLE, seed, epoch as u64]).shuffle(&mut order);
    order
}

/// Groups rows of `lengths` tokens into packs of at most `pack_tokens`: first-fit decreasing, equal lengths in
/// their given order. Each pack lists indices into `lengths`; a row longer than a pack is alone in its own.
pub(super) fn pack(lengths: &[usize], pack_tokens: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    let mut packs: Vec<(usize, Vec<usize>)> = Vec::new();
    for row in longest_first {
        let length = lengths[row];
        match packs.iter_mut().find(|(filled, _)| filled + length <= pack_tokens) {
            Some((filled, pack)) => {
                *filled += length;
                pack.push(row);
            }
            None => packs.push((length, vec![row])),
        }
    }
    packs.into_iter().map(|(_, pack)| pack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_epoch_visits_every_row_once_in_another_order() {
        let mut plan = Plan::new(10, 4, 2, 7);
        assert_eq!((plan.steps_per_epoch(), plan.total_steps()), (3, 6));
        let mut epoch = |range: std::ops::Range<usize>| {
            range.flat_map(|step| plan.rows_of(step).to_vec()).collect::<Vec<_>>()
        };
        let (first, second) = (epoch(0..3), epoch(3..6));
        assert_ne!(first, second);
        for mut rows in [first, second] {
            rows.sort_unstable();
            assert_eq!(rows, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn any_step_is_reached_without_its_predecessors() {
        let mut walked = Plan::new(23, 4, 3, 11);
        let steps: Vec<Vec<usize>> =
            (0..walked.total_steps()).map(|step| walked.rows_of(step).to_vec()).collect();
        for step in (0..steps.len()).rev() {
            assert_eq!(Plan::new(23, 4, 3, 11).rows_of(step), steps[step]);
        }
    }

    #[test]
    fn another_seed_gives_another_order() {
        assert_ne!(epoch_order(50, 1, 0), epoch_order(50, 2, 0));
    }

    #[test]
    fn order_is_pinned() {
        // A change here changes every adapter that was ever trained: bump the train stage's version with it.
        assert_eq!(epoch_order(8, 7, 0), [1, 4, 3, 5, 7, 2, 0, 6]);
    }

    #[test]
    fn longest_rows_are_placed_first_and_gaps_filled() {
        assert_eq!(pack(&[3, 7, 5, 2, 5], 10), vec![vec![1, 0], vec![2, 4], vec![3]]);
    }

    #[test]
    fn a_row_longer_than_a_pack_stands_alone() {
        assert_eq!(pack(&[2, 12, 2], 10), vec![vec![1], vec![0, 2]]);
    }

    proptest! {
        #[test]
        fn packs_hold_every_row_once_within_the_limit(lengths in prop::collection::vec(1usize..50, 0..60)) {
            let packs = pack(&lengths, 50);
            let mut seen: Vec<usize> = packs.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for pack in &packs {
                prop_assert!(pack.iter().map(|&row| lengths[row]).sum::<usize>() <= 50);
            }
        }
    }
}
