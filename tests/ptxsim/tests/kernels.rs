//! The kernels of `kernels/`, compiled by NVRTC and run by the interpreter: one binary, a module a file of kernels.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;
mod harness;
mod planted;

mod kernels {
    mod resources;
    mod shared;
}
