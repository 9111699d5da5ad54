//! The one list of stage kinds. Manifest checks, JSON Schema, `docs/stages.md` and completions come from it.

use tunesmith_pipeline::stage::StageKind;

mod dedupe;
mod generate;
#[cfg(test)]
mod harness;
mod load;
mod split;
mod validate;

/// Every kind, in the order a pipeline usually has them.
pub static STAGES: &[&dyn StageKind] =
    &[&generate::Generate, &load::Load, &validate::Validate, &dedupe::Dedupe, &split::Split];
