//! The same trainer on a device, in the interpreter of PTX.

use super::*;
use crate::backend::Simulator;

fn on_device() -> Model {
    Model::open(&golden("llama"), &Compute::test_device()).unwrap()
}

fn few_steps() -> TrainOptions {
    TrainOptions { epochs: 1, ..options() }
}

/// A run on a device takes the steps of a run on the CPU: rows, schedule, clipping and AdamW are the same, and losses
/// differ by what bfloat16 rounds.
#[test]
fn a_device_takes_the_steps_of_the_cpu() {
    let (train, validation) = (rows(8, 1), rows(2, 2));
    let cpu = super::super::train(&MODEL, &train, &validation, &few_steps(), &mut ()).unwrap();
    let device = super::super::train(&on_device(), &train, &validation, &few_steps(), &mut ()).unwrap();
    assert_eq!(cpu.report.losses.len(), device.report.losses.len());
    for (cpu, device) in cpu.report.losses.iter().zip(&device.report.losses) {
        assert_eq!(
            (cpu.step, cpu.tokens, cpu.supervised_tokens),
            (device.step, device.tokens, device.supervised_tokens)
        );
        assert_eq!(cpu.learning_rate, device.learning_rate);
        assert!(
            (cpu.loss - device.loss).abs() < 0.02 * cpu.loss,
            "step {}: {} on the CPU, {}",
            cpu.step,
            cpu.loss,
            device.loss
        );
        assert!(
            (cpu.grad_norm / device.grad_norm - 1.0).abs() < 0.1,
            "step {}: norm {} on the CPU, {}",
            cpu.step,
            cpu.grad_norm,
            device.grad_norm
        );
    }
    let (cpu, device) = (cpu.report.eval_loss.unwrap(), device.report.eval_loss.unwrap());
    assert!((cpu - device).abs() < 0.02 * cpu, "validation: {cpu} on the CPU, {device}");
}

/// Activations that are computed twice instead of kept change no bit.
#[test]
fn recomputed_layers_change_no_bit_on_a_device() {
    let model = on_device();
    let train = rows(3, 1);
    let marked: Vec<(&[u32], &[bool])> =
        train.iter().map(|row| (&row.tokens[..], &row.supervised[..])).collect();
    let pack = model.pack(&marked);
    let adapter = Adapter::new(&model, &lora()).unwrap();
    let run = |layers: usize| {
        let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
        workspace.recompute_layers(layers);
        model.loss_and_gradients(&adapter, &pack, 0.1, &mut gradients, &mut workspace).unwrap();
        gradients.tensors().flat_map(|(_, values)| values.to_vec()).map(f32::to_bits).collect::<Vec<u32>>()
    };
    assert!(run(0) == run(2));
}

/// On a pack whose indices are there, between the adapter's arrival and the gradients' return, a step reads its losses and
/// one flag for each check that values are finite, and brings nothing.
#[test]
fn a_step_is_no_conversation() {
    if Compute::test_device().kind == BackendKind::Cuda {
        return eprintln!("skipped: only the interpreter counts what goes to and fro");
    }
    let model = on_device();
    let device = Simulator::latest();
    let train = rows(3, 1);
    let marked: Vec<(&[u32], &[bool])> =
        train.iter().map(|row| (&row.tokens[..], &row.supervised[..])).collect();
    let pack = model.pack(&marked);
    let adapter = Adapter::new(&model, &lora()).unwrap();
    let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
    let mut step = || model.loss_and_gradients(&adapter, &pack, 0.1, &mut gradients, &mut workspace).unwrap();
    step();
    device.traffic();
    let supervised = step().supervised;
    let traffic = device.traffic();
    let checks = 1 + 2 * model.config().num_hidden_layers();
    assert_eq!(traffic.bytes_read, 4 * (adapter.parameter_count() + supervised + checks));
    assert_eq!(traffic.bytes_written, 4 * checks, "only flags are set");
}

/// The plan for a device holds what its buffers take. Two layers are few: what is planned for one at work weighs more here
/// than in a model of thirty.
#[test]
fn plan_for_a_device_covers_its_peak() {
    let (model, train) = (on_device(), rows(16, 1));
    let options = TrainOptions { epochs: 1, batch: Batch::Rows(16), pack_tokens: 200, ..options() };
    let report = super::super::train(&model, &train, &[], &options, &mut ()).unwrap().report;
    let (planned, peak) = (report.plan.memory.total() as f64, model.device_memory().unwrap().peak as f64);
    let ratio = planned / peak;
    assert!((1.0..1.3).contains(&ratio), "planned {planned}, took {peak}: {:?}", report.plan.memory);
}
