//! `cvt` and `cvta`.

use crate::lanes::{check_floats, check16, check32, check64};

fn f(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn minus(x: i32) -> u64 {
    u64::from(x as u32)
}

#[test]
fn integers_widen_and_narrow() {
    check64("cvt.u32.u64 %r0, %a; cvt.s64.s32 %d, %r0;", &[(0xffff_ffff, 0, 0, u64::MAX)]);
    check64("cvt.u32.u64 %r0, %a; cvt.u64.u32 %d, %r0;", &[(u64::MAX, 0, 0, 0xffff_ffff)]);
    check32("cvt.u16.u32 %h0, %a; cvt.u32.u16 %d, %h0;", &[(0x1_2345, 0, 0, 0x2345)]);
    check32("cvt.s32.s8 %d, %a;", &[(0x80, 0, 0, minus(-128)), (0x17f, 0, 0, 127)]);
    check32("cvt.s8.s32 %d, %a;", &[(0xff, 0, 0, minus(-1))]);
    check32("cvt.u32.u8 %d, %a;", &[(0x1ff, 0, 0, 255)]);
    check32("cvt.sat.u8.s32 %d, %a;", &[(minus(-5), 0, 0, 0), (300, 0, 0, 255), (7, 0, 0, 7)]);
    check32("cvt.sat.s8.s32 %d, %a;", &[(minus(-500), 0, 0, minus(-128)), (300, 0, 0, 127)]);
    check16("cvt.s16.s8 %d, %a;", &[(0x80, 0, 0, 0xff80)]);
}

#[test]
fn integers_become_floats() {
    check32("cvt.rn.f32.s32 %d, %a;", &[(minus(-7), 0, 0, f(-7.0)), (16_777_217, 0, 0, f(16_777_216.0))]);
    check32("cvt.rn.f32.u32 %d, %a;", &[(0xffff_ffff, 0, 0, f(4_294_967_296.0))]);
    check32("cvt.rz.f32.u32 %d, %a;", &[(0xffff_ffff, 0, 0, f(4_294_967_040.0))]);
    check32("cvt.rp.f32.s32 %d, %a;", &[(16_777_217, 0, 0, f(16_777_218.0))]);
    check64("cvt.rn.f64.s64 %d, %a;", &[((-3i64) as u64, 0, 0, (-3f64).to_bits())]);
    check64("cvt.rn.f32.u64 %r0, %a; cvt.u64.u32 %d, %r0;", &[(1 << 40, 0, 0, f((1u64 << 40) as f32))]);
    check16("cvt.rn.f16.u16 %d, %a;", &[(2, 0, 0, 0x4000)]);
    check32("cvt.rn.f32.u8 %d, %a;", &[(0x1ff, 0, 0, f(255.0))]);
}

#[test]
fn floats_become_integers() {
    check32("cvt.rzi.s32.f32 %d, %a;", &[(f(-2.9), 0, 0, minus(-2)), (f(1e20), 0, 0, 0x7fff_ffff)]);
    check32("cvt.rni.s32.f32 %d, %a;", &[(f(2.5), 0, 0, 2), (f(3.5), 0, 0, 4)]);
    check32("cvt.rmi.s32.f32 %d, %a;", &[(f(-2.1), 0, 0, minus(-3))]);
    check32("cvt.rpi.s32.f32 %d, %a;", &[(f(2.1), 0, 0, 3)]);
    check32("cvt.rzi.u32.f32 %d, %a;", &[(f(-5.0), 0, 0, 0), (f(4e9), 0, 0, 4_000_000_000)]);
    check32("cvt.rzi.s32.f32 %d, %a;", &[(f(f32::NAN), 0, 0, 0)]);
    check64("cvt.rzi.s64.f64 %d, %a;", &[((-1e15f64).to_bits(), 0, 0, (-1_000_000_000_000_000i64) as u64)]);
    check32("cvt.rni.sat.u8.f32 %d, %a;", &[(f(300.0), 0, 0, 255)]);
}

#[test]
fn floats_round_to_whole_numbers() {
    check_floats("cvt.rni.f32.f32 %d, %a;", &[(2.5, 0.0, 0.0, 2.0), (-0.4, 0.0, 0.0, -0.0)]);
    check_floats("cvt.rzi.f32.f32 %d, %a;", &[(-2.5, 0.0, 0.0, -2.0)]);
    check_floats("cvt.rmi.f32.f32 %d, %a;", &[(-2.5, 0.0, 0.0, -3.0)]);
    check_floats(
        "cvt.sat.f32.f32 %d, %a;",
        &[(2.5, 0.0, 0.0, 1.0), (-2.5, 0.0, 0.0, 0.0), (0.5, 0.0, 0.0, 0.5)],
    );
}

#[test]
fn floats_change_their_width() {
    check64(
        "cvt.rn.f32.f64 %r0, %a; cvt.f64.f32 %d, %r0;",
        &[(0.1f64.to_bits(), 0, 0, f64::from(0.1f32).to_bits())],
    );
    check64(
        "cvt.rz.f32.f64 %r0, %a; cvt.f64.f32 %d, %r0;",
        &[(0.1f64.to_bits(), 0, 0, f64::from(0.1f32.next_down()).to_bits())],
    );
    check32(
        "cvt.rn.f16.f32 %h0, %a; cvt.f32.f16 %d, %h0;",
        &[(f(0.1), 0, 0, f(0.099_975_586)), (f(1e6), 0, 0, f(f32::INFINITY))],
    );
    check32("cvt.f32.f16 %d, %a;", &[(0x0001, 0, 0, f(2f32.powi(-24)))]);
    check32("cvt.rz.f16.f32 %h0, %a; cvt.u32.u16 %d, %h0;", &[(f(1.9999), 0, 0, 0x3fff)]);
    // Ties go to the even neighbour: 1 + 2^-8 down, 1 + 3·2^-8 up.
    let bf16 = "cvt.rn.bf16.f32 %h0, %a; cvt.u32.u16 %d, %h0;";
    check32(bf16, &[(0x3f80_8000, 0, 0, 0x3f80), (0x3f81_8000, 0, 0, 0x3f82), (0x7fc0_0001, 0, 0, 0x7fff)]);
    check32("cvt.f32.bf16 %d, %a;", &[(0x3fc0, 0, 0, f(1.5))]);
    check32("cvt.rn.relu.bf16.f32 %h0, %a; cvt.u32.u16 %d, %h0;", &[(f(-1.0), 0, 0, 0)]);
}

#[test]
fn pairs_have_the_first_source_above() {
    check32("cvt.rn.bf16x2.f32 %d, %a, %b;", &[(f(1.0), f(-2.0), 0, 0x3f80_c000)]);
    check32("cvt.rn.f16x2.f32 %d, %a, %b;", &[(f(1.0), f(-2.0), 0, 0x3c00_c000)]);
    check32("cvt.rz.bf16x2.f32 %d, %a, %b;", &[(0x3f80_ffff, 0x3f81_ffff, 0, 0x3f80_3f81)]);
    check32(
        "cvt.rna.tf32.f32 %d, %a;",
        &[(0x3f80_1000, 0, 0, 0x3f80_2000), (0x3f80_0fff, 0, 0, 0x3f80_0000)],
    );
}
