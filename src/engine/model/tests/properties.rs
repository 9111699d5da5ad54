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

fn packed(sequences: &[(Vec<u32>, Vec<bool>)]) -> Pack {
    Pack::new(&sequences.iter().map(|(tokens, marks)| (&tokens[..], &marks[..])).collect::<Vec<_>>())
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
    for (stored, device) in [(Stored::F32, REFERENCE), (Stored::F32, CPU), (Stored::Nf4, CPU)] {
        let model = random_model(&odd_config(), stored, &device);
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
                "slope {slope}, gradient {expected}, allowed {allowed}"
            );
        }
    }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let sequences = sequences();
    for (stored, device) in [(Stored::F32, REFERENCE), (Stored::Nf4, CPU)] {
        let model = random_model(&odd_config(), stored, &device);
        let adapter = busy_adapter(&model, 3);
        let alone: Vec<Pack> = sequences.iter().map(|one| packed(std::slice::from_ref(one))).collect();
        let (together_nll, together) = run(&model, &adapter, &[packed(&sequences)]);
        let (alone_nll, alone) = run(&model, &adapter, &alone);
        assert!((together_nll / alone_nll - 1.0).abs() < 1e-6, "{together_nll} packed, {alone_nll} alone");
        let error = worst(&flat(&together), &flat(&alone));
        assert!(error < 1e-6 * together.norm() as f32 + 1e-6, "gradients differ by {error}");
    }
}

#[test]
fn cached_decoding_of_many_is_the_whole_pass_of_each() {
    let sequences = sequences();
    let model = random_model(&odd_config(), Stored::Nf4, &CPU);
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
                let whole = model.logits(Some(&adapter), &pack, &[tokens.len() - 1], &mut workspace).unwrap();
                let error = worst(logits, &whole);
                assert!(error < 2e-5, "sequence {index} after {} tokens is off by {error}", fed[index]);
            }
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let pack = packed(&sequences());
    let results: Vec<(u64, Vec<u32>)> = [1, 2, 3]
        .map(|threads| {
            let model = random_model(&odd_config(), Stored::Nf4, &Compute { threads, ..CPU });
            let (nll, gradients) = run(&model, &busy_adapter(&model, 3), std::slice::from_ref(&pack));
            (nll.to_bits(), flat(&gradients).into_iter().map(f32::to_bits).collect())
        })
        .to_vec();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn used_workspace_gives_the_same_bits_as_a_fresh_one() {
    let sequences = sequences();
    let model = random_model(&odd_config(), Stored::Nf4, &CPU);
    let adapter = busy_adapter(&model, 3);
    let (long, short) = (packed(&sequences), packed(&sequences[2..]));
    let (_, fresh) = run(&model, &adapter, std::slice::from_ref(&short));
    let (mut gradients, mut workspace) = (Gradients::new(&adapter), Workspace::default());
    model.loss_and_gradients(&adapter, &long, 0.1, &mut gradients, &mut workspace).unwrap();
    gradients.zero();
    model.loss_and_gradients(&adapter, &short, 0.1, &mut gradients, &mut workspace).unwrap();
    assert_eq!(flat(&gradients), flat(&fresh));
}

#[test]
fn partial_adapter_has_the_gradients_it_has_in_the_whole() {
    let pack = packed(&sequences());
    let model = random_model(&odd_config(), Stored::F32, &CPU);
    for targets in [r".*layers\.1\.mlp\.down_proj", r".*layers\.[12]\.self_attn\.[qo]_proj"] {
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
