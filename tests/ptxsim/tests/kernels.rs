//! The kernels of `kernels/`, compiled by NVRTC and run by the interpreter: one binary, a module a file of kernels.

mod harness;
mod planted;

mod kernels {
    mod attention;
    mod attention_backward;
    mod shared;
}
