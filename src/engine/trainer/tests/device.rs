//! The same trainer on a device, in the interpreter of PTX.

use super::*;

fn on_device() -> Model {
    let device = Compute { kind: BackendKind::Simulated, threads: 1, device: 0 };
    Model::open(&golden("llama"), &device).unwrap()
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
