//! The sequences of a pack as kernels want them.

use std::ops::Range;

/// Sequences one after the other; `lengths` may hold zeros.
pub(crate) fn spans(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut start = 0;
    let span = |&length: &usize| {
        start += length;
        start - length..start
    };
    lengths.iter().map(span).collect()
}

/// `struct Span` of each: queries, keys, an empty prefix.
pub(crate) fn words(spans: &[Range<usize>]) -> Vec<i32> {
    spans
        .iter()
        .flat_map(|span| [span.start, span.end, span.start, span.end, 0, 0])
        .map(|row| row as i32)
        .collect()
}

/// (span, first row within it) of every `rows` rows of every span.
pub(crate) fn tiles(spans: &[Range<usize>], rows: usize) -> Vec<i32> {
    let tiles = |(index, span): (usize, &Range<usize>)| {
        (0..span.len()).step_by(rows).flat_map(move |first| [index as i32, first as i32]).collect::<Vec<_>>()
    };
    spans.iter().enumerate().flat_map(tiles).collect()
}
