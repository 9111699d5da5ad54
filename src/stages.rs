//! The one list of stage kinds. Manifest checks, JSON Schema, `docs/stages.md` and completions come from it.

use tunesmith_pipeline::stage::StageKind;

/// Every kind, in the order a pipeline usually has them.
pub static STAGES: &[&dyn StageKind] = &[];
