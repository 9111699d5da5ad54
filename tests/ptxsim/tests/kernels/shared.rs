//! What all kernels share: `common.cuh`.

use ptxsim::{Arg, Device, Launch};

use crate::harness::{Random, Tolerance, assert_close, compile, download, upload};

#[test]
fn a_block_sums_over_its_warps() {
    let module = compile(
        "sum.cu",
        r#"#include "common.cuh"
        KERNEL sum(float* y, const float* x) {
            __shared__ float scratch[WARP];
            float total = block_sum(x[threadIdx.x], scratch);
            y[threadIdx.x] = total;
        }"#,
    );
    let values = Random::new(7).normals(128);
    let expected: f64 = values.iter().map(|&x| f64::from(x)).sum();
    let mut device = Device::new();
    let x = upload(&mut device, &values);
    let y = device.allocate(128 * 4);
    let launch = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared: 0 };
    let counts = device.launch(module, "sum", &launch, &[Arg::Pointer(y), Arg::Pointer(x)]).unwrap();
    // 128 values, each below 6: seven levels of pairwise sums.
    let tolerance = Tolerance::f32(7.0, 128.0 * 7.0 / f64::from(1 << 24));
    assert_close("sum", &download(&device, y, 128), &vec![expected; 128], tolerance);
    assert_eq!(counts.load_efficiency(), 1.0);
}
