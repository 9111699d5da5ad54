//! Black-box tests of the binary: one executable, one module a subject.

mod harness;
mod job;
mod manifests;
mod runner;
mod tidy;
mod tiny_model;
