//! The kernels of `kernels/`, compiled by NVRTC and run by the interpreter: one binary, a module a file of kernels.

mod harness;

mod kernels {
    mod convert;
    mod gemm;
    mod lora;
    mod nf4;
    mod conv;
    mod glu;
    mod noise;
    mod norm;
    mod orders;
    mod rope;
    mod rows;
    mod scan;
    mod scan_case;
    mod attention;
    mod attention_backward;
    mod shared;
    mod spans;
}
