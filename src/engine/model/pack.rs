//! What goes into a pass: sequences laid end to end, each with its own positions and its own attention.
//! Knows nothing of texts: which tokens are supervised is decided where examples are tokenised.

use super::Noise;
use crate::backend::Span;

/// Sequences of tokens, end to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Pack {
    /// Token ids of all sequences (T).
    pub tokens: Vec<u32>,
    /// First token of each sequence, and T last: sequences + 1 numbers.
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
        let mut pack = Self { tokens: Vec::new(), starts: vec![0], targets: Vec::new(), noise: None };
        for (tokens, supervised) in sequences {
            assert_eq!(tokens.len(), supervised.len(), "BUG: one mark a token");
            pack.tokens.extend_from_slice(tokens);
            for next in 1..=tokens.len() {
                let target = tokens.get(next).filter(|_| supervised[next]);
                pack.targets.push(target.copied());
            }
            pack.starts.push(pack.tokens.len());
        }
        pack
    }

    /// Number of supervised targets.
    pub fn supervised(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    /// Rows that have a target, ascending.
    pub(super) fn supervised_rows(&self) -> Vec<usize> {
        (0..self.targets.len()).filter(|&row| self.targets[row].is_some()).collect()
    }

    /// The position of each row in its sequence, and one span a sequence.
    pub(super) fn layout(&self) -> (Vec<usize>, Vec<Span>) {
        let ranges = self.starts.windows(2).map(|pair| pair[0]..pair[1]);
        let positions = ranges.clone().flat_map(|range| 0..range.len()).collect();
        let spans = ranges.filter(|range| !range.is_empty());
        (positions, spans.map(|range| Span { queries: range.clone(), keys: range }).collect())
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
}
