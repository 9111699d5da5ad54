//! Divides examples into train, validation and test without ever separating a group, and looks for test
//! questions that were trained on.
//!
//! Rows that share a group key, or whose questions are equal after normalising, form one component (union-find).
//! Components are put in the order of `blake3(seed, smallest group key)`, an order that knows nothing of the
//! rows' order or number; the first fill the test side, the next the validation side, the rest is train. So a
//! new row leaves every other component where it was, but for one at each border when the target sizes move.
//! Knows no file and no stage.

use std::collections::BTreeMap;

use super::Example;
use super::words::{normalised, word_shingles};

/// Words in one shingle of a question when looking for leaks.
const LEAK_WORDS: usize = 3;

/// A side of the split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    /// What is learnt.
    Train,
    /// What is watched while learning.
    Validation,
    /// What is asked at the end.
    Test,
}

/// What ties rows together.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GroupBy {
    /// The example's group: paraphrases of one fact, or the rows of one source.
    #[default]
    Fact,
    /// The file it came from, and the example's group too.
    Document,
    /// Nothing but an equal question.
    None,
}

/// Shares of the rows, and the seed of the division.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shares {
    /// 0 to 1.
    pub(crate) validation: f64,
    /// 0 to 1.
    pub(crate) test: f64,
    /// Another seed is another division.
    pub(crate) seed: u64,
}

/// The division of a table.
#[derive(Debug)]
pub(crate) struct Division {
    /// The side of each row.
    pub(crate) sides: Vec<Side>,
    /// How many components there were.
    pub(crate) groups: usize,
}

/// Why a table cannot be divided.
#[derive(Debug, thiserror::Error)]
#[error("{rows} rows in {groups} groups are too few for a {side} share of {share}")]
pub(crate) struct TooFewGroups {
    rows: usize,
    groups: usize,
    side: &'static str,
    share: f64,
}

/// Divides the rows. Order of rows changes nothing; an error where a wanted side would stay empty.
pub(crate) fn divide(
    examples: &[Example],
    group_by: GroupBy,
    shares: Shares,
) -> Result<Division, TooFewGroups> {
    let mut components: Vec<(blake3::Hash, Vec<usize>)> = components(examples, group_by)
        .into_iter()
        .map(|(key, rows)| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&shares.seed.to_le_bytes()).update(key.as_bytes());
            (hasher.finalize(), rows)
        })
        .collect();
    components.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
    let mut sides = vec![Side::Train; examples.len()];
    let mut next = components.iter().peekable();
    for (side, name, share) in
        [(Side::Test, "test", shares.test), (Side::Validation, "validation", shares.validation)]
    {
        let target = share * examples.len() as f64;
        let mut taken = 0;
        // A component that alone is more than twice the side stays in train: taking it would turn the shares over.
        while let Some((_, rows)) = next.next_if(|(_, rows)| {
            let size = rows.len() as f64;
            share > 0.0 && (size > 2.0 * target.max(1.0) || taken as f64 + size / 2.0 <= target || taken == 0)
        }) {
            if rows.len() as f64 <= 2.0 * target.max(1.0) {
                taken += rows.len();
                rows.iter().for_each(|row| sides[*row] = side);
            }
        }
        if share > 0.0 && taken == 0 {
            return Err(TooFewGroups { rows: examples.len(), groups: components.len(), side: name, share });
        }
    }
    if !sides.contains(&Side::Train) {
        let share = 1.0 - shares.test - shares.validation;
        return Err(TooFewGroups { rows: examples.len(), groups: components.len(), side: "train", share });
    }
    Ok(Division { sides, groups: components.len() })
}

/// Rows that must stay together, by the smallest of their keys.
fn components(examples: &[Example], group_by: GroupBy) -> BTreeMap<String, Vec<usize>> {
    let mut parents: Vec<usize> = (0..examples.len()).collect();
    let mut owners: BTreeMap<String, usize> = BTreeMap::new();
    let mut smallest: Vec<String> = Vec::with_capacity(examples.len());
    for (row, example) in examples.iter().enumerate() {
        let mut keys: Vec<String> = match group_by {
            GroupBy::Fact => vec![format!("group:{}", example.group)],
            GroupBy::Document => {
                let files = documents(example).into_iter().map(|file| format!("document:{file}"));
                files.chain([format!("group:{}", example.group)]).collect()
            }
            GroupBy::None => Vec::new(),
        };
        keys.push(format!("question:{}", normalised(&example.asked())));
        for key in &keys {
            let owner = *owners.entry(key.clone()).or_insert(row);
            let (a, b) = (root(&mut parents, owner), root(&mut parents, row));
            parents[a.max(b)] = a.min(b);
        }
        smallest.push(keys.into_iter().min().unwrap_or_default());
    }
    let mut by_root: BTreeMap<usize, (String, Vec<usize>)> = BTreeMap::new();
    for (row, key) in smallest.into_iter().enumerate() {
        let entry = by_root.entry(root(&mut parents, row)).or_insert_with(|| (key.clone(), Vec::new()));
        if key < entry.0 {
            entry.0 = key;
        }
        entry.1.push(row);
    }
    by_root.into_values().collect()
}

fn root(parents: &mut [usize], mut row: usize) -> usize {
    while parents[row] != row {
        parents[row] = parents[parents[row]];
        row = parents[row];
    }
    row
}

/// The files behind an example: `a.pdf` for the chunk `a.pdf#page=3@120`.
fn documents(example: &Example) -> Vec<&str> {
    let file = |chunk: &'_ str| -> usize {
        let document = chunk.rfind('@').unwrap_or(chunk.len());
        chunk[..document].rfind("#page=").unwrap_or(document)
    };
    example.provenance.chunks.iter().map(|chunk| &chunk[..file(chunk)]).collect()
}

/// Word 3-gram similarity from which a test question counts as close to a training question.
pub(crate) const NEAR: f64 = 0.7;

/// How close a test question comes to the training questions.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Closeness {
    /// A training row with the same normalised question.
    pub(crate) equal: Option<usize>,
    /// The training row with the largest overlap of word 3-grams, and that Jaccard index.
    pub(crate) nearest: Option<(usize, f64)>,
}

/// For each test row, how close the training rows come to its question.
pub(crate) fn closeness(train: &[&Example], test: &[&Example]) -> Vec<Closeness> {
    let mut questions: BTreeMap<String, usize> = BTreeMap::new();
    let mut holders: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    let mut sizes = Vec::with_capacity(train.len());
    for (row, example) in train.iter().enumerate() {
        let question = normalised(&example.asked());
        let shingles = word_shingles(&question, LEAK_WORDS);
        sizes.push(shingles.len());
        for shingle in shingles {
            holders.entry(shingle).or_default().push(row);
        }
        questions.entry(question).or_insert(row);
    }
    test.iter()
        .map(|example| {
            let question = normalised(&example.asked());
            let shingles = word_shingles(&question, LEAK_WORDS);
            let mut shared: BTreeMap<usize, usize> = BTreeMap::new();
            for row in shingles.iter().filter_map(|shingle| holders.get(shingle)).flatten() {
                *shared.entry(*row).or_default() += 1;
            }
            let mut nearest: Option<(usize, f64)> = None;
            for (row, shared) in shared {
                let similarity = shared as f64 / (shingles.len() + sizes[row] - shared) as f64;
                if nearest.is_none_or(|(_, best)| similarity > best) {
                    nearest = Some((row, similarity));
                }
            }
            Closeness { equal: questions.get(&question).copied(), nearest }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::words::mixed;
    use crate::corpus::{Message, Provenance};

    fn example(id: usize, question: &str, group: &str, chunk: &str) -> Example {
        Example {
            id: id.to_string(),
            messages: vec![
                Message { role: "user".to_owned(), content: question.to_owned() },
                Message { role: "assistant".to_owned(), content: "answer".to_owned() },
            ],
            group: group.to_owned(),
            tags: Vec::new(),
            key_facts: Vec::new(),
            provenance: Provenance { chunks: vec![chunk.to_owned()], ..Provenance::default() },
        }
    }

    fn random_table(seed: u64, rows: u64) -> Vec<Example> {
        (0..rows)
            .map(|row| {
                let random = mixed(mixed(seed) ^ row);
                let group = format!("fact-{}", random % (rows / 3 + 1));
                let question = format!("question {}", (random >> 20) % (rows * 2));
                let chunk = format!("n{}.pdf#page={}@{row}", (random >> 40) % (rows / 2 + 1), random % 9);
                example(usize::try_from(row).unwrap(), &question, &group, &chunk)
            })
            .collect()
    }

    const SHARES: Shares = Shares { validation: 0.1, test: 0.1, seed: 7 };

    #[test]
    fn no_group_and_no_question_is_ever_separated() {
        for seed in 0..60 {
            let table = random_table(seed, 60 + seed * 3);
            for group_by in [GroupBy::Fact, GroupBy::None] {
                let Ok(division) = divide(&table, group_by, Shares { seed, ..SHARES }) else { continue };
                let mut sides: BTreeMap<String, Side> = BTreeMap::new();
                for (example, side) in table.iter().zip(&division.sides) {
                    let mut keys = vec![format!("q{}", example.question())];
                    if group_by == GroupBy::Fact {
                        keys.push(format!("g{}", example.group));
                    }
                    for key in keys {
                        assert_eq!(
                            *sides.entry(key.clone()).or_insert(*side),
                            *side,
                            "{key} with seed {seed}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn documents_stay_together_across_pages() {
        let table: Vec<Example> = (0..40)
            .map(|row| {
                let chunk = format!("notes/{}.pdf#page={}@0", row / 4, row % 4);
                example(row, &format!("q{row}"), &format!("g{row}"), &chunk)
            })
            .collect();
        let division = divide(&table, GroupBy::Document, SHARES).unwrap();
        assert_eq!(division.groups, 10);
        for pages in division.sides.chunks(4) {
            assert!(pages.iter().all(|side| *side == pages[0]));
        }
    }

    #[test]
    fn order_of_rows_changes_nothing() {
        let table = random_table(3, 120);
        let mut shuffled = table.clone();
        shuffled.sort_by_key(|example| mixed(example.id.parse().unwrap()));
        let side_of = |table: &[Example]| -> BTreeMap<String, Side> {
            let division = divide(table, GroupBy::Fact, SHARES).unwrap();
            table.iter().map(|example| example.id.clone()).zip(division.sides).collect()
        };
        assert_eq!(side_of(&table), side_of(&shuffled));
    }

    #[test]
    fn a_new_row_moves_at_most_a_group_at_each_border() {
        let table: Vec<Example> =
            (0..300).map(|row| example(row, &format!("q{row}"), &format!("g{}", row / 3), "n@0")).collect();
        let before = divide(&table, GroupBy::Fact, SHARES).unwrap().sides;
        for extra in 0..50 {
            let mut larger = table.clone();
            larger.push(example(1000, "new question", &format!("new-{extra}"), "n@0"));
            let after = divide(&larger, GroupBy::Fact, SHARES).unwrap().sides;
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
            assert!(moved <= 6, "{moved} rows moved");
        }
    }

    #[test]
    fn shares_are_met_and_seeds_differ() {
        let table = random_table(11, 900);
        let sides = divide(&table, GroupBy::None, SHARES).unwrap().sides;
        for side in [Side::Validation, Side::Test] {
            let count = sides.iter().filter(|other| **other == side).count();
            assert!((85..=95).contains(&count), "{side:?} {count}");
        }
        assert_ne!(sides, divide(&table, GroupBy::None, Shares { seed: 8, ..SHARES }).unwrap().sides);
    }

    #[test]
    fn too_few_groups_are_an_error() {
        let table: Vec<Example> = (0..9).map(|row| example(row, &format!("q{row}"), "one", "n@0")).collect();
        let error = divide(&table, GroupBy::Fact, SHARES).unwrap_err();
        assert_eq!(error.to_string(), "9 rows in 1 groups are too few for a test share of 0.1");
        let pair: Vec<Example> =
            (0..2).map(|row| example(row, &format!("q{row}"), &format!("{row}"), "n")).collect();
        assert!(divide(&pair, GroupBy::Fact, SHARES).unwrap_err().to_string().contains("train"));
    }

    #[test]
    fn equal_and_near_questions_are_found() {
        let train =
            [example(0, "When does the review take place?", "a", "n"), example(1, "Who leads it?", "b", "n")];
        let test = [
            example(2, "when does the review take place", "c", "n"),
            example(3, "When does the review take place now?", "c", "n"),
            example(4, "Why is the sky blue?", "c", "n"),
        ];
        let found = closeness(&train.each_ref(), &test.each_ref());
        assert_eq!(found[0], Closeness { equal: Some(0), nearest: Some((0, 1.0)) });
        assert_eq!(found[1], Closeness { equal: None, nearest: Some((0, 0.8)) });
        assert_eq!(found[2], Closeness { equal: None, nearest: None });
    }
}
