//! The JSON Schema of a whole manifest, for editors: they complete and check from it, in YAML and in TOML.
//! It is put together from the kinds' own schemas, so it cannot know other parameters than the checker does.
//!
//! Editors see a manifest before anything is filled in, so every parameter may also be a `${...}` text.

use serde_json::{Map, Value as Json, json};

use crate::manifest::document::{NAME_PATTERN, STAGE_WORDS, WORDS};
use crate::manifest::execution::Written;
use crate::manifest::sweep::Spec;
use crate::stage::{Arity, StageKind};

/// The schema (draft 2020-12) of manifests whose stages are of these kinds.
pub fn json_schema(kinds: &[&'static dyn StageKind]) -> Json {
    let mut definitions = Map::new();
    definitions.insert(
        "reference".to_owned(),
        json!({
            "description": "A value filled in from `params` or the environment.",
            "type": "string",
            "pattern": "\\$\\{"
        }),
    );
    for kind in kinds {
        add_kind(*kind, &mut definitions);
    }
    definitions.insert("stage".to_owned(), stage_schema(kinds));
    add("sweep", schemars::schema_for!(Spec).to_value(), &mut definitions);
    add("execution", schemars::schema_for!(Written).to_value(), &mut definitions);
    definitions["sweep"]["description"] = json!(
        "What `tunesmith sweep` tries and compares; one of `matrix`, `list` and `random` says which values."
    );
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunesmith manifest",
        "description": "A pipeline: stages, what each needs, and the params they share.",
        "type": "object",
        "additionalProperties": false,
        "properties": top_properties(),
        "$defs": definitions
    })
}

fn top_properties() -> Json {
    let properties: Map<String, Json> = WORDS
        .iter()
        .map(|word| {
            let schema = match *word {
                "name" => json!({
                    "description": "Name of the pipeline; the file's name if left out.",
                    "type": "string", "pattern": NAME_PATTERN
                }),
                "params" => json!({
                    "description": "Values the stages use as `${params.name}`; `--set name=value` overrides them.",
                    "type": ["object", "null"], "propertyNames": { "pattern": NAME_PATTERN }
                }),
                "profiles" => json!({
                    "description": "Named sets of params that `--profile NAME` lays over the defaults.",
                    "type": ["object", "null"], "additionalProperties": { "type": ["object", "null"] }
                }),
                "include" => json!({
                    "description": "Other manifests, relative to this file, whose params, profiles and stages are taken over; what stands here wins. Paths in their stages are relative to the manifest that is run.",
                    "type": ["string", "array"], "items": { "type": "string" }
                }),
                "stages" => json!({
                    "description": "The stages, by name.",
                    "type": "object",
                    "propertyNames": { "pattern": NAME_PATTERN },
                    "additionalProperties": { "$ref": "#/$defs/stage" }
                }),
                "sweep" => json!({ "$ref": "#/$defs/sweep" }),
                _ => json!({ "description": "For people.", "type": "string" }),
            };
            ((*word).to_owned(), schema)
        })
        .collect();
    Json::Object(properties)
}

fn stage_schema(kinds: &[&'static dyn StageKind]) -> Json {
    let uses: Vec<Json> =
        kinds.iter().map(|kind| json!({ "const": kind.name(), "description": kind.doc() })).collect();
    let properties: Map<String, Json> = STAGE_WORDS
        .iter()
        .map(|word| {
            let schema = match *word {
                "uses" => json!({ "description": "The kind of the stage.", "oneOf": uses }),
                "needs" => json!({
                    "description": "The stages whose results this one takes: a name, a list of names, or a map from input to name.",
                    "type": ["string", "array", "object", "null"]
                }),
                "resources" | "timeout" | "retries" => json!({ "$ref": format!("#/$defs/execution/properties/{word}") }),
                "matrix" => json!({
                    "description": "Lists of values by axis: the stage becomes one node a combination, which reads its values as `${matrix.axis}`. Whoever needs the stage takes all nodes; a stage with axes of the same name takes those that agree with it.",
                    "type": ["object", "string", "null"], "additionalProperties": { "type": ["array", "string"], "minItems": 1 }
                }),
                "with" => json!({
                    "description": "The parameters of the stage.",
                    "type": ["object", "string", "null"]
                }),
                _ => json!({ "description": "For people.", "type": "string" }),
            };
            ((*word).to_owned(), schema)
        })
        .collect();
    let rules: Vec<Json> = kinds.iter().map(|kind| kind_rule(*kind)).collect();
    let mut schema = json!({
        "type": "object",
        "required": ["uses"],
        "additionalProperties": false,
        "properties": properties
    });
    if !rules.is_empty() {
        schema["allOf"] = rules.into();
    }
    schema
}

/// What holds for a stage once its `uses` is known.
fn kind_rule(kind: &dyn StageKind) -> Json {
    let slots = kind.inputs();
    let mut then = json!({
        "properties": {
            "with": { "anyOf": [{ "$ref": format!("#/$defs/{}", kind.name()) }, { "$ref": "#/$defs/reference" }] }
        }
    });
    let has_required = |schema: &Json| schema["required"].as_array().is_some_and(|names| !names.is_empty());
    let mut required = Vec::new();
    if has_required(kind.schema().as_value()) {
        required.push("with");
    }
    if slots.is_empty() {
        then["properties"]["needs"] = json!(false);
    } else {
        then["properties"]["needs"] = needs_schema(kind);
    }
    if slots.iter().any(|slot| slot.arity == Arity::One) {
        required.push("needs");
    }
    if !required.is_empty() {
        then["required"] = required.into();
    }
    json!({
        "if": { "properties": { "uses": { "const": kind.name() } }, "required": ["uses"] },
        "then": then
    })
}

fn needs_schema(kind: &dyn StageKind) -> Json {
    let slots = kind.inputs();
    let properties: Map<String, Json> = slots
        .iter()
        .map(|slot| (slot.name.to_owned(), json!({ "description": slot.doc, "type": ["string", "array"] })))
        .collect();
    let takes_any = slots.iter().any(|slot| slot.arity == Arity::Any);
    json!({
        "type": ["string", "array", "object"],
        "items": { "type": "string" },
        "properties": properties,
        "additionalProperties": if takes_any { json!({ "type": ["string", "array"] }) } else { json!(false) }
    })
}

/// The kind's parameters as `#/$defs/<kind>`, and the definitions they refer to as `#/$defs/<kind>.<name>`.
fn add_kind(kind: &dyn StageKind, definitions: &mut Map<String, Json>) {
    add(kind.name(), kind.schema().to_value(), definitions);
    definitions[kind.name()]["description"] = kind.doc().into();
}

fn add(name: &str, mut schema: Json, definitions: &mut Map<String, Json>) {
    let Some(object) = schema.as_object_mut() else { return };
    object.remove("$schema");
    if let Some(Json::Object(own)) = object.remove("$defs") {
        for (part, mut definition) in own {
            rewrite(&mut definition, name);
            definitions.insert(format!("{name}.{part}"), definition);
        }
    }
    rewrite(&mut schema, name);
    definitions.insert(name.to_owned(), schema);
}

/// Renames references to the kind's own definitions, and lets every value be a `${...}` text.
fn rewrite(schema: &mut Json, kind: &str) {
    let Some(object) = schema.as_object_mut() else { return };
    if let Some(Json::String(reference)) = object.get_mut("$ref")
        && let Some(name) = reference.strip_prefix("#/$defs/")
    {
        *reference = format!("#/$defs/{kind}.{name}");
    }
    // With references allowed, a text may fit more than one variant.
    if let Some(variants) = object.remove("oneOf") {
        object.insert("anyOf".to_owned(), variants);
    }
    for word in ["anyOf", "allOf"] {
        for part in object.get_mut(word).and_then(Json::as_array_mut).into_iter().flatten() {
            rewrite(part, kind);
        }
    }
    for property in object.get_mut("properties").and_then(Json::as_object_mut).into_iter().flatten() {
        allow_reference(property.1, kind);
    }
    for word in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(word).filter(|inner| inner.is_object()) {
            allow_reference(inner, kind);
        }
    }
}

/// `schema`, or a `${...}` text. What describes it stays outside, where editors look.
fn allow_reference(schema: &mut Json, kind: &str) {
    rewrite(schema, kind);
    let is_tag = schema.get("const").is_some();
    let takes_text = schema.get("type").is_some_and(|name| name == "string") && schema.get("enum").is_none();
    let Some(object) = schema.as_object_mut().filter(|_| !is_tag && !takes_text) else { return };
    let mut outer = Map::new();
    for word in ["title", "description", "default", "examples"] {
        if let Some(value) = object.remove(word) {
            outer.insert(word.to_owned(), value);
        }
    }
    let inner = std::mem::take(object);
    if inner.is_empty() {
        *object = outer;
        return;
    }
    outer.insert("anyOf".to_owned(), json!([Json::Object(inner), { "$ref": "#/$defs/reference" }]));
    *object = outer;
}
