//! From logits to one token: repetition penalty, temperature, top-k, top-p, min-p, in this order (Hugging Face's),
//! then a draw from a stream named by (seed, prompt). Knows no model. Ties always go to the lowest token id, so a
//! result does not depend on how a sort treats equals.

use std::cmp::Ordering;

use crate::random::Random;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The token with the highest logit.
    #[default]
    Greedy,
    /// A random token.
    Sampled(SamplingOptions),
}

/// How random tokens are drawn. The defaults draw from the model's own distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; below 1 sharpens. Above 0.
    pub temperature: f32,
    /// Only the so many most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the most likely one; 0 for all.
    pub min_p: f32,
    /// Divides positive logits of tokens seen before, multiplies negative ones; 1 for none. Above 0.
    pub repetition_penalty: f32,
    /// Names the stream of random numbers, together with the prompt's index.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// A sampling option outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("sampling option `{name}` is {value}; it must be {range}")]
pub struct SamplingProblem {
    /// The option.
    pub name: &'static str,
    /// Its value.
    pub value: f32,
    /// What it may be.
    pub range: &'static str,
}

impl SamplingOptions {
    fn check(&self) -> Result<(), SamplingProblem> {
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let checks = [
            ("temperature", self.temperature, positive(self.temperature), "above 0"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, positive(self.repetition_penalty), "above 0"),
        ];
        match checks.into_iter().find(|(_, _, holds, _)| !holds) {
            Some((name, value, _, range)) => Err(SamplingProblem { name, value, range }),
            None => Ok(()),
        }
    }
}

/// Chooses the tokens of one prompt.
#[derive(Debug)]
pub struct Sampler {
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    Greedy,
    Sampled { options: SamplingOptions, random: Random, seen: Vec<bool> },
}

const SAMPLE: u64 = 0x0053_414d_504c_4521;

impl Sampler {
    /// The sampler of prompt number `prompt`, whose tokens count as seen.
    pub fn new(sampling: Sampling, prompt: u64, prompt_tokens: &[u32]) -> Result<Self, SamplingProblem> {
        let Sampling::Sampled(options) = sampling else {
            return Ok(Self { mode: Mode::Greedy });
        };
        options.check()?;
        let random = Random::new(&[SAMPLE, options.seed, prompt]);
        let mut sampler = Self { mode: Mode::Sampled { options, random, seen: Vec::new() } };
        for &token in prompt_tokens {
            sampler.mark(token);
        }
        Ok(sampler)
    }

    /// The next token for `logits` (V) f32, which are overwritten; none if no logit is a number.
    pub fn pick(&mut self, logits: &mut [f32]) -> Option<u32> {
        let token = match &mut self.mode {
            Mode::Greedy => argmax(logits),
            Mode::Sampled { options, random, seen } => {
                penalise(logits, seen, options.repetition_penalty);
                draw(&candidates(logits, options), random.unit())
            }
        }?;
        self.mark(token);
        Some(token)
    }

    fn mark(&mut self, token: u32) {
        if let Mode::Sampled { seen, .. } = &mut self.mode {
            let index = token as usize;
            seen.resize(seen.len().max(index + 1), false);
            seen[index] = true;
        }
    }
}

/// The token with the highest logit, the lowest id of equals; none if no logit is a number.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|(_, highest)| logit > highest) {
            best = Some((token, logit));
        }
    }
    best.map(|(token, _)| token as u32)
}

fn penalise(logits: &mut [f32], seen: &[bool], penalty: f32) {
    for (logit, _) in logits.iter_mut().zip(seen).filter(|(_, seen)| **seen) {
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
}

/// The tokens that may be drawn, most likely first, with weights relative to the most likely one (which has 1).
fn candidates(logits: &[f32], options: &SamplingOptions) -> Vec<(u32, f64)> {
    let mut candidates: Vec<(u32, f32)> = (0u32..)
        .zip(logits)
        .filter(|(_, logit)| !logit.is_nan())
        .map(|(token, &logit)| (token, logit / options.temperature))
        .collect();
    let likelier = |left: &(u32, f32), right: &(u32, f32)| -> Ordering {
        right.1.total_cmp(&left.1).then(left.0.cmp(&right.0))
    };
    if options.top_k > 0 && options.top_k < candidates.len() {
        candidates.select_nth_unstable_by(options.top_k - 1, likelier);
        candidates.truncate(options.top_k);
    }
    candidates.sort_unstable_by(likelier);
    let highest = candidates.first().map_or(0.0, |(_, logit)| *logit);
    let weight = |logit: f32| if logit == highest { 1.0 } else { f64::from(logit - highest).exp() };
    let mut weighted: Vec<(u32, f64)> =
        candidates.into_iter().map(|(token, logit)| (token, weight(logit))).collect();
    if options.top_p < 1.0 {
        let enough = f64::from(options.top_p) * weighted.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut reached = 0.0;
        let crossing = weighted.iter().position(|(_, weight)| {
            reached += weight;
            reached >= enough
        });
        weighted.truncate(crossing.map_or(weighted.len(), |last| last + 1));
    }
    weighted.retain(|(_, weight)| *weight >= f64::from(options.min_p));
    weighted
}

/// The candidate at `unit` (in [0, 1)) of the whole weight.
fn draw(candidates: &[(u32, f64)], unit: f64) -> Option<u32> {
    let mut left = unit * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    for &(token, weight) in candidates {
        left -= weight;
        if left < 0.0 {
            return Some(token);
        }
    }
    // Rounding may leave a remainder of the last bits.
    candidates.last().map(|(token, _)| *token)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits whose softmax is 0.4, 0.3, 0.2, 0.1.
    fn logits() -> Vec<f32> {
        [0.4f32, 0.3, 0.2, 0.1].map(f32::ln).to_vec()
    }

    /// Frequencies of 40,000 first tokens, one a prompt, must be within 0.012 (five standard deviations).
    fn check(options: SamplingOptions, prompt: &[u32], want: [f64; 4]) {
        let mut counts = [0u32; 4];
        for index in 0..40_000 {
            let mut sampler = Sampler::new(Sampling::Sampled(options), index, prompt).unwrap();
            counts[sampler.pick(&mut logits()).unwrap() as usize] += 1;
        }
        let got = counts.map(|count| f64::from(count) / 40_000.0);
        for token in 0..4 {
            assert!((got[token] - want[token]).abs() < 0.012, "{options:?}: got {got:?}, want {want:?}");
            assert!(want[token] > 0.0 || counts[token] == 0, "{options:?}: token {token} is excluded");
        }
    }

    #[test]
    fn defaults_draw_from_the_model_s_distribution() {
        check(SamplingOptions::default(), &[], [0.4, 0.3, 0.2, 0.1]);
    }

    #[test]
    fn temperature_sharpens() {
        let squares = [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3];
        check(SamplingOptions { temperature: 0.5, ..SamplingOptions::default() }, &[], squares);
    }

    #[test]
    fn top_k_keeps_the_most_likely() {
        check(
            SamplingOptions { top_k: 2, ..SamplingOptions::default() },
            &[],
            [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0],
        );
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_it() {
        let options = SamplingOptions { top_p: 0.75, ..SamplingOptions::default() };
        check(options, &[], [4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0, 0.0]);
        check(SamplingOptions { top_p: 1e-6, ..options }, &[], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_is_taken_of_what_top_k_left() {
        // Of 4/7 and 3/7, the first alone reaches one half.
        let options = SamplingOptions { top_k: 2, top_p: 0.5, ..SamplingOptions::default() };
        check(options, &[], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let options = SamplingOptions { min_p: 0.6, ..SamplingOptions::default() };
        check(options, &[], [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]);
    }

    #[test]
    fn repetition_penalty_lowers_tokens_of_the_prompt() {
        // Logits are negative, so the penalty multiplies: token 0 falls from 0.4 to 0.4² = 0.16.
        let sum = 0.16 + 0.3 + 0.2 + 0.1;
        let options = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::default() };
        check(options, &[0], [0.16 / sum, 0.3 / sum, 0.2 / sum, 0.1 / sum]);
    }

    #[test]
    fn repetition_penalty_counts_drawn_tokens_and_divides_positive_logits() {
        let options = SamplingOptions { repetition_penalty: 4.0, top_k: 1, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(Sampling::Sampled(options), 0, &[]).unwrap();
        let picks: Vec<_> = (0..3).map(|_| sampler.pick(&mut [1.0, 2.0, 0.3]).unwrap()).collect();
        // 2.0 → 0.5 after the first draw, 1.0 → 0.25 after the second.
        assert_eq!(picks, [1, 0, 1]);
    }

    #[test]
    fn same_seed_and_prompt_repeat_and_others_differ() {
        let stream = |seed, prompt| {
            let options = SamplingOptions { seed, ..SamplingOptions::default() };
            let mut sampler = Sampler::new(Sampling::Sampled(options), prompt, &[]).unwrap();
            (0..40).map(|_| sampler.pick(&mut logits()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(stream(1, 2), stream(1, 2));
        assert_ne!(stream(1, 2), stream(1, 3));
        assert_ne!(stream(1, 2), stream(2, 2));
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        assert_eq!(argmax(&[0.0, 3.0, 3.0, -1.0]), Some(1));
        let options = SamplingOptions { top_k: 1, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(Sampling::Sampled(options), 0, &[]).unwrap();
        assert_eq!(sampler.pick(&mut [1.0, 5.0, 5.0]), Some(1));
    }

    #[test]
    fn no_number_among_the_logits_is_no_token() {
        assert_eq!(argmax(&[f32::NAN, f32::NAN]), None);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), Some(1));
        let mut sampler = Sampler::new(Sampling::Sampled(SamplingOptions::default()), 0, &[]).unwrap();
        assert_eq!(sampler.pick(&mut [f32::NAN]), None);
        assert_eq!(sampler.pick(&mut []), None);
    }

    #[test]
    fn options_out_of_range_are_named() {
        let options = SamplingOptions { temperature: 0.0, ..SamplingOptions::default() };
        let problem = Sampler::new(Sampling::Sampled(options), 0, &[]).unwrap_err();
        assert_eq!(problem.to_string(), "sampling option `temperature` is 0; it must be above 0");
    }
}
