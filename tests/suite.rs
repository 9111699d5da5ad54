//! Black-box tests of the binary: one executable, one module a subject.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bench;
mod device;
mod explain;
mod faults;
mod guards;
mod harness;
mod job;
mod manifests;
mod model;
mod real_model;
mod records;
mod robust;
mod runner;
mod store;
mod sweep;
mod tidy;
mod tiny_model;
