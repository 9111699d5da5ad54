//! PEFT's two files: `adapter_config.json` and `adapter_model.safetensors`. Written byte for byte the same for
//! the same adapter (keys sorted, f32 values); read with every tensor accounted for, so that an adapter that
//! would apply to nothing, or only in part, is refused.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use super::{
    Adapter, AdapterError, LinearName, Module, Shape, StateSpace, Targets, state_space, targets::leaf,
};
use crate::model::Model;

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const TENSORS: &str = "adapter_model.safetensors";
/// The version of PEFT whose files these are.
const PEFT_VERSION: &str = "0.21.2";

/// The name of a module's tensor in PEFT's file; `half` is 'A' or 'B'.
pub(super) fn key(module: &str, half: char) -> String {
    format!("base_model.model.{module}.lora_{half}.weight")
}

/// The name of DoRA's magnitudes of a module in PEFT's file.
pub(super) fn magnitude_key(module: &str) -> String {
    format!("base_model.model.{module}.lora_magnitude_vector")
}

/// A whole number as PEFT's users write one, without a fraction.
fn number(value: f32) -> Value {
    let whole = value.fract() == 0.0 && value.abs() < 1e9;
    if whole { json!(value as i64) } else { json!(decimal(value)) }
}

/// The f64 whose shortest text is that of the f32: 0.1 and not 0.10000000149011612.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl Adapter {
    /// Writes PEFT's two files into `folder`, which is made if missing. `base_name` is recorded as the base.
    ///
    /// # Errors
    /// The folder or a file cannot be written.
    pub fn save_peft(&self, folder: &Path, base_name: &str) -> Result<(), AdapterError> {
        fs_err::create_dir_all(folder)?;
        let config = serde_json::to_string_pretty(&self.peft_config(base_name))
            .expect("a map with string keys is always JSON");
        fs_err::write(folder.join(CONFIG), config + "\n")?;
        let path = folder.join(TENSORS);
        fs_err::write(
            &path,
            self.peft_tensors().map_err(|source| AdapterError::Tensors { path: path.clone(), source })?,
        )?;
        Ok(())
    }

    fn peft_config(&self, base_name: &str) -> BTreeMap<&'static str, Value> {
        let shape = &self.shape;
        let alphas: BTreeMap<&String, Value> =
            shape.alpha_pattern.iter().map(|(key, &alpha)| (key, number(alpha))).collect();
        BTreeMap::from([
            ("alpha_pattern", json!(alphas)),
            ("base_model_name_or_path", json!(base_name)),
            ("bias", json!("none")),
            ("exclude_modules", Value::Null),
            ("fan_in_fan_out", json!(false)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("layers_pattern", Value::Null),
            ("layers_to_transform", Value::Null),
            ("loftq_config", json!({})),
            ("lora_alpha", number(shape.alpha)),
            ("lora_bias", json!(false)),
            ("lora_dropout", json!(decimal(shape.dropout))),
            ("modules_to_save", Value::Null),
            ("peft_type", json!("LORA")),
            ("peft_version", json!(PEFT_VERSION)),
            ("r", json!(shape.rank)),
            ("rank_pattern", json!(shape.rank_pattern)),
            ("revision", Value::Null),
            ("target_modules", json!(self.target_modules())),
            ("task_type", json!("CAUSAL_LM")),
            ("use_dora", json!(shape.dora)),
            ("use_rslora", json!(shape.rslora)),
        ])
    }

    /// Last parts of names where all layers of that name are adapted, full names elsewhere; sorted.
    pub(super) fn target_modules(&self) -> Vec<String> {
        let is_whole = |part: &str| {
            let mut named = self.linears.iter().zip(&self.slots).filter(|((name, ..), _)| leaf(name) == part);
            named.all(|(_, slot)| slot.is_some())
        };
        let name_of = |module: &Module| match leaf(&module.name) {
            part if is_whole(part) => part.to_owned(),
            _ => module.name.clone(),
        };
        let mut names: Vec<String> = self.modules.iter().map(name_of).collect();
        names.sort();
        names.dedup();
        names
    }

    fn peft_tensors(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let bytes_of =
            |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let pairs = self.modules.iter().flat_map(|module| module.tensors().zip(module.shapes()));
        let constants = self.state_spaces.iter().flat_map(StateSpace::tensors);
        let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = pairs
            .chain(constants.map(|(name, values)| ((name, values), vec![values.len()])))
            .map(|((name, values), shape)| (name, (shape, bytes_of(values))))
            .collect();
        let views = tensors
            .iter()
            .map(|(name, (shape, bytes))| {
                TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
            })
            .collect::<Result<Vec<_>, _>>()?;
        safetensors::serialize(views, Some(HashMap::from([("format".to_owned(), "pt".to_owned())])))
    }

    /// Reads PEFT's two files from `folder` for `model`.
    ///
    /// # Errors
    /// Files missing or malformed; a kind of adapter other than plain LoRA; a tensor that fits no layer, a
    /// module that lacks a tensor, a targeted layer without a module, a wrong shape.
    pub fn load_peft(folder: &Path, model: &Model) -> Result<Self, AdapterError> {
        let adapter = Self::load_peft_for(folder, model.linear_names())?;
        state_space::check(&adapter.state_spaces, &model.state_spaces(), &folder.join(TENSORS))?;
        Ok(adapter)
    }

    /// As [`Adapter::load_peft`], from the names and shapes of the linear layers.
    ///
    /// # Errors
    /// As [`Adapter::load_peft`].
    pub fn load_peft_for(folder: &Path, linears: Vec<LinearName>) -> Result<Self, AdapterError> {
        let config = PeftConfig::read(&folder.join(CONFIG))?;
        let path = folder.join(TENSORS);
        let bytes = fs_err::read(&path)?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|source| AdapterError::Tensors { path: path.clone(), source })?;
        let mut names: Vec<&str> = tensors.names();
        names.sort_unstable();
        let mut chosen = config.targets.choose(&linears)?;
        for name in names.iter().filter(|name| !StateSpace::is_key(name)) {
            let known = |(module, ..): &LinearName| {
                *name == key(module, 'A')
                    || *name == key(module, 'B')
                    || (config.shape.dora && *name == magnitude_key(module))
            };
            let Some(index) = linears.iter().position(known) else {
                return Err(AdapterError::UnknownTensor { path, tensor: (*name).to_owned() });
            };
            chosen[index] = true;
        }
        let state_spaces = StateSpace::of_file(&tensors, &linears);
        let mut adapter = Self { state_spaces, ..Self::zeros(linears, &chosen, config.shape)? };
        for module in &mut adapter.modules {
            let shapes = module.shapes();
            for ((tensor, values), shape) in module.tensors_mut().zip(shapes) {
                let Ok(view) = tensors.tensor(&tensor) else {
                    return Err(AdapterError::MissingTensor { path, tensor });
                };
                read_tensor(&path, &tensor, &view, &shape, values)?;
            }
        }
        for (tensor, values) in adapter.state_spaces.iter_mut().flat_map(StateSpace::tensors_mut) {
            let Ok(view) = tensors.tensor(&tensor) else {
                return Err(AdapterError::MissingTensor { path, tensor });
            };
            read_tensor(&path, &tensor, &view, &[values.len()], values)?;
        }
        Ok(adapter)
    }
}

impl Module {
    /// The shapes of the module's tensors in PEFT's file, in their order.
    fn shapes(&self) -> Vec<Vec<usize>> {
        let (input, out) = (self.a.len() / self.rank, self.b.len() / self.rank);
        let mut shapes = vec![vec![self.rank, input], vec![out, self.rank]];
        shapes.extend(self.magnitude.as_ref().map(|_| vec![out]));
        shapes
    }
}

fn read_tensor(
    path: &Path,
    tensor: &str,
    view: &TensorView<'_>,
    shape: &[usize],
    values: &mut [f32],
) -> Result<(), AdapterError> {
    if view.shape() != shape {
        let (got, expected) = (view.shape().to_vec(), shape.to_vec());
        return Err(AdapterError::Shape { path: path.to_owned(), tensor: tensor.to_owned(), got, expected });
    }
    let (data, values) = (view.data(), values.iter_mut());
    match view.dtype() {
        Dtype::F32 => values
            .zip(data.chunks_exact(4))
            .for_each(|(value, bytes)| *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
        Dtype::BF16 => values
            .zip(data.chunks_exact(2))
            .for_each(|(value, bytes)| *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
        Dtype::F16 => values
            .zip(data.chunks_exact(2))
            .for_each(|(value, bytes)| *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
        other => {
            let dtype = format!("{other:?}");
            return Err(AdapterError::Dtype { path: path.to_owned(), tensor: tensor.to_owned(), dtype });
        }
    }
    Ok(())
}

/// What of `adapter_config.json` decides values.
struct PeftConfig {
    shape: Shape,
    targets: Targets,
}

impl PeftConfig {
    fn read(path: &Path) -> Result<Self, AdapterError> {
        let text = fs_err::read_to_string(path)?;
        let config_error = |source| AdapterError::Config { path: path.to_owned(), source };
        let fields: Fields = serde_json::from_str(&text).map_err(config_error)?;
        let unsupported = |key, value: &Value| AdapterError::Unsupported {
            path: path.to_owned(),
            key,
            value: value.to_string(),
        };
        if fields.peft_type != "LORA" {
            return Err(unsupported("peft_type", &json!(fields.peft_type)));
        }
        for (key, value) in [
            ("fan_in_fan_out", &fields.fan_in_fan_out),
            ("lora_bias", &fields.lora_bias),
            ("modules_to_save", &fields.modules_to_save),
            ("layers_to_transform", &fields.layers_to_transform),
            ("exclude_modules", &fields.exclude_modules),
        ] {
            if !is_unset(value) {
                return Err(unsupported(key, value));
            }
        }
        let targets = match &fields.target_modules {
            Value::String(text) if text == "all-linear" => Targets::AllLinear,
            Value::String(text) => Targets::Regex(text.clone()),
            Value::Array(names) => {
                Targets::Names(names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect())
            }
            other => return Err(unsupported("target_modules", other)),
        };
        let shape = Shape {
            rank: fields.r,
            alpha: fields.lora_alpha,
            rslora: fields.use_rslora,
            dora: fields.use_dora,
            dropout: fields.lora_dropout,
            rank_pattern: fields.rank_pattern.unwrap_or_default(),
            alpha_pattern: fields.alpha_pattern.unwrap_or_default(),
        };
        Ok(Self { shape, targets })
    }
}

/// The keys of `adapter_config.json` that are looked at.
#[derive(serde::Deserialize)]
struct Fields {
    peft_type: String,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Value,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    lora_dropout: f32,
    #[serde(default)]
    fan_in_fan_out: Value,
    #[serde(default)]
    lora_bias: Value,
    #[serde(default)]
    modules_to_save: Value,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, usize>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, f32>>,
    #[serde(default)]
    layers_to_transform: Value,
    #[serde(default)]
    exclude_modules: Value,
}

/// Null, false, and empty lists and maps all mean that an option is not used.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoraConfig;

    fn linears() -> Vec<LinearName> {
        let parts = [("self_attn.q_proj", 12, 8), ("self_attn.v_proj", 4, 8), ("mlp.down_proj", 8, 20)];
        let layers = (0..2).flat_map(|layer| parts.map(|part| (layer, part)));
        layers
            .map(|(layer, (name, out, input))| (format!("model.layers.{layer}.{name}"), out, input))
            .collect()
    }

    fn adapter(targets: Targets) -> Adapter {
        let config =
            LoraConfig { rank: 3, alpha: 6.0, targets, rslora: true, seed: 1, ..LoraConfig::default() };
        let mut adapter = Adapter::for_linears(linears(), &config).unwrap();
        adapter.modules.iter_mut().for_each(|module| module.b.fill(0.25));
        adapter
    }

    fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
        (fs_err::read(folder.join(CONFIG)).unwrap(), fs_err::read(folder.join(TENSORS)).unwrap())
    }

    #[test]
    fn saved_adapter_reads_back_equal_and_saves_the_same_bytes() {
        let targets = [
            Targets::AllLinear,
            Targets::Names(vec!["q_proj".into()]),
            Targets::Regex(r"model\.layers\.1\..*".into()),
        ];
        for targets in targets {
            let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let adapter = adapter(targets);
            adapter.save_peft(first.path(), "base").unwrap();
            let read = Adapter::load_peft_for(first.path(), linears()).unwrap();
            assert_eq!(read, adapter);
            read.save_peft(second.path(), "base").unwrap();
            assert_eq!(files(first.path()), files(second.path()));
        }
    }

    #[test]
    fn configuration_has_sorted_keys_and_names_only_what_is_adapted() {
        let folder = tempfile::tempdir().unwrap();
        adapter(Targets::Names(vec!["q_proj".into(), "layers.1.mlp.down_proj".into()]))
            .save_peft(folder.path(), "base")
            .unwrap();
        let config: serde_json::Map<String, Value> = serde_json::from_slice(&files(folder.path()).0).unwrap();
        let keys: Vec<&String> = config.keys().collect();
        assert!(keys.is_sorted(), "{keys:?}");
        assert_eq!(config["target_modules"], json!(["model.layers.1.mlp.down_proj", "q_proj"]));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(3), &json!(6)));
    }

    #[test]
    fn adapter_that_would_apply_in_part_or_not_at_all_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        adapter(Targets::Names(vec!["q_proj".into()])).save_peft(folder.path(), "base").unwrap();
        let load = |linears| Adapter::load_peft_for(folder.path(), linears).unwrap_err();
        let elsewhere = linears().into_iter().map(|(name, out, input)| (format!("other.{name}"), out, input));
        assert!(matches!(load(elsewhere.collect()), AdapterError::UnknownTensor { .. }));
        let one_layer = linears().into_iter().take(3).collect();
        assert!(matches!(load(one_layer), AdapterError::UnknownTensor { .. }));
        let mut wider = linears();
        wider[0].2 = 9;
        let error = load(wider);
        assert!(matches!(&error, AdapterError::Shape { got, .. } if *got == [3, 8]), "{error}");
        let config = String::from_utf8(files(folder.path()).0).unwrap();
        for (from, to) in
            [("\"q_proj\"", "\"q_proj\", \"v_proj\""), ("\"use_dora\": false", "\"use_dora\": true")]
        {
            fs_err::write(folder.path().join(CONFIG), config.replace(from, to)).unwrap();
            let error = load(linears());
            let expected = ["self_attn.v_proj.lora_A.weight`", "self_attn.q_proj.lora_magnitude_vector`"];
            assert!(matches!(error, AdapterError::MissingTensor { .. }), "{error}");
            assert!(expected.iter().any(|text| error.to_string().contains(text)), "{error}");
        }
    }

    #[test]
    fn rank_that_does_not_fit_is_refused() {
        for rank in [0, 5] {
            let config = LoraConfig { rank, alpha: 1.0, seed: 1, ..LoraConfig::default() };
            assert!(
                matches!(Adapter::for_linears(linears(), &config), Err(AdapterError::Rank { .. })),
                "{rank}"
            );
        }
        let share = adapter(Targets::Names(vec!["q_proj".into()])).adapted_percent();
        assert!((share - 100.0 * 96.0 / 288.0).abs() < 1e-9, "{share}");
    }
}
