//! AdamW and gradient clipping over named f32 tensors, in the float operations and the order that torch uses on
//! the CPU (`torch.optim.AdamW` single-tensor path, `torch.nn.utils.clip_grad_norm_`), so that golden runs agree.
//! Knows nothing of models or of where gradients come from. Element-wise, in a fixed order: the result does not
//! depend on threads.

/// What AdamW is told once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled: each step multiplies parameters by 1 - learning_rate · weight_decay.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW with its state: both moments in f32, one value a parameter, tensors one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    options: AdamWOptions,
    steps: u64,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    /// A fresh state for `parameters` values in all.
    pub fn new(options: AdamWOptions, parameters: usize) -> Self {
        Self { options, steps: 0, first: vec![0.0; parameters], second: vec![0.0; parameters] }
    }

    /// The state after `steps` steps, as [`AdamW::moments`] gave it. Both moments have the same length.
    pub fn resume(options: AdamWOptions, steps: u64, first: Vec<f32>, second: Vec<f32>) -> Self {
        assert_eq!(first.len(), second.len(), "BUG: the moments are of different models");
        Self { options, steps, first, second }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// First and second moments of all parameters.
    pub fn moments(&self) -> (&[f32], &[f32]) {
        (&self.first, &self.second)
    }

    /// One step: moves each tensor of `tensors` (parameters, gradients of the same length) against its gradient.
    /// The tensors come in the same order at every step and hold as many values as [`AdamW::new`] was told.
    pub fn step<'a>(
        &mut self,
        learning_rate: f64,
        tensors: impl IntoIterator<Item = (&'a mut [f32], &'a [f32])>,
    ) {
        self.steps += 1;
        let update = Update::new(&self.options, self.steps, learning_rate);
        let mut start = 0;
        for (parameters, gradients) in tensors {
            assert_eq!(
                parameters.len(),
                gradients.len(),
                "BUG: a gradient has another shape than its tensor"
            );
            let range = start..start + parameters.len();
            start = range.end;
            update.apply(parameters, gradients, &mut self.first[range.clone()], &mut self.second[range]);
        }
        assert_eq!(start, self.first.len(), "BUG: the optimizer was made for another set of tensors");
    }
}

/// The scalars of one step: computed in f64 as Python does, then rounded once to the tensors' f32.
struct Update {
    keep: f32,
    first_weight: f32,
    second_keep: f32,
    second_weight: f32,
    correction: f32,
    epsilon: f32,
    step_size: f32,
}

impl Update {
    fn new(options: &AdamWOptions, step: u64, learning_rate: f64) -> Self {
        let first_correction = 1.0 - power(options.beta1, step);
        let second_correction = 1.0 - power(options.beta2, step);
        Self {
            keep: (1.0 - learning_rate * options.weight_decay) as f32,
            first_weight: (1.0 - options.beta1) as f32,
            second_keep: options.beta2 as f32,
            second_weight: (1.0 - options.beta2) as f32,
            correction: second_correction.sqrt() as f32,
            epsilon: options.epsilon as f32,
            step_size: -(learning_rate / first_correction) as f32,
        }
    }

    /// parameters, first, second (n) f32 are overwritten; gradients (n) f32.
    fn apply(&self, parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        let moments = first.iter_mut().zip(second.iter_mut());
        for ((parameter, &gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
            *parameter *= self.keep;
            // torch writes the first moment as a `lerp`, which picks the end nearer to the result.
            *first = if self.first_weight < 0.5 {
                *first + self.first_weight * (gradient - *first)
            } else {
                gradient - (gradient - *first) * (1.0 - self.first_weight)
            };
            *second = *second * self.second_keep + self.second_weight * gradient * gradient;
            let denominator = second.sqrt() / self.correction + self.epsilon;
            *parameter += self.step_size * *first / denominator;
        }
    }
}

/// base^exponent by squaring: the same bits on every platform, which `powf` does not promise.
fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

/// What gradients of norm `norm` are multiplied by so that it does not exceed `norm_max`: torch's
/// min(1, norm_max / (norm + 1e-6)).
pub fn clip_factor(norm: f64, norm_max: f64) -> f32 {
    (norm_max / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f32, want: f64) {
        assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs().max(1e-3), "got {got}, want {want}");
    }

    #[test]
    fn first_step_moves_by_the_learning_rate_against_the_sign() {
        // At step 1 both corrections cancel the decay: m̂ = g, v̂ = g², so the step is lr · g / (|g| + eps).
        let mut adamw = AdamW::new(AdamWOptions::default(), 3);
        let mut parameters = [1.0f32, -2.0, 0.5];
        adamw.step(0.1, [(&mut parameters[..], &[0.5f32, -4.0, 0.0][..])]);
        close(parameters[0], 1.0 * (1.0 - 0.1 * 0.01) - 0.1);
        close(parameters[1], -2.0 * (1.0 - 0.1 * 0.01) + 0.1);
        close(parameters[2], 0.5 * (1.0 - 0.1 * 0.01));
    }

    #[test]
    fn two_steps_agree_with_sums_by_hand() {
        // g = 1, then 3. m: 0.1, 0.39. v: 0.001, 0.009999.
        // m̂ = 0.39 / 0.19, v̂ = 0.009999 / 0.001999; eps is outside the root.
        let options = AdamWOptions { weight_decay: 0.0, epsilon: 0.5, ..AdamWOptions::default() };
        let mut adamw = AdamW::new(options, 1);
        let mut parameter = [0.0f32];
        adamw.step(0.1, [(&mut parameter[..], &[1.0f32][..])]);
        close(parameter[0], -0.1 / 1.5);
        adamw.step(0.01, [(&mut parameter[..], &[3.0f32][..])]);
        let second = (0.009_999f64 / 0.001_999).sqrt();
        close(parameter[0], -0.1 / 1.5 - 0.01 * (0.39 / 0.19) / (second + 0.5));
        let (first, squares) = adamw.moments();
        close(first[0], 0.39);
        close(squares[0], 0.009_999);
    }

    #[test]
    fn splitting_tensors_changes_nothing() {
        let gradients: Vec<f32> = (0..40).map(|index| (index as f32 * 0.7).sin()).collect();
        let mut whole: Vec<f32> = (0..40).map(|index| index as f32 / 10.0).collect();
        let mut parts = whole.clone();
        let mut one = AdamW::new(AdamWOptions::default(), 40);
        let mut two = one.clone();
        for _ in 0..3 {
            one.step(1e-2, [(&mut whole[..], &gradients[..])]);
            let (left, right) = parts.split_at_mut(13);
            two.step(1e-2, [(left, &gradients[..13]), (right, &gradients[13..])]);
        }
        assert_eq!(whole, parts);
        assert_eq!(one, two);
    }

    #[test]
    fn resumed_state_goes_on_bit_for_bit() {
        let mut straight = AdamW::new(AdamWOptions::default(), 2);
        let mut parameters = [0.3f32, -0.7];
        straight.step(1e-2, [(&mut parameters[..], &[0.1f32, 0.2][..])]);
        let (first, second) = straight.moments();
        let mut resumed =
            AdamW::resume(AdamWOptions::default(), straight.steps(), first.to_vec(), second.to_vec());
        let mut copy = parameters;
        straight.step(1e-2, [(&mut parameters[..], &[0.4f32, -0.1][..])]);
        resumed.step(1e-2, [(&mut copy[..], &[0.4f32, -0.1][..])]);
        assert_eq!(parameters.map(f32::to_bits), copy.map(f32::to_bits));
    }

    #[test]
    fn clipping_is_torch_s() {
        assert_eq!(clip_factor(5.0, 1.0), (1.0 / 5.000_001) as f32);
        assert_eq!(clip_factor(5.0, 50.0), 1.0);
        assert_eq!(clip_factor(1.0, 1.0), (1.0 / 1.000_001) as f32);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }

    #[test]
    fn power_is_close_to_pow() {
        for step in [1, 2, 3, 10, 1000, 123_457] {
            let want = 0.999f64.powf(step as f64);
            assert!((power(0.999, step) - want).abs() <= 1e-12 * want.max(1e-40), "step {step}");
        }
    }
}
