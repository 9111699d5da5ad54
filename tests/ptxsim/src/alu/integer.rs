//! Integers and plain bits of 16, 32 and 64 bits.

use super::Opcode;
use crate::lanes::{Bits, Function, low_bits, one, sign_extend, three, two};
use crate::program::Update;
use crate::syntax::{Kind, Type};

pub(super) fn function(opcode: &Opcode<'_>, of: Type) -> Option<Function> {
    if opcode.has("sat") && !matches!(opcode.name, "add" | "sub") {
        return None;
    }
    if opcode.name == "mov" {
        let mask = low_bits(of.bits);
        return Some(one(move |a: u64| a & mask));
    }
    match (of.kind, of.bits) {
        (Kind::Signed, 16) => signed_16(opcode),
        (Kind::Signed, 32) => words(opcode).or_else(|| signed_32(opcode)),
        (Kind::Signed, 64) => signed_64(opcode),
        (_, 16) => unsigned_16(opcode),
        (_, 32) => words(opcode).or_else(|| unsigned_32(opcode)),
        (_, 64) => unsigned_64(opcode),
        _ => None,
    }
}

/// One table of operations on a type, the one of twice its width, and that of its bits.
macro_rules! integers {
    ($name:ident, $number:ty, $wide:ty, $bits:ty) => {
        fn $name(opcode: &Opcode<'_>) -> Option<Function> {
            type N = $number;
            const WIDTH: u32 = N::BITS;
            fn wide(a: N, b: N) -> $wide {
                <$wide>::from(a).wrapping_mul(<$wide>::from(b))
            }
            fn high(a: N, b: N) -> N {
                (wide(a, b) >> WIDTH) as N
            }
            fn is_negative(a: N) -> bool {
                N::MIN != 0 && (a as i64) < 0
            }
            Some(match opcode.name {
                "add" if opcode.has("sat") => two(|a: N, b: N| a.saturating_add(b)),
                "sub" if opcode.has("sat") => two(|a: N, b: N| a.saturating_sub(b)),
                "add" => two(|a: N, b: N| a.wrapping_add(b)),
                "sub" => two(|a: N, b: N| a.wrapping_sub(b)),
                "mul" if opcode.has("wide") => two(wide),
                "mul" if opcode.has("hi") => two(high),
                "mul" => two(|a: N, b: N| a.wrapping_mul(b)),
                "mad" if opcode.has("wide") => three(|a: N, b: N, c: $wide| wide(a, b).wrapping_add(c)),
                "mad" if opcode.has("hi") => three(|a: N, b: N, c: N| high(a, b).wrapping_add(c)),
                "mad" => three(|a: N, b: N, c: N| a.wrapping_mul(b).wrapping_add(c)),
                "sad" => three(|a: N, b: N, c: $bits| c.wrapping_add(a.abs_diff(b))),
                // Division by zero is left open by the ISA; the hardware gives all ones, and the dividend.
                "div" => two(|a: N, b: N| if b == 0 { !0 } else { a.wrapping_div(b) }),
                "rem" => two(|a: N, b: N| if b == 0 { a } else { a.wrapping_rem(b) }),
                "min" => two(|a: N, b: N| a.min(b)),
                "max" => two(|a: N, b: N| a.max(b)),
                "abs" => one(|a: N| if is_negative(a) { a.wrapping_neg() } else { a }),
                "neg" => one(|a: N| a.wrapping_neg()),
                "not" => one(|a: N| !a),
                "cnot" => one(|a: N| N::from(a == 0)),
                "and" => two(|a: N, b: N| a & b),
                "or" => two(|a: N, b: N| a | b),
                "xor" => two(|a: N, b: N| a ^ b),
                "shl" => two(|a: N, by: u32| a.checked_shl(by).unwrap_or(0)),
                "shr" => two(|a: N, by: u32| {
                    let filled = if is_negative(a) { !0 } else { 0 };
                    a.checked_shr(by).unwrap_or(filled)
                }),
                "popc" => one(|a: N| a.count_ones()),
                "clz" => one(|a: N| a.leading_zeros()),
                "brev" => one(|a: N| a.reverse_bits()),
                "bfind" => {
                    let from_top = opcode.has("shiftamt");
                    one(move |a: N| {
                        // Of a negative number, the first zero.
                        let bits = if is_negative(a) { !a } else { a };
                        let zeros = bits.leading_zeros();
                        if zeros == WIDTH {
                            u32::MAX
                        } else if from_top {
                            zeros
                        } else {
                            WIDTH - 1 - zeros
                        }
                    })
                }
                "bfe" => {
                    let is_signed = N::MIN != 0;
                    three(move |a: N, at: u8, width: u8| extract(a.bits(), at, width, WIDTH, is_signed))
                }
                "slct" => three(|a: N, b: N, c: i32| if c >= 0 { a } else { b }),
                _ => return None,
            })
        }
    };
}
integers!(signed_16, i16, i32, u16);
integers!(signed_32, i32, i64, u32);
integers!(signed_64, i64, i128, u64);
integers!(unsigned_16, u16, u32, u16);
integers!(unsigned_32, u32, u64, u32);
integers!(unsigned_64, u64, u128, u64);

/// `bfe`: `width` bits from bit `at`; beyond the end of a signed value its sign goes on.
fn extract(a: u64, at: u8, width: u8, bits: u32, is_signed: bool) -> u64 {
    let (at, width) = (u32::from(at), u32::from(width));
    if width == 0 {
        return 0;
    }
    if !is_signed {
        return if at >= bits { 0 } else { a >> at & low_bits(width) };
    }
    let shifted = sign_extend(a, bits) >> at.min(63);
    let field = if width >= 64 { shifted } else { sign_extend(shifted as u64, width) };
    field as u64 & low_bits(bits)
}

/// `bfi`: the low `width` bits of `a` in the place of those of `b` from bit `at`.
pub(crate) fn insert(a: u64, b: u64, at: u64, width: u64, bits: u32) -> u64 {
    let (at, width) = (at as u8, width as u8);
    if u32::from(at) >= bits {
        return b;
    }
    let field = low_bits(width.into()) << at & low_bits(bits);
    a << at & field | b & !field
}

/// What exists for 32 bits only.
fn words(opcode: &Opcode<'_>) -> Option<Function> {
    Some(match opcode.name {
        "prmt" => permutation(opcode),
        "shf" => {
            let (left, wraps) = (opcode.has("l"), opcode.has("wrap"));
            three(move |low: u32, high: u32, by: u32| {
                let by = if wraps { by & 31 } else { by.min(32) };
                let both = u64::from(high) << 32 | u64::from(low);
                if left { ((both << by) >> 32) as u32 } else { (both >> by) as u32 }
            })
        }
        "dp4a" => {
            let signed = opcode.types.iter().map(|of| of.kind == Kind::Signed).collect::<Vec<_>>();
            let [a_signed, b_signed] = signed[..] else { return None };
            let part = |word: u32, at: u32, signed: bool| {
                let byte = u64::from(word >> (8 * at) & 0xff);
                if signed { sign_extend(byte, 8) as i32 } else { byte as i32 }
            };
            three(move |a: u32, b: u32, c: i32| {
                (0..4).fold(c, |sum, at| {
                    sum.wrapping_add(part(a, at, a_signed).wrapping_mul(part(b, at, b_signed)))
                })
            })
        }
        _ => return None,
    })
}

/// `prmt`: four bytes chosen out of eight.
fn permutation(opcode: &Opcode<'_>) -> Function {
    let mode = opcode.modifiers.iter().find(|word| Type::named(word).is_none()).copied().unwrap_or("");
    let chosen: fn(u32) -> [u32; 4] = match mode {
        "f4e" => |c| [0, 1, 2, 3].map(|byte| (byte + c) & 7),
        "b4e" => |c| [0, 7, 6, 5].map(|byte| (byte + c) & 7),
        "rc8" => |c| [c; 4],
        "ecl" => |c| [0, 1, 2, 3].map(|byte: u32| byte.max(c)),
        "ecr" => |c| [0, 1, 2, 3].map(|byte: u32| byte.min(c)),
        "rc16" => |c| [2 * (c & 1), 2 * (c & 1) + 1, 2 * (c & 1), 2 * (c & 1) + 1],
        _ => |c| [0, 4, 8, 12].map(|at| c >> at & 15),
    };
    let is_general = mode.is_empty();
    three(move |a: u32, b: u32, selector: u32| {
        let both = u64::from(b) << 32 | u64::from(a);
        let bytes = chosen(if is_general { selector } else { selector & 3 }).map(|choice| {
            let byte = (both >> (8 * (choice & 7))) as u8;
            let replicates_sign = is_general && choice & 8 != 0;
            if replicates_sign { (byte as i8 >> 7) as u8 } else { byte }
        });
        u32::from_le_bytes(bytes)
    })
}

/// `lop3`: any function of three bits, by its table.
pub(crate) fn logic_of_three(table: u64) -> Function {
    let term = move |a: u32, b: u32, c: u32| {
        (0..8u32).filter(|row| table >> row & 1 == 1).fold(0, |sum, row| {
            let pick = |x: u32, bit: u32| if row & bit != 0 { x } else { !x };
            sum | pick(a, 4) & pick(b, 2) & pick(c, 1)
        })
    };
    three(term)
}

/// What an atomic instruction makes of memory, its operand and a second one (`cas`).
pub(crate) fn update(opcode: &Opcode<'_>) -> Option<Update> {
    let of = opcode.of()?;
    let (bits, mask) = (of.bits, low_bits(of.bits));
    let signed = move |value: u64| sign_extend(value, bits);
    let is_signed = of.kind == Kind::Signed;
    let name = ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]
        .into_iter()
        .find(|name| opcode.has(name))?;
    if of.is_float() {
        return match (name, of.bits) {
            ("add", 32) if !of.pair => Some(Box::new(|a, b, _| (f32::of(a) + f32::of(b)).bits())),
            ("add", 64) => Some(Box::new(|a, b, _| (f64::of(a) + f64::of(b)).bits())),
            _ => None,
        };
    }
    Some(match name {
        "add" => Box::new(move |a, b, _| a.wrapping_add(b) & mask),
        "min" if is_signed => Box::new(move |a, b, _| if signed(a) < signed(b) { a } else { b & mask }),
        "max" if is_signed => Box::new(move |a, b, _| if signed(a) > signed(b) { a } else { b & mask }),
        "min" => Box::new(move |a, b, _| a.min(b & mask)),
        "max" => Box::new(move |a, b, _| a.max(b & mask)),
        "and" => Box::new(move |a, b, _| a & b & mask),
        "or" => Box::new(move |a, b, _| (a | b) & mask),
        "xor" => Box::new(move |a, b, _| (a ^ b) & mask),
        "exch" => Box::new(move |_, b, _| b & mask),
        "cas" => Box::new(move |a, b, c| if a == b & mask { c & mask } else { a }),
        "inc" => Box::new(move |a, b, _| if a >= b & mask { 0 } else { a + 1 }),
        _ => Box::new(move |a, b, _| if a == 0 || a > b & mask { b & mask } else { a - 1 }),
    })
}

/// The combination of `redux.sync`.
pub(crate) fn extreme(opcode: &Opcode<'_>) -> Option<fn(u32, u32) -> u32> {
    let is_signed = opcode.of()?.kind == Kind::Signed;
    let name = ["add", "min", "max", "and", "or", "xor"].into_iter().find(|name| opcode.has(name))?;
    Some(match name {
        "add" => u32::wrapping_add,
        "min" if is_signed => |a, b| (a as i32).min(b as i32) as u32,
        "max" if is_signed => |a, b| (a as i32).max(b as i32) as u32,
        "min" => Ord::min,
        "max" => Ord::max,
        "and" => |a, b| a & b,
        "or" => |a, b| a | b,
        _ => |a, b| a ^ b,
    })
}
