//! What must hold of any model, on random ones.

use super::*;

fn sequences() -> Vec<(Vec<u32>, Vec<bool>)> {
    let lengths = [70, 1, 5, 13];
    lengths
        .iter()
        .enumerate()
        .map(|(seed, &len)| {
            let random = noise(seed as u64 + 1, len);
            let tokens = random.iter().map(|value| ((value + 1.0) * 18.0) as u32).collect();
            (tokens, random.iter().map(|value| *value > -0.5).collect())
        })
        .collect()
}

/// Sequences that begin with the same 12 tokens, whose targets lie behind them.
fn sequences_with_one_beginning() -> Vec<(Vec<u32>, Vec<bool>)> {
    let common: Vec<u32> = (3..15).collect();
    let with_beginning = |(tokens, marks): (Vec<u32>, Vec<bool>)| {
        ([&common[..], &tokens].concat(), [&[false; 12][..], &marks].concat())
    };
    sequences().into_iter().map(with_beginning).collect()
}

fn slices(sequences: &[(Vec<u32>, Vec<bool>)]) -> Vec<(&[u32], &[bool])> {
    sequences.iter().map(|(tokens, marks)| (&tokens[..], &marks[..])).collect()
}

fn packed(sequences: &[(Vec<u32>, Vec<bool>)]) -> Pack {
    Pack::new(&slices(sequences))
}

/// Every odd model, plain under both backends and quantised.
fn models() -> Vec<(ModelConfig, Stored, Compute)> {
    let ways = [(Stored::F32, REFERENCE), (Stored::F32, CPU), (Stored::Nf4, CPU)];
    let with_ways = |config: ModelConfig| ways.map(|(stored, device)| (config.clone(), stored, device));
    odd_configs().into_iter().flat_map(with_ways).collect()
}

fn run(model: &Model, adapter: &Adapter, packs: &[Pack]) -> (f64, Gradients) {
    let (mut gradients, mut workspace) = (Gradients::new(adapter), Workspace::default());
    let mut nll = 0.0;
    for pack in packs {
        nll += model.loss_and_gradients(adapter, pack, 0.1, &mut gradients, &mut workspace).unwrap().nll;
    }
    (nll, gradients)
}

fn flat(gradients: &Gradients) -> Vec<f32> {
    gradients.tensors().flat_map(|(_, values)| values.to_vec()).collect()
}

#[test]
fn gradient_is_the_slope_of_the_loss() {
    let pack = packed(&sequences());
    for (family, stored, device) in models() {
        let model = random_model(&family, stored, &device);
        let adapter = busy_adapter(&model, 3);
        let (_, gradients) = run(&model, &adapter, std::slice::from_ref(&pack));
        for seed in 0..4 {
            let direction: Vec<Vec<f32>> = adapter
                .parameters()
                .enumerate()
                .map(|(index, (_, values))| noise(1000 * (seed + 1) + index as u64, values.len()))
                .collect();
            let loss_at = |step: f32| {
                let mut moved = adapter.clone();
                for ((_, values), direction) in moved.parameters_mut().zip(&direction) {
                    values.iter_mut().zip(direction).for_each(|(value, d)| *value += step * d);
                }
                let losses = model.loss(Some(&moved), &pack, &mut Workspace::default()).unwrap();
                0.1 * losses.iter().map(|loss| loss.nll).sum::<f64>()
            };
            let step = 1e-3;
            let slope = (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
            let dots = gradients.tensors().zip(&direction).map(|((_, gradient), direction)| {
                gradient.iter().zip(direction).map(|(g, d)| f64::from(g * d)).sum::<f64>()
            });
            let expected: f64 = dots.sum();
            let allowed = 2e-3 * gradients.norm();
            assert!(
                (slope - expected).abs() < allowed,
                "{}: slope {slope}, gradient {expected}, allowed {allowed}",
                family.model_type
            );
        }
    }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let sequences = sequences();
    for (family, stored, device) in models() {
        let model = random_model(&family, stored, &device);
        let adapter = busy_adapter(&model, 3);
        let alone: Vec<Pack> = sequences.iter().map(|one| packed(std::slice::from_ref(one))).collect();
        let (together_nll, together) = run(&model, &adapter, &[packed(&sequences)]);
        let (alone_nll, alone) = run(&model, &adapter, &alone);
        let name = &family.model_type;
        let difference = (together_nll / alone_nll - 1.0).abs();
        assert!(difference < 1e-6, "{name}: {together_nll} packed, {alone_nll} alone");
        let error = worst(&flat(&together), &flat(&alone));
        assert!(error < 1e-6 * together.norm() as f32 + 1e-6, "{name}: gradients differ by {error}");
    }
}

#[test]
fn shared_beginning_gives_what_whole_sequences_give() {
    let sequences = sequences_with_one_beginning();
    let whole = packed(&sequences);
    for (family, stored, device) in models() {
        let (model, name) = (random_model(&family, stored, &device), &family.model_type);
        let shared = model.pack(&slices(&sequences));
        if family.layers.contains(&Mixing::Mamba) {
            assert_eq!(shared, whole, "{name}");
            continue;
        }
        assert_eq!((shared.starts[0], shared.tokens.len()), (11, whole.tokens.len() - 3 * 11), "{name}");
        let (adapter, mut workspace) = (busy_adapter(&model, 3), Workspace::default());
        let mut losses = |pack| model.loss(Some(&adapter), pack, &mut workspace).unwrap();
        for (shared, whole) in losses(&shared).iter().zip(losses(&whole)) {
            assert_eq!(shared.supervised, whole.supervised, "{name}");
            let difference = (shared.nll - whole.nll).abs();
            assert!(difference <= 1e-6 * whole.nll, "{name}: {} shared, {} whole", shared.nll, whole.nll);
        }
        let [(shared_nll, shared), (whole_nll, whole)] =
            [shared, whole.clone()].map(|pack| run(&model, &adapter, &[pack]));
        assert!(
            (shared_nll / whole_nll - 1.0).abs() < 1e-6,
            "{name}: {shared_nll} shared, {whole_nll} whole"
        );
        let allowed = 1e-6 * whole.norm() as f32 + 1e-6;
        for ((tensor, shared), (_, whole)) in shared.tensors().zip(whole.tensors()) {
            let error = worst(shared, whole);
            assert!(error < allowed, "{name}: gradient of {tensor} differs by {error} of {allowed}");
        }
    }
}

#[test]
fn cached_decoding_of_many_is_the_whole_pass_of_each() {
    let sequences = sequences();
    for (family, stored, device) in models() {
        let model = random_model(&family, stored, &device);
        let (adapter, mut workspace) = (busy_adapter(&model, 3), Workspace::default());
        let mut cache = model.new_cache(sequences.len(), 70);
        let mut fed = vec![0; sequences.len()];
        // Prefill of uneven lengths, then steps in which the shorter ones fall away.
        for step in [3, 1, 9, 1, 56] {
            let slices: Vec<&[u32]> = sequences
                .iter()
                .zip(&fed)
                .map(|((tokens, _), &fed)| &tokens[fed..tokens.len().min(fed + step)])
                .collect();
            let logits = model.extend(Some(&adapter), &mut cache, &slices, &mut workspace).unwrap();
            for (index, slice) in slices.iter().enumerate() {
                fed[index] += slice.len();
                assert_eq!(logits[index].is_some(), !slice.is_empty());
                if let Some(logits) = &logits[index] {
                    let tokens = &sequences[index].0[..fed[index]];
                    let pack = Pack::new(&[(tokens, &vec![false; tokens.len()])]);
                    let last = [tokens.len() - 1];
                    let whole = model.logits(Some(&adapter), &pack, &last, &mut workspace).unwrap();
                    let (error, name) = (worst(logits, &whole), &family.model_type);
                    let after = fed[index];
                    assert!(error < 2e-5, "{name}: sequence {index} after {after} tokens is off by {error}");
                }
            }
        }
    }
}

#[test]
fn forked_sequence_goes_on_as_the_one_it_came_from() {
    for (family, stored, device) in models() {
        let model = random_model(&family, stored, &device);
        let (adapter, mut workspace) = (busy_adapter(&model, 3), Workspace::default());
        let mut cache = model.new_cache(2, 20);
        let mut extend = |cache: &mut _, tokens: [&[u32]; 2]| {
            model.extend(Some(&adapter), cache, &tokens, &mut workspace).unwrap()
        };
        extend(&mut cache, [&[5, 9, 2, 7], &[]]);
        cache.fork(0, 1);
        assert_eq!(cache.lengths(), [4, 4]);
        let both = extend(&mut cache, [&[3, 1], &[3, 1]]);
        let (first, second) = (both[0].as_ref().unwrap(), both[1].as_ref().unwrap());
        assert!(worst(first, second) < 1e-6, "{}", family.model_type);
        let apart = extend(&mut cache, [&[8], &[4]]);
        assert_ne!(apart[0], apart[1], "{}", family.model_type);
    }
}

#[test]
fn loss_after_a_prefix_is_that_of_the_whole_and_leaves_the_cache_as_it_was() {
    let (prefix, token) = ([5u32, 9, 2, 7], [8u32]);
    let (tail, marks) = ([3u32, 1, 4, 6], [false, true, false, true]);
    for (family, stored, device) in models() {
        let model = random_model(&family, stored, &device);
        let (adapter, mut workspace) = (busy_adapter(&model, 3), Workspace::default());
        let whole = [&prefix[..], &tail[..]].concat();
        let whole_marks = [&[false; 4][..], &marks[..]].concat();
        let pack = Pack::new(&[(&whole, &whole_marks)]);
        let want = model.loss(Some(&adapter), &pack, &mut workspace).unwrap()[0];
        let mut cache = model.new_cache_of(&[4, 9, 5]);
        model.feed(Some(&adapter), &mut cache, &[&[], &prefix, &prefix], &mut workspace).unwrap();
        let mut untouched = cache.clone();
        let tails = [(&[][..], &[][..]), (&tail[..], &marks[..]), (&[], &[])];
        let got = model.loss_after(Some(&adapter), &mut cache, &tails, &mut workspace).unwrap();
        assert_eq!(got.iter().map(|loss| loss.supervised).collect::<Vec<_>>(), [0, 2, 0]);
        assert!((got[1].nll - want.nll).abs() < 1e-4, "{}: {got:?} {want:?}", family.model_type);
        let mut next = |cache: &mut _| {
            model.extend(Some(&adapter), cache, &[&[], &token, &token], &mut workspace).unwrap()
        };
        assert_eq!(next(&mut cache), next(&mut untouched), "{}", family.model_type);
        assert_eq!(cache.lengths(), [0, 5, 5]);
    }
}

#[test]
fn failed_pass_leaves_the_cache_as_it_was() {
    for family in odd_configs() {
        let model = random_model(&family, Stored::F32, &CPU);
        let (mut cache, mut workspace) = (model.new_cache(1, 20), Workspace::default());
        model.extend(None, &mut cache, &[&[3, 4, 5]], &mut workspace).unwrap();
        let mut untouched = cache.clone();
        let mut broken = busy_adapter(&model, 3);
        let last = broken.parameters_mut().last().unwrap();
        last.1.fill(f32::NAN);
        let error = model.extend(Some(&broken), &mut cache, &[&[6, 7]], &mut workspace).unwrap_err();
        assert!(matches!(error, ModelError::NotFinite { .. }), "{error}");
        let [after, expected] = [&mut cache, &mut untouched]
            .map(|cache| model.extend(None, cache, &[&[8]], &mut workspace).unwrap());
        assert_eq!(after, expected, "{}", family.model_type);
    }
}

#[test]
fn forgotten_sequence_starts_anew() {
    for family in odd_configs() {
        let model = random_model(&family, Stored::F32, &CPU);
        let (mut cache, mut workspace) = (model.new_cache(2, 20), Workspace::default());
        let fresh = model.extend(None, &mut cache, &[&[3, 4], &[5]], &mut workspace).unwrap();
        model.extend(None, &mut cache, &[&[6], &[7]], &mut workspace).unwrap();
        let to_one = cache.truncate(0, 1);
        let recurrent = family.layers.contains(&Mixing::Mamba);
        assert_eq!(matches!(to_one, Err(ModelError::CacheKeepsNoPast { .. })), recurrent);
        (0..2).for_each(|sequence| cache.truncate(sequence, 0).unwrap());
        let again = model.extend(None, &mut cache, &[&[3, 4], &[5]], &mut workspace).unwrap();
        assert_eq!(again, fresh, "{}", family.model_type);
        assert_eq!(cache.lengths(), [2, 1]);
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let sequences = sequences_with_one_beginning();
    for family in odd_configs() {
        let results: Vec<(u64, Vec<u32>)> = [1, 2, 3]
            .map(|threads| {
                let model = random_model(&family, Stored::Nf4, &Compute { threads, ..FASTEST });
                let packs = [packed(&sequences), model.pack(&slices(&sequences))];
                let (nll, gradients) = run(&model, &busy_adapter(&model, 3), &packs);
                (nll.to_bits(), flat(&gradients).into_iter().map(f32::to_bits).collect())
            })
            .to_vec();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{}", family.model_type);
    }
}

#[test]
fn used_workspace_gives_the_same_bits_as_a_fresh_one() {
    let sequences = sequences();
    let (long, short) = (packed(&sequences), packed(&sequences[2..]));
    // One workspace for all: what a model of another family left in it must not matter either.
    let mut workspace = Workspace::default();
    for family in odd_configs() {
        let model = random_model(&family, Stored::Nf4, &CPU);
        let adapter = busy_adapter(&model, 3);
        let (_, fresh) = run(&model, &adapter, std::slice::from_ref(&short));
        let mut gradients = Gradients::new(&adapter);
        model.loss_and_gradients(&adapter, &long, 0.1, &mut gradients, &mut workspace).unwrap();
        gradients.zero();
        model.loss_and_gradients(&adapter, &short, 0.1, &mut gradients, &mut workspace).unwrap();
        assert_eq!(flat(&gradients), flat(&fresh), "{}", family.model_type);
    }
}

#[test]
fn every_tensor_is_listed_and_every_golden_tensor_is_used() {
    for family in GOLDEN {
        let checkpoint = Checkpoint::open(&folder(family)).unwrap();
        let mut listed: Vec<String> =
            tensors(checkpoint.config()).unwrap().into_iter().map(|tensor| tensor.name).collect();
        listed.sort();
        assert_eq!(listed, checkpoint.names(), "{family}");
    }
}

#[test]
fn partial_adapter_has_the_gradients_it_has_in_the_whole() {
    let pack = packed(&sequences());
    let hybrid = odd_configs().pop().unwrap();
    for (family, targets) in [
        (odd_config(), r".*layers\.1\.mlp\.down_proj"),
        (odd_config(), r".*layers\.[12]\.self_attn\.[qo]_proj"),
        (hybrid.clone(), r".*layers\.2\.mamba\.in_proj"),
        (hybrid.clone(), r".*layers\.0\.mamba\.out_proj"),
        (hybrid, r".*layers\.1\.shared_mlp\.input_linear"),
    ] {
        let model = random_model(&family, Stored::F32, &CPU);
        let config = LoraConfig {
            rank: 3,
            alpha: 8.0,
            targets: Targets::Regex(targets.into()),
            seed: 3,
            ..LoraConfig::default()
        };
        let mut part = Adapter::new(&model, &config).unwrap();
        for (index, (_, values)) in part.parameters_mut().enumerate() {
            values.copy_from_slice(&noise(index as u64 + 50, values.len()));
        }
        // The same values within an adapter of all layers whose other pairs are zero.
        let mut whole = busy_adapter(&model, 3);
        whole.parameters_mut().for_each(|(_, values)| values.fill(0.0));
        for (name, values) in part.parameters() {
            let place = whole.parameters_mut().find(|(other, _)| *other == name);
            place.unwrap().1.copy_from_slice(values);
        }
        let (_, part_gradients) = run(&model, &part, std::slice::from_ref(&pack));
        let (_, whole_gradients) = run(&model, &whole, std::slice::from_ref(&pack));
        for (name, values) in part_gradients.tensors() {
            let place = whole_gradients.tensors().find(|(other, _)| *other == name);
            let error = worst(values, place.unwrap().1);
            assert!(error < 1e-5, "{name} differs by {error}");
        }
    }
}

#[test]
fn pack_without_targets_has_no_loss() {
    let model = random_model(&odd_config(), Stored::F32, &CPU);
    let adapter = busy_adapter(&model, 3);
    let pack = Pack::new(&[(&[1, 2, 3], &[false; 3])]);
    let (nll, gradients) = run(&model, &adapter, &[pack]);
    assert_eq!((nll, gradients.norm()), (0.0, 0.0));
}

/// One layer of the width of SmolLM2-135M: linears 2·T·(2·3538944 - 552960), LoRA of rank 16 on all of them forward
/// and twice as much backward, but not to the input of q, k and v; attention of 6 + 3 pairs of a query and a key
/// it sees; the head on 2 + 1 targets.
#[test]
fn training_step_takes_the_operations_counted_by_hand() {
    let config = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 64,
        "tie_word_embeddings": true}"#;
    let model = random_model(&ModelConfig::from_json(config).unwrap(), Stored::F32, &CPU);
    let adapter = busy_adapter(&model, 16);
    let pack = Pack::new(&[(&[1, 2, 3], &[true; 3]), (&[4, 5], &[true, true])]);
    let linears = 2 * 5 * (2 * 3_538_944 - 552_960);
    let lora = 2 * 16 * 5 * (3 * (2 * 1152 + 2 * 768 + 3 * 2112) - 3 * 576);
    let attention = 2 * (2 + 5) * (6 + 3) * 576;
    let head = 4 * 3 * 64 * 576;
    assert_eq!(model.training_flops(&adapter, &pack), f64::from(linears + lora + attention + head));
}
