//! The kernels of `kernels/`, compiled by NVRTC and run by the interpreter: one binary, a module a file of kernels.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;
mod harness;
mod planted;

mod kernels {
    mod attention;
    mod attention_backward;
    mod conv;
    mod convert;
    mod entropy;
    mod gemm;
    mod glu;
    mod lora;
    mod nf4;
    mod noise;
    mod norm;
    mod optimizer;
    mod orders;
    mod resources;
    mod rope;
    mod rows;
    mod scan;
    mod scan_case;
    mod scan_chunks;
    mod shared;
    mod spans;
}
