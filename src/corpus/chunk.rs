//! Cuts a document into passages that fit a token budget. Every passage is an exact byte range of the text.
//!
//! Text is seen as *units*: headings, paragraphs, list items, code blocks; a paragraph over the budget becomes its
//! sentences, a sentence over the budget its words. Units are packed in order. A heading of level 1 or 2 starts a
//! new passage, unless what it heads or what came before is too small to stand alone; a heading never ends one.
//! Knows no file and no stage; what a token is comes in as a [`TokenCounter`].

use std::ops::Range;

pub(crate) mod sentences;
pub(crate) mod tokens;
mod units;

use tokens::TokenCounter;
use units::{Unit, UnitKind};

/// How to cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Tokens of a passage at most; only a single word over it goes beyond.
    pub(crate) tokens_max: usize,
    /// Passages below this are joined to a neighbour where both fit the budget.
    pub(crate) tokens_min: usize,
    /// Sentences repeated from the passage before, within a section.
    pub(crate) overlap_sentences: usize,
}

/// One passage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Passage {
    /// Byte range in the text.
    pub(crate) span: Range<usize>,
    /// The headings its first text stands under, outermost first.
    pub(crate) headings: Vec<String>,
    /// Its length in tokens.
    pub(crate) tokens: usize,
}

/// Passages of `text`, in order; together they hold all of its text but trailing headings that head nothing.
pub(crate) fn cut(text: &str, budget: Budget, counter: &TokenCounter) -> Vec<Passage> {
    let units = units::of(text, budget.tokens_max, counter);
    let packer = Packer { text, units: &units, budget, counter };
    let mut runs = Vec::new();
    for (section, units) in packer.sections().into_iter().enumerate() {
        packer.pack(section, units, &mut runs);
    }
    let runs = packer.join_small(runs);
    runs.into_iter().map(|run| packer.passage(&run)).collect()
}

/// A run of units, and where its text begins: at its first unit, or earlier by the overlap.
#[derive(Debug, Clone)]
struct Run {
    units: Range<usize>,
    start: usize,
    section: usize,
    /// Holds all text of its section.
    is_whole: bool,
}

struct Packer<'a> {
    text: &'a str,
    units: &'a [Unit],
    budget: Budget,
    counter: &'a TokenCounter,
}

impl Packer<'_> {
    /// The units from one heading of level 1 or 2 to the next; headings without text go with what follows.
    fn sections(&self) -> Vec<Range<usize>> {
        let mut sections = Vec::new();
        let mut start = 0;
        let mut has_text = false;
        for (index, unit) in self.units.iter().enumerate() {
            match unit.kind {
                UnitKind::Heading(level) if level <= 2 && has_text => {
                    sections.push(start..index);
                    start = index;
                    has_text = false;
                }
                UnitKind::Heading(_) => {}
                UnitKind::Text => has_text = true,
            }
        }
        if has_text {
            sections.push(start..self.units.len());
        }
        sections
    }

    fn pack(&self, section: usize, units: Range<usize>, runs: &mut Vec<Run>) {
        let runs_before = runs.len();
        let mut run = Run {
            section,
            is_whole: false,
            start: self.units[units.start].span.start,
            units: units.start..units.start,
        };
        for index in units.clone() {
            if self.tokens(run.start, index + 1) > self.budget.tokens_max {
                let end = self.without_trailing_headings(&run.units);
                if end > run.units.start {
                    let start = self.overlapped_start(&units, end, index + 1, run.start);
                    runs.push(Run { units: run.units.start..end, ..run });
                    run = Run { units: end..index, start, ..run };
                }
                // Headings that leave no room for the text below them are only named, not repeated.
                while run.units.start < index && self.tokens(run.start, index + 1) > self.budget.tokens_max {
                    run.units.start += 1;
                    run.start = self.units[run.units.start].span.start;
                }
            }
            run.units.end = index + 1;
        }
        let end = self.without_trailing_headings(&run.units);
        if end > run.units.start {
            let is_whole = runs.len() == runs_before;
            runs.push(Run { units: run.units.start..end, is_whole, ..run });
        }
    }

    fn without_trailing_headings(&self, units: &Range<usize>) -> usize {
        let is_text = |unit: &Unit| unit.kind == UnitKind::Text;
        units.clone().rfind(|index| is_text(&self.units[*index])).map_or(units.start, |last| last + 1)
    }

    /// Where a passage whose first unit is `first` begins, if sentences before it are repeated and everything up
    /// to unit `end` still fits. Never at or before the start of the passage before, so starts stay distinct.
    fn overlapped_start(
        &self,
        section: &Range<usize>,
        first: usize,
        end: usize,
        start_before: usize,
    ) -> usize {
        let plain = self.units[first].span.start;
        let floor = self.units[section.start].span.start.max(start_before + 1);
        let mut starts = self.units[section.start..first]
            .iter()
            .rev()
            .take_while(|unit| unit.kind == UnitKind::Text)
            .flat_map(|unit| {
                let base = unit.span.start;
                let mut starts = sentences::split(&self.text[unit.span.clone()])
                    .into_iter()
                    .map(|sentence| base + sentence.start)
                    .collect::<Vec<_>>();
                starts.reverse();
                starts
            })
            .take(self.budget.overlap_sentences)
            .take_while(|start| *start >= floor && self.tokens(*start, end) <= self.budget.tokens_max)
            .collect::<Vec<_>>();
        starts.pop().unwrap_or(plain)
    }

    /// Joins runs below the minimum to the one before where that fits, else to the one after. Only a section that
    /// is small as a whole crosses into another.
    fn join_small(&self, runs: Vec<Run>) -> Vec<Run> {
        let mut out: Vec<Run> = Vec::with_capacity(runs.len());
        for run in runs {
            if let Some(before) = out.last_mut() {
                let is_one_section = before.section == run.section;
                let may_join =
                    [&*before, &run].iter().any(|run| self.is_small(run) && (run.is_whole || is_one_section));
                if may_join && self.tokens(before.start, run.units.end) <= self.budget.tokens_max {
                    before.units.end = run.units.end;
                    before.section = run.section;
                    before.is_whole &= run.is_whole;
                    continue;
                }
            }
            out.push(run);
        }
        out
    }

    fn is_small(&self, run: &Run) -> bool {
        self.tokens(run.start, run.units.end) < self.budget.tokens_min
    }

    /// Tokens from byte `start` to the end of the unit before unit `end`.
    fn tokens(&self, start: usize, end: usize) -> usize {
        self.counter.count(&self.text[start..self.units[end - 1].span.end])
    }

    fn passage(&self, run: &Run) -> Passage {
        let span = run.start..self.units[run.units.end - 1].span.end;
        Passage {
            headings: self.headings_above(run),
            tokens: self.counter.count(&self.text[span.clone()]),
            span,
        }
    }

    /// The headings in force at the first text of a run.
    fn headings_above(&self, run: &Run) -> Vec<String> {
        let first_text =
            self.units.iter().position(|unit| unit.kind == UnitKind::Text && unit.span.end > run.start);
        let mut path: Vec<(u8, String)> = Vec::new();
        for unit in &self.units[..first_text.unwrap_or(0)] {
            if let UnitKind::Heading(level) = unit.kind {
                path.retain(|(above, _)| *above < level);
                path.push((level, self.text[unit.span.clone()].trim_start_matches('#').trim().to_owned()));
            }
        }
        path.into_iter().map(|(_, heading)| heading).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn budget(tokens_max: usize, tokens_min: usize, overlap_sentences: usize) -> Budget {
        Budget { tokens_max, tokens_min, overlap_sentences }
    }

    fn texts(text: &str, budget: Budget) -> Vec<&str> {
        cut(text, budget, &TokenCounter::Approximate).into_iter().map(|passage| &text[passage.span]).collect()
    }

    #[test]
    fn a_short_note_is_one_passage() {
        let note = "# Leave\n\nAsk Ann first.\n\nThen fill the form.";
        assert_eq!(texts(note, budget(320, 24, 0)), [note]);
    }

    #[test]
    fn a_section_starts_a_new_passage() {
        let note =
            "# A\n\nOne two three four five.\n\n## B\n\nSix seven eight nine ten.\n\n### C\n\nEleven twelve.";
        assert_eq!(
            texts(note, budget(40, 4, 0)),
            [
                "# A\n\nOne two three four five.",
                "## B\n\nSix seven eight nine ten.\n\n### C\n\nEleven twelve."
            ]
        );
    }

    #[test]
    fn small_sections_join_their_neighbours() {
        let note = "# A\n\nOne.\n\n## B\n\nTwo.\n\n## C\n\nThree.";
        assert_eq!(texts(note, budget(40, 24, 0)), [note]);
    }

    #[test]
    fn a_title_without_text_goes_with_what_follows() {
        let note = "# Title\n\n## Part\n\nSome words here to read.\n\n## Nothing below";
        assert_eq!(texts(note, budget(40, 1, 0)), ["# Title\n\n## Part\n\nSome words here to read."]);
    }

    #[test]
    fn a_heading_never_ends_a_passage() {
        let note = "One two three four five six seven.\n\n### Next\n\nEight nine ten eleven twelve.";
        assert_eq!(
            texts(note, budget(10, 1, 0)),
            ["One two three four five six seven.", "### Next\n\nEight nine ten eleven twelve."]
        );
    }

    #[test]
    fn long_paragraphs_are_cut_at_sentences() {
        let note = "Mr. Lee said so today. It was a good day. We go on now.";
        assert_eq!(
            texts(note, budget(8, 1, 0)),
            ["Mr. Lee said so today.", "It was a good day.", "We go on now."]
        );
    }

    #[test]
    fn overlap_repeats_sentences_within_a_section() {
        let note = "One is here. Two is here. Three is here. Four is here.";
        assert_eq!(
            texts(note, budget(8, 1, 1)),
            ["One is here. Two is here.", "Two is here. Three is here.", "Three is here. Four is here."]
        );
    }

    #[test]
    fn small_tails_join_the_passage_before() {
        let note = "One two three four five six.\n\nSeven.";
        assert_eq!(texts(note, budget(12, 4, 0)), [note]);
        assert_eq!(texts(note, budget(8, 4, 0)).len(), 2);
    }

    #[test]
    fn passages_name_the_headings_above_them() {
        let note = "# A\n\n## B\n\nOne two three four.\n\n## C\n\n### D\n\nFive six seven eight.";
        let passages = cut(note, budget(12, 1, 0), &TokenCounter::Approximate);
        assert_eq!(passages[0].headings, ["A", "B"]);
        assert_eq!(passages[1].headings, ["A", "C", "D"]);
    }

    #[test]
    fn a_hash_inside_code_is_no_heading() {
        let note = "Run it:\n\n```\n# not a heading\nls\n```\n\nDone now.";
        assert_eq!(texts(note, budget(320, 1, 0)), [note]);
    }

    fn note() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            4 => "[a-zA-Zäß]{1,12}[.,!?]?",
            1 => Just("e.g.".to_owned()),
            1 => Just("会议。".to_owned()),
            1 => "[a-z]{30,60}",
        ];
        let line = proptest::collection::vec(word, 1..14).prop_map(|words| words.join(" "));
        let block = prop_oneof![
            4 => line.clone(),
            1 => line.clone().prop_map(|text| format!("# {text}")),
            1 => line.clone().prop_map(|text| format!("### {text}")),
            1 => proptest::collection::vec(line.clone(), 1..5).prop_map(|lines| format!("- {}", lines.join("\n- "))),
            1 => line.prop_map(|text| format!("```\n# {text}\n\n{text}\n```")),
        ];
        let gap = prop_oneof![Just("\n\n"), Just("\n"), Just("\n\n\n")];
        proptest::collection::vec((block, gap), 0..14)
            .prop_map(|blocks| blocks.into_iter().map(|(block, gap)| block + gap).collect())
    }

    proptest! {
        /// Spans are in order and on character borders, words are never cut, budgets are kept, and every byte of
        /// text outside headings is in a passage.
        #[test]
        fn passages_hold_all_text_in_exact_spans(
            note in note(), tokens_max in 16usize..80, tokens_min in 1usize..24, overlap in 0usize..3,
        ) {
            let counter = TokenCounter::Approximate;
            let passages = cut(&note, budget(tokens_max, tokens_min, overlap), &counter);
            let mut covered = vec![false; note.len()];
            let mut start_before = None;
            for passage in &passages {
                let text = &note[passage.span.clone()];
                prop_assert_eq!(text.trim(), text);
                prop_assert!(!text.is_empty());
                prop_assert_eq!(counter.count(text), passage.tokens);
                prop_assert!(passage.tokens <= tokens_max || text.split_whitespace().count() == 1, "{}", text);
                prop_assert!(start_before < Some(passage.span.start));
                start_before = Some(passage.span.start);
                let before = note[..passage.span.start].chars().next_back();
                let after = note[passage.span.end..].chars().next();
                prop_assert!(before.is_none_or(|char| char.is_whitespace() || char == '。'));
                prop_assert!(after.is_none_or(|char| char.is_whitespace()) || text.ends_with('。'));
                covered[passage.span.clone()].fill(true);
            }
            for unit in units::of(&note, tokens_max, &counter).iter().filter(|unit| unit.kind == UnitKind::Text) {
                prop_assert!(unit.span.clone().all(|byte| covered[byte]), "{:?}", &note[unit.span.clone()]);
            }
            let in_units = units::of(&note, tokens_max, &counter).into_iter().map(|unit| unit.span.len()).sum::<usize>();
            let spaces = note.bytes().filter(u8::is_ascii_whitespace).count();
            prop_assert!(in_units + spaces >= note.len());
        }
    }
}
