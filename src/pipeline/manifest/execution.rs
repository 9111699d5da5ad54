//! `resources`, `timeout` and `retries` of a stage: how it is run. None of it changes a result, so none of
//! it is part of a key.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::graph::Execution;
use crate::manifest::check;
use crate::manifest::document::StageDraft;
use crate::manifest::node::{Node, Value};
use crate::manifest::problem::Problem;
use crate::manifest::source::Span;

/// How a stage is run.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Written {
    /// What the stage takes of the machine while it runs.
    #[serde(default)]
    resources: Option<Resources>,
    /// How long the stage may run: `90s`, `10m`, `2h`, or a number of seconds.
    #[serde(default)]
    timeout: Option<Amount>,
    /// How often the stage is tried again after an error that may pass, such as a network that is down.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100))]
    retries: Option<u32>,
}

/// What a stage takes of the machine while it runs.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Resources {
    /// Cores, and so threads. Without it a stage that uses the whole machine runs alone of its sort.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65_536))]
    cpu: Option<u32>,
    /// Memory: `4GiB`, `500MB`, or a number of bytes.
    #[serde(default)]
    memory: Option<Amount>,
    /// GPUs, lent by id for as long as the stage runs.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1024))]
    gpu: Option<u32>,
}

/// A number, or a number with a unit.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Amount {
    /// In the smallest unit.
    Number(f64),
    /// With a unit.
    Text(String),
}

const TIMES: [(&str, f64); 4] = [("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)];
const SIZES: [(&str, f64); 9] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("kB", 1e3),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("B", 1.0),
];

/// How a stage is run, given its words with everything filled in.
pub(crate) fn read(draft: &StageDraft, words: &Node) -> Result<Execution, Vec<Problem>> {
    let found = check::check(schemars::schema_for!(Written).as_value(), words, draft.name.span);
    if !found.is_empty() {
        return Err(found);
    }
    let at = |path: &[&str]| -> Span {
        path.iter().try_fold(words, |node, key| node.get(key)).map_or(draft.name.span, |node| node.span)
    };
    let written: Written = serde_json::from_value(words.to_json())
        .map_err(|error| vec![Problem::new("manifest::execution", draft.name.span, error.to_string())])?;
    let resources = written.resources.unwrap_or_default();
    let memory =
        amount(resources.memory.as_ref(), &SIZES, at(&["resources", "memory"]), "`4GiB` or `500MB`")?;
    let timeout = amount(written.timeout.as_ref(), &TIMES, at(&["timeout"]), "`90s`, `10m` or `2h`")?;
    Ok(Execution {
        cpu: resources.cpu,
        memory_bytes: memory.map(|bytes| bytes as u64),
        gpu: resources.gpu.unwrap_or(0) as usize,
        timeout: timeout.map(Duration::from_secs_f64),
        retries: written.retries.unwrap_or(0),
    })
}

/// The words of a stage that say how it is run, as one map.
pub(crate) fn words(draft: &StageDraft) -> Node {
    Node::new(Value::Map(draft.execution.clone()), draft.name.span)
}

fn amount(
    amount: Option<&Amount>,
    units: &[(&str, f64)],
    at: Span,
    examples: &str,
) -> Result<Option<f64>, Vec<Problem>> {
    let number = match amount {
        None => return Ok(None),
        Some(Amount::Number(number)) => Some(*number),
        Some(Amount::Text(text)) => parsed(text, units),
    };
    // A century and an exabyte are beyond any stage, and within what the types can hold.
    match number.filter(|number| *number > 0.0 && *number < 1e18) {
        Some(number) if !units.iter().any(|(unit, _)| *unit == "s") || number < 3.2e9 => Ok(Some(number)),
        _ => Err(vec![
            Problem::new("manifest::execution", at, "this is no amount that a stage could be given")
                .hint(format!("write {examples}")),
        ]),
    }
}

/// `1.5GiB` in the smallest unit.
pub(crate) fn parsed(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (unit, scale) = units.iter().find(|(unit, _)| text.ends_with(unit))?;
    let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
    number.is_finite().then_some(number * scale)
}

/// Bytes of a text such as `4GiB`; a plain number is bytes.
pub fn memory_bytes(text: &str) -> Option<u64> {
    let bytes = text.parse().ok().or_else(|| parsed(text, &SIZES))?;
    (bytes > 0.0 && bytes < 1e18).then_some(bytes as u64)
}

/// Time of a text such as `30d`; a plain number is seconds.
pub fn duration(text: &str) -> Option<Duration> {
    let seconds = text.parse().ok().or_else(|| parsed(text, &TIMES))?;
    (0.0..3.2e9).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        assert_eq!(parsed("90s", &TIMES), Some(90.0));
        assert_eq!(parsed("1.5 h", &TIMES), Some(5400.0));
        assert_eq!(memory_bytes("4GiB"), Some(4 << 30));
        assert_eq!(memory_bytes("500 MB"), Some(500_000_000));
        assert_eq!(memory_bytes("12"), Some(12));
        for wrong in ["4 bananas", "GiB", "-1GiB", "NaNs", "1e30GiB"] {
            assert_eq!((parsed(wrong, &TIMES), memory_bytes(wrong)), (None, None), "{wrong}");
        }
    }
}
