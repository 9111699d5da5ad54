//! `cvt`: between integers, floats of every width, and pairs of 16-bit floats.

use super::Opcode;
use crate::lanes::{Bits, Function, low_bits, one, sign_extend, two};
use crate::number::{BF16, F16, F32, Format, Rounding, TF32, bf16_bits, bf16_value};
use crate::syntax::{Kind, Type};

/// `register_bits` is the width of the register that is written: a signed result fills it with its sign.
pub(super) fn conversion(opcode: &Opcode<'_>, register_bits: u32) -> Option<Function> {
    let [to, from] = opcode.types[..] else { return None };
    if to.pair {
        return pair(opcode, to, from);
    }
    if from.pair {
        return None;
    }
    if let Some(function) = common(opcode, to, from) {
        return Some(function);
    }
    match (to.is_float(), from.is_float()) {
        (false, false) => Some(integers(to, from, opcode.has("sat"), register_bits)),
        (true, false) => from_integer(opcode, to, from),
        (false, true) => to_integer(opcode, to, from, register_bits),
        (true, true) => floats(opcode, to, from),
    }
}

/// The conversions that kernels are full of, without the detour over `f64`.
fn common(opcode: &Opcode<'_>, to: Type, from: Type) -> Option<Function> {
    let mut plain = opcode.modifiers.iter().filter(|word| Type::named(word).is_none());
    if !plain.all(|word| *word == "rn") {
        return None;
    }
    Some(match ((to.kind, to.bits), (from.kind, from.bits)) {
        ((Kind::Brain, 16), (Kind::Float, 32)) => one(bf16_bits),
        ((Kind::Float, 32), (Kind::Brain, 16)) => one(bf16_value),
        ((Kind::Float, 32), (Kind::Signed, 32)) => one(|a: i32| a as f32),
        ((Kind::Float, 32), (Kind::Unsigned, 32)) => one(|a: u32| a as f32),
        ((Kind::Float, 32), (Kind::Signed, 64)) => one(|a: i64| a as f32),
        ((Kind::Float, 32), (Kind::Unsigned, 64)) => one(|a: u64| a as f32),
        ((Kind::Float, 64), (Kind::Float, 32)) => one(|a: f32| f64::from(a)),
        ((Kind::Float, 32), (Kind::Float, 64)) => one(|a: f64| a as f32),
        _ => return None,
    })
}

fn integers(to: Type, from: Type, saturates: bool, register_bits: u32) -> Function {
    one(move |a: u64| {
        let exact = if from.kind == Kind::Signed {
            i128::from(sign_extend(a, from.bits))
        } else {
            i128::from(a & low_bits(from.bits))
        };
        let exact = if saturates { clamp(exact, to) } else { exact };
        fill(exact as u64, to, register_bits)
    })
}

fn clamp(exact: i128, to: Type) -> i128 {
    if to.kind == Kind::Signed {
        let most = (1i128 << (to.bits - 1)) - 1;
        exact.clamp(-most - 1, most)
    } else {
        exact.clamp(0, i128::from(low_bits(to.bits)))
    }
}

/// The low bits that `to` has; a signed value goes on to the width of its register.
fn fill(bits: u64, to: Type, register_bits: u32) -> u64 {
    if to.kind == Kind::Signed && to.bits < register_bits {
        sign_extend(bits, to.bits) as u64 & low_bits(register_bits)
    } else {
        bits & low_bits(to.bits)
    }
}

fn from_integer(opcode: &Opcode<'_>, to: Type, from: Type) -> Option<Function> {
    let rounding = opcode.rounding().unwrap_or(Rounding::Nearest);
    let is_signed = from.kind == Kind::Signed;
    if to.bits == 64 {
        return match (rounding, is_signed) {
            (Rounding::Nearest, true) => Some(one(move |a: u64| sign_extend(a, from.bits) as f64)),
            (Rounding::Nearest, false) => Some(one(move |a: u64| (a & low_bits(from.bits)) as f64)),
            _ => None,
        };
    }
    let format = format(to)?;
    Some(one(move |a: u64| {
        let (magnitude, negative) = if is_signed {
            let value = sign_extend(a, from.bits);
            (value.unsigned_abs(), value < 0)
        } else {
            (a & low_bits(from.bits), false)
        };
        // 64 bits to 53, the last of them set if any below was.
        let spare = 11u32.saturating_sub(magnitude.leading_zeros());
        let kept = magnitude >> spare << spare;
        let odd = kept | u64::from(kept != magnitude) << spare;
        let value = odd as f64;
        format.round(if negative { -value } else { value }, rounding)
    }))
}

fn to_integer(opcode: &Opcode<'_>, to: Type, from: Type, register_bits: u32) -> Option<Function> {
    let rounding = opcode.integral()?;
    let value = reader(from, opcode.has("ftz"))?;
    Some(one(move |a: u64| {
        let whole = rounding.integral(value(a));
        let exact = if to.kind == Kind::Signed { i128::from(whole as i64) } else { i128::from(whole as u64) };
        fill(clamp(exact, to) as u64, to, register_bits)
    }))
}

fn floats(opcode: &Opcode<'_>, to: Type, from: Type) -> Option<Function> {
    let (integral, saturates) = (opcode.integral(), opcode.has("sat"));
    let rounding = opcode.rounding().unwrap_or(Rounding::Nearest);
    let relu = opcode.has("relu");
    let value = reader(from, opcode.has("ftz"))?;
    let adjusted = move |a: u64| {
        let mut x = value(a);
        if let Some(integral) = integral {
            x = integral.integral(x);
        }
        if saturates {
            x = if x > 0.0 { x.min(1.0) } else { 0.0 };
        }
        if relu && x <= 0.0 { 0.0 } else { x }
    };
    if to.bits == 64 {
        return Some(one(adjusted));
    }
    let format = format(to)?;
    let shift = if to.kind == Kind::Tensor { 13 } else { 0 };
    let flushes = opcode.has("ftz") && format == F32;
    Some(one(move |a: u64| {
        let bits = format.round(adjusted(a), rounding) << shift;
        if flushes && f32::from_bits(bits).is_subnormal() { bits & 0x8000_0000 } else { bits }
    }))
}

/// `cvt.rn.bf16x2.f32 d, a, b`: a in the upper half.
fn pair(opcode: &Opcode<'_>, to: Type, from: Type) -> Option<Function> {
    if (from.kind, from.bits) != (Kind::Float, 32) {
        return None;
    }
    let format = if to.kind == Kind::Brain { BF16 } else { F16 };
    let rounding = opcode.rounding()?;
    if format == BF16 && opcode.modifiers == ["rn", "bf16x2", "f32"] {
        return Some(two(|a: f32, b: f32| u32::from(bf16_bits(a)) << 16 | u32::from(bf16_bits(b))));
    }
    let relu = opcode.has("relu");
    let half = move |x: f32| {
        let x = if relu && x <= 0.0 { 0.0 } else { x };
        format.round(x.into(), rounding)
    };
    Some(two(move |a: f32, b: f32| half(a) << 16 | half(b)))
}

fn format(of: Type) -> Option<Format> {
    Some(match (of.kind, of.bits) {
        (Kind::Float, 32) => F32,
        (Kind::Float, 16) => F16,
        (Kind::Brain, 16) => BF16,
        (Kind::Tensor, _) => TF32,
        _ => return None,
    })
}

fn reader(from: Type, flushes: bool) -> Option<Box<dyn Fn(u64) -> f64 + Send + Sync>> {
    if from.bits == 64 {
        return Some(Box::new(f64::of));
    }
    if from.bits == 32 {
        return Some(Box::new(move |bits| {
            let value = f32::of(bits);
            if flushes && value.is_subnormal() { f64::from(value) * 0.0 } else { f64::from(value) }
        }));
    }
    let format = format(from)?;
    Some(Box::new(move |bits| format.value(bits as u16 as u32)))
}
