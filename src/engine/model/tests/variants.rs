//! rsLoRA as PEFT does it and QLoRA as bitsandbytes does it, for the families whose golden values have them, and the
//! language model inside a multimodal file.

use super::golden::{Golden, adapter, check_gradients, check_logits};
use super::*;

/// NF4 with double quantisation, as bitsandbytes makes it.
fn quantized(matrix: &Matrix) -> Matrix {
    let plain = Nf4::encode(&matrix.to_f32());
    let absmax = DoubleQuantized::encode(&plain.absmax).decode(&dynamic_map(true));
    Matrix { values: Values::Nf4(Nf4 { absmax: absmax.into(), ..plain }), ..*matrix }
}

/// A checkpoint whose linear layers are quantised as they are read.
struct Quantized(Checkpoint);

impl TensorSource for Quantized {
    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        Ok(quantized(&self.0.linear(name, rows, cols)?))
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        self.0.table(name, rows, cols)
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.0.values(name, shape)
    }
}

fn quantized_model(family: &str, device: &Compute) -> Model {
    let source = Quantized(Checkpoint::open(&folder(family)).unwrap());
    Model::assemble(source.0.config().clone(), &source, device).unwrap()
}

/// The adapter of the QLoRA run. It has the same B; A is not in the golden files, for the model was built before
/// the seed was set there. So it is drawn as torch draws it: seed 3, and for each module, in the order of
/// transformers' classes, the initial values of `nn.Linear` for A and for B, thrown away by PEFT, and then A's
/// own.
fn qlora_adapter(family: &str, model: &Model) -> Adapter {
    let mut adapter = adapter(family, model, false);
    let mut generator = Mersenne::new(3);
    let sizes: Vec<(String, usize)> =
        adapter.parameters().map(|(name, values)| (name, values.len())).collect();
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<usize>().ok());
    let is_a = |index: &usize| sizes[*index].0.contains("lora_A");
    let mut order: Vec<usize> = (0..sizes.len()).filter(is_a).collect();
    order.sort_by_key(|&index| (layer(&sizes[index].0), !sizes[index].0.contains(".shared_mlp.")));
    for index in order {
        let (name, len) = &sizes[index];
        (0..len + sizes[index + 1].1).for_each(|_| _ = generator.unit());
        let bound = 1.0 / ((len / 4) as f32).sqrt();
        let values = adapter.parameters_mut().find(|(other, _)| other == name).unwrap().1;
        values.fill_with(|| generator.unit() * (2.0 * bound) - bound);
    }
    adapter
}

/// MT19937, torch's generator on the CPU.
struct Mersenne {
    state: [u32; 624],
    next: usize,
}

impl Mersenne {
    fn new(seed: u32) -> Self {
        let mut state = [seed; 624];
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: 624 }
    }

    /// 24 random bits as a number in [0, 1).
    fn unit(&mut self) -> f32 {
        if self.next == 624 {
            self.twist();
        }
        let mut bits = self.state[self.next];
        self.next += 1;
        bits ^= bits >> 11;
        bits ^= (bits << 7) & 0x9D2C_5680;
        bits ^= (bits << 15) & 0xEFC6_0000;
        bits ^= bits >> 18;
        (bits & 0xFF_FFFF) as f32 / (1 << 24) as f32
    }

    fn twist(&mut self) {
        for i in 0..624 {
            let bits = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7FFF_FFFF);
            let odd = if bits & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[i] = self.state[(i + 397) % 624] ^ (bits >> 1) ^ odd;
        }
        self.next = 0;
    }
}

#[test]
fn rslora_gradients_are_those_of_peft() {
    let golden = Golden::open("llama", "variants.safetensors");
    for device in [REFERENCE, CPU] {
        let model = model("llama", &device);
        let adapter = adapter("llama", &model, true);
        check_gradients("rslora", &model, &adapter, &golden, "rslora.grad0.", 7.398_598_194_122_314);
    }
}

#[test]
fn qlora_logits_and_gradients_are_those_of_bitsandbytes() {
    let golden = Golden::open("llama", "variants.safetensors");
    for device in [REFERENCE, CPU] {
        let model = quantized_model("llama", &device);
        let adapter = qlora_adapter("llama", &model);
        check_logits("qlora", &model, Some(&adapter), &golden.f32("qlora.llama.logits0"));
        check_gradients("qlora", &model, &adapter, &golden, "qlora.llama.grad0.", 7.504_227_161_407_471);
    }
}

/// Golden values of qwen2 exist too, but bitsandbytes' lookup table rounded one of its 1152 nested scales away from
/// the nearest, which moves the logits by 2.1e-4.
#[test]
fn qlora_logits_of_a_hybrid_are_those_of_bitsandbytes() {
    let (family, golden) = ("granitemoehybrid", Golden::open("llama", "variants.safetensors"));
    for device in [REFERENCE, CPU] {
        let model = quantized_model(family, &device);
        let adapter = qlora_adapter(family, &model);
        check_logits(family, &model, Some(&adapter), &golden.f32("qlora.granitemoehybrid.logits0"));
    }
}

/// The golden gemma3_text as the multimodal files of gemma3 have it, with a stand-in for their vision tower.
#[test]
fn language_model_of_a_multimodal_file_is_read_by_itself() {
    let bytes = fs_err::read(folder("gemma3_text").join("model.safetensors")).unwrap();
    let text = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = text.tensors();
    tensors.iter_mut().for_each(|(name, _)| *name = format!("language_model.{name}"));
    let norm = text.tensor("model.norm.weight").unwrap();
    tensors.push(("vision_tower.vision_model.post_layernorm.weight".to_owned(), norm));
    let out = tempfile::tempdir().unwrap();
    safetensors::serialize_to_file(tensors, None, &out.path().join("model.safetensors")).unwrap();
    let config = fs_err::read_to_string(folder("gemma3_text").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        config.as_object_mut().unwrap().remove(field);
    }
    let whole = serde_json::json!({"model_type": "gemma3", "text_config": config, "bos_token_id": 1,
        "eos_token_id": [2, 7], "pad_token_id": 0, "vision_config": {"hidden_size": 32}});
    fs_err::write(out.path().join("config.json"), whole.to_string()).unwrap();
    let model = Model::open(out.path(), &CPU).unwrap();
    assert_eq!(model.config().eos_token_ids, [2, 7]);
    assert_eq!(model.config().model_type, "gemma3_text");
    let golden = Golden::open("gemma3_text", "golden.safetensors");
    check_logits("multimodal", &model, None, &golden.f32("logits"));
}
