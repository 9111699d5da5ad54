//! Which linear layers an adapter touches. A name that matches nothing is an error, never a silent no-op.

use std::collections::BTreeMap;

use regex::Regex;

use super::{AdapterError, LinearName};

/// The linear layers to adapt; the output layer is never among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// What the family calls for: all of its linear layers.
    Auto,
    /// All linear layers.
    AllLinear,
    /// Layers whose name is one of these or ends in `.` and one of these; each must match something.
    Names(Vec<String>),
    /// Layers whose full name this expression matches from end to end.
    Regex(String),
}

impl Targets {
    /// Of each linear layer, whether it is adapted.
    pub(super) fn choose(&self, linears: &[LinearName]) -> Result<Vec<bool>, AdapterError> {
        match self {
            Self::Auto | Self::AllLinear => Ok(vec![true; linears.len()]),
            Self::Names(names) => choose_names(names, linears),
            Self::Regex(expression) => {
                let whole = Regex::new(&format!("^(?:{expression})$"))
                    .map_err(|source| AdapterError::Expression { expression: expression.clone(), source })?;
                let chosen: Vec<bool> = linears.iter().map(|(name, ..)| whole.is_match(name)).collect();
                if chosen.contains(&true) { Ok(chosen) } else { Err(unknown(expression, linears)) }
            }
        }
    }
}

fn choose_names(names: &[String], linears: &[LinearName]) -> Result<Vec<bool>, AdapterError> {
    let mut chosen = vec![false; linears.len()];
    for target in names {
        let mut matched = false;
        for (index, (name, ..)) in linears.iter().enumerate() {
            if matches(name, target) {
                (chosen[index], matched) = (true, true);
            }
        }
        if !matched {
            return Err(unknown(target, linears));
        }
    }
    if names.is_empty() { Err(AdapterError::NoTarget) } else { Ok(chosen) }
}

/// For each of `adapted`, the value of the first key of `pattern` that matches it as PEFT matches: the key, as a
/// regular expression, against the whole name or its end after a `.`. A key that matches nothing is an error.
pub(super) fn by_pattern<T: Copy>(
    pattern: &'static str,
    values: &BTreeMap<String, T>,
    adapted: &[&str],
) -> Result<Vec<Option<T>>, AdapterError> {
    let mut found = vec![None; adapted.len()];
    for (key, &value) in values {
        let end = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
            .map_err(|source| AdapterError::Expression { expression: key.clone(), source })?;
        let mut matched = false;
        for (found, _) in found.iter_mut().zip(adapted).filter(|(_, name)| end.is_match(name)) {
            found.get_or_insert(value);
            matched = true;
        }
        if !matched {
            let mut leaves: Vec<&str> = adapted.iter().map(|name| leaf(name)).collect();
            leaves.sort_unstable();
            leaves.dedup();
            let adapted = leaves.join(", ");
            return Err(AdapterError::UnmatchedPattern { pattern, key: key.clone(), adapted });
        }
    }
    Ok(found)
}

fn matches(name: &str, target: &str) -> bool {
    name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The last part of a layer's name.
pub(super) fn leaf(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn unknown(target: &str, linears: &[LinearName]) -> AdapterError {
    let mut leaves: Vec<&str> = Vec::new();
    for (name, ..) in linears {
        if !leaves.contains(&leaf(name)) {
            leaves.push(leaf(name));
        }
    }
    let nearest = leaves.iter().min_by_key(|leaf| distance(leaf, leaf_of_target(target))).copied();
    AdapterError::UnknownTarget {
        target: target.to_owned(),
        nearest: nearest.unwrap_or_default().to_owned(),
        available: leaves.join(", "),
    }
}

fn leaf_of_target(target: &str) -> &str {
    leaf(target).trim_end_matches('$')
}

/// Levenshtein's edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, &b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linears() -> Vec<LinearName> {
        let names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"];
        let layers = (0..2).flat_map(|layer| names.map(|name| format!("model.layers.{layer}.{name}")));
        layers.map(|name| (name, 8, 8)).collect()
    }

    fn count(targets: &Targets) -> usize {
        targets.choose(&linears()).unwrap().iter().filter(|chosen| **chosen).count()
    }

    #[test]
    fn names_match_whole_parts_from_the_end() {
        assert_eq!(count(&Targets::Auto), 6);
        assert_eq!(count(&Targets::Names(vec!["q_proj".into()])), 2);
        assert_eq!(count(&Targets::Names(vec!["self_attn.q_proj".into(), "up_proj".into()])), 4);
        assert_eq!(count(&Targets::Names(vec!["model.layers.1.mlp.up_proj".into()])), 1);
        assert_eq!(count(&Targets::Regex(r".*\.1\..*_proj".into())), 3);
    }

    #[test]
    fn unmatched_name_is_an_error_with_the_nearest() {
        for targets in [Targets::Names(vec!["q_prj".into()]), Targets::Regex("q_proj".into())] {
            let error = targets.choose(&linears()).unwrap_err().to_string();
            assert!(error.contains("did you mean `q_proj`"), "{error}");
            assert!(error.contains("available: q_proj, o_proj, up_proj"), "{error}");
        }
        assert!(matches!(Targets::Names(vec![]).choose(&linears()), Err(AdapterError::NoTarget)));
        assert!(matches!(
            Targets::Regex("(".into()).choose(&linears()),
            Err(AdapterError::Expression { .. })
        ));
    }

    #[test]
    fn patterns_match_as_peft_matches() {
        let names = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
        ];
        let found = |keys: &[(&str, usize)]| {
            let values = keys.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
            by_pattern("rank_pattern", &values, &names).map_err(|error| error.to_string())
        };
        assert_eq!(found(&[("q_proj", 2)]), Ok(vec![Some(2), Some(2), None]));
        assert_eq!(found(&[(r"layers\.1\..*", 3)]), Ok(vec![None, Some(3), Some(3)]));
        assert_eq!(
            found(&[("model.layers.0.self_attn.q_proj", 4), ("q_proj", 2)]),
            Ok(vec![Some(4), Some(2), None])
        );
        assert_eq!(
            found(&[("k_proj", 2)]).unwrap_err(),
            "`rank_pattern` names `k_proj`, which matches no adapted layer; adapted: q_proj, up_proj"
        );
        assert!(found(&[("_proj", 2)]).is_err(), "a key matches from a `.` on");
    }
}
