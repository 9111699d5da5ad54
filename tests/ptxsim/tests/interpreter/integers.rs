//! Integers and bits.

use crate::lanes::{check16, check32, check64};

const M1: u64 = 0xffff_ffff;

#[test]
fn sums_and_products_wrap() {
    check32("add.s32 %d, %a, %b;", &[(M1, 1, 0, 0), (0x7fff_ffff, 1, 0, 0x8000_0000)]);
    check32("add.sat.s32 %d, %a, %b;", &[(0x7fff_ffff, 1, 0, 0x7fff_ffff), (5, 6, 0, 11)]);
    check32("sub.u32 %d, %a, %b;", &[(0, 1, 0, M1)]);
    check32("mul.lo.s32 %d, %a, %b;", &[(M1, 7, 0, (-7i32) as u32 as u64)]);
    check32("mul.hi.u32 %d, %a, %b;", &[(M1, M1, 0, 0xffff_fffe)]);
    check32("mul.hi.s32 %d, %a, %b;", &[(M1, M1, 0, 0), (0x8000_0000, 2, 0, M1)]);
    check32("mad.lo.s32 %d, %a, %b, %c;", &[(3, 5, 7, 22)]);
    check32("mad.hi.u32 %d, %a, %b, %c;", &[(0x8000_0000, 6, 7, 10)]);
    check32("sad.u32 %d, %a, %b, %c;", &[(3, 5, 7, 9), (5, 3, 7, 9)]);
    check32("sad.s32 %d, %a, %b, %c;", &[(M1, 1, 0, 2)]);
    check64("mul.hi.u64 %d, %a, %b;", &[(u64::MAX, u64::MAX, 0, u64::MAX - 1)]);
    check64("mad.lo.s64 %d, %a, %b, %c;", &[(u64::MAX, 5, 7, 2)]);
    check16("mad.lo.u16 %d, %a, %b, %c;", &[(300, 300, 1, (300 * 300 + 1) & 0xffff)]);
}

#[test]
fn wide_products_keep_their_sign() {
    let wide = |of: &str| format!("cvt.u32.u64 %r0, %a; cvt.u32.u64 %r1, %b; mul.wide.{of} %d, %r0, %r1;");
    check64(&wide("s32"), &[(M1, 2, 0, (-2i64) as u64)]);
    check64(&wide("u32"), &[(M1, 2, 0, 0x1_ffff_fffe)]);
    let mad = "cvt.u32.u64 %r0, %a; cvt.u32.u64 %r1, %b; mad.wide.s32 %d, %r0, %r1, %c;";
    check64(mad, &[(M1, 4, 100, 96)]);
}

#[test]
fn division_truncates() {
    let minus = |x: i32| u64::from(x as u32);
    check32("div.s32 %d, %a, %b;", &[(minus(-7), 2, 0, minus(-3)), (7, minus(-2), 0, minus(-3))]);
    check32("rem.s32 %d, %a, %b;", &[(minus(-7), 2, 0, minus(-1)), (7, 3, 0, 1)]);
    check32("div.u32 %d, %a, %b;", &[(M1, 2, 0, 0x7fff_ffff)]);
    check64("rem.u64 %d, %a, %b;", &[(1 << 40, 1000, 0, (1 << 40) % 1000)]);
}

#[test]
fn extremes_know_the_sign() {
    check32("min.s32 %d, %a, %b;", &[(M1, 1, 0, M1)]);
    check32("min.u32 %d, %a, %b;", &[(M1, 1, 0, 1)]);
    check32("max.s32 %d, %a, %b;", &[(M1, 1, 0, 1)]);
    check64("max.u64 %d, %a, %b;", &[(u64::MAX, 1, 0, u64::MAX)]);
    check32("abs.s32 %d, %a;", &[(M1, 0, 0, 1), (5, 0, 0, 5)]);
    check32("neg.s32 %d, %a;", &[(1, 0, 0, M1)]);
    check16("min.s16 %d, %a, %b;", &[(0xffff, 1, 0, 0xffff)]);
    check16("neg.s16 %d, %a;", &[(1, 0, 0, 0xffff)]);
}

#[test]
fn bits_are_moved() {
    check32("and.b32 %d, %a, %b;", &[(0b1100, 0b1010, 0, 0b1000)]);
    check32("or.b32 %d, %a, %b;", &[(0b1100, 0b1010, 0, 0b1110)]);
    check32("xor.b32 %d, %a, -1;", &[(0b1100, 0, 0, 0xffff_fff3)]);
    check32("not.b32 %d, %a;", &[(1, 0, 0, 0xffff_fffe)]);
    check32("cnot.b32 %d, %a;", &[(1, 0, 0, 0), (0, 0, 0, 1)]);
    check32("shl.b32 %d, %a, %b;", &[(1, 31, 0, 0x8000_0000), (1, 32, 0, 0), (1, 255, 0, 0)]);
    check32("shr.u32 %d, %a, %b;", &[(0x8000_0000, 31, 0, 1), (M1, 32, 0, 0)]);
    check32("shr.s32 %d, %a, %b;", &[(0x8000_0000, 31, 0, M1), (M1, 99, 0, M1), (7, 99, 0, 0)]);
    check64("shr.s64 %d, %a, 63;", &[(1 << 63, 0, 0, u64::MAX)]);
    check64("shl.b64 %d, %a, 40;", &[(3, 0, 0, 3 << 40)]);
    check16("shr.s16 %d, %a, 4;", &[(0x8000, 0, 0, 0xf800)]);
    check32("popc.b32 %d, %a;", &[(0xf0f0, 0, 0, 8)]);
    check32("clz.b32 %d, %a;", &[(1, 0, 0, 31), (0, 0, 0, 32)]);
    check32("popc.b64 %d, -1;", &[(0, 0, 0, 64)]);
    check32("brev.b32 %d, %a;", &[(1, 0, 0, 0x8000_0000)]);
    check32("bfind.u32 %d, %a;", &[(0x10, 0, 0, 4), (0, 0, 0, M1)]);
    check32("bfind.s32 %d, %a;", &[(0xffff_ffef, 0, 0, 4)]);
    check32("bfind.shiftamt.u32 %d, %a;", &[(0x10, 0, 0, 27)]);
}

#[test]
fn fields_are_cut_out_and_put_in() {
    check32("bfe.u32 %d, %a, 8, 8;", &[(0x1234_5678, 0, 0, 0x56)]);
    check32("bfe.s32 %d, %a, 4, 4;", &[(0x80, 0, 0, 0xffff_fff8), (0x70, 0, 0, 7)]);
    check32("bfe.s32 %d, %a, 28, 8;", &[(0x8000_0000, 0, 0, 0xffff_fff8)]);
    check32("bfe.u32 %d, %a, %b, %c;", &[(M1, 40, 4, 0), (M1, 30, 8, 3), (M1, 0, 0, 0)]);
    check32("bfi.b32 %d, %a, %b, 8, 8;", &[(0xab, 0x1234_5678, 0, 0x1234_ab78)]);
    check32("bfi.b32 %d, %a, %b, 28, 8;", &[(0xab, 0, 0, 0xb000_0000)]);
    check64("bfi.b64 %d, %a, %b, 32, 32;", &[(7, 9, 0, 7 << 32 | 9)]);
}

#[test]
fn bytes_are_chosen() {
    check32("prmt.b32 %d, %a, %b, 0x5410;", &[(0x4433_2211, 0x8877_6655, 0, 0x6655_2211)]);
    check32("prmt.b32 %d, %a, %b, %c;", &[(0x4433_2211, 0x8877_6655, 0x7632, 0x8877_4433)]);
    // Bit 3 of a choice spreads the byte's sign.
    check32("prmt.b32 %d, %a, 0, 0x8b80;", &[(0x8000_0080, 0, 0, 0xffff_ff80)]);
    check32("prmt.b32.rc16 %d, %a, %b, 1;", &[(0x4433_2211, 0, 0, 0x4433_4433)]);
    check32("shf.l.wrap.b32 %d, %a, %b, %c;", &[(0x8000_0000, 1, 1, 3), (0, 5, 32, 5)]);
    check32("shf.l.clamp.b32 %d, %a, %b, %c;", &[(9, 1, 32, 9)]);
    check32("shf.r.wrap.b32 %d, %a, %b, %c;", &[(2, 1, 1, 0x8000_0001)]);
    check32("dp4a.s32.s32 %d, %a, %b, %c;", &[(0xff02_0304, 0x0101_0101, 10, 18)]);
}

#[test]
fn any_function_of_three_bits_is_known() {
    // 0x96: the parity of three; 0xe8: the majority.
    check32("lop3.b32 %d, %a, %b, %c, 0x96;", &[(0b1100, 0b1010, 0b1001, 0b1111)]);
    check32("lop3.b32 %d, %a, %b, %c, 0xe8;", &[(0b1100, 0b1010, 0b1001, 0b1000)]);
    check32("lop3.b32 %d, %a, %b, %c, 0xf8;", &[(0b0001, 0b1010, 0b0010, 0b0011)]);
}

#[test]
fn halves_are_packed_and_unpacked() {
    check32("mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};", &[(0x1234_5678, 0, 0, 0x5678_1234)]);
    check64("mov.b64 {%r0, %r1}, %a; mov.b64 %d, {%r1, %r0};", &[(1 << 32 | 2, 0, 0, 2 << 32 | 1)]);
    check64("mov.b64 {_, %r1}, %a; cvt.u64.u32 %d, %r1;", &[(7 << 32, 0, 0, 7)]);
}

#[test]
fn comparisons_select() {
    let less = |of: &str| format!("setp.lt.{of} %p0, %a, %b; selp.b32 %d, 1, 2, %p0;");
    check32(&less("s32"), &[(M1, 1, 0, 1), (1, 1, 0, 2)]);
    check32(&less("u32"), &[(M1, 1, 0, 2), (0, 1, 0, 1)]);
    check32("setp.ge.and.s32 %p0|%p1, %a, %b, %p2; selp.u32 %d, 1, 0, %p1;", &[(1, 2, 0, 0)]);
    let both = "setp.gt.u32 %p0, %a, 5; setp.lt.and.u32 %p1, %a, 9, %p0; selp.u32 %d, 1, 0, %p1;";
    check32(both, &[(5, 0, 0, 0), (6, 0, 0, 1), (9, 0, 0, 0)]);
    let not = "setp.gt.u32 %p0, %a, 5; setp.lt.or.u32 %p1, %a, 2, !%p0; selp.u32 %d, 1, 0, %p1;";
    check32(not, &[(5, 0, 0, 1), (6, 0, 0, 0), (1, 0, 0, 1)]);
    check32("set.eq.u32.u32 %d, %a, %b;", &[(3, 3, 0, M1), (3, 4, 0, 0)]);
    check32("set.ne.f32.s32 %d, %a, %b;", &[(3, 4, 0, 0x3f80_0000)]);
    check32("slct.u32.s32 %d, %a, %b, %c;", &[(1, 2, 0, 1), (1, 2, M1, 2)]);
}

#[test]
fn predicates_are_numbers_of_one_bit() {
    let logic =
        |op: &str| format!("setp.ne.u32 %p0, %a, 0; setp.ne.u32 %p1, %b, 0; {op} selp.u32 %d, 1, 0, %p2;");
    let rows = |[a, b, c, d]: [u64; 4]| [(0, 0, 0, a), (0, 1, 0, b), (1, 0, 0, c), (1, 1, 0, d)];
    check32(&logic("and.pred %p2, %p0, %p1;"), &rows([0, 0, 0, 1]));
    check32(&logic("or.pred %p2, %p0, %p1;"), &rows([0, 1, 1, 1]));
    check32(&logic("xor.pred %p2, %p0, %p1;"), &rows([0, 1, 1, 0]));
    check32(&logic("not.pred %p2, %p0;"), &rows([1, 1, 0, 0]));
    check32(&logic("mov.pred %p2, %p1;"), &rows([0, 1, 0, 1]));
    check32(&logic("mov.pred %p2, -1; @%p0 mov.pred %p2, 0;"), &rows([1, 1, 0, 0]));
    check32("mov.u32 %d, 1; setp.eq.u32 %p0, %a, 3; @!%p0 add.u32 %d, %d, 1;", &[(3, 0, 0, 1), (4, 0, 0, 2)]);
}
