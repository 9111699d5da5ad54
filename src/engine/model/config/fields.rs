//! Typed reading of a `config.json`: a field is absent, of the right kind, or an error that names it. Also what
//! most families read alike: the rope parameters of both generations of field names, and layer types.

use serde_json::{Map, Value, json};

use super::{ConfigError, DIMENSION_MAX, Rope, RopeScaling};

/// The value of `field` among those that this build can compute.
pub(in crate::model) fn unsupported(
    field: &str,
    got: &impl ToString,
    supported: &'static str,
) -> ConfigError {
    ConfigError::Unsupported { field: field.to_owned(), got: got.to_string(), supported }
}

/// Typed access to the fields of a JSON object; `null` counts as absent.
pub(in crate::model) struct Fields<'json>(pub(in crate::model) &'json Map<String, Value>);

impl<'json> Fields<'json> {
    fn get(&self, field: &str) -> Option<&'json Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(in crate::model) fn text(&self, field: &str) -> Result<Option<&'json str>, ConfigError> {
        self.typed(field, "a text", Value::as_str)
    }

    pub(in crate::model) fn object(
        &self,
        field: &str,
    ) -> Result<Option<&'json Map<String, Value>>, ConfigError> {
        self.typed(field, "an object", Value::as_object)
    }

    pub(in crate::model) fn flag(&self, field: &str) -> Result<bool, ConfigError> {
        Ok(self.typed(field, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(in crate::model) fn flag_or(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.typed(field, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub(in crate::model) fn number(&self, field: &str) -> Result<Option<f32>, ConfigError> {
        Ok(self.typed(field, "a number", Value::as_f64)?.map(|value| value as f32))
    }

    pub(in crate::model) fn number_or(&self, field: &str, default: f32) -> Result<f32, ConfigError> {
        Ok(self.number(field)?.unwrap_or(default))
    }

    /// A positive number, where there is one.
    pub(in crate::model) fn optional_positive(&self, field: &str) -> Result<Option<f32>, ConfigError> {
        self.get(field).map(|_| self.positive(field)).transpose()
    }

    pub(in crate::model) fn positive(&self, field: &str) -> Result<f32, ConfigError> {
        let value = self.number(field)?.ok_or_else(|| ConfigError::Missing { field: field.to_owned() })?;
        if value > 0.0 && value.is_finite() {
            return Ok(value);
        }
        Err(invalid(field, &value, "a positive number"))
    }

    pub(in crate::model) fn dimension(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_dimension(field)?.ok_or_else(|| ConfigError::Missing { field: field.to_owned() })
    }

    pub(in crate::model) fn dimension_or(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_dimension(field)?.unwrap_or(default))
    }

    /// A dimension that `null` takes away and that is `default` where the file does not mention it.
    pub(in crate::model) fn dimension_unless_null(
        &self,
        field: &str,
        default: usize,
    ) -> Result<Option<usize>, ConfigError> {
        if self.0.contains_key(field) { self.optional_dimension(field) } else { Ok(Some(default)) }
    }

    /// A positive number that `null` takes away and that is `default` where the file does not mention it.
    pub(in crate::model) fn positive_unless_null(
        &self,
        field: &str,
        default: f32,
    ) -> Result<Option<f32>, ConfigError> {
        if self.0.contains_key(field) { self.optional_positive(field) } else { Ok(Some(default)) }
    }

    /// A number of things, possibly none.
    pub(in crate::model) fn count_or(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        let count = self.typed(field, "a whole number", Value::as_u64)?;
        Ok(count.map_or(default, |count| usize::try_from(count).unwrap_or(usize::MAX)))
    }

    pub(in crate::model) fn optional_dimension(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let expected = "a positive whole number below 16777217";
        match self.typed(field, expected, Value::as_u64)? {
            None => Ok(None),
            Some(value) if (1..=DIMENSION_MAX).contains(&value) => Ok(Some(value as usize)),
            Some(value) => Err(invalid(field, &value, expected)),
        }
    }

    /// A flag that must be off, for what it stands for is not computed.
    pub(in crate::model) fn refuse(&self, field: &str) -> Result<(), ConfigError> {
        if self.flag(field)? { Err(unsupported(field, &true, "false")) } else { Ok(()) }
    }

    /// The kind of each layer, `sliding_attention`, `full_attention` or `linear_attention`, whatever the
    /// generation of the file calls it; `default` where the file leaves it to its model.
    pub(in crate::model) fn layer_types(
        &self,
        layers: usize,
        default: impl Fn(usize) -> &'static str,
    ) -> Result<Vec<&'static str>, ConfigError> {
        let field = "layer_types";
        let Some(list) = self.typed(field, "a list of layer types", Value::as_array)? else {
            return Ok((0..layers).map(default).collect());
        };
        if list.len() != layers {
            return Err(invalid(field, &list.len(), "one a layer, as num_hidden_layers says"));
        }
        let supported = "full_attention, sliding_attention, linear_attention (or attention, mamba)";
        list.iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention" | "attention") => Ok("full_attention"),
                Some("sliding_attention") => Ok("sliding_attention"),
                Some("linear_attention" | "mamba") => Ok("linear_attention"),
                _ => Err(unsupported(field, kind, supported)),
            })
            .collect()
    }

    /// The rope of the whole model, by its new field names or its old ones.
    pub(in crate::model) fn rope(&self) -> Result<Rope, ConfigError> {
        let scaling = self.object("rope_parameters")?.or(self.object("rope_scaling")?);
        self.rope_of(scaling, "rope_theta", 10_000.0)
    }

    /// The rope that `scaling` describes; `theta` is the field beside it that older files use.
    pub(in crate::model) fn rope_of(
        &self,
        scaling: Option<&Map<String, Value>>,
        theta: &str,
        default: f32,
    ) -> Result<Rope, ConfigError> {
        let empty = Map::new();
        let scaling = Fields(scaling.unwrap_or(&empty));
        let theta = match scaling.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number_or(theta, default)?,
        };
        let kind = match scaling.text("rope_type")? {
            Some(kind) => Some(kind),
            None => scaling.text("type")?,
        };
        let scaling = match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: scaling.positive("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: scaling.positive("factor")?,
                low_freq_factor: scaling.positive("low_freq_factor")?,
                high_freq_factor: scaling.positive("high_freq_factor")?,
                original_max_position_embeddings: scaling.dimension("original_max_position_embeddings")?,
            },
            Some(other) => return Err(unsupported("rope_scaling", &other, "default, linear, llama3")),
        };
        Ok(Rope { theta, scaling })
    }

    /// A number in all its digits.
    pub(in crate::model) fn wide_number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(field, "a number", Value::as_f64)
    }

    /// Numbers that may be infinite: `Infinity` as a text, or as transformers 5 wraps it.
    pub(in crate::model) fn wide_numbers(&self, field: &str) -> Result<Option<Vec<f32>>, ConfigError> {
        let expected = "a list of numbers";
        let number = |value: &Value| {
            let wrapped = value.get("__float__").unwrap_or(value);
            let parsed = wrapped.as_f64().or_else(|| wrapped.as_str()?.to_lowercase().parse().ok());
            parsed.map(|value| value as f32).ok_or_else(|| invalid(field, value, expected))
        };
        let list = self.typed(field, expected, Value::as_array)?;
        list.map(|list| list.iter().map(number).collect()).transpose()
    }

    /// One id or a list of them.
    pub(in crate::model) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let expected = "a token id or a list of token ids";
        let id = |value: &Value| {
            // transformers writes -1 for "none" in some old files.
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| invalid(field, &value, expected))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(single) => Ok(vec![id(single)?]),
        }
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &'static str,
        read: impl FnOnce(&'json Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| invalid(field, &value, expected)),
        }
    }
}

pub(in crate::model) fn invalid(field: &str, got: &impl ToString, expected: &'static str) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), got: got.to_string(), expected }
}

/// The shortest decimal that reads back as the same f32 (`1e-5`, not `9.999999747378752e-6`).
pub(in crate::model) fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

/// `rope_scaling` as older readers know it; null where there is none.
pub(in crate::model) fn rope_scaling(rope: &Rope) -> Value {
    match rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"factor": number(factor), "rope_type": "linear"}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "factor": number(factor),
            "high_freq_factor": number(high_freq_factor),
            "low_freq_factor": number(low_freq_factor),
            "original_max_position_embeddings": original_max_position_embeddings,
            "rope_type": "llama3",
        }),
    }
}
