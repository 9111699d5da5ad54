//! The runner of tunesmith: reads a manifest, builds the graph of stages, and runs what is not in the
//! content-addressed store yet.
//!
//! It knows no tensor, no note and no terminal. What a stage does comes in through [`stage::StageKind`];
//! what happened goes out through [`events::Reporter`].
//!
//! ```text
//! manifest ──► graph ──► runner ──► scheduler ──► StageKind::run
//!                          │ key (one walk: hash or explain)
//!                          ▼
//!              store: objects, actions, index (stat cache, row memo, run history), leases
//! ```

pub mod digest;
pub mod events;
pub mod graph;
pub mod key;
pub mod lease;
pub mod lock;
pub mod manifest;
pub mod memo;
pub mod runner;
pub mod runs;
pub mod scheduler;
pub mod stage;
pub mod stat_index;
pub mod store;
pub mod sweep;
