//! The one list of stage kinds. Manifest checks, JSON Schema, `docs/stages.md` and completions come from it.

use tunesmith_pipeline::stage::StageKind;

mod chunk;
#[cfg(test)]
mod harness;
mod ingest;

/// Every kind, in the order a pipeline usually has them.
pub static STAGES: &[&dyn StageKind] = &[&ingest::Ingest::IN_CHILD, &chunk::Chunk];
