//! granitemoehybrid (Granite 4.0 H Micro and 1B): mostly Mamba2 layers with a few attention layers without
//! positions between them, a shared MLP whose gate and up projections are one matrix, and granite's factors.
//! Files with experts are refused.

use serde_json::{Map, Value, json};

use super::{Family, GgufFamily, granite};
use crate::model::config::fields::{Fields, invalid, number, unsupported};
use crate::model::config::{ConfigError, Gate, MambaOptions, Mixing, MlpLayout, ModelConfig, Positions};

pub(super) const FAMILY: Family = Family {
    model_type: "granitemoehybrid",
    architecture: "GraniteMoeHybridForCausalLM",
    read,
    write,
    gguf: Some(GgufFamily {
        interleaved: true,
        required: granite::GGUF_FACTORS,
        optional: &[
            ("mamba_d_conv", "ssm.conv_kernel"),
            ("mamba_d_state", "ssm.state_size"),
            ("mamba_n_groups", "ssm.group_count"),
            ("mamba_n_heads", "ssm.time_step_rank"),
            ("position_embedding_type", "rope.scaling.finetuned"),
            ("shared_intermediate_size", "expert_shared_feed_forward_length"),
            ("ssm_inner_size", "ssm.inner_size"),
        ],
        complete,
        ..GgufFamily::plain("granitehybrid")
    }),
};

const NO_DT_LIMITS: (f32, f32) = (0.0, f32::INFINITY);

fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let experts = fields.count_or("num_local_experts", 8)?;
    if experts > 0 {
        return Err(unsupported("num_local_experts", &experts, "0"));
    }
    let mut config = ModelConfig::plain(FAMILY.model_type, fields, Gate::Silu, "shared_intermediate_size")?;
    config.rope = fields.rope()?;
    granite::read_factors(&mut config, fields)?;
    config.mlp.layout = MlpLayout::Stacked;
    let positions = match fields.text("position_embedding_type")? {
        Some("rope") => Positions::Global,
        None | Some("nope") => Positions::None,
        Some(other) => return Err(unsupported("position_embedding_type", &other, "rope, nope")),
    };
    let mixing = |kind| match kind {
        "full_attention" => Ok(Mixing::Attention { window: None, positions }),
        "linear_attention" => Ok(Mixing::Mamba),
        other => Err(unsupported("layer_types", &other, "attention, mamba")),
    };
    let types = fields.layer_types(config.layers.len(), |_| "linear_attention")?;
    config.layers = types.into_iter().map(mixing).collect::<Result<_, _>>()?;
    if config.layers.contains(&Mixing::Mamba) {
        config.mamba = Some(mamba(fields, config.hidden_size)?);
    }
    Ok(config)
}

/// GGUF files have the inner size in place of the expansion, and say by a flag whether positions are rotated.
fn complete(fields: &mut Map<String, Value>) {
    let number = |field: &str| fields.get(field).and_then(Value::as_u64);
    let expand = number("ssm_inner_size").zip(number("hidden_size")).and_then(|(a, b)| a.checked_div(b));
    let rotated = fields.get("position_embedding_type").and_then(Value::as_bool).unwrap_or(false);
    let width = number("shared_intermediate_size").or(number("intermediate_size"));
    fields.insert("mamba_expand".to_owned(), json!(expand));
    fields.insert("shared_intermediate_size".to_owned(), json!(width));
    fields.insert("num_local_experts".to_owned(), json!(0));
    fields.insert("position_embedding_type".to_owned(), json!(if rotated { "rope" } else { "nope" }));
}

fn mamba(fields: &Fields<'_>, hidden_size: usize) -> Result<MambaOptions, ConfigError> {
    let inner = hidden_size * fields.dimension_or("mamba_expand", 2)?;
    let heads = fields.dimension_or("mamba_n_heads", 128)?;
    let head_dim = match fields.text("mamba_d_head") {
        Ok(None | Some("auto")) => inner / heads,
        _ => fields.dimension("mamba_d_head")?,
    };
    if heads * head_dim != inner {
        return Err(invalid("mamba_n_heads", &heads, "mamba_expand * hidden_size / mamba_d_head"));
    }
    let limits = fields.wide_numbers("time_step_limit")?;
    let dt_limits = match limits.as_deref() {
        None => NO_DT_LIMITS,
        Some(&[low, high]) => (low, high),
        Some(other) => return Err(invalid("time_step_limit", &other.len(), "two numbers")),
    };
    Ok(MambaOptions {
        heads,
        head_dim,
        groups: fields.dimension_or("mamba_n_groups", 1)?,
        states: fields.dimension_or("mamba_d_state", 256)?,
        taps: fields.dimension_or("mamba_d_conv", 4)?,
        conv_bias: fields.flag_or("mamba_conv_bias", true)?,
        proj_bias: fields.flag("mamba_proj_bias")?,
        dt_limits,
    })
}

fn write(config: &ModelConfig) -> Value {
    let mut own = granite::factors(config);
    let kind = |layer: &Mixing| if *layer == Mixing::Mamba { "mamba" } else { "attention" };
    let rotated = |layer: &Mixing| matches!(layer, Mixing::Attention { positions: Positions::Global, .. });
    let position = if config.layers.iter().any(rotated) { "rope" } else { "nope" };
    let mut put = |field: &str, value: Value| own.insert(field.to_owned(), value);
    put("layer_types", json!(config.layers.iter().map(kind).collect::<Vec<_>>()));
    put("num_experts_per_tok", json!(0));
    put("num_local_experts", json!(0));
    put("position_embedding_type", json!(position));
    put("shared_intermediate_size", json!(config.intermediate_size));
    if let Some(mamba) = &config.mamba {
        put("mamba_chunk_size", json!(256));
        put("mamba_conv_bias", json!(mamba.conv_bias));
        put("mamba_d_conv", json!(mamba.taps));
        put("mamba_d_head", json!(mamba.head_dim));
        put("mamba_d_state", json!(mamba.states));
        put("mamba_expand", json!(mamba.inner() / config.hidden_size));
        put("mamba_n_groups", json!(mamba.groups));
        put("mamba_n_heads", json!(mamba.heads));
        put("mamba_proj_bias", json!(mamba.proj_bias));
        // Left out where it is the default, for infinity has no common spelling.
        if mamba.dt_limits != NO_DT_LIMITS {
            let limit = |value: f32| match value.is_finite() {
                true => number(value),
                false => json!({"__float__": "Infinity"}),
            };
            put("time_step_limit", json!([limit(mamba.dt_limits.0), limit(mamba.dt_limits.1)]));
        }
    }
    Value::Object(own)
}
