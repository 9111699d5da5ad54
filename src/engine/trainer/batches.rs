//! Which rows go into which optimizer step, and which of a step's rows share a pack. Pure functions of the row
//! lengths, the seed and the epoch: the position in the data is two integers. Knows nothing of tokens or models.
//!
//! ```text
//! rows ──shuffle(seed, epoch)──► order ──rows or tokens of a batch──► steps ──best-fit decreasing──► packs
//! ```

use std::collections::BTreeSet;

use crate::random::Random;

/// Names the stream of random numbers that orders rows, so that no other use of the seed shares it.
const SHUFFLE: u64 = 0x0053_4855_4646_4c45;
/// Names the stream that orders the steps of [`Order::ByLength`].
const STEPS: u64 = 0x0053_5445_5053;

/// What goes into one optimizer step. The last step of an epoch may have less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// So many rows.
    Rows(usize),
    /// Rows one after another as long as they have no more tokens than this together; at least one row.
    Tokens(usize),
}

/// The order of an epoch's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// At random.
    #[default]
    Shuffled,
    /// At random, then by length within windows of `WINDOW_STEPS` steps, and those steps at random again: the
    /// rows of a step are of like length, so steps of few rows differ less in what each row weighs.
    ByLength,
}

/// Steps whose rows [`Order::ByLength`] sorts together.
const WINDOW_STEPS: usize = 50;

/// The rows of every optimizer step of a run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    lengths: Vec<usize>,
    batch: Batch,
    order: Order,
    seed: u64,
    /// The first step of each epoch, and the number of all steps.
    epochs: Vec<usize>,
    /// The epoch whose steps were asked for last, with the rows of each.
    known: Option<(usize, Vec<Vec<usize>>)>,
}

impl Plan {
    /// A run over rows of `lengths` tokens.
    pub(super) fn new(lengths: Vec<usize>, batch: Batch, order: Order, epochs: usize, seed: u64) -> Self {
        assert!(!lengths.is_empty() && epochs > 0, "BUG: an empty plan");
        let mut plan = Self { lengths, batch, order, seed, epochs: vec![0], known: None };
        for epoch in 0..epochs {
            let steps = match batch {
                Batch::Rows(rows) => plan.lengths.len().div_ceil(rows),
                Batch::Tokens(_) => plan.steps_of(epoch).len(),
            };
            plan.epochs.push(plan.total_steps() + steps);
        }
        plan
    }

    /// Optimizer steps of the run.
    pub(super) fn total_steps(&self) -> usize {
        self.epochs[self.epochs.len() - 1]
    }

    /// The epoch, from 0, that step `step` (from 0) is in.
    pub(super) fn epoch_of(&self, step: usize) -> usize {
        self.epochs.partition_point(|&first| first <= step) - 1
    }

    /// Optimizer steps of the epoch that step `step` is in.
    pub(super) fn steps_around(&self, step: usize) -> usize {
        let epoch = self.epoch_of(step);
        self.epochs[epoch + 1] - self.epochs[epoch]
    }

    /// True if `done` steps end an epoch.
    pub(super) fn ends_epoch(&self, done: usize) -> bool {
        self.epochs.binary_search(&done).is_ok()
    }

    /// The rows of step `step` (from 0), in the epoch's order.
    pub(super) fn rows_of(&mut self, step: usize) -> &[usize] {
        let epoch = self.epoch_of(step);
        let known = self.known.take().filter(|(known, _)| *known == epoch);
        let steps = known.unwrap_or_else(|| (epoch, self.steps_of(epoch)));
        &self.known.insert(steps).1[step - self.epochs[epoch]]
    }

    /// The most tokens that a pass of at most `pack_tokens` will have.
    pub(super) fn largest_pass(&self, pack_tokens: usize) -> usize {
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let mut longest_first = self.lengths.clone();
        longest_first.sort_unstable_by_key(|&length| std::cmp::Reverse(length));
        let step: usize = match self.batch {
            Batch::Rows(rows) => longest_first.iter().take(rows).sum(),
            Batch::Tokens(tokens) => tokens.min(self.lengths.iter().sum()).max(longest),
        };
        step.min(pack_tokens).max(longest)
    }

    fn steps_of(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut rows = epoch_order(self.lengths.len(), self.seed, epoch);
        if self.order == Order::Shuffled {
            return self.split(&rows);
        }
        let per_step = match self.batch {
            Batch::Rows(rows) => rows,
            Batch::Tokens(tokens) => tokens * rows.len() / self.lengths.iter().sum::<usize>().max(1),
        };
        for window in rows.chunks_mut((per_step * WINDOW_STEPS).max(1)) {
            window.sort_by_key(|&row| std::cmp::Reverse(self.lengths[row]));
        }
        let mut steps = self.split(&rows);
        Random::new(&[STEPS, self.seed, epoch as u64]).shuffle(&mut steps);
        steps
    }

    fn split(&self, rows: &[usize]) -> Vec<Vec<usize>> {
        let most = match self.batch {
            Batch::Rows(most) => return rows.chunks(most).map(<[usize]>::to_vec).collect(),
            Batch::Tokens(most) => most,
        };
        let (mut steps, mut filled): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
        for &row in rows {
            match steps.last_mut().filter(|_| filled + self.lengths[row] <= most) {
                Some(step) => step.push(row),
                None => {
                    steps.push(vec![row]);
                    filled = 0;
                }
            }
            filled += self.lengths[row];
        }
        steps
    }
}

/// The order of `rows` rows in epoch `epoch`: a permutation that depends on nothing else but the seed.
pub(super) fn epoch_order(rows: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows).collect();
    Random::new(&[SHUFFLE, seed, epoch as u64]).shuffle(&mut order);
    order
}

/// Groups rows of `lengths` tokens into packs of at most `pack_tokens`: best-fit decreasing, where each row goes to
/// the fullest pack that has room; equal lengths in their given order, equal packs by age. Each pack lists indices
/// into `lengths`; a row longer than a pack is alone in its own.
pub(super) fn pack(lengths: &[usize], pack_tokens: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for row in longest_first {
        let length = lengths[row];
        let fullest = rooms.range((length, 0)..).next().copied();
        let (room, pack) = fullest.unwrap_or_else(|| {
            packs.push(Vec::new());
            (pack_tokens.max(length), packs.len() - 1)
        });
        rooms.remove(&(room, pack));
        rooms.insert((room - length, pack));
        packs[pack].push(row);
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 23 rows of 1 to 9 tokens.
    fn lengths() -> Vec<usize> {
        (0..23).map(|row| 1 + row * 5 % 9).collect()
    }

    const BATCHES: [Batch; 3] = [Batch::Rows(4), Batch::Tokens(20), Batch::Tokens(1)];

    #[test]
    fn each_epoch_visits_every_row_once_in_another_order() {
        for (batch, order) in
            BATCHES.into_iter().flat_map(|batch| [(batch, Order::Shuffled), (batch, Order::ByLength)])
        {
            let mut plan = Plan::new(lengths(), batch, order, 2, 7);
            let first = plan.steps_around(0);
            assert!(
                plan.ends_epoch(first) && plan.ends_epoch(plan.total_steps()) && !plan.ends_epoch(first - 1)
            );
            let total = plan.total_steps();
            let mut epoch = |range: std::ops::Range<usize>| {
                range.flat_map(|step| plan.rows_of(step).to_vec()).collect::<Vec<_>>()
            };
            let (first, second) = (epoch(0..first), epoch(first..total));
            assert_ne!(first, second);
            for mut rows in [first, second] {
                rows.sort_unstable();
                assert_eq!(rows, (0..23).collect::<Vec<_>>());
            }
        }
        assert_eq!(Plan::new(lengths(), Batch::Rows(4), Order::Shuffled, 2, 7).total_steps(), 12);
    }

    #[test]
    fn a_step_of_tokens_has_no_more_than_asked_but_one_row() {
        let mut plan = Plan::new(lengths(), Batch::Tokens(20), Order::Shuffled, 3, 1);
        for step in 0..plan.total_steps() {
            let tokens: usize = plan.rows_of(step).iter().map(|&row| lengths()[row]).sum();
            assert!((1..=20).contains(&tokens), "step {step} has {tokens}");
        }
        assert_eq!(Plan::new(lengths(), Batch::Tokens(1), Order::Shuffled, 1, 1).total_steps(), 23);
    }

    #[test]
    fn rows_of_a_step_are_of_like_length_if_so_ordered() {
        let spread = |order| {
            let mut plan =
                Plan::new((0..400).map(|row| row * 37 % 101 + 1).collect(), Batch::Rows(8), order, 1, 1);
            let spreads = (0..plan.total_steps()).map(|step| {
                let lengths: Vec<usize> = plan.rows_of(step).iter().map(|&row| row * 37 % 101).collect();
                lengths.iter().max().unwrap() - lengths.iter().min().unwrap()
            });
            spreads.sum::<usize>()
        };
        assert!(spread(Order::ByLength) * 10 < spread(Order::Shuffled));
    }

    #[test]
    fn any_step_is_reached_without_its_predecessors() {
        for (batch, order) in
            BATCHES.into_iter().flat_map(|batch| [(batch, Order::Shuffled), (batch, Order::ByLength)])
        {
            let plan = || Plan::new(lengths(), batch, order, 3, 11);
            let mut walked = plan();
            let steps: Vec<Vec<usize>> =
                (0..walked.total_steps()).map(|step| walked.rows_of(step).to_vec()).collect();
            for step in (0..steps.len()).rev() {
                assert_eq!(plan().rows_of(step), steps[step]);
            }
        }
    }

    #[test]
    fn largest_pass_is_bounded_by_step_and_pack() {
        let plan = |batch| Plan::new(vec![5, 3, 9, 4], batch, Order::Shuffled, 1, 1);
        assert_eq!(plan(Batch::Rows(2)).largest_pass(100), 14);
        assert_eq!(plan(Batch::Rows(2)).largest_pass(10), 10);
        assert_eq!(plan(Batch::Tokens(12)).largest_pass(100), 12);
        assert_eq!(plan(Batch::Tokens(2)).largest_pass(100), 9);
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
    fn longest_rows_are_placed_first_and_the_tightest_gap_filled() {
        assert_eq!(pack(&[3, 7, 5, 2, 5], 10), vec![vec![1, 0], vec![2, 4], vec![3]]);
        // 3 fits beside 6 as well, where first-fit would put it.
        assert_eq!(pack(&[6, 7, 3, 4], 10), vec![vec![1, 2], vec![0, 3]]);
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
