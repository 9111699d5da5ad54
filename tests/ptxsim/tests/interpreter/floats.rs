//! Floats of 32 and 64 bits, of 16 bits, and their pairs.

use crate::lanes::{check, check_floats, check16, check32, check64};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;
const ULP: f32 = f32::EPSILON;

#[test]
fn sums_and_products_round_as_told() {
    check_floats("add.f32 %d, %a, %b;", &[(1.0, ULP / 2.0, 0.0, 1.0), (1.5, 2.5, 0.0, 4.0)]);
    check_floats("add.rp.f32 %d, %a, %b;", &[(1.0, ULP / 4.0, 0.0, 1.0 + ULP)]);
    check_floats("add.rm.f32 %d, %a, %b;", &[(-1.0, -ULP / 4.0, 0.0, -1.0 - ULP)]);
    check_floats("add.rz.f32 %d, %a, %b;", &[(-1.0, -ULP * 0.9, 0.0, -1.0), (1.0, 1e-30, 0.0, 1.0)]);
    check_floats("sub.rn.f32 %d, %a, %b;", &[(1.0, 3.0, 0.0, -2.0)]);
    check_floats("mul.rz.f32 %d, %a, %b;", &[(1.0 + ULP, 1.0 + ULP, 0.0, 1.0 + 2.0 * ULP)]);
    check_floats("mul.rp.f32 %d, %a, %b;", &[(1.0 + ULP, 1.0 + ULP, 0.0, 1.0 + 3.0 * ULP)]);
    // The product is not rounded before the sum.
    check_floats("fma.rn.f32 %d, %a, %b, %c;", &[(1.0 + ULP, 1.0 + ULP, -1.0 - 2.0 * ULP, ULP * ULP)]);
    check_floats("fma.rm.f32 %d, %a, %b, %c;", &[(1.0, -1.0, -ULP / 8.0, -1.0 - ULP)]);
    check_floats("div.rn.f32 %d, %a, %b;", &[(1.0, 3.0, 0.0, 1.0 / 3.0), (1.0, 0.0, 0.0, INF)]);
    check_floats("div.rp.f32 %d, %a, %b;", &[(1.0, -3.0, 0.0, -(1.0f32 / 3.0).next_down())]);
    check_floats("rcp.rn.f32 %d, %a;", &[(3.0, 0.0, 0.0, 1.0 / 3.0)]);
    check_floats("sqrt.rn.f32 %d, %a;", &[(2.0, 0.0, 0.0, 2f32.sqrt())]);
    check_floats("sqrt.rz.f32 %d, %a;", &[(4.0, 0.0, 0.0, 2.0)]);
}

#[test]
fn extremes_leave_out_what_is_not_a_number() {
    let rows = [(NAN, 2.0, 0.0, 2.0), (2.0, NAN, 0.0, 2.0), (-0.0, 0.0, 0.0, 0.0), (1.0, 2.0, 0.0, 2.0)];
    check_floats("max.f32 %d, %a, %b;", &rows);
    check_floats("min.f32 %d, %a, %b;", &[(0.0, -0.0, 0.0, -0.0), (NAN, -1.0, 0.0, -1.0)]);
    check32("max.NaN.f32 %d, %a, %b;", &[(0x7fc0_0000, 0, 0, 0x7fff_ffff)]);
    // One NaN only comes out of arithmetic; moves and signs keep the bits.
    check32("add.f32 %d, %a, %b;", &[(0x7fc0_1234, 0, 0, 0x7fff_ffff)]);
    check32("neg.f32 %d, %a;", &[(0x7fc0_1234, 0, 0, 0xffc0_1234), (0, 0, 0, 0x8000_0000)]);
    check_floats("abs.f32 %d, %a;", &[(-3.0, 0.0, 0.0, 3.0)]);
    check_floats("copysign.f32 %d, %a, %b;", &[(-3.0, 2.0, 0.0, -2.0)]);
}

#[test]
fn small_numbers_are_flushed_only_when_told() {
    let small = f32::MIN_POSITIVE / 2.0;
    check_floats("add.f32 %d, %a, %b;", &[(small, 0.0, 0.0, small)]);
    check_floats("add.ftz.f32 %d, %a, %b;", &[(small, 0.0, 0.0, 0.0), (-small, -0.0, 0.0, -0.0)]);
    check_floats("mul.ftz.f32 %d, %a, %b;", &[(f32::MIN_POSITIVE, 0.5, 0.0, 0.0)]);
    check_floats(
        "add.sat.f32 %d, %a, %b;",
        &[(1.0, 1.0, 0.0, 1.0), (-1.0, 0.0, 0.0, 0.0), (NAN, 0.0, 0.0, 0.0)],
    );
    check_floats("fma.rn.sat.f32 %d, %a, %b, %c;", &[(0.5, 0.5, 0.0, 0.25)]);
}

#[test]
fn approximations_are_the_nearest_numbers() {
    check_floats(
        "ex2.approx.f32 %d, %a;",
        &[(3.0, 0.0, 0.0, 8.0), (-1.0, 0.0, 0.0, 0.5), (-INF, 0.0, 0.0, 0.0)],
    );
    check_floats("ex2.approx.ftz.f32 %d, %a;", &[(-140.0, 0.0, 0.0, 0.0)]);
    check_floats("lg2.approx.f32 %d, %a;", &[(8.0, 0.0, 0.0, 3.0), (0.0, 0.0, 0.0, -INF)]);
    check_floats("rsqrt.approx.f32 %d, %a;", &[(4.0, 0.0, 0.0, 0.5), (0.0, 0.0, 0.0, INF)]);
    check_floats("rcp.approx.ftz.f32 %d, %a;", &[(4.0, 0.0, 0.0, 0.25)]);
    check_floats("sqrt.approx.f32 %d, %a;", &[(9.0, 0.0, 0.0, 3.0)]);
    check_floats("div.full.f32 %d, %a, %b;", &[(1.0, 4.0, 0.0, 0.25)]);
    check_floats("div.approx.f32 %d, %a, %b;", &[(3.0, 4.0, 0.0, 0.75)]);
    check_floats("sin.approx.f32 %d, %a;", &[(0.5, 0.0, 0.0, 0.5f64.sin() as f32)]);
    check_floats("cos.approx.f32 %d, %a;", &[(0.0, 0.0, 0.0, 1.0)]);
    check_floats("tanh.approx.f32 %d, %a;", &[(0.5, 0.0, 0.0, 0.5f64.tanh() as f32)]);
}

#[test]
fn comparisons_know_what_is_not_a_number() {
    let compare =
        |how: &str| format!("setp.{how}.f32 %p0, %a, %b; selp.f32 %d, 0f3F800000, 0f00000000, %p0;");
    check_floats(&compare("lt"), &[(1.0, 2.0, 0.0, 1.0), (NAN, 2.0, 0.0, 0.0)]);
    check_floats(&compare("ltu"), &[(1.0, 2.0, 0.0, 1.0), (NAN, 2.0, 0.0, 1.0), (2.0, 1.0, 0.0, 0.0)]);
    check_floats(&compare("ne"), &[(1.0, 2.0, 0.0, 1.0), (NAN, NAN, 0.0, 0.0)]);
    check_floats(&compare("neu"), &[(1.0, 1.0, 0.0, 0.0), (NAN, NAN, 0.0, 1.0)]);
    check_floats(&compare("equ"), &[(0.0, -0.0, 0.0, 1.0), (NAN, 1.0, 0.0, 1.0)]);
    check_floats(&compare("num"), &[(1.0, 1.0, 0.0, 1.0), (1.0, NAN, 0.0, 0.0)]);
    check_floats(&compare("nan"), &[(1.0, 1.0, 0.0, 0.0), (1.0, NAN, 0.0, 1.0)]);
    let property = |of: &str| format!("testp.{of}.f32 %p0, %a; selp.f32 %d, 0f3F800000, 0f00000000, %p0;");
    check_floats(&property("finite"), &[(1.0, 0.0, 0.0, 1.0), (INF, 0.0, 0.0, 0.0)]);
    check_floats(&property("notanumber"), &[(NAN, 0.0, 0.0, 1.0)]);
}

#[test]
fn doubles_are_those_of_the_host() {
    let check = |lines: &str, row: (f64, f64, f64, f64)| {
        check64(lines, &[(row.0.to_bits(), row.1.to_bits(), row.2.to_bits(), row.3.to_bits())]);
    };
    check("add.f64 %d, %a, %b;", (0.1, 0.2, 0.0, 0.1 + 0.2));
    check("fma.rn.f64 %d, %a, %b, %c;", (0.1, 0.2, 0.3, 0.1f64.mul_add(0.2, 0.3)));
    check("div.rn.f64 %d, %a, %b;", (1.0, 3.0, 0.0, 1.0 / 3.0));
    check("sqrt.rn.f64 %d, %a;", (2.0, 0.0, 0.0, 2f64.sqrt()));
    check("min.f64 %d, %a, %b;", (2.0, -1.0, 0.0, -1.0));
    check("neg.f64 %d, %a;", (2.0, 0.0, 0.0, -2.0));
    check("mov.f64 %d, 0d3FF8000000000000;", (0.0, 0.0, 0.0, 1.5));
    check64("setp.lt.f64 %p0, %a, %b; selp.b64 %d, 1, 2, %p0;", &[(0, 1f64.to_bits(), 0, 1)]);
}

#[test]
fn halves_are_rounded_once() {
    // bf16: 0x3f80 is 1, 0x3f81 the next number, 0x4000 is 2.
    check16("fma.rn.bf16 %d, %a, %b, %c;", &[(0x3f81, 0x3f81, 0, 0x3f82), (0x4000, 0x4000, 0x3f80, 0x40a0)]);
    check16("add.rn.bf16 %d, %a, %b;", &[(0x3f80, 0x3f80, 0, 0x4000)]);
    check16("max.bf16 %d, %a, %b;", &[(0x3f80, 0xc000, 0, 0x3f80), (0x7fc0, 0x3f80, 0, 0x3f80)]);
    check16("neg.bf16 %d, %a;", &[(0x3f80, 0, 0, 0xbf80)]);
    // f16: 0x3c00 is 1, 0x3c01 the next number, 0x7bff the greatest.
    check16("mul.f16 %d, %a, %b;", &[(0x3c01, 0x3c01, 0, 0x3c02), (0x7bff, 0x4000, 0, 0x7c00)]);
    check16("sub.f16 %d, %a, %b;", &[(0x3c00, 0x4000, 0, 0xbc00)]);
    check16("fma.rn.relu.f16 %d, %a, %b, %c;", &[(0x3c00, 0xbc00, 0, 0)]);
    check16("setp.lt.bf16 %p0, %a, %b; selp.b16 %d, 1, 0, %p0;", &[(0xbf80, 0x3f80, 0, 1)]);
}

#[test]
fn pairs_are_two_halves() {
    check32("fma.rn.bf16x2 %d, %a, %b, %c;", &[(0x4000_3f80, 0x4000_3f80, 0x3f80_0000, 0x40a0_3f80)]);
    check32("add.f16x2 %d, %a, %b;", &[(0x3c00_bc00, 0x3c00_3c00, 0, 0x4000_0000)]);
    check32("mul.rn.bf16x2 %d, %a, %b;", &[(0x3f80_4000, 0x4000_4000, 0, 0x4000_4080)]);
    check32("max.bf16x2 %d, %a, %b;", &[(0x3f80_bf80, 0xbf80_3f80, 0, 0x3f80_3f80)]);
    check(32, "abs.bf16x2 %d, %a;", &[(0xbf80_3f80, 0, 0, 0x3f80_3f80)]);
}
