//! The training loop. To be completed.

mod batches;
mod checkpoint;
mod events;
mod gates;
mod schedule;
