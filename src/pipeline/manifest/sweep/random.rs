//! Values drawn at random for the trials of a sweep. They depend on the seed, the trial and the param alone,
//! so a sweep that is run again, or longer, tries the same values again.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Number, Value as Json};

use crate::digest::Digest;

/// Random trials.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Random {
    /// How many.
    #[schemars(range(min = 1, max = 10_000))]
    trials: u32,
    /// Other seeds draw other values.
    #[serde(default)]
    seed: u64,
    /// What each param is drawn from: a list, or a range.
    pub(super) params: BTreeMap<String, Choice>,
}

/// What a value is drawn from.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Choice {
    /// One of these.
    List(Vec<Json>),
    /// A number in a range.
    Range(Range),
}

/// A range of numbers, both ends included; whole numbers if both ends are.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    /// The lower end.
    low: Number,
    /// The upper end.
    high: Number,
    /// How values are spread: `linear`, or `log` where the order of magnitude is what matters.
    #[serde(default)]
    scale: Scale,
}

/// How values are spread over a range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// Evenly in the logarithm.
    Log,
}

impl Random {
    /// The values of each trial; or the name of a param that cannot be drawn.
    pub(super) fn draw(&self) -> Result<Vec<Map<String, Json>>, &str> {
        (0..self.trials).map(|trial| self.point(trial)).collect()
    }

    fn point(&self, trial: u32) -> Result<Map<String, Json>, &str> {
        let mut point = Map::new();
        for (name, choice) in &self.params {
            let value = drawn(choice, unit(self.seed, trial, name)).ok_or(name.as_str())?;
            point.insert(name.clone(), value);
        }
        Ok(point)
    }
}

/// A number in [0, 1) that belongs to one param of one trial.
fn unit(seed: u64, trial: u32, name: &str) -> f64 {
    const SCALE: f64 = (1_u64 << 53) as f64;
    let digest = Digest::of(format!("tunesmith sweep {seed} {trial} {name}").as_bytes());
    let bytes: [u8; 8] = digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes");
    (u64::from_le_bytes(bytes) >> 11) as f64 / SCALE
}

fn drawn(choice: &Choice, unit: f64) -> Option<Json> {
    let range = match choice {
        Choice::List(values) => {
            let position = (unit * values.len() as f64) as usize;
            return values.get(position).cloned();
        }
        Choice::Range(range) => range,
    };
    let (low, high) = (range.low.as_f64()?, range.high.as_f64()?);
    let is_whole = range.low.is_i64() && range.high.is_i64();
    if low > high || (range.scale == Scale::Log && low <= 0.0) {
        return None;
    }
    // A whole number stands for everything that rounds down to it.
    let top = if is_whole { high + 1.0 } else { high };
    let value = match range.scale {
        Scale::Linear => low + unit * (top - low),
        Scale::Log => (low.ln() + unit * (top.ln() - low.ln())).exp(),
    };
    if is_whole {
        return Some(Json::from(value.floor().min(high) as i64));
    }
    // Three digits are enough to try, and can be read and repeated.
    let rounded: f64 = format!("{value:.2e}").parse().ok()?;
    Some(Json::from(rounded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(trials: u32, params: &Json) -> Random {
        serde_json::from_value(serde_json::json!({ "trials": trials, "seed": 5, "params": params })).unwrap()
    }

    #[test]
    fn values_fill_their_range_and_do_not_depend_on_other_params() {
        let params = serde_json::json!({
            "rank": { "low": 1, "high": 4 }, "lr": { "low": 1e-6, "high": 1e-2, "scale": "log" }, "kind": ["a", "b"],
        });
        let points = random(400, &params).draw().unwrap();
        for rank in 1..=4 {
            let count = points.iter().filter(|point| point["rank"] == rank).count();
            assert!((60..140).contains(&count), "rank {rank}: {count} of 400");
        }
        let small = points.iter().filter(|point| point["lr"].as_f64().unwrap() < 1e-4).count();
        assert!((150..250).contains(&small), "half of the magnitudes: {small} of 400");
        let alone = random(400, &serde_json::json!({ "rank": { "low": 1, "high": 4 } })).draw().unwrap();
        assert!(points.iter().zip(&alone).all(|(point, alone)| point["rank"] == alone["rank"]));
    }

    #[test]
    fn what_cannot_be_drawn_is_named() {
        for wrong in [
            serde_json::json!({ "a": [] }),
            serde_json::json!({ "a": { "low": 2, "high": 1 } }),
            serde_json::json!({ "a": { "low": 0.0, "high": 1.0, "scale": "log" } }),
        ] {
            assert_eq!(random(1, &wrong).draw(), Err("a"));
        }
    }
}
