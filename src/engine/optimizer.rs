//! AdamW and gradient clipping over named f32 tensors, in the float operations and the order that torch uses on
//! the CPU (`torch.optim.AdamW` single-tensor path, `torch.nn.utils.clip_grad_norm_`), so that golden runs agree.
//! Knows nothing of models or of where gradients come from. Element-wise, in a fixed order: the result does not
//! depend on threads.

mod moments;

pub use moments::StatePart;

use moments::{Maps, Moments};

/// Tensors with fewer values keep their moments in f32 whatever is asked for, as in bitsandbytes.
const CODED_MIN: usize = 4096;

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
    /// How the moments rest between steps.
    pub state: MomentFormat,
}

/// How moments rest between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MomentFormat {
    /// 8 bytes a parameter.
    #[default]
    F32,
    /// About 2 bytes a parameter: bitsandbytes' 8-bit blocks, for tensors of at least 4096 values.
    Blockwise8,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, state: MomentFormat::F32 }
    }
}

/// AdamW with its state: two moments of every parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    options: AdamWOptions,
    steps: u64,
    moments: Vec<Moments>,
    /// Tensors that are decayed; those after them are not.
    decayed: usize,
    maps: Maps,
}

impl AdamW {
    /// A fresh state for tensors of these lengths.
    pub fn new(options: AdamWOptions, lengths: impl IntoIterator<Item = usize>) -> Self {
        let moments = lengths.into_iter().map(|len| match options.state {
            MomentFormat::Blockwise8 if len >= CODED_MIN => Moments::zeros_blockwise8(len),
            _ => Moments::zeros_f32(len),
        });
        Self { options, steps: 0, moments: moments.collect(), decayed: usize::MAX, maps: Maps::new() }
    }

    /// Spares all but the first `tensors` tensors the weight decay.
    pub fn decay_first(&mut self, tensors: usize) {
        self.decayed = tensors;
    }

    /// Puts a fresh optimizer where another one was after `steps` steps, from the bytes of its
    /// [`AdamW::state`]. False, and the state is useless, if they are of another number of values.
    pub fn resume(&mut self, steps: u64, mut bytes: &[u8]) -> bool {
        self.steps = steps;
        for moments in &mut self.moments {
            let Some(rest) = moments.read(bytes) else { return false };
            bytes = rest;
        }
        bytes.is_empty()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// All moments, tensor by tensor.
    pub fn state(&self) -> impl Iterator<Item = StatePart<'_>> {
        self.moments.iter().flat_map(Moments::parts)
    }

    /// Bytes of [`AdamW::state`].
    pub fn state_bytes(&self) -> usize {
        let size = |part: StatePart<'_>| match part {
            StatePart::Floats(values) => 4 * values.len(),
            StatePart::Codes(codes) => codes.len(),
        };
        self.state().map(size).sum()
    }

    /// One step: moves each tensor of `tensors` (learning rate, parameters, gradients of the same length) against
    /// its gradient. The tensors come in the same order at every step, of the lengths that [`AdamW::new`] was told.
    pub fn step<'a>(&mut self, tensors: impl IntoIterator<Item = (f64, &'a mut [f32], &'a [f32])>) {
        self.steps += 1;
        let mut moments = self.moments.iter_mut();
        for (index, (learning_rate, parameters, gradients)) in tensors.into_iter().enumerate() {
            let moments = moments.next().expect("BUG: the optimizer was made for fewer tensors");
            let lengths = (parameters.len(), gradients.len());
            assert_eq!(lengths, (moments.len(), moments.len()), "BUG: a tensor of another shape");
            let weight_decay = if index < self.decayed { self.options.weight_decay } else { 0.0 };
            let options = AdamWOptions { weight_decay, ..self.options };
            let update = Update::new(&options, self.steps, learning_rate);
            moments.update(&update, &self.maps, parameters, gradients);
        }
        assert!(moments.next().is_none(), "BUG: the optimizer was made for more tensors");
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

    fn bytes(adamw: &AdamW) -> Vec<u8> {
        let bytes = |part: StatePart<'_>| match part {
            StatePart::Floats(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            StatePart::Codes(codes) => codes.to_vec(),
        };
        adamw.state().flat_map(bytes).collect()
    }

    #[test]
    fn first_step_moves_by_the_learning_rate_against_the_sign() {
        // At step 1 both corrections cancel the decay: m̂ = g, v̂ = g², so the step is lr · g / (|g| + eps).
        let mut adamw = AdamW::new(AdamWOptions::default(), [3]);
        let mut parameters = [1.0f32, -2.0, 0.5];
        adamw.step([(0.1, &mut parameters[..], &[0.5f32, -4.0, 0.0][..])]);
        close(parameters[0], 1.0 * (1.0 - 0.1 * 0.01) - 0.1);
        close(parameters[1], -2.0 * (1.0 - 0.1 * 0.01) + 0.1);
        close(parameters[2], 0.5 * (1.0 - 0.1 * 0.01));
    }

    #[test]
    fn two_steps_agree_with_sums_by_hand() {
        // g = 1, then 3. m: 0.1, 0.39. v: 0.001, 0.009999.
        // m̂ = 0.39 / 0.19, v̂ = 0.009999 / 0.001999; eps is outside the root.
        let options = AdamWOptions { weight_decay: 0.0, epsilon: 0.5, ..AdamWOptions::default() };
        let mut adamw = AdamW::new(options, [1]);
        let mut parameter = [0.0f32];
        adamw.step([(0.1, &mut parameter[..], &[1.0f32][..])]);
        close(parameter[0], -0.1 / 1.5);
        adamw.step([(0.01, &mut parameter[..], &[3.0f32][..])]);
        let second = (0.009_999f64 / 0.001_999).sqrt();
        close(parameter[0], -0.1 / 1.5 - 0.01 * (0.39 / 0.19) / (second + 0.5));
        let mut state = adamw.state();
        assert!(matches!(state.next(), Some(StatePart::Floats([first])) if (first - 0.39).abs() < 1e-6));
        assert!(
            matches!(state.next(), Some(StatePart::Floats([second])) if (second - 0.009_999).abs() < 1e-8)
        );
    }

    #[test]
    fn splitting_tensors_changes_nothing() {
        let gradients: Vec<f32> = (0..40).map(|index| (index as f32 * 0.7).sin()).collect();
        let mut whole: Vec<f32> = (0..40).map(|index| index as f32 / 10.0).collect();
        let mut parts = whole.clone();
        let mut one = AdamW::new(AdamWOptions::default(), [40]);
        let mut two = AdamW::new(AdamWOptions::default(), [13, 27]);
        for _ in 0..3 {
            one.step([(1e-2, &mut whole[..], &gradients[..])]);
            let (left, right) = parts.split_at_mut(13);
            two.step([(1e-2, left, &gradients[..13]), (1e-2, right, &gradients[13..])]);
        }
        assert_eq!(whole, parts);
    }

    #[test]
    fn resumed_state_goes_on_bit_for_bit() {
        for state in [MomentFormat::F32, MomentFormat::Blockwise8] {
            let options = AdamWOptions { state, ..AdamWOptions::default() };
            let gradients: Vec<f32> = (0..5000).map(|index| (index as f32 * 0.7).sin()).collect();
            let mut straight = AdamW::new(options, [5000, 2]);
            let mut parameters = vec![0.3f32; 5002];
            let step = |adamw: &mut AdamW, parameters: &mut [f32]| {
                let (left, right) = parameters.split_at_mut(5000);
                adamw.step([(1e-2, left, &gradients[..]), (1e-2, right, &gradients[..2])]);
            };
            step(&mut straight, &mut parameters);
            let mut resumed = AdamW::new(options, [5000, 2]);
            let bytes = bytes(&straight);
            assert_eq!(bytes.len(), straight.state_bytes());
            assert!(!resumed.resume(1, &bytes[1..]) && !resumed.resume(1, &[&bytes[..], &[0]].concat()));
            assert!(resumed.resume(straight.steps(), &bytes));
            assert_eq!(straight, resumed);
            let mut copy = parameters.clone();
            step(&mut straight, &mut parameters);
            step(&mut resumed, &mut copy);
            assert_eq!(parameters, copy);
        }
    }

    #[test]
    fn codes_are_used_from_4096_values_on() {
        let options = AdamWOptions { state: MomentFormat::Blockwise8, ..AdamWOptions::default() };
        assert_eq!(AdamW::new(options, [4095]).state_bytes(), 8 * 4095);
        assert_eq!(AdamW::new(options, [4096]).state_bytes(), 2 * (4096 + 4 * 16));
        assert_eq!(AdamW::new(options, [4097]).state_bytes(), 2 * (4097 + 4 * 17));
    }

    #[test]
    fn eight_bit_steps_are_those_of_bitsandbytes() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let file = fs_err::read(folder.join("adamw8bit.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = file.tensor(name).unwrap().data().to_vec();
            data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
        };
        let options =
            AdamWOptions { weight_decay: 0.05, state: MomentFormat::Blockwise8, ..AdamWOptions::default() };
        let mut parameters = floats("init");
        let mut adamw = AdamW::new(options, [parameters.len()]);
        for step in 0..4 {
            adamw.step([(1e-2, &mut parameters[..], &floats(&format!("gradient.{step}"))[..])]);
            let mut state = adamw.state();
            for (moment, name) in ["first", "second"].into_iter().enumerate() {
                let Some(StatePart::Codes(codes)) = state.next() else { panic!("moment {moment}") };
                let want = file.tensor(&format!("{name}.{step}")).unwrap();
                let off = codes.iter().zip(want.data()).map(|(&got, &want)| got.abs_diff(want));
                // A value between two codes may take either, by its last bit.
                assert!(off.clone().all(|off| off <= 1), "{name} of step {step}");
                let differing = off.filter(|&off| off > 0).count();
                assert!(differing <= 2, "{name} of step {step}: {differing} codes differ");
                let Some(StatePart::Floats(absmax)) = state.next() else { panic!("moment {moment}") };
                for (got, want) in absmax.iter().zip(floats(&format!("{name}_absmax.{step}"))) {
                    close(*got, f64::from(want));
                }
            }
            for (got, want) in parameters.iter().zip(floats(&format!("parameters.{step}"))) {
                assert!((got - want).abs() < 2e-5, "step {step}: {got} is not {want}");
            }
        }
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
