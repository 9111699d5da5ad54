//! Writes small GGUF files for tests: any metadata, any tensors, and a tiny llama model with a byte-level
//! vocabulary. Knows the container's layout, so that tests can also break it on purpose.

use half::{bf16, f16};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::format::gguf::Value;

/// Tensor type codes.
pub(crate) const F32: u32 = 0;
pub(crate) const F16: u32 = 1;
pub(crate) const Q4_0: u32 = 2;
pub(crate) const Q4_1: u32 = 3;
pub(crate) const Q5_0: u32 = 6;
pub(crate) const Q5_1: u32 = 7;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const BF16: u32 = 30;

/// Rows per head, and other sizes, of `tiny_llama`.
pub(crate) const HEAD_DIM: usize = 16;
pub(crate) const HIDDEN: usize = 64;

/// ChatML, as SmolLM2 writes it, without its default system prompt.
pub(crate) const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A file in the making.
#[derive(Clone, Default)]
pub(crate) struct GgufWriter {
    entries: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

impl GgufWriter {
    /// Adds an entry, or replaces the one of this key.
    pub(crate) fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.entries.retain(|(present, _)| present != key);
        self.entries.push((key.to_owned(), value));
        self
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(present, _)| present == key).map(|(_, value)| value)
    }

    pub(crate) fn text(&mut self, key: &str, text: &str) -> &mut Self {
        self.set(key, Value::Text(text.to_owned()))
    }

    pub(crate) fn unsigned(&mut self, key: &str, number: usize) -> &mut Self {
        self.set(key, Value::Unsigned(number as u64))
    }

    pub(crate) fn texts(&mut self, key: &str, texts: &[String]) -> &mut Self {
        self.set(key, Value::List(texts.iter().cloned().map(Value::Text).collect()))
    }

    pub(crate) fn remove(&mut self, key: &str) -> &mut Self {
        self.entries.retain(|(present, _)| present != key);
        self.tensors.retain(|(name, ..)| name != key);
        self
    }

    /// Takes all tensors out.
    pub(crate) fn keep_entries_alone(&mut self) {
        self.tensors.clear();
    }

    /// Adds a tensor; `shape` outermost first.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], code: u32, bytes: Vec<u8>) -> &mut Self {
        self.tensors.retain(|(present, ..)| present != name);
        self.tensors.push((name.to_owned(), shape.to_vec(), code, bytes));
        self
    }

    pub(crate) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, F32, bytes)
    }

    /// The file's bytes.
    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            put_text(&mut out, key);
            out.extend(type_code(value).to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0;
        for (name, shape, code, bytes) in &self.tensors {
            put_text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
            out.extend(code.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(32);
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

fn type_code(value: &Value) -> u32 {
    match value {
        Value::Unsigned(_) => 10,
        Value::Signed(_) => 5,
        Value::Float(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::List(_) => 9,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Unsigned(number) => out.extend(number.to_le_bytes()),
        Value::Signed(number) => out.extend((*number as i32).to_le_bytes()),
        Value::Float(number) => out.extend((*number as f32).to_le_bytes()),
        Value::Bool(flag) => out.push(u8::from(*flag)),
        Value::Text(text) => put_text(out, text),
        Value::List(values) => {
            out.extend(values.first().map_or(8, type_code).to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put_value(out, value));
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A two-layer llama (hidden 64, 4 heads, 2 key heads, intermediate 128) whose linears have type `code`, with
/// the vocabulary of `add_vocabulary`.
pub(crate) fn tiny_llama(code: u32) -> GgufWriter {
    let mut file = GgufWriter::default();
    file.text("general.architecture", "llama");
    for (key, value) in [
        ("llama.block_count", 2),
        ("llama.context_length", 512),
        ("llama.embedding_length", HIDDEN),
        ("llama.feed_forward_length", 128),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", HEAD_DIM),
    ] {
        file.unsigned(key, value);
    }
    file.set("llama.rope.freq_base", Value::Float(100_000.0));
    file.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    let vocabulary = add_vocabulary(&mut file);
    let mut seed = 1;
    let mut put = |name: &str, shape: &[usize], code: u32| {
        seed += 1;
        let bytes = noise(shape.iter().product(), code, seed);
        file.tensor(name, shape, code, bytes);
    };
    put("token_embd.weight", &[vocabulary, HIDDEN], Q8_0);
    put("output_norm.weight", &[HIDDEN], F32);
    for layer in 0..2 {
        for (name, rows, cols) in [
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_gate", 128, 64),
            ("ffn_up", 128, 64),
            ("ffn_down", 64, 128),
        ] {
            put(&format!("blk.{layer}.{name}.weight"), &[rows, cols], code);
        }
        put(&format!("blk.{layer}.attn_norm.weight"), &[HIDDEN], F32);
        put(&format!("blk.{layer}.ffn_norm.weight"), &[HIDDEN], F32);
    }
    file
}

/// Three special tokens, the byte alphabet and a few merges; returns the number of tokens.
fn add_vocabulary(file: &mut GgufWriter) -> usize {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut tokens: Vec<String> = specials.iter().map(|&token| token.to_owned()).collect();
    tokens.extend(alphabet.iter().map(char::to_string));
    let merges = ["h e", "t he", "Ġ the", "l l", "he ll", "hell o", "Ġ hello", "u s", "e r", "us er", "Ċ Ċ"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let types = (0..tokens.len()).map(|id| Value::Signed(if id < specials.len() { 3 } else { 1 }));
    file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
    file.set("tokenizer.ggml.token_type", Value::List(types.collect()));
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.texts("tokenizer.ggml.merges", &merges.map(str::to_owned));
    file.unsigned("tokenizer.ggml.bos_token_id", 1).unsigned("tokenizer.ggml.eos_token_id", 2);
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    file.text("tokenizer.chat_template", CHATML);
    tokens.len()
}

/// Encoded values of a fixed pseudo-random sequence; scales of blocks are small and finite.
fn noise(values: usize, code: u32, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let scale = f16::from_f32(0.0125).to_le_bytes();
    let min = f16::from_f32(-0.0625).to_le_bytes();
    let mut blocks = |head: &[u8], bytes: usize| {
        let mut out = Vec::new();
        for _ in 0..values / 32 {
            out.extend(head);
            out.extend((0..bytes).map(|_| byte()));
        }
        out
    };
    match code {
        Q4_0 => blocks(&scale, 16),
        Q4_1 => blocks(&[scale, min].concat(), 16),
        Q5_0 => blocks(&scale, 20),
        Q5_1 => blocks(&[scale, min].concat(), 20),
        Q8_0 => blocks(&f16::from_f32(0.001).to_le_bytes(), 32),
        F32 => (0..values).flat_map(|_| ((f32::from(byte()) - 127.5) / 640.0).to_le_bytes()).collect(),
        F16 => (0..values)
            .flat_map(|_| f16::from_f32((f32::from(byte()) - 127.5) / 640.0).to_le_bytes())
            .collect(),
        BF16 => (0..values)
            .flat_map(|_| bf16::from_f32((f32::from(byte()) - 127.5) / 640.0).to_le_bytes())
            .collect(),
        other => panic!("no noise for type {other}"),
    }
}
