//! The whole loop on the tiny golden llama: against PEFT and torch, across kills, threads and packings.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::LazyLock;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::adapter::{LoraConfig, Targets};
use crate::backend::{BackendKind, Compute};
use crate::optimizer::AdamWOptions;

mod device;
mod memory;
mod variants;

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn model(threads: usize) -> Model {
    Model::open(&golden("llama"), &Compute { kind: BackendKind::CpuExact, ..Compute::cpu(threads) }).unwrap()
}

static MODEL: LazyLock<Model> = LazyLock::new(|| model(1));

fn lora() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 8.0,
        targets: Targets::AllLinear,
        rslora: false,
        seed: 3,
        ..LoraConfig::default()
    }
}

/// Rows of random tokens after three that are always the same, 6 to 20 long; about the later half is supervised.
fn rows(count: usize, seed: u64) -> Vec<TokenizedExample> {
    let mut random = Random::new(&[seed]);
    let mut row = |index: usize| {
        let length = 6 + random.below(15) as usize;
        TokenizedExample {
            id: format!("row{index}"),
            tokens: (0..length as u32)
                .map(|at| 3 + if at < 3 { at } else { random.below(93) as u32 })
                .collect(),
            supervised: (0..length).map(|index| index >= length / 2).collect(),
        }
    };
    (0..count).map(&mut row).collect()
}

fn options() -> TrainOptions {
    TrainOptions {
        learning_rate: 5e-3,
        epochs: 2,
        batch: Batch::Rows(4),
        pack_tokens: 40,
        seed: 11,
        ..TrainOptions::new(lora())
    }
}

fn bits(adapter: &Adapter) -> Vec<u32> {
    values(adapter).into_iter().map(f32::to_bits).collect()
}

/// Losses without their times.
fn numbers(report: &TrainReport) -> Vec<(usize, u64, u64)> {
    report.losses.iter().map(|step| (step.step, step.loss.to_bits(), step.grad_norm.to_bits())).collect()
}

/// Hooks that note what they hear and end the run after some step: by a panic, which leaves no time for a last
/// checkpoint, or by asking to stop.
#[derive(Default)]
struct Script {
    die_after: Option<usize>,
    cancel_after: Option<usize>,
    steps: Vec<usize>,
    warnings: Vec<String>,
}

impl TrainHooks for Script {
    fn step(&mut self, record: &StepRecord, _total: usize) {
        self.steps.push(record.step);
        if self.die_after == Some(record.step) {
            resume_unwind(Box::new("killed"));
        }
    }

    fn warn(&mut self, text: &str) {
        self.warnings.push(text.to_owned());
    }

    fn cancelled(&mut self) -> bool {
        self.cancel_after.is_some_and(|step| self.steps.last() == Some(&step))
    }
}

fn read(path: &str) -> Vec<u8> {
    fs_err::read(golden(path)).unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(4).map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap())).collect()
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let data = file.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(8).map(|chunk| i64::from_le_bytes(chunk.try_into().unwrap())).collect()
}

/// The two rows of the golden batch; the second is padded.
fn golden_rows() -> Vec<TokenizedExample> {
    let bytes = read("llama/golden.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (ids, labels) = (integers(&file, "input_ids"), integers(&file, "labels"));
    let present = integers(&file, "attention_mask");
    let row = |row: usize| {
        let columns = (row * 24..(row + 1) * 24).filter(|&index| present[index] == 1);
        let (tokens, supervised) = columns.map(|index| (ids[index] as u32, labels[index] != -100)).unzip();
        TokenizedExample { id: format!("golden{row}"), tokens, supervised }
    };
    vec![row(0), row(1)]
}

#[test]
fn three_steps_give_peft_s_losses_norms_and_adapter() {
    let rows = golden_rows();
    // Exactly the generator's run: both rows in each step, constant learning rate, weight decay 0.01, clip at 1.
    let options = TrainOptions {
        epochs: 3,
        batch: Batch::Rows(2),
        pack_tokens: 64,
        decay: Decay::Constant,
        warmup_ratio: 0.0,
        adamw: AdamWOptions { weight_decay: 0.01, ..AdamWOptions::default() },
        clip_norm: Some(1.0),
        ..options()
    };
    let mut run = Run::new(&MODEL, &rows, &[], &options).unwrap();
    let bytes = read("llama/lora.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (name, values) in run.adapter.parameters_mut() {
        values.copy_from_slice(&floats(&file, &format!("init.{name}")));
    }
    while !run.is_over() {
        run.advance(&mut ()).unwrap();
    }
    let record: serde_json::Value = serde_json::from_slice(&read("lora.json")).unwrap();
    let log = &record["llama"]["log"];
    for (step, got) in run.losses.iter().enumerate() {
        let close = |got: f64, want: &serde_json::Value| (got / want.as_f64().unwrap() - 1.0).abs() < 1e-5;
        assert!(close(got.loss, &log[step]["loss"]), "step {step}: {} is not {}", got.loss, log[step]);
        assert!(
            close(got.grad_norm, &log[step]["grad_norm"]),
            "step {step}: {} is not {}",
            got.grad_norm,
            log[step]
        );
    }
    let after = Evaluation::new(&MODEL, &rows, 64).unwrap();
    let after = after.mean_loss(&MODEL, Some(&run.adapter), &mut Workspace::default()).unwrap();
    assert!((after / log[3]["loss"].as_f64().unwrap() - 1.0).abs() < 1e-5, "{after} is not {}", log[3]);
    let bytes = read("llama/adapter/adapter_model.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (name, got) in run.adapter.parameters() {
        for (got, want) in got.iter().zip(floats(&file, &name)) {
            // Each value has moved by up to 0.015 in the three steps.
            assert!((got - want).abs() < 3e-6, "{name}: {got} is not {want}");
            compared += 1;
        }
    }
    assert_eq!(compared, record["llama"]["trainable"].as_u64().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_split_into_packs_gives_the_same_gradient(
        seed in any::<u64>(),
        split in prop::collection::vec(0usize..4, 6),
    ) {
        let rows = rows(6, seed);
        let mut adapter = Adapter::new(&MODEL, &lora()).unwrap();
        let mut random = Random::new(&[seed, 1]);
        for (_, values) in adapter.parameters_mut() {
            values.iter_mut().for_each(|value| *value += 0.05 * (random.unit() - 0.5) as f32);
        }
        let total: usize = rows.iter().map(TokenizedExample::supervised_tokens).sum();
        let gradient = |packs: &[Vec<&TokenizedExample>]| {
            let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
            let mut nll = 0.0;
            for pack in packs.iter().filter(|pack| !pack.is_empty()) {
                let pack = MODEL.pack(&marked(pack));
                let scale = 1.0 / total as f32;
                let loss = MODEL.loss_and_gradients(&adapter, &pack, scale, &mut gradients, &mut workspace);
                nll += loss.unwrap().nll;
            }
            (nll, gradients.tensors().flat_map(|(_, values)| values.to_vec()).collect::<Vec<f32>>())
        };
        let (whole_nll, whole) = gradient(&[rows.iter().collect()]);
        let mut packs: Vec<Vec<&TokenizedExample>> = vec![Vec::new(); 4];
        for (row, &pack) in rows.iter().zip(&split) {
            packs[pack].push(row);
        }
        let (split_nll, parts) = gradient(&packs);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        // Rows may pull in opposite directions: rounding is as large as what is summed, not as the sum.
        let size: f64 = rows
            .iter()
            .map(|row| norm(&mut gradient(&[vec![row]]).1.into_iter().map(f64::from)))
            .sum();
        let error = norm(&mut whole.iter().zip(&parts).map(|(left, right)| f64::from(left - right)));
        prop_assert!(error <= 1e-6 * size, "gradient differs by {} of its norm", error / size);
        prop_assert!((split_nll / whole_nll - 1.0).abs() < 1e-6);
    }
}

#[test]
fn pack_size_changes_nothing_but_rounding() {
    let rows = rows(10, 12);
    let run = |pack_tokens| {
        let options = TrainOptions { pack_tokens, warmup_ratio: 0.0, ..options() };
        train(&MODEL, &rows, &[], &options, &mut ()).unwrap().report
    };
    let (alone, together) = (run(20), run(200));
    assert_eq!(alone.losses.len(), together.losses.len());
    for (left, right) in alone.losses.iter().zip(&together.losses) {
        let tolerance = if left.step == 1 { 1e-6 } else { 1e-4 };
        assert!((left.loss / right.loss - 1.0).abs() < tolerance, "{left:?} {right:?}");
        assert!((left.grad_norm / right.grad_norm - 1.0).abs() < 10.0 * tolerance, "{left:?} {right:?}");
        assert_eq!((left.tokens, left.supervised_tokens), (right.tokens, right.supervised_tokens));
    }
}

#[test]
fn training_lowers_the_loss_and_reports_it() {
    let rows = rows(12, 1);
    let options = TrainOptions { epochs: 6, warmup_ratio: 0.0, ..options() };
    let trained = train(&MODEL, &rows, &rows[..3], &options, &mut ()).unwrap();
    let report = &trained.report;
    assert_eq!(
        (report.steps, report.planned_steps, report.losses.len(), report.evals.len()),
        (18, 18, 18, 6)
    );
    assert!(report.train_loss < 0.8 * report.losses[0].loss, "{:?}", numbers(report));
    assert_eq!(report.tokens, 6 * rows.iter().map(|row| row.tokens.len() as u64).sum::<u64>());
    assert_eq!(
        report.supervised_tokens,
        6 * rows.iter().map(|row| row.supervised_tokens() as u64).sum::<u64>()
    );
    let again = Evaluation::new(&MODEL, &rows[..3], 40).unwrap();
    let again = again.mean_loss(&MODEL, Some(&trained.adapter), &mut Workspace::default()).unwrap();
    assert_eq!(report.eval_loss, Some(again));
    assert_eq!(report.adapted_percent, 100.0);
    assert!(report.peak_rss_bytes > 0 && report.tokens_per_second > 0.0);
}

#[test]
fn thread_count_and_repetition_change_no_bit() {
    let rows = rows(10, 2);
    let one = train(&MODEL, &rows, &[], &options(), &mut ()).unwrap();
    for threads in [1, 2, 3] {
        let other = train(&model(threads), &rows, &[], &options(), &mut ()).unwrap();
        assert_eq!(bits(&one.adapter), bits(&other.adapter), "{threads} threads");
    }
}

#[test]
fn killed_run_resumes_bit_for_bit() {
    let (rows, validation) = (rows(10, 3), rows(3, 4));
    let plain = TrainOptions { eval_every: 2, keep: Keep::Best, ..options() };
    let straight = train(&MODEL, &rows, &validation, &plain, &mut ()).unwrap();
    for die_after in 1..=6 {
        let dir = tempfile::tempdir().unwrap();
        let folder = CheckpointFolder { dir: dir.path().to_owned(), every: 2, identity: "base".into() };
        let options = TrainOptions { checkpoints: Some(folder), ..plain.clone() };
        let mut script = Script { die_after: Some(die_after), ..Script::default() };
        let killed =
            catch_unwind(AssertUnwindSafe(|| train(&MODEL, &rows, &validation, &options, &mut script)));
        assert!(killed.is_err());
        let mut script = Script::default();
        let resumed = train(&MODEL, &rows, &validation, &options, &mut script).unwrap();
        // The checkpoint is of the last even step before the one in which the run died.
        assert_eq!(script.steps[0], (die_after - 1) / 2 * 2 + 1);
        assert_eq!(bits(&straight.adapter), bits(&resumed.adapter), "killed in step {die_after}");
        assert_eq!(numbers(&straight.report), numbers(&resumed.report));
        assert_eq!(straight.report.eval_loss, resumed.report.eval_loss);
    }
}

#[test]
fn cancelled_run_keeps_what_it_has() {
    let rows = rows(10, 5);
    let dir = tempfile::tempdir().unwrap();
    let folder = CheckpointFolder { dir: dir.path().to_owned(), every: 0, identity: String::new() };
    let options = TrainOptions { checkpoints: Some(folder), ..options() };
    let mut script = Script { cancel_after: Some(4), ..Script::default() };
    let error = train(&MODEL, &rows, &[], &options, &mut script).err().unwrap();
    assert!(matches!(error, TrainError::Cancelled { step: 4 }));
    let mut script = Script::default();
    let resumed = train(&MODEL, &rows, &[], &options, &mut script).unwrap();
    assert_eq!(script.steps, [5, 6]);
    let straight =
        train(&MODEL, &rows, &[], &TrainOptions { checkpoints: None, ..options }, &mut ()).unwrap();
    assert_eq!(bits(&straight.adapter), bits(&resumed.adapter));
}

#[test]
fn checkpoints_of_another_run_are_passed_over_aloud() {
    let rows = rows(10, 6);
    let dir = tempfile::tempdir().unwrap();
    let folder =
        |identity: &str| CheckpointFolder { dir: dir.path().to_owned(), every: 1, identity: identity.into() };
    let with = |identity: &str| TrainOptions { checkpoints: Some(folder(identity)), ..options() };
    train(&MODEL, &rows, &[], &with("base"), &mut ()).unwrap();
    let started_anew = |rows: &[TokenizedExample], options: &TrainOptions| {
        let mut script = Script::default();
        train(&MODEL, rows, &[], options, &mut script).unwrap();
        script.steps.first() == Some(&1) && script.warnings.iter().any(|text| text.contains("other options"))
    };
    assert!(started_anew(&rows, &with("another base")));
    assert!(started_anew(&rows, &TrainOptions { learning_rate: 1e-3, ..with("another base") }));
    let mut edited = rows.clone();
    edited[4].tokens[2] += 1;
    edited[4].tokens[2] %= 96;
    assert!(started_anew(&edited, &TrainOptions { learning_rate: 1e-3, ..with("another base") }));
}

#[test]
fn number_that_is_not_finite_halts_with_step_and_rows() {
    let rows = rows(8, 7);
    let options = TrainOptions { learning_rate: 1e36, warmup_ratio: 0.0, clip_norm: None, ..options() };
    let error = train(&MODEL, &rows, &[], &options, &mut ()).err().unwrap();
    let TrainError::NotFinite { what, step, rows } = &error else { panic!("{error}") };
    assert_eq!(*step, 2);
    assert!(!what.is_empty() && !rows.is_empty(), "{error}");
    assert_eq!(error.code(), "not_finite");
    assert!(error.to_string().contains("in step 2, rows `row"), "{error}");
}

#[test]
fn memorising_two_rows_is_overfitting() {
    let (rows, validation) = (rows(2, 8), rows(4, 9));
    let options = TrainOptions {
        learning_rate: 2e-2,
        epochs: 200,
        batch: Batch::Rows(2),
        decay: Decay::Constant,
        eval_every: 5,
        ..options()
    };
    let error = train(&MODEL, &rows, &validation, &options, &mut ()).err().unwrap();
    let TrainError::Overfit { train_loss, eval_loss, lowest, .. } = error else { panic!("{error}") };
    assert!(train_loss < 0.05 && eval_loss > lowest);
    let gates = Gates { overfit: Severity::Warning, ..Gates::default() };
    let report = train(&MODEL, &rows, &validation, &TrainOptions { gates, ..options.clone() }, &mut ())
        .unwrap()
        .report;
    assert!(report.warnings.iter().any(|text| text.contains("memorises")), "{:?}", report.warnings);
    assert!(report.warnings.iter().any(|text| text.contains("above training loss")), "{:?}", report.warnings);
    let alone = train(&MODEL, &rows, &[], &options, &mut ()).unwrap().report;
    assert!(alone.warnings[0].contains("no validation rows"), "{:?}", alone.warnings);
}

#[test]
fn patience_stops_early_and_the_best_adapter_is_kept() {
    let (rows, validation) = (rows(2, 8), rows(4, 9));
    let gates = Gates { patience: Some(2), ..Gates::default() };
    let options = TrainOptions { epochs: 60, eval_every: 3, keep: Keep::Best, gates, ..options() };
    let trained = train(&MODEL, &rows, &validation, &options, &mut ()).unwrap();
    let report = &trained.report;
    let best = gates::best(&report.evals).unwrap();
    assert_eq!(report.evals.len(), best + 3);
    assert!(report.steps < report.planned_steps);
    assert_eq!(
        (report.kept_step, report.eval_loss),
        (report.evals[best].step, Some(report.evals[best].loss))
    );
    let kept = Evaluation::new(&MODEL, &validation, 40).unwrap();
    let kept = kept.mean_loss(&MODEL, Some(&trained.adapter), &mut Workspace::default()).unwrap();
    assert_eq!(report.eval_loss, Some(kept));
}

#[test]
fn unusable_options_and_rows_are_named() {
    let rows = rows(3, 1);
    let message = |rows: &[TokenizedExample], options: TrainOptions| {
        train(&MODEL, rows, &[], &options, &mut ()).err().unwrap().to_string()
    };
    assert_eq!(message(&[], options()), "there are no training rows");
    assert_eq!(
        message(&rows, TrainOptions { learning_rate: -1.0, ..options() }),
        "training option `learning_rate` is -1; it must be above 0"
    );
    let mut unsupervised = rows.clone();
    unsupervised[1].supervised.fill(false);
    assert_eq!(message(&unsupervised, options()), "row `row1` has no supervised token");
    let error = train(&MODEL, &rows, &unsupervised, &options(), &mut ()).err().unwrap();
    assert_eq!(error.to_string(), "row `row1` has no supervised token");
}
