//! What goes into a pass: sequences laid end to end, each with its own positions and its own attention. What all
//! of them begin with may stand before them once: its rows depend on nothing behind it, so they are the same for
//! all. Knows nothing of texts: which tokens are supervised is decided where examples are tokenised.
//!
//! ```text
//! sequences   S S u a a    S S u u a         rows   S S │ u a a │ u u a      starts 2, 5, 8
//!                                       positions   0 1 │ 2 3 4 │ 2 3 4
//! ```

use super::Noise;
use crate::backend::Span;

/// A common beginning stands once where it spares at least one row in so many: each sequence then has its keys and
/// values copied behind those of the beginning, about as much work as this share of attention.
const SPARED_SHARE: usize = 32;

/// Sequences of tokens, end to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Pack {
    /// Token ids of the beginning that all sequences share, if they do, and of the rest of each (T).
    pub tokens: Vec<u32>,
    /// First row of each sequence by itself, and T last: sequences + 1 numbers. The rows before the first are the
    /// shared beginning.
    pub starts: Vec<usize>,
    /// Of row t, the next token of its sequence if that one is supervised (T).
    pub targets: Vec<Option<u32>>,
    /// What a training pass disturbs on purpose.
    pub noise: Option<Noise>,
}

/// The loss of a pack.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PackLoss {
    /// Sum of negative log-likelihoods (nats) of the supervised targets.
    pub nll: f64,
    /// Their number.
    pub supervised: usize,
}

/// The loss of one sequence of a pack.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SequenceLoss {
    /// Sum of negative log-likelihoods (nats) of the supervised targets.
    pub nll: f64,
    /// Their number.
    pub supervised: usize,
}

impl Pack {
    /// Packs sequences of (tokens, whether each token is supervised). A sequence's first token is never a
    /// target, for nothing precedes it.
    pub fn new(sequences: &[(&[u32], &[bool])]) -> Self {
        Self::after(0, sequences)
    }

    /// [`Pack::new`] with what all sequences begin with only once, as far as none of it has a supervised target and
    /// each sequence keeps a token of its own. For models whose layers all attend, in passes without noise.
    pub(super) fn sharing(sequences: &[(&[u32], &[bool])]) -> Self {
        Self::after(common_beginning(sequences), sequences)
    }

    /// Packs sequences whose first `shared` tokens are the same.
    fn after(shared: usize, sequences: &[(&[u32], &[bool])]) -> Self {
        let beginning = sequences.first().map_or(&[][..], |(tokens, _)| &tokens[..shared]);
        let mut pack = Self {
            tokens: beginning.to_vec(),
            starts: vec![shared],
            targets: vec![None; shared],
            noise: None,
        };
        for (tokens, supervised) in sequences {
            assert_eq!(tokens.len(), supervised.len(), "BUG: one mark a token");
            pack.tokens.extend_from_slice(&tokens[shared..]);
            for next in shared + 1..=tokens.len() {
                let target = tokens.get(next).filter(|_| supervised[next]);
                pack.targets.push(target.copied());
            }
            pack.starts.push(pack.tokens.len());
        }
        pack
    }

    /// Rows of the beginning that all sequences share.
    pub(super) fn shared(&self) -> usize {
        self.starts[0]
    }

    /// Number of supervised targets.
    pub fn supervised(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    /// Rows that have a target, ascending.
    pub(super) fn supervised_rows(&self) -> Vec<usize> {
        (0..self.targets.len()).filter(|&row| self.targets[row].is_some()).collect()
    }

    /// The position of each row in its sequence, and one span a sequence after that of the shared beginning.
    pub(super) fn layout(&self) -> (Vec<usize>, Vec<Span>) {
        let shared = self.shared();
        let own = self.starts.windows(2).map(|pair| pair[0]..pair[1]);
        let positions = own.clone().flat_map(|rows| shared..shared + rows.len());
        let spans = own.map(|rows| Span { prefix: 0..shared, ..Span::whole(rows) });
        let spans = std::iter::once(Span::whole(0..shared)).chain(spans);
        ((0..shared).chain(positions).collect(), spans.filter(|span| !span.queries.is_empty()).collect())
    }

    /// Sums the losses of `rows` by sequence.
    pub(super) fn by_sequence(&self, rows: &[usize], losses: &[f64]) -> Vec<SequenceLoss> {
        let mut pairs = rows.iter().zip(losses).peekable();
        let ends = self.starts.iter().skip(1);
        ends.map(|&end| {
            let mut sum = SequenceLoss { nll: 0.0, supervised: 0 };
            while let Some((_, loss)) = pairs.next_if(|(row, _)| **row < end) {
                sum.nll += loss;
                sum.supervised += 1;
            }
            sum
        })
        .collect()
    }
}

/// Tokens that [`Pack::sharing`] packs once; 0 where that spares too little.
fn common_beginning(sequences: &[(&[u32], &[bool])]) -> usize {
    let Some(((first, _), others)) = sequences.split_first() else { return 0 };
    let agreed = |(tokens, _): &(&[u32], _)| first.iter().zip(*tokens).take_while(|(a, b)| a == b).count();
    let untargeted = |(tokens, supervised): &(&[u32], &[bool])| {
        let targets = supervised.iter().skip(1);
        targets.take_while(|target| !**target).count().min(tokens.len().saturating_sub(1))
    };
    let shared = others.iter().map(agreed).chain(sequences.iter().map(untargeted)).min().unwrap_or(0);
    let rows: usize = sequences.iter().map(|(tokens, _)| tokens.len()).sum();
    if shared * others.len() * SPARED_SHARE >= rows { shared } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_the_next_supervised_token_of_the_same_sequence() {
        let pack =
            Pack::new(&[(&[5, 6, 7], &[false, true, true]), (&[], &[]), (&[8, 9, 10], &[true, false, true])]);
        assert_eq!(pack.tokens, [5, 6, 7, 8, 9, 10]);
        assert_eq!(pack.starts, [0, 3, 3, 6]);
        assert_eq!(pack.targets, [Some(6), Some(7), None, None, Some(10), None]);
        let (positions, spans) = pack.layout();
        assert_eq!(positions, [0, 1, 2, 0, 1, 2]);
        assert_eq!(spans.len(), 2);
        let by_sequence = pack.by_sequence(&pack.supervised_rows(), &[1.0, 2.0, 4.0]);
        let sums: Vec<(f64, usize)> = by_sequence.iter().map(|loss| (loss.nll, loss.supervised)).collect();
        assert_eq!(sums, [(3.0, 2), (0.0, 0), (4.0, 1)]);
    }

    #[test]
    fn what_all_begin_with_stands_once() {
        let (a, b): ([u32; 5], [u32; 4]) = ([1, 1, 2, 6, 7], [1, 1, 2, 9]);
        let (later, last) = ([false, false, false, true, true], [true, false, false, true]);
        let pack = Pack::sharing(&[(&a, &later), (&b, &last)]);
        // The row of the third token has a target in both, so it stands twice.
        assert_eq!(pack.tokens, [1, 1, 2, 6, 7, 2, 9]);
        assert_eq!(pack.starts, [2, 5, 7]);
        assert_eq!(pack.targets, [None, None, Some(6), Some(7), None, Some(9), None]);
        let (positions, spans) = pack.layout();
        assert_eq!(positions, [0, 1, 2, 3, 4, 2, 3]);
        let prefix = |rows| Span { prefix: 0..2, ..Span::whole(rows) };
        assert_eq!(spans, [Span::whole(0..2), prefix(2..5), prefix(5..7)]);
        let losses = pack.by_sequence(&pack.supervised_rows(), &[1.0, 2.0, 4.0]);
        assert_eq!(losses.iter().map(|loss| loss.nll).collect::<Vec<_>>(), [3.0, 4.0]);
    }

    #[test]
    fn each_sequence_keeps_a_token_of_its_own() {
        let pack =
            Pack::sharing(&[(&[1, 2, 3], &[false; 3]), (&[1, 2], &[false; 2]), (&[1, 2], &[false; 2])]);
        assert_eq!((pack.tokens, pack.starts), (vec![1, 2, 3, 2, 2], vec![1, 3, 4, 5]));
    }

    #[test]
    fn sequences_without_a_beginning_worth_sharing_stay_whole() {
        let (long, marks): (Vec<u32>, _) = ((0..40).collect(), [false; 40]);
        let other: Vec<u32> = (0..1).chain(50..89).collect();
        let cases: [&[(&[u32], &[bool])]; 6] = [
            &[],
            &[(&long, &marks)],
            &[(&long, &marks), (&long[1..], &marks[1..])],
            &[(&long, &marks), (&other, &marks)],
            &[(&long, &marks), (&[], &[])],
            &[(&long, &[true; 40]), (&long, &marks)],
        ];
        for sequences in cases {
            assert_eq!(Pack::sharing(sequences), Pack::new(sequences));
        }
    }
}
