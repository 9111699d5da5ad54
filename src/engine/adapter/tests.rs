//! Adapters of every kind on the tiny golden llama against PEFT: `tests/golden/adapter_variants.py` made the values.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use safetensors::SafeTensors;

use super::*;
use crate::backend::{BackendKind, Compute};
use crate::model::{Noise, Pack, Workspace};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama")
}

fn models() -> [Model; 2] {
    [BackendKind::Reference, BackendKind::CpuExact]
        .map(|kind| Model::open(&folder(), &Compute { kind, ..Compute::cpu(2) }).unwrap())
}

struct Golden(Vec<u8>);

static VARIANTS: LazyLock<Golden> =
    LazyLock::new(|| Golden(fs_err::read(folder().join("adapter_variants.safetensors")).unwrap()));
static PLAIN: LazyLock<Golden> =
    LazyLock::new(|| Golden(fs_err::read(folder().join("lora.safetensors")).unwrap()));

impl Golden {
    fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let bytes = tensors.tensor(name).unwrap_or_else(|_| panic!("no golden `{name}`")).data().to_vec();
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }
}

fn golden_loss(path: &str) -> f64 {
    let text = fs_err::read(folder().join("adapter_variants.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    record.pointer(path).unwrap().as_f64().unwrap()
}

/// The golden batch; its second row is padded after 17 tokens.
fn pack(noise: Option<Noise>) -> Pack {
    let golden = Golden(fs_err::read(folder().join("golden.safetensors")).unwrap());
    let tensors = SafeTensors::deserialize(&golden.0).unwrap();
    let integers = |name: &str| -> Vec<i64> {
        let bytes = tensors.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let tokens: Vec<u32> = integers("input_ids").iter().map(|&id| id as u32).collect();
    let marks: Vec<bool> = integers("labels").iter().map(|&label| label != -100).collect();
    let mut pack = Pack::new(&[(&tokens[..24], &marks[..24]), (&tokens[24..41], &marks[24..41])]);
    pack.noise = noise;
    pack
}

fn noise(dropout: f32, neftune_alpha: f32) -> Option<Noise> {
    Some(Noise { dropout, neftune_alpha, streams: vec![101, 202] })
}

fn config() -> LoraConfig {
    LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() }
}

fn filled(model: &Model, config: &LoraConfig, golden: &Golden, prefix: &str) -> Adapter {
    let mut adapter = Adapter::new(model, config).unwrap();
    for (name, values) in adapter.parameters_mut() {
        values.copy_from_slice(&golden.f32(&format!("{prefix}init.{name}")));
    }
    adapter
}

/// Loss and gradients of `adapter` are those recorded under `name`.
fn check(model: &Model, adapter: &Adapter, pack: &Pack, name: &str) {
    let mut gradients = Gradients::new(adapter);
    let scale = 1.0 / pack.supervised() as f32;
    let loss =
        model.loss_and_gradients(adapter, pack, scale, &mut gradients, &mut Workspace::default()).unwrap();
    let (loss, want) = (loss.nll / loss.supervised as f64, golden_loss(&format!("/{name}/loss")));
    assert!((loss / want - 1.0).abs() < 1e-5, "{name}: loss {loss} is not {want}");
    for (tensor, got) in gradients.tensors() {
        let want = VARIANTS.f32(&format!("{name}.grad.{tensor}"));
        assert_eq!(got.len(), want.len(), "{tensor}");
        for (got, want) in got.iter().zip(want) {
            let tolerance = 1e-5 + 1e-3 * want.abs();
            assert!((got - want).abs() <= tolerance, "{name} {tensor}: {got} is not {want}");
        }
    }
}

#[test]
fn dora_gradients_of_a_b_and_magnitude_are_those_of_peft() {
    for model in models() {
        let adapter = filled(&model, &LoraConfig { dora: true, ..config() }, &VARIANTS, "dora.");
        check(&model, &adapter, &pack(None), "dora");
    }
}

#[test]
fn dropout_falls_on_the_input_of_the_pair_alone() {
    for model in models() {
        let plain = filled(&model, &LoraConfig { dropout: 0.25, ..config() }, &PLAIN, "");
        check(&model, &plain, &pack(noise(0.25, 0.0)), "dropout");
        let dora = LoraConfig { dora: true, dropout: 0.25, ..config() };
        check(&model, &filled(&model, &dora, &VARIANTS, "dora."), &pack(noise(0.25, 0.0)), "dora_dropout");
    }
}

#[test]
fn neftune_disturbs_training_alone() {
    for model in models() {
        let adapter = filled(&model, &config(), &PLAIN, "");
        check(&model, &adapter, &pack(noise(0.0, 5.0)), "neftune");
        let loss = |pack: &Pack| model.loss(Some(&adapter), pack, &mut Workspace::default()).unwrap();
        assert_eq!(loss(&pack(noise(0.5, 5.0))), loss(&pack(None)), "an evaluation is exact");
    }
}

fn patterns() -> LoraConfig {
    let ranks = [("down_proj", 2), (r"layers\.0\.self_attn\.q_proj", 6)];
    let alphas = [("v_proj", 3.5), (r".*1\.mlp.*", 16.0)];
    LoraConfig {
        rank_pattern: ranks.map(|(key, rank)| (key.to_owned(), rank)).into(),
        alpha_pattern: alphas.map(|(key, alpha)| (key.to_owned(), alpha)).into(),
        ..config()
    }
}

#[test]
fn rank_and_alpha_patterns_are_those_of_peft() {
    for model in models() {
        let adapter = filled(&model, &patterns(), &VARIANTS, "patterns.");
        check(&model, &adapter, &pack(None), "patterns");
    }
}

#[test]
fn every_kind_of_adapter_survives_its_files() {
    let [model, _] = models();
    let dora = LoraConfig { dora: true, dropout: 0.1, rslora: true, ..patterns() };
    for config in [patterns(), dora] {
        let folder = tempfile::tempdir().unwrap();
        let adapter = Adapter::new(&model, &config).unwrap();
        adapter.save_peft(folder.path(), "base").unwrap();
        assert_eq!(Adapter::load_peft(folder.path(), &model).unwrap(), adapter);
        let text = fs_err::read_to_string(folder.path().join("adapter_config.json")).unwrap();
        let written: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(written["rank_pattern"]["down_proj"], 2);
        assert_eq!(written["alpha_pattern"]["v_proj"], 3.5);
        assert_eq!(written["use_dora"], config.dora);
        assert_eq!(written["lora_dropout"], if config.dora { 0.1 } else { 0.0 });
    }
}

#[test]
fn dora_saved_by_peft_is_read_decoded_and_merged() {
    for model in models() {
        let adapter = Adapter::load_peft(&folder().join("adapter_dora"), &model).unwrap();
        let pack = pack(None);
        let mean = |adapter: Option<&Adapter>, model: &Model| {
            let losses = model.loss(adapter, &pack, &mut Workspace::default()).unwrap();
            losses.iter().map(|loss| loss.nll).sum::<f64>() / pack.supervised() as f64
        };
        assert!((mean(Some(&adapter), &model) / golden_loss("/dora/loss") - 1.0).abs() < 1e-5);
        // One token at a time: the norms are known from the first token on, and give the same logits.
        let tokens = &pack.tokens[..24];
        let mut workspace = Workspace::default();
        let one = Pack::new(&[(tokens, &[false; 24])]);
        let whole = model.logits(Some(&adapter), &one, &[23], &mut workspace).unwrap();
        let mut cache = model.new_cache(1, 24);
        let mut last = Vec::new();
        for token in tokens {
            let step = model.extend(Some(&adapter), &mut cache, &[&[*token]], &mut workspace).unwrap();
            last = step[0].clone().unwrap();
        }
        let worst = last.iter().zip(&whole).map(|(step, whole)| (step - whole).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "{worst}");
    }
    let [model, _] = models();
    let adapter = Adapter::load_peft(&folder().join("adapter_dora"), &model).unwrap();
    let checkpoint = crate::format::Checkpoint::open(&folder()).unwrap();
    let name = "model.layers.1.mlp.down_proj";
    let mut weight = checkpoint.matrix(&format!("{name}.weight")).unwrap().to_f32();
    assert!(adapter.merge(name, &mut weight));
    for (got, want) in weight.iter().zip(VARIANTS.f32(&format!("dora.merged.{name}.weight"))) {
        assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    }
    assert!(!adapter.merge("lm_head", &mut weight));
}

#[test]
fn fresh_dora_changes_next_to_nothing() {
    let [_, model] = models();
    let adapter = Adapter::new(&model, &LoraConfig { dora: true, ..config() }).unwrap();
    let loss = |adapter| model.loss(adapter, &pack(None), &mut Workspace::default()).unwrap()[0].nll;
    assert!((loss(Some(&adapter)) / loss(None) - 1.0).abs() < 1e-6);
}

#[test]
fn changed_values_change_the_norms() {
    let [_, model] = models();
    let mut adapter = filled(&model, &LoraConfig { dora: true, ..config() }, &VARIANTS, "dora.");
    let loss = |adapter: &Adapter| model.loss(Some(adapter), &pack(None), &mut Workspace::default()).unwrap();
    let before = loss(&adapter);
    adapter.parameters_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value *= 1.5));
    let fresh = adapter.clone();
    assert_ne!(before, loss(&adapter));
    assert_eq!(loss(&fresh), loss(&adapter));
}

#[test]
fn pattern_that_matches_nothing_is_named() {
    let [model, _] = models();
    let config = LoraConfig { rank_pattern: BTreeMap::from([("x_proj".to_owned(), 2)]), ..config() };
    let error = Adapter::new(&model, &config).unwrap_err().to_string();
    assert!(
        error.starts_with("`rank_pattern` names `x_proj`, which matches no adapted layer; adapted: "),
        "{error}"
    );
}
