//! Finds examples that say again what an earlier one said.
//!
//! The rule: two examples are *exact* duplicates when question and answer are equal after normalising, and
//! *near* duplicates when their questions' character 5-grams overlap by at least the threshold, their answers'
//! by at least [`ANSWERS_ALIKE`], and both hold the same numbers. So paraphrases of one fact (one answer, other
//! questions) stay, `revenue in 2021` never swallows `revenue in 2022`, and one question with two different
//! answers stays for `validate` to call a conflict.
//!
//! MinHash signatures in bands (Broder 1997; Indyk and Motwani 1998) propose pairs, the exact Jaccard index
//! decides. Knows no file and no stage.

use std::collections::{BTreeMap, BTreeSet};

use super::Example;
use super::words::{character_shingles, jaccard, mixed, normalised, quantities};

/// How much the answers of near duplicates must overlap.
pub(crate) const ANSWERS_ALIKE: f64 = 0.5;
const SHINGLE_CHARACTERS: usize = 5;
const HASHES: usize = 128;
/// Earlier examples of one band's bucket that a new one is compared with: bounds the work on a table in which
/// every question is the same, at the price of missing some near duplicates there.
const COMPARED_PER_BUCKET: usize = 64;

/// An example that repeats an earlier one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Duplicate {
    /// Index of the example.
    pub(crate) row: usize,
    /// Index of the earlier example that stays.
    pub(crate) kept: usize,
    /// Jaccard index of the questions; 1 for exact duplicates.
    pub(crate) similarity: f64,
    /// How they are alike.
    pub(crate) kind: Likeness,
}

/// How two examples are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Likeness {
    /// Equal after normalising.
    Exact,
    /// Almost the same words.
    Near,
}

/// What of an example is compared.
struct Fingerprint {
    question: Vec<u64>,
    answer: Vec<u64>,
    numbers: [BTreeSet<String>; 2],
}

/// The examples that repeat an earlier one, in order. `threshold` is the Jaccard index of the questions.
pub(crate) fn duplicates(examples: &[Example], threshold: f64, exact: bool) -> Vec<Duplicate> {
    let mut found = Vec::new();
    let mut seen: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut index = NearIndex::new(threshold);
    let mut kept: BTreeMap<usize, Fingerprint> = BTreeMap::new();
    for (row, example) in examples.iter().enumerate() {
        let (question, answer) = (normalised(&example.asked()), normalised(example.answer()));
        if exact {
            if let Some(&kept) = seen.get(&(question.clone(), answer.clone())) {
                found.push(Duplicate { row, kept, similarity: 1.0, kind: Likeness::Exact });
                continue;
            }
            seen.insert((question.clone(), answer.clone()), row);
        }
        let print = Fingerprint {
            question: character_shingles(&question, SHINGLE_CHARACTERS),
            answer: character_shingles(&answer, SHINGLE_CHARACTERS),
            numbers: [numbers(&example.asked()), numbers(example.answer())],
        };
        let candidates = index.candidates_then_add(row, &print.question);
        let earlier = candidates.into_iter().find_map(|candidate| {
            let other = kept.get(&candidate)?;
            let similarity = jaccard(&print.question, &other.question);
            let alike = similarity >= threshold
                && print.numbers == other.numbers
                && jaccard(&print.answer, &other.answer) >= ANSWERS_ALIKE;
            alike.then_some((candidate, similarity))
        });
        match earlier {
            Some((kept, similarity)) => {
                found.push(Duplicate { row, kept, similarity, kind: Likeness::Near });
            }
            None => {
                kept.insert(row, print);
            }
        }
    }
    found
}

fn numbers(text: &str) -> BTreeSet<String> {
    quantities(text).into_iter().flat_map(|quantity| quantity.values).collect()
}

/// The smallest value of each of [`HASHES`] hash functions over a set: equal in as large a share of places as
/// the sets' Jaccard index.
pub(crate) fn signature(shingles: &[u64]) -> [u64; HASHES] {
    let mut smallest = [u64::MAX; HASHES];
    for shingle in shingles {
        for (place, value) in smallest.iter_mut().enumerate() {
            *value = (*value).min(mixed(shingle ^ mixed(place as u64 + 1)));
        }
    }
    smallest
}

/// Proposes earlier sets that are likely to be as similar as the threshold.
pub(crate) struct NearIndex {
    /// Hashes a band; the bands' number is [`HASHES`] over it.
    rows_per_band: usize,
    buckets: BTreeMap<(usize, u64), Vec<usize>>,
}

impl NearIndex {
    /// The longest bands that still propose a pair *at* the threshold with a probability of 0.99.
    pub(crate) fn new(threshold: f64) -> Self {
        let proposes = |rows: usize| {
            1.0 - (1.0 - threshold.powi(i32::try_from(rows).unwrap_or(i32::MAX))).powf((HASHES / rows) as f64)
        };
        let rows_per_band = [32, 16, 8, 4, 2].into_iter().find(|rows| proposes(*rows) >= 0.99).unwrap_or(1);
        Self { rows_per_band, buckets: BTreeMap::new() }
    }

    /// The earlier items that share a band with this set, in order; then adds the set as `item`.
    pub(crate) fn candidates_then_add(&mut self, item: usize, shingles: &[u64]) -> BTreeSet<usize> {
        let mut candidates = BTreeSet::new();
        for (band, part) in signature(shingles).chunks(self.rows_per_band).enumerate() {
            let digest = part.iter().fold(band as u64, |state, value| mixed(state ^ value));
            let bucket = self.buckets.entry((band, digest)).or_default();
            candidates.extend(bucket.iter().copied());
            if bucket.len() < COMPARED_PER_BUCKET {
                bucket.push(item);
            }
        }
        candidates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::{Message, Provenance};

    fn example(question: &str, answer: &str) -> Example {
        let message =
            |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
        Example {
            id: question.to_owned(),
            messages: vec![message("user", question), message("assistant", answer)],
            group: "g".to_owned(),
            tags: Vec::new(),
            key_facts: Vec::new(),
            provenance: Provenance::default(),
        }
    }

    fn check(rows: &[(&str, &str)], expected: &[(usize, usize, Likeness)]) {
        let examples: Vec<Example> =
            rows.iter().map(|(question, answer)| example(question, answer)).collect();
        let found: Vec<_> = duplicates(&examples, 0.85, true)
            .into_iter()
            .map(|duplicate| (duplicate.row, duplicate.kept, duplicate.kind))
            .collect();
        assert_eq!(found, expected);
    }

    const ANSWER: &str = "The weekly operating review runs on Tuesdays at 09:30 for 45 minutes.";

    #[test]
    fn case_and_punctuation_make_no_new_example() {
        check(
            &[
                ("When does the weekly operating review take place?", ANSWER),
                ("when does the weekly Operating Review take place", ANSWER),
            ],
            &[(1, 0, Likeness::Exact)],
        );
    }

    #[test]
    fn one_changed_letter_is_a_near_duplicate() {
        check(
            &[
                ("When does the weekly operating review of the company take place?", ANSWER),
                ("When does the weekly operating reviews of the company take place?", ANSWER),
            ],
            &[(1, 0, Likeness::Near)],
        );
    }

    #[test]
    fn paraphrases_of_one_fact_survive() {
        check(
            &[
                ("When does the weekly operating review take place?", ANSWER),
                ("Which day and time did Dana pick for the operating review?", ANSWER),
                ("I need to book the room for the weekly operating review; what slot is it?", ANSWER),
            ],
            &[],
        );
    }

    #[test]
    fn another_year_is_another_question() {
        check(
            &[
                (
                    "What was the annual recurring revenue of the whole company at the end of 2021?",
                    "It was $3m.",
                ),
                (
                    "What was the annual recurring revenue of the whole company at the end of 2022?",
                    "It was $3m.",
                ),
            ],
            &[],
        );
    }

    #[test]
    fn one_question_with_two_answers_is_a_conflict_and_stays() {
        check(
            &[("How old is Biscuit the dog?", "Four."), ("How old is Biscuit the dog?", "Eleven years.")],
            &[],
        );
    }

    fn random_set(seed: u64, size: u64, universe: u64) -> Vec<u64> {
        let mut set: Vec<u64> = (0..size).map(|at| mixed(mixed(seed) ^ at) % universe).map(mixed).collect();
        set.sort_unstable();
        set.dedup();
        set
    }

    #[test]
    fn signatures_estimate_the_exact_jaccard_index() {
        for seed in 0..200 {
            let a = random_set(seed, 10 + seed % 90, 120);
            let b = random_set(seed + 1000, 10 + seed * 7 % 90, 120);
            let exact = jaccard(&a, &b);
            let (one, two) = (signature(&a), signature(&b));
            let estimate = one.iter().zip(&two).filter(|(x, y)| x == y).count() as f64 / HASHES as f64;
            let deviation = (exact * (1.0 - exact) / HASHES as f64).sqrt();
            assert!((estimate - exact).abs() <= 4.5 * deviation + 1e-9, "{seed}: {estimate} against {exact}");
        }
    }

    #[test]
    fn the_index_proposes_what_brute_force_finds() {
        let base = random_set(7, 200, 1 << 40);
        let sets: Vec<Vec<u64>> = (0..60)
            .map(|at| {
                let mut set = base[at..at + 100].to_vec();
                set.sort_unstable();
                set
            })
            .collect();
        for threshold in [0.5, 0.7, 0.85, 0.95] {
            let mut index = NearIndex::new(threshold);
            let (mut wanted, mut proposed) = (0, 0);
            for (item, set) in sets.iter().enumerate() {
                let candidates = index.candidates_then_add(item, set);
                for (earlier, other) in sets[..item].iter().enumerate() {
                    if jaccard(set, other) >= threshold {
                        wanted += 1;
                        proposed += usize::from(candidates.contains(&earlier));
                    }
                }
            }
            assert!(wanted > 50 && proposed * 100 >= wanted * 99, "{threshold}: {proposed} of {wanted}");
        }
    }
}
