//! The learning rate of each optimizer step: the shapes and the warmup of Hugging Face's `get_scheduler`
//! (`cosine` with half a cycle, `linear`, `constant_with_warmup`,
//! `warmup_stable_decay`), as a function of the step alone, so that a
//! resumed run needs no state. Knows nothing of optimizers.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Along half a cosine to zero.
    #[default]
    Cosine,
    /// Along a line to zero.
    Linear,
    /// Not at all.
    Constant,
    /// Not at all until the last steps, then along half a cosine to zero (warmup, stable, decay).
    Wsd,
}

/// The learning rate over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// The shape after the warmup.
    pub decay: Decay,
    /// Steps of linear warmup; the first of them has learning rate 0.
    pub warmup_steps: usize,
    /// Steps of the fall of [`Decay::Wsd`].
    pub decay_steps: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
}

impl Schedule {
    /// A schedule whose warmup takes `warmup_ratio` (0 to 1) of all steps, and whose fall, with [`Decay::Wsd`],
    /// takes `decay_ratio` of them; both rounded up.
    pub fn new(
        learning_rate: f64,
        decay: Decay,
        (warmup_ratio, decay_ratio): (f64, f64),
        total_steps: usize,
    ) -> Self {
        let steps = |ratio: f64| (total_steps as f64 * ratio).ceil() as usize;
        let warmup_steps = steps(warmup_ratio);
        let decay_steps = steps(decay_ratio).min(total_steps.saturating_sub(warmup_steps));
        Self { learning_rate, decay, warmup_steps, decay_steps, total_steps }
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        self.learning_rate * self.factor(step)
    }

    fn factor(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decaying = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (step - self.warmup_steps) as f64 / decaying;
        match self.decay {
            Decay::Cosine => half_wave(progress),
            Decay::Linear => (1.0 - progress).max(0.0),
            Decay::Constant => 1.0,
            Decay::Wsd => {
                let falling = (step + self.decay_steps).saturating_sub(self.total_steps);
                half_wave(falling as f64 / self.decay_steps.max(1) as f64)
            }
        }
    }
}

/// From 1 at 0 to 0 at 1.
fn half_wave(progress: f64) -> f64 {
    (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[s.get_last_lr()[0] ...]` of transformers' schedulers with 2 warmup steps of 8, learning rate 1.
    fn check(decay: Decay, want: [f64; 8]) {
        let schedule = Schedule::new(1.0, decay, (0.25, 0.2), 8);
        assert_eq!(schedule.warmup_steps, 2);
        for (step, want) in want.into_iter().enumerate() {
            assert!(
                (schedule.at(step) - want).abs() < 1e-12,
                "step {step}: {} is not {want}",
                schedule.at(step)
            );
        }
    }

    #[test]
    fn cosine_falls_along_half_a_wave() {
        let root = 3f64.sqrt() / 2.0;
        check(Decay::Cosine, [0.0, 0.5, 1.0, 0.5 * (1.0 + root), 0.75, 0.5, 0.25, 0.5 * (1.0 - root)]);
    }

    #[test]
    fn linear_falls_by_equal_steps() {
        check(Decay::Linear, [0.0, 0.5, 1.0, 5.0 / 6.0, 4.0 / 6.0, 0.5, 2.0 / 6.0, 1.0 / 6.0]);
    }

    #[test]
    fn constant_stays_after_the_warmup() {
        check(Decay::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn wsd_stays_and_falls_at_the_end() {
        // transformers' get_wsd_schedule with 2 warmup and 4 decay steps of 10.
        let schedule = Schedule::new(1.0, Decay::Wsd, (0.2, 0.4), 10);
        let want =
            [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.853_553_390_593_273_7, 0.5, 0.146_446_609_406_726_27];
        for (step, want) in want.into_iter().enumerate() {
            assert!((schedule.at(step) - want).abs() < 1e-12, "step {step}: {}", schedule.at(step));
        }
        let short = Schedule::new(1.0, Decay::Wsd, (0.8, 0.5), 10);
        assert_eq!((short.at(7), short.at(8), short.at(9)), (7.0 / 8.0, 1.0, 0.5));
    }

    #[test]
    fn without_warmup_the_first_step_is_the_highest() {
        assert_eq!(Schedule::new(2e-4, Decay::Cosine, (0.0, 0.2), 100).at(0), 2e-4);
    }

    #[test]
    fn warmup_is_rounded_up_and_may_be_everything() {
        assert_eq!(Schedule::new(1.0, Decay::Linear, (0.03, 0.2), 10).warmup_steps, 1);
        let all = Schedule::new(1.0, Decay::Cosine, (1.0, 0.2), 4);
        assert_eq!([0, 1, 2, 3].map(|step| all.at(step)), [0.0, 0.25, 0.5, 0.75]);
    }
}
