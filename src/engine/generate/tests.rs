//! Generation on the tiny golden llama: batches against single prompts, the cache against whole passes, and stops.

use std::path::Path;
use std::sync::LazyLock;

use super::*;
use crate::adapter::{LoraConfig, Targets};
use crate::backend::Compute;
use crate::model::Pack;
use crate::random::Random;

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama");
    Model::open(&golden, &Compute::cpu(2)).unwrap()
});

/// Prompts of 1 to 20 random tokens.
fn prompts(count: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(&[17]);
    (0..count).map(|_| (0..=random.below(20)).map(|_| 3 + random.below(93) as u32).collect()).collect()
}

fn tokens(prompts: &[Vec<u32>], options: &GenerateOptions) -> Vec<Vec<u32>> {
    let answers = generate(&MODEL, None, prompts, options, &mut ()).unwrap();
    answers.into_iter().map(|answer| answer.tokens).collect()
}

fn sampled() -> GenerateOptions {
    let sampling = SamplingOptions {
        temperature: 1.5,
        top_p: 0.95,
        repetition_penalty: 1.1,
        seed: 4,
        ..SamplingOptions::default()
    };
    GenerateOptions { sampling: Sampling::Sampled(sampling), ..GenerateOptions::greedy(12, vec![2]) }
}

#[test]
fn batches_give_the_tokens_of_single_prompts() {
    let prompts = prompts(9);
    for options in [GenerateOptions::greedy(12, vec![2]), sampled()] {
        let alone = tokens(&prompts, &GenerateOptions { batch: 1, ..options.clone() });
        for batch in [2, 4, 16] {
            assert_eq!(
                tokens(&prompts, &GenerateOptions { batch, ..options.clone() }),
                alone,
                "batch of {batch}"
            );
        }
    }
}

#[test]
fn what_prompts_share_is_read_once_and_changes_nothing() {
    let beginning: Vec<u32> = prompts(40).concat().into_iter().take(37).collect();
    let mut prompts: Vec<Vec<u32>> = prompts(6);
    prompts.iter_mut().for_each(|prompt| *prompt = [&beginning[..], &prompt[..prompt.len().min(9)]].concat());
    prompts.push(beginning.clone());
    let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    assert_eq!(shared_beginning(&views), 36, "the shortest keeps a token");
    assert_eq!(shared_beginning(&views[..1]), 0);
    assert_eq!(shared_beginning(&[&[1, 2, 3], &[1, 2, 4]]), 0, "too little to be worth a pass");
    for options in [GenerateOptions::greedy(12, vec![2]), sampled()] {
        let alone = tokens(&prompts, &GenerateOptions { batch: 1, ..options.clone() });
        assert_eq!(tokens(&prompts, &options), alone);
    }
}

#[test]
fn references_have_the_losses_of_whole_passes_and_change_no_answer() {
    let beginning: Vec<u32> = prompts(40).concat().into_iter().take(20).collect();
    let tail = |prompt: &Vec<u32>| prompt[..prompt.len().min(9)].to_vec();
    let prompts: Vec<Vec<u32>> =
        prompts(6).iter().map(|prompt| [&beginning[..], &tail(prompt), &[4, 5]].concat()).collect();
    // What the prompt is followed by, what counts of it, and what it parts from the prompt by.
    let texts: Vec<(Vec<u32>, Vec<bool>)> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let kept = prompt.len() - [0, 1, 12, 0, 0, 0][index];
            let tokens = [&prompt[..kept], &[9, 8, 7, 6 + index as u32, 3]].concat();
            let counts = |place: usize| (kept..kept + 4).contains(&place) || index == 3 && place == 5;
            let supervised = (0..tokens.len()).map(counts).collect();
            (tokens, supervised)
        })
        .collect();
    let requests: Vec<Request<'_>> = prompts
        .iter()
        .zip(&texts)
        .enumerate()
        .map(|(index, (prompt, (tokens, supervised)))| Request {
            prompt,
            max_new_tokens: [12, 12, 12, 12, 5, 0][index],
            reference: (index != 4).then_some(Reference { tokens, supervised }),
        })
        .collect();
    for batch in [16, 2] {
        let options = GenerateOptions { batch, ..GenerateOptions::greedy(12, vec![2]) };
        let plain = tokens(&prompts, &options);
        let answers = answer(&MODEL, None, &requests, &options, &mut ()).unwrap();
        for (index, answer) in answers.iter().enumerate() {
            let most = plain[index].len().min(requests[index].max_new_tokens);
            assert_eq!(answer.tokens, plain[index][..most], "answer {index}");
            let (tokens, supervised) = &texts[index];
            let pack = Pack::new(&[(tokens, supervised)]);
            let whole = MODEL.loss(None, &pack, &mut Workspace::default()).unwrap()[0];
            assert_eq!(answer.reference, (index != 4).then_some(whole), "reference {index}");
            assert!(whole.supervised == 4 + usize::from(index == 3));
        }
    }
}

#[test]
fn logits_are_those_of_the_prompt_alone_to_the_bit() {
    let prompts = prompts(5);
    let mut workspace = Workspace::default();
    let mut together = MODEL.new_cache(5, 40);
    let views: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let first = MODEL.extend(None, &mut together, &views, &mut workspace).unwrap();
    let second = MODEL.extend(None, &mut together, &[&[7][..]; 5], &mut workspace).unwrap();
    for (index, prompt) in prompts.iter().enumerate() {
        // Alone, and cut in two somewhere.
        let mut cache = MODEL.new_cache(1, 64);
        let (head, tail) = prompt.split_at(prompt.len() / 2);
        MODEL.extend(None, &mut cache, &[head], &mut workspace).unwrap();
        let alone = MODEL.extend(None, &mut cache, &[tail], &mut workspace).unwrap();
        assert_eq!(alone[0], first[index], "prompt {index}");
        let alone = MODEL.extend(None, &mut cache, &[&[7]], &mut workspace).unwrap();
        assert_eq!(alone[0], second[index], "prompt {index}, next token");
    }
}

#[test]
fn greedy_is_the_argmax_of_whole_passes() {
    let prompt = prompts(3)[2].clone();
    let answer = tokens(std::slice::from_ref(&prompt), &GenerateOptions::greedy(10, vec![])).remove(0);
    let mut context = prompt;
    for (index, &token) in answer.iter().enumerate() {
        let marks = vec![false; context.len()];
        let pack = Pack::new(&[(&context, &marks)]);
        let logits = MODEL.logits(None, &pack, &[context.len() - 1], &mut Workspace::default()).unwrap();
        assert_eq!(argmax(&logits), Some(token), "token {index}");
        context.push(token);
    }
    assert_eq!(answer.len(), 10);
}

#[test]
fn stop_token_ends_the_answer_and_is_left_out() {
    let prompt = vec![prompts(1)[0].clone()];
    let free = tokens(&prompt, &GenerateOptions::greedy(12, vec![])).remove(0);
    let at = (1..free.len()).find(|&index| !free[..index].contains(&free[index])).unwrap();
    let options = GenerateOptions::greedy(12, vec![free[at], 95]);
    let stopped = generate(&MODEL, None, &prompt, &options, &mut ()).unwrap().remove(0);
    assert_eq!((stopped.tokens.as_slice(), stopped.stopped), (&free[..at], StopReason::EndOfTurn));
    let options = GenerateOptions::greedy(at, vec![free[at]]);
    let cut = generate(&MODEL, None, &prompt, &options, &mut ()).unwrap().remove(0);
    assert_eq!((cut.tokens.as_slice(), cut.stopped), (&free[..at], StopReason::MaxTokens));
}

#[test]
fn answers_end_where_positions_end() {
    let positions = MODEL.config().max_position_embeddings;
    let long = vec![5u32; positions - 3];
    let answers =
        generate(&MODEL, None, &[vec![5], long], &GenerateOptions::greedy(1000, vec![]), &mut ()).unwrap();
    assert_eq!(answers.iter().map(|answer| answer.tokens.len()).collect::<Vec<_>>(), [positions - 1, 3]);
    assert!(answers.iter().all(|answer| answer.stopped == StopReason::MaxTokens));
    assert!(tokens(&[vec![5]], &GenerateOptions::greedy(0, vec![]))[0].is_empty());
}

#[test]
fn streams_make_a_subset_answer_as_the_whole() {
    let prompts = prompts(6);
    let whole = tokens(&prompts, &sampled());
    let subset = [prompts[5].clone(), prompts[2].clone()];
    let options = GenerateOptions { streams: Some(vec![5, 2]), ..sampled() };
    assert_eq!(tokens(&subset, &options), [whole[5].clone(), whole[2].clone()]);
    let same_prompt = vec![prompts[0].clone(); 4];
    let answers = tokens(&same_prompt, &sampled());
    assert!(answers.iter().any(|answer| *answer != answers[0]), "each prompt has its own stream");
}

#[test]
fn adapters_are_switched_without_reopening_the_model() {
    let lora = LoraConfig {
        rank: 4,
        alpha: 8.0,
        targets: Targets::AllLinear,
        rslora: false,
        seed: 1,
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::new(&MODEL, &lora).unwrap();
    adapter.parameters_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value += 0.1));
    let prompts = prompts(4);
    let options = GenerateOptions::greedy(8, vec![]);
    let base = tokens(&prompts, &options);
    let tuned = generate(&MODEL, Some(&adapter), &prompts, &options, &mut ()).unwrap();
    assert_ne!(tuned.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>(), base);
    assert_eq!(tokens(&prompts, &options), base);
}

#[derive(Default)]
struct Listener {
    tokens: Vec<Vec<u32>>,
    done: Vec<(usize, Generation)>,
    passes_left: Option<usize>,
}

impl GenerateHooks for Listener {
    fn token(&mut self, prompt: usize, token: u32) {
        self.tokens.resize(self.tokens.len().max(prompt + 1), Vec::new());
        self.tokens[prompt].push(token);
    }

    fn done(&mut self, prompt: usize, generation: &Generation) {
        self.done.push((prompt, generation.clone()));
    }

    fn cancelled(&mut self) -> bool {
        let cancelled = self.passes_left == Some(0);
        self.passes_left = self.passes_left.map(|left| left.saturating_sub(1));
        cancelled
    }
}

#[test]
fn hooks_hear_every_token_and_may_cancel() {
    let prompts = prompts(5);
    let options = GenerateOptions { batch: 2, ..GenerateOptions::greedy(6, vec![]) };
    let mut listener = Listener::default();
    let answers = generate(&MODEL, None, &prompts, &options, &mut listener).unwrap();
    assert_eq!(listener.tokens, answers.iter().map(|answer| answer.tokens.clone()).collect::<Vec<_>>());
    listener.done.sort_by_key(|(prompt, _)| *prompt);
    assert_eq!(listener.done, answers.into_iter().enumerate().collect::<Vec<_>>());
    // The first batch takes a prefill and five steps.
    let mut listener = Listener { passes_left: Some(6), ..Listener::default() };
    let error = generate(&MODEL, None, &prompts, &options, &mut listener).unwrap_err();
    assert!(matches!(error, GenerateError::Cancelled));
    assert_eq!(listener.done.len(), 2);
}

#[test]
fn prompts_that_cannot_be_answered_are_named() {
    let message = |prompt: Vec<u32>| {
        let prompts = [vec![5], prompt];
        generate(&MODEL, None, &prompts, &GenerateOptions::greedy(4, vec![]), &mut ())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(message(vec![]), "prompt 1 is empty");
    assert_eq!(message(vec![96]), "prompt 1 has token 96, beyond the model's vocabulary of 96");
    assert_eq!(
        message(vec![5; 64]),
        "prompt 1 has 64 tokens; the model has 64 positions, and an answer needs some"
    );
    let options = GenerateOptions { streams: Some(vec![1]), ..GenerateOptions::greedy(4, vec![]) };
    let error = generate(&MODEL, None, &[], &options, &mut ()).unwrap_err();
    assert_eq!(error.to_string(), "1 random streams are given for 0 prompts");
}
