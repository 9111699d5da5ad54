//! The constants of Mamba's scan trained along with the pairs: against torch and PEFT
//! (`tests/golden/state_space_golden.py`), against finite differences, and across runs that were killed.

use super::golden::{Golden, check_gradients, pack};
use super::*;
use crate::adapter::{AdapterError, StateSpace};
use crate::optimizer::{AdamW, AdamWOptions, clip_factor};
use crate::trainer::{CheckpointFolder, TokenizedExample, TrainError, TrainOptions, train};

const HYBRID: &str = "granitemoehybrid";

fn config(rank: usize) -> LoraConfig {
    LoraConfig { rank, alpha: 8.0, train_ssm: true, seed: 5, ..LoraConfig::default() }
}

/// The plain golden adapter, with the model's own constants.
fn golden_adapter(model: &Model) -> Adapter {
    let mut adapter = Adapter::new(model, &config(4)).unwrap();
    let golden = Golden::open(HYBRID, "lora.safetensors");
    for (name, values) in adapter.parameters_mut().filter(|(name, _)| name.contains("lora_")) {
        values.copy_from_slice(&golden.f32(&format!("init.{name}")));
    }
    adapter
}

fn log() -> Vec<(f64, f64)> {
    let text = fs_err::read(folder(HYBRID).join("state_space.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let number = |step: &serde_json::Value, name: &str| step[name].as_f64().unwrap_or(0.0);
    record["log"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| (number(step, "loss"), number(step, "grad_norm")))
        .collect()
}

fn loss(model: &Model, adapter: &Adapter) -> f64 {
    let losses = model.loss(Some(adapter), &pack(), &mut Workspace::default()).unwrap();
    losses.iter().map(|loss| loss.nll).sum::<f64>() / 23.0
}

#[test]
fn constants_are_trained_as_torch_trains_them() {
    for device in [REFERENCE, CPU] {
        let model = model(HYBRID, &device);
        let mut adapter = golden_adapter(&model);
        assert_eq!(adapter.state_spaces().len(), 2);
        let (golden, log) = (Golden::open(HYBRID, "state_space.safetensors"), log());
        check_gradients(HYBRID, &model, &adapter, &golden, "grad0.", log[0].0);
        let lengths = adapter.parameters().map(|(_, values)| values.len());
        let mut optimizer = AdamW::new(AdamWOptions::default(), lengths);
        optimizer.decay_first(adapter.parameters().filter(|(name, _)| !StateSpace::is_key(name)).count());
        let mut workspace = Workspace::default();
        for (step, (expected, norm)) in log[..3].iter().enumerate() {
            let mut gradients = Gradients::new(&adapter);
            let got = model
                .loss_and_gradients(&adapter, &pack(), 1.0 / 23.0, &mut gradients, &mut workspace)
                .unwrap();
            assert!((got.nll / 23.0 / expected - 1.0).abs() < 1e-5, "loss of step {step}");
            assert!((gradients.norm() / norm - 1.0).abs() < 1e-5, "norm of step {step}");
            gradients.scale(clip_factor(gradients.norm(), 1.0));
            let values = adapter.parameters_mut().zip(gradients.tensors());
            optimizer.step(values.map(|((_, parameters), (_, gradients))| (5e-3, parameters, gradients)));
        }
        assert!((loss(&model, &adapter) / log[3].0 - 1.0).abs() < 1e-5);
        for (name, values) in adapter.parameters().filter(|(name, _)| StateSpace::is_key(name)) {
            assert!(worst(values, &golden.f32(&format!("after3.{name}"))) < 1e-5, "{name}");
        }
    }
}

#[test]
fn constants_of_an_adapter_that_peft_loads_are_read_and_written_alike() {
    let model = model(HYBRID, &CPU);
    let theirs = folder(HYBRID).join("adapter_state_space");
    let adapter = Adapter::load_peft(&theirs, &model).unwrap();
    assert!((loss(&model, &adapter) / log()[3].0 - 1.0).abs() < 1e-5);
    let ours = tempfile::tempdir().unwrap();
    adapter.save_peft(ours.path(), "").unwrap();
    let read = |folder: &Path| fs_err::read(folder.join("adapter_model.safetensors")).unwrap();
    let (left, right) = (read(&theirs), read(ours.path()));
    let tensors = |bytes: &[u8]| {
        let file = SafeTensors::deserialize(bytes).unwrap();
        let tensors = file.tensors().into_iter();
        let parts = tensors.map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()));
        parts.collect::<std::collections::BTreeSet<_>>()
    };
    assert!(tensors(&left) == tensors(&right), "same names, shapes and values");
    assert_eq!(Adapter::load_peft(ours.path(), &model).unwrap(), adapter);
}

#[test]
fn constants_that_do_not_fit_are_refused_by_name() {
    let llama = super::model("llama", &CPU);
    assert!(matches!(Adapter::new(&llama, &config(4)), Err(AdapterError::NoStateSpace)));
    let hybrid = super::model(HYBRID, &CPU);
    let mut adapter = golden_adapter(&hybrid);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    adapter.save_peft(folder.path(), "").unwrap();
    let whole = fs_err::read(&path).unwrap();
    let file = SafeTensors::deserialize(&whole).unwrap();
    let without = |gone: &str| {
        let kept = file.tensors().into_iter().filter(|(name, _)| !name.ends_with(gone));
        fs_err::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
        Adapter::load_peft(folder.path(), &hybrid).unwrap_err().to_string()
    };
    assert!(without("layers.0.mamba.D").contains("lacks `base_model.model.model.layers.0.mamba.D`"));
    // A whole layer without its constants would be trained in part.
    let error = {
        let kept = file
            .tensors()
            .into_iter()
            .filter(|(name, _)| !name.contains("layers.0.mamba.") || name.contains("lora"));
        fs_err::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
        Adapter::load_peft(folder.path(), &hybrid).unwrap_err().to_string()
    };
    assert!(error.contains("lacks `base_model.model.model.layers.0.mamba.A_log`"), "{error}");
    let constants = adapter.parameters_mut().filter(|(name, _)| StateSpace::is_key(name));
    constants.for_each(|(_, values)| values[0] = f32::NAN);
    let error = hybrid.loss(Some(&adapter), &pack(), &mut Workspace::default()).unwrap_err();
    assert!(matches!(error, ModelError::NotFinite { .. }), "{error}");
}

#[test]
fn gradient_of_each_constant_is_the_slope_of_the_loss() {
    let model = model(HYBRID, &CPU);
    let mut adapter = golden_adapter(&model);
    let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
    model.loss_and_gradients(&adapter, &pack(), 1.0, &mut gradients, &mut workspace).unwrap();
    let tensors: Vec<(usize, String)> = adapter.parameters().map(|(name, _)| name).enumerate().collect();
    for (index, name) in tensors.into_iter().filter(|(_, name)| StateSpace::is_key(name)) {
        let gradient = gradients.tensors().nth(index).unwrap().1.to_vec();
        for (at, gradient) in gradient.into_iter().enumerate() {
            let mut loss_at = |step: f32| {
                adapter.parameters_mut().nth(index).unwrap().1[at] += step;
                let sum = 23.0 * loss(&model, &adapter);
                adapter.parameters_mut().nth(index).unwrap().1[at] -= step;
                sum
            };
            let slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2;
            let allowed = 5e-3 + 2e-2 * f64::from(gradient.abs());
            assert!(
                (slope - f64::from(gradient)).abs() < allowed,
                "{name} {at}: slope {slope}, gradient {gradient}"
            );
        }
    }
}

#[test]
fn constants_alone_reach_layers_that_nothing_else_adapts() {
    let model = model(HYBRID, &CPU);
    let only =
        LoraConfig { targets: Targets::Regex(r".*layers\.2\.shared_mlp\.output_linear".into()), ..config(2) };
    let adapter = Adapter::new(&model, &only).unwrap();
    let mut gradients = Gradients::new(&adapter);
    model.loss_and_gradients(&adapter, &pack(), 1.0, &mut gradients, &mut Workspace::default()).unwrap();
    let constants = gradients.tensors().filter(|(name, _)| StateSpace::is_key(name));
    assert!(constants.into_iter().all(|(_, values)| values.iter().all(|&value| value != 0.0)));
}

#[test]
fn a_run_with_constants_goes_on_from_its_checkpoint_whatever_the_threads() {
    let rows: Vec<TokenizedExample> = (0..6)
        .map(|row: u32| TokenizedExample {
            id: format!("row{row}"),
            tokens: (0..12 + row).map(|at| 3 + (7 * row + 5 * at) % 90).collect(),
            supervised: (0..12 + row).map(|at| at > 5).collect(),
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let options = |epochs, every: Option<usize>| TrainOptions {
        epochs,
        learning_rate: 5e-3,
        checkpoints: every.map(|every| CheckpointFolder {
            dir: folder.path().to_owned(),
            every,
            identity: "base".to_owned(),
        }),
        ..TrainOptions::new(config(4))
    };
    let run = |threads: usize, options: &TrainOptions| {
        let model = super::model(HYBRID, &Compute::cpu(threads));
        let trained = train(&model, &rows, &[], options, &mut ()).unwrap().adapter;
        let before = model.state_spaces();
        assert!(trained.state_spaces().iter().zip(&before).all(|(after, before)| after.skip != before.skip));
        trained.parameters().flat_map(|(_, values)| values.to_vec()).map(f32::to_bits).collect::<Vec<_>>()
    };
    let whole = run(1, &options(4, None));
    assert_eq!(run(3, &options(4, None)), whole);
    struct Stop;
    impl crate::trainer::TrainHooks for Stop {
        fn cancelled(&mut self) -> bool {
            STEPS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 2
        }
    }
    static STEPS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let model = super::model(HYBRID, &CPU);
    let error = train(&model, &rows, &[], &options(4, Some(1)), &mut Stop).err().unwrap();
    assert!(matches!(error, TrainError::Cancelled { step: 2 }), "{error}");
    assert_eq!(run(2, &options(4, Some(1))), whole);
}
