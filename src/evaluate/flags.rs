//! What looks too good, or too thin, to be believed: red flags of an evaluation.
//! The rules come from the experiments the product replaces: leaked test questions, perfect scores on eight
//! questions, adapters that answer a training row word for word.

use serde::{Deserialize, Serialize};

/// One thing the reader of a figure must know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Flag {
    /// A stable name: `too_few_questions`.
    pub(crate) name: String,
    /// What was seen, with its numbers.
    pub(crate) detail: String,
}

/// What the flags are read from.
pub(crate) struct Seen {
    /// Questions with key facts.
    pub(crate) questions: usize,
    /// Right answers of the tuned model.
    pub(crate) tuned_right: usize,
    /// Right answers of the base model.
    pub(crate) base_right: usize,
    /// Test questions that equal a training question.
    pub(crate) leaks_exact: u64,
    /// Test questions close to a training question.
    pub(crate) leaks_near: u64,
    /// Answers of the tuned model that did not end by themselves.
    pub(crate) unfinished: usize,
    /// Loss on the test rows, tuned and base.
    pub(crate) losses: Option<(f64, f64)>,
    /// Whether the accuracy intervals of tuned and base do not touch.
    pub(crate) accuracies_apart: bool,
}

/// Questions below which a proportion says little.
const QUESTIONS_MIN: usize = 30;

/// The flags that apply, in a fixed order.
pub(crate) fn raise(seen: &Seen) -> Vec<Flag> {
    let mut flags = Vec::new();
    let mut flag = |name: &str, detail: String| flags.push(Flag { name: name.to_owned(), detail });
    if seen.questions > 0 && seen.questions < QUESTIONS_MIN {
        flag(
            "too_few_questions",
            format!(
                "{} questions with key facts; below {QUESTIONS_MIN} the interval is wide",
                seen.questions
            ),
        );
    }
    if seen.questions > 0 && seen.tuned_right == seen.questions {
        flag(
            "perfect_score",
            format!(
                "all {} answers are right; look for a leak or for questions that are too easy",
                seen.questions
            ),
        );
    }
    if seen.leaks_exact > 0 {
        flag("leak", format!("{} test questions stand in the training rows", seen.leaks_exact));
    }
    if seen.leaks_near > 0 {
        flag("near_leak", format!("{} test questions are close to a training question", seen.leaks_near));
    }
    if seen.questions > 0 && seen.tuned_right <= seen.base_right {
        flag(
            "no_better_than_base",
            format!("tuned {} right, base {} right", seen.tuned_right, seen.base_right),
        );
    }
    if seen.tuned_right > seen.base_right && !seen.accuracies_apart {
        flag(
            "intervals_overlap",
            "the accuracy intervals of tuned and base touch; ask more questions".to_owned(),
        );
    }
    if let Some((tuned, base)) = seen.losses
        && tuned >= base
    {
        flag("loss_no_lower_than_base", format!("tuned {tuned:.3}, base {base:.3} on the test rows"));
    }
    if seen.unfinished > 0 {
        flag(
            "unfinished_answers",
            format!("{} answers of the tuned model ran into the token limit", seen.unfinished),
        );
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Seen = Seen {
        questions: 66,
        tuned_right: 40,
        base_right: 1,
        leaks_exact: 0,
        leaks_near: 0,
        unfinished: 0,
        losses: Some((1.0, 3.0)),
        accuracies_apart: true,
    };

    fn names(seen: &Seen) -> Vec<String> {
        raise(seen).into_iter().map(|flag| flag.name).collect()
    }

    #[test]
    fn a_sound_result_raises_nothing() {
        assert_eq!(names(&GOOD), Vec::<String>::new());
    }

    #[test]
    fn each_flag_is_raised_by_its_cause() {
        assert_eq!(
            names(&Seen { questions: 8, tuned_right: 8, ..GOOD }),
            ["too_few_questions", "perfect_score"]
        );
        assert_eq!(names(&Seen { leaks_exact: 42, leaks_near: 1, ..GOOD }), ["leak", "near_leak"]);
        assert_eq!(names(&Seen { tuned_right: 1, ..GOOD }), ["no_better_than_base"]);
        assert_eq!(names(&Seen { accuracies_apart: false, ..GOOD }), ["intervals_overlap"]);
        assert_eq!(
            names(&Seen { losses: Some((3.0, 3.0)), unfinished: 2, ..GOOD }),
            ["loss_no_lower_than_base", "unfinished_answers"]
        );
    }
}
