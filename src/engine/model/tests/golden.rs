//! The tiny models of `tests/golden`, every family under both backends.

use super::*;
use crate::optimizer::{AdamW, AdamWOptions, clip_factor};

/// A safetensors file of golden values.
pub(super) struct Golden(Vec<u8>);

impl Golden {
    pub(super) fn open(family: &str, name: &str) -> Self {
        Self(fs_err::read(folder(family).join(name)).unwrap())
    }

    pub(super) fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let bytes = tensors.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let bytes = tensors.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
    }
}

/// The golden batch, the same for all families, is (2, 24) with 7 tokens of padding at the end of the second row.
const WIDTH: usize = 24;
const LENGTHS: [usize; 2] = [24, 17];
const SUPERVISED: usize = 23;
const VOCABULARY: usize = 96;

pub(super) fn pack() -> Pack {
    let golden = Golden::open("llama", "golden.safetensors");
    let tokens: Vec<u32> = golden.i64("input_ids").iter().map(|&id| id as u32).collect();
    let supervised: Vec<bool> = golden.i64("labels").iter().map(|&label| label != -100).collect();
    let row = |row: usize| row * WIDTH..row * WIDTH + LENGTHS[row];
    let pack = Pack::new(&[(&tokens[row(0)], &supervised[row(0)]), (&tokens[row(1)], &supervised[row(1)])]);
    assert_eq!(pack.supervised(), SUPERVISED);
    pack
}

/// The rows of a padded (2, 24, width) tensor that are real tokens.
fn unpadded(values: &[f32]) -> Vec<f32> {
    let width = values.len() / (2 * WIDTH);
    let second = WIDTH * width;
    [&values[..LENGTHS[0] * width], &values[second..second + LENGTHS[1] * width]].concat()
}

/// PEFT's adapter before its first step, over all linear layers of the model.
pub(super) fn adapter(family: &str, model: &Model, rslora: bool) -> Adapter {
    let config =
        LoraConfig { rank: 4, alpha: 8.0, targets: Targets::Auto, rslora, seed: 0, ..LoraConfig::default() };
    let mut adapter = Adapter::new(model, &config).unwrap();
    let golden = Golden::open(family, "lora.safetensors");
    for (name, values) in adapter.parameters_mut() {
        values.copy_from_slice(&golden.f32(&format!("init.{name}")));
    }
    adapter
}

fn record() -> serde_json::Value {
    serde_json::from_slice(&fs_err::read(folder("lora.json")).unwrap()).unwrap()
}

/// Loss and norm of the gradient of each of PEFT's three steps, and the loss after them.
fn steps(family: &str) -> (Vec<(f64, f64)>, f64) {
    let record = record();
    let number = |step: usize, name: &str| record[family]["log"][step][name].as_f64().unwrap();
    ((0..3).map(|step| (number(step, "loss"), number(step, "grad_norm"))).collect(), number(3, "loss"))
}

fn assert_close(what: &str, got: f64, golden: f64) {
    assert!((got / golden - 1.0).abs() < 1e-5, "{what}: {got}, golden {golden}");
}

/// Loss and gradients of the golden batch.
pub(super) fn gradients(model: &Model, adapter: &Adapter) -> (f64, Gradients) {
    let (mut gradients, mut workspace) = (Gradients::new(adapter), Workspace::default());
    let scale = 1.0 / SUPERVISED as f32;
    let got = model.loss_and_gradients(adapter, &pack(), scale, &mut gradients, &mut workspace).unwrap();
    assert_eq!(got.supervised, SUPERVISED);
    (got.nll / SUPERVISED as f64, gradients)
}

pub(super) fn check_gradients(
    what: &str,
    model: &Model,
    adapter: &Adapter,
    golden: &Golden,
    prefix: &str,
    expected_loss: f64,
) {
    let (loss, gradients) = gradients(model, adapter);
    assert_close(&format!("{what}: loss"), loss, expected_loss);
    for (name, values) in gradients.tensors() {
        let expected = golden.f32(&format!("{prefix}{name}"));
        assert_eq!(values.len(), expected.len());
        // Where all gradients are small, so is the part of the tolerance that does not grow with them.
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (got, expected) in values.iter().zip(&expected) {
            let allowed = 1e-5 * largest.min(1.0) + 1e-3 * expected.abs();
            assert!((got - expected).abs() <= allowed, "{what}: {name}: {got}, golden {expected}");
        }
    }
}

pub(super) fn check_logits(what: &str, model: &Model, adapter: Option<&Adapter>, golden: &[f32]) {
    let rows: Vec<usize> = (0..LENGTHS.iter().sum()).collect();
    let logits = model.logits(adapter, &pack(), &rows, &mut Workspace::default()).unwrap();
    let error = worst(&logits, &unpadded(golden));
    assert!(error <= 2e-4, "{what}: logits are off by {error}");
}

fn mean_loss(model: &Model, adapter: Option<&Adapter>) -> f64 {
    let losses = model.loss(adapter, &pack(), &mut Workspace::default()).unwrap();
    assert_eq!(losses.iter().map(|loss| loss.supervised).sum::<usize>(), SUPERVISED);
    losses.iter().map(|loss| loss.nll).sum::<f64>() / SUPERVISED as f64
}

#[test]
fn hidden_states_logits_and_loss_are_those_of_transformers() {
    for (family, device) in families() {
        let golden = Golden::open(family, "golden.safetensors");
        let (model, mut workspace) = (model(family, &device), Workspace::default());
        let hidden = model.hidden_states(None, &pack(), &mut workspace).unwrap();
        assert_eq!(hidden.len(), model.config().num_hidden_layers() + 1);
        for (index, hidden) in hidden.iter().enumerate() {
            let error = worst(hidden, &unpadded(&golden.f32(&format!("hidden.{index}"))));
            assert!(error <= 2e-4, "{family}: hidden {index} is off by {error}");
        }
        check_logits(family, &model, None, &golden.f32("logits"));
        assert_close(family, mean_loss(&model, None), f64::from(golden.f32("loss")[0]));
    }
}

/// Every golden model with every backend.
fn families() -> impl Iterator<Item = (&'static str, Compute)> {
    GOLDEN.into_iter().flat_map(|family| [REFERENCE, CPU].map(|device| (family, device)))
}

#[test]
fn cached_decoding_is_that_of_transformers() {
    for (family, device) in families() {
        let golden = Golden::open(family, "golden.safetensors").f32("decode_logits");
        let tokens = &pack().tokens[..WIDTH];
        let (model, mut workspace) = (model(family, &device), Workspace::default());
        let mut cache = model.new_cache(1, WIDTH);
        let mut fed = 0;
        for (step, expected) in golden.chunks_exact(VOCABULARY).enumerate() {
            let next = &tokens[fed..10 + step];
            let logits = model.extend(None, &mut cache, &[next], &mut workspace).unwrap();
            let error = worst(logits[0].as_ref().unwrap(), expected);
            assert!(error <= 2e-4, "{family}: step {step} is off by {error}");
            fed = 10 + step;
        }
        assert_eq!(cache.lengths(), [WIDTH]);
    }
}

#[test]
fn lora_logits_and_gradients_are_those_of_peft() {
    for (family, device) in families() {
        let golden = Golden::open(family, "lora.safetensors");
        let model = model(family, &device);
        let adapter = adapter(family, &model, false);
        check_logits(family, &model, Some(&adapter), &golden.f32("logits0"));
        check_gradients(family, &model, &adapter, &golden, "grad0.", steps(family).0[0].0);
    }
}

#[test]
fn three_steps_of_adamw_are_those_of_torch() {
    for (family, device) in families() {
        let model = model(family, &device);
        let mut adapter = adapter(family, &model, false);
        let lengths = adapter.parameters().map(|(_, values)| values.len());
        let mut optimizer = AdamW::new(AdamWOptions::default(), lengths);
        let (steps, loss_after) = steps(family);
        for (step, (loss, norm)) in steps.into_iter().enumerate() {
            let (got_loss, mut gradients) = gradients(&model, &adapter);
            assert_close(&format!("{family}: loss of step {step}"), got_loss, loss);
            assert_close(&format!("{family}: norm of step {step}"), gradients.norm(), norm);
            gradients.scale(clip_factor(gradients.norm(), 1.0));
            let values = adapter.parameters_mut().zip(gradients.tensors());
            optimizer.step(values.map(|((_, parameters), (_, gradients))| (5e-3, parameters, gradients)));
        }
        let after = format!("{family}: loss after the steps");
        assert_close(&after, mean_loss(&model, Some(&adapter)), loss_after);
    }
}

#[test]
fn adapter_saved_by_peft_gives_its_loss() {
    for (family, device) in families() {
        let model = model(family, &device);
        let adapter = Adapter::load_peft(&folder(family).join("adapter"), &model).unwrap();
        assert_eq!(Some(adapter.parameter_count() as u64), record()[family]["trainable"].as_u64());
        assert_close(family, mean_loss(&model, Some(&adapter)), steps(family).1);
    }
}

#[test]
fn wrong_input_is_an_error_with_its_culprit() {
    let (model, mut workspace) = (model("llama", &CPU), Workspace::default());
    let alien = Pack::new(&[(&[1, 96], &[true, true])]);
    let error = model.loss(None, &alien, &mut workspace).unwrap_err();
    assert!(matches!(error, ModelError::Token { token: 96, vocabulary: 96 }), "{error}");
    let mut cache = model.new_cache(2, 4);
    let error = model.extend(None, &mut cache, &[&[1], &[1, 2, 3, 4, 5]], &mut workspace).unwrap_err();
    assert!(matches!(error, ModelError::CacheFull { sequence: 1, tokens: 5, capacity: 4 }), "{error}");
    assert_eq!(cache.lengths(), [0, 0]);
    let other = random_model(&odd_config(), Stored::F32, &CPU);
    let error = model.loss(Some(&busy_adapter(&other, 2)), &pack(), &mut workspace).unwrap_err();
    assert!(matches!(error, ModelError::AdapterMismatch), "{error}");
}

#[test]
fn bad_value_is_named() {
    let (model, mut workspace) = (model("llama", &CPU), Workspace::default());
    let mut adapter = adapter("llama", &model, false);
    let place = "layers.1.self_attn.v_proj.lora_A";
    adapter.parameters_mut().find(|(name, _)| name.contains(place)).unwrap().1[0] = f32::NAN;
    let mut gradients = Gradients::new(&adapter);
    let error = model.loss_and_gradients(&adapter, &pack(), 1.0, &mut gradients, &mut workspace).unwrap_err();
    let ModelError::NotFinite { name } = error else { panic!("{error}") };
    assert_eq!(name, "model.layers.1.self_attn.v_proj");
}

/// How far the logits, the last hidden states and all gradients together are off, the last by their distance.
pub(super) fn errors(family: &str, device: &Compute) -> [(&'static str, f64); 3] {
    let (golden, lora) =
        (Golden::open(family, "golden.safetensors"), Golden::open(family, "lora.safetensors"));
    let (model, mut workspace) = (model(family, device), Workspace::default());
    let hidden = model.hidden_states(None, &pack(), &mut workspace).unwrap();
    let last = golden.f32(&format!("hidden.{}", hidden.len() - 1));
    let rows: Vec<usize> = (0..LENGTHS.iter().sum()).collect();
    let logits = model.logits(None, &pack(), &rows, &mut workspace).unwrap();
    let (_, gradients) = gradients(&model, &adapter(family, &model, false));
    let squares = gradients.tensors().flat_map(|(name, values)| {
        let expected = lora.f32(&format!("grad0.{name}"));
        values.iter().zip(expected).map(|(got, want)| f64::from(got - want).powi(2)).collect::<Vec<_>>()
    });
    [
        ("logits", worst(&logits, &unpadded(&golden.f32("logits"))).into()),
        ("hidden states", worst(hidden.last().unwrap(), &unpadded(&last)).into()),
        ("gradients", squares.sum::<f64>().sqrt()),
    ]
}

#[test]
fn rounded_factors_err_at_most_twice_as_far_as_naively_rounded_ones() {
    if !super::FASTEST.numerics().unwrap().contains("bf16") {
        return eprintln!("skipped: products are in f32 here");
    }
    for family in GOLDEN {
        let (got, naive) = (errors(family, &FASTEST), errors(family, &NAIVE));
        for ((what, got), (_, naive)) in got.into_iter().zip(naive) {
            assert!(got <= 2.0 * naive, "{family}: {what} are off by {got}, naively rounded by {naive}");
        }
    }
}
