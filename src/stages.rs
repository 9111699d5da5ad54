//! The one list of stage kinds. Manifest checks, JSON Schema, `docs/stages.md` and completions come from it.

use std::fmt::Write as _;

use serde_json::Value;
use tunesmith_pipeline::stage::{Arity, StageKind};

mod chunk;
mod dedupe;
pub(crate) mod device;
mod eval;
mod exec;
mod generate;
#[cfg(test)]
mod harness;
mod ingest;
mod load;
pub(crate) mod model;
mod report;
mod split;
pub(crate) mod train;
mod validate;

/// Every kind, in the order a pipeline usually has them.
pub(crate) static STAGES: &[&dyn StageKind] = &[
    &ingest::Ingest::IN_CHILD,
    &chunk::Chunk,
    &generate::Generate,
    &load::Load,
    &validate::Validate,
    &dedupe::Dedupe,
    &split::Split,
    &model::Model,
    &train::Train,
    &eval::Eval,
    &report::Report,
    &exec::Exec,
];

/// `docs/stages.md`: every kind with its inputs, outputs and parameters.
pub(crate) fn markdown() -> String {
    let mut page = String::from(
        "# Stages\n\nWritten by `tunesmith schema --markdown` from the stage kinds; do not edit.\n",
    );
    for kind in STAGES {
        describe(*kind, &mut page).expect("a string takes everything");
    }
    page
}

fn describe(kind: &dyn StageKind, page: &mut String) -> std::fmt::Result {
    writeln!(page, "\n## {}\n\n{}", kind.name(), kind.doc())?;
    if !kind.inputs().is_empty() {
        writeln!(page, "\n| input | what | how many |\n|---|---|---|")?;
        for slot in kind.inputs() {
            let arity = match slot.arity {
                Arity::One => "one",
                Arity::Optional => "one or none",
                Arity::Any => "any number",
            };
            writeln!(page, "| `{}` | {} | {arity} |", slot.name, cell(slot.doc))?;
        }
    }
    writeln!(page, "\n| output | what |\n|---|---|")?;
    for (name, doc) in kind.outputs() {
        writeln!(page, "| `{name}` | {} |", cell(doc))?;
    }
    let schema = kind.schema().to_value();
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if let Some(properties) = schema["properties"].as_object().filter(|properties| !properties.is_empty()) {
        writeln!(page, "\n| parameter | default | what |\n|---|---|---|")?;
        for (name, property) in properties {
            let default = match property.get("default") {
                _ if required.contains(&name.as_str()) => "required".to_owned(),
                None | Some(Value::Null) => String::new(),
                Some(default) => format!("`{default}`"),
            };
            let mut what = cell(property["description"].as_str().unwrap_or_default());
            let choices = choices(&schema, property);
            if choices.iter().any(|choice| !what.contains(&format!("`{choice}`"))) {
                write!(what, " One of `{}`.", choices.join("`, `"))?;
            }
            writeln!(page, "| `{name}` | {default} | {what} |")?;
        }
    }
    Ok(())
}

/// The words a parameter takes, if it takes one of a few.
fn choices<'s>(schema: &'s Value, property: &'s Value) -> Vec<&'s str> {
    let name = property["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
    let kind = name.map_or(property, |name| &schema["$defs"][name]);
    let described =
        kind["oneOf"].as_array().into_iter().flatten().filter_map(|choice| choice["const"].as_str());
    kind["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).chain(described).collect()
}

/// Text that may stand in a table cell.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
