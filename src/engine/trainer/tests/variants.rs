//! Every option that changes what is computed: each run is the same after a kill, on any number of threads and in
//! any packing, and LoRA+ steps are PEFT's.

use super::*;
use crate::optimizer::MomentFormat;

/// Options that differ from the plain ones in all that matters, by name.
fn variants() -> Vec<(&'static str, TrainOptions)> {
    let plain = || TrainOptions { eval_every: 2, keep: Keep::Best, ..options() };
    let with_lora = |lora: LoraConfig| TrainOptions { lora, ..plain() };
    let eight_bit = AdamWOptions { state: MomentFormat::Blockwise8, ..AdamWOptions::default() };
    vec![
        ("dora", with_lora(LoraConfig { dora: true, ..lora() })),
        ("dropout", with_lora(LoraConfig { dropout: 0.2, ..lora() })),
        ("dora_dropout", with_lora(LoraConfig { dora: true, dropout: 0.2, ..lora() })),
        ("neftune", TrainOptions { neftune_alpha: 5.0, ..plain() }),
        ("patterns", with_lora(LoraConfig { rank_pattern: [("q_proj".into(), 2)].into(), ..lora() })),
        // From rank 32 on, some of the tiny model's tensors are large enough for 8-bit state.
        ("eight_bit", TrainOptions { adamw: eight_bit, ..with_lora(LoraConfig { rank: 32, ..lora() }) }),
        ("loraplus_wsd", TrainOptions { loraplus_ratio: 4.0, decay: Decay::Wsd, ..plain() }),
        ("tokens", TrainOptions { batch: Batch::Tokens(45), ..plain() }),
        ("by_length", TrainOptions { order: Order::ByLength, batch: Batch::Rows(3), ..plain() }),
    ]
}

#[test]
fn killed_run_resumes_bit_for_bit_whatever_its_options() {
    let (rows, validation) = (rows(10, 3), rows(3, 4));
    for (name, plain) in variants() {
        let straight = train(&MODEL, &rows, &validation, &plain, &mut ()).unwrap();
        for die_after in [3, 4] {
            let dir = tempfile::tempdir().unwrap();
            let folder = CheckpointFolder { dir: dir.path().to_owned(), every: 2, identity: "base".into() };
            let options = TrainOptions { checkpoints: Some(folder), ..plain.clone() };
            let mut script = Script { die_after: Some(die_after), ..Script::default() };
            let run = AssertUnwindSafe(|| train(&MODEL, &rows, &validation, &options, &mut script));
            assert!(catch_unwind(run).is_err(), "{name}");
            let mut script = Script::default();
            let resumed = train(&MODEL, &rows, &validation, &options, &mut script).unwrap();
            assert_eq!(script.steps[0], 3, "{name}");
            assert_eq!(bits(&straight.adapter), bits(&resumed.adapter), "{name} killed in step {die_after}");
            assert_eq!(numbers(&straight.report), numbers(&resumed.report), "{name}");
        }
    }
}

#[test]
fn options_change_the_adapter_and_threads_do_not() {
    let (rows, validation) = (rows(10, 3), rows(3, 4));
    let plain = TrainOptions { eval_every: 2, keep: Keep::Best, ..options() };
    let plain = bits(&train(&MODEL, &rows, &validation, &plain, &mut ()).unwrap().adapter);
    for (name, options) in variants() {
        let one = bits(&train(&MODEL, &rows, &validation, &options, &mut ()).unwrap().adapter);
        let three = bits(&train(&model(3), &rows, &validation, &options, &mut ()).unwrap().adapter);
        assert_eq!(one, three, "{name}");
        assert_ne!(plain, one, "{name} does nothing");
    }
}

#[test]
fn noise_and_magnitudes_do_not_depend_on_the_packing() {
    let rows = rows(10, 12);
    for (name, options) in variants() {
        let run = |pack_tokens| {
            let options = TrainOptions { pack_tokens, warmup_ratio: 0.0, epochs: 1, ..options.clone() };
            train(&MODEL, &rows, &[], &options, &mut ()).unwrap().report
        };
        let (alone, together) = (run(20), run(200));
        for (left, right) in alone.losses.iter().zip(&together.losses) {
            let tolerance = if left.step == 1 { 2e-6 } else { 2e-4 };
            assert!((left.loss / right.loss - 1.0).abs() < tolerance, "{name}: {left:?} {right:?}");
        }
    }
}

#[test]
fn seed_and_step_decide_what_is_dropped() {
    let rows = rows(4, 5);
    let with_seed = |seed| {
        let lora = LoraConfig { dropout: 0.5, ..lora() };
        let options =
            TrainOptions { lora, seed, learning_rate: 1e-9, batch: Batch::Rows(4), epochs: 2, ..options() };
        let report = train(&MODEL, &rows, &[], &options, &mut ()).unwrap().report;
        report.losses.iter().map(|step| step.grad_norm).collect::<Vec<_>>()
    };
    let norms = with_seed(1);
    assert_ne!(norms[0], norms[1], "the same rows lose other values in the next step");
    assert_ne!(norms[0], with_seed(2)[0]);
}

#[test]
fn loraplus_steps_are_those_of_peft() {
    let bytes = read("llama/adapter_variants.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let plain = read("llama/lora.safetensors");
    let plain = SafeTensors::deserialize(&plain).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&read("llama/adapter_variants.json")).unwrap();
    for (name, dora) in [("loraplus", false), ("loraplus_dora", true)] {
        let rows = golden_rows();
        let options = TrainOptions {
            lora: LoraConfig { dora, ..lora() },
            loraplus_ratio: 4.0,
            epochs: 3,
            batch: Batch::Rows(2),
            pack_tokens: 64,
            decay: Decay::Constant,
            warmup_ratio: 0.0,
            clip_norm: Some(1.0),
            ..options()
        };
        let mut run = Run::new(&MODEL, &rows, &[], &options).unwrap();
        let init = |tensor: &str| match dora {
            true => floats(&file, &format!("dora.init.{tensor}")),
            false => floats(&plain, &format!("init.{tensor}")),
        };
        for (tensor, values) in run.adapter.parameters_mut() {
            values.copy_from_slice(&init(&tensor));
        }
        while !run.is_over() {
            run.advance(&mut ()).unwrap();
        }
        for (step, got) in run.losses.iter().enumerate() {
            for (key, got) in [("loss", got.loss), ("grad_norm", got.grad_norm)] {
                let want = record[name][step][key].as_f64().unwrap();
                assert!((got / want - 1.0).abs() < 2e-5, "{name} step {step}: {key} {got} is not {want}");
            }
        }
        let mut compared = 0;
        for (tensor, got) in run.adapter.parameters().filter(|(tensor, _)| tensor.contains("layers.1.mlp")) {
            // Adam divides by a gradient's own size, so rounding shows where the gradient is next to nothing: how
            // far a tensor is off is measured by how far it came.
            let want = floats(&file, &format!("{name}.after.{tensor}"));
            let (off, came) = (distance(got, &want), distance(&want, &init(&tensor)));
            assert!(off < 1e-3 * came, "{name} {tensor}: off by {off} after a way of {came}");
            compared += got.len();
        }
        assert!(compared > 2000);
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}
