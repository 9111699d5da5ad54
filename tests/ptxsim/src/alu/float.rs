//! `f32` and `f64`. The approximations of the special function unit are computed in `f64` and rounded once: exact
//! where the hardware is off in its last places.

use super::Opcode;
use crate::lanes::{Function, one, three, two};
use crate::number::{Rounding, odd_fma, odd_quotient, odd_root, odd_sum, to_f32};

const SIGN: u32 = 1 << 31;
const SIGN_64: u64 = 1 << 63;

/// The functions of `f32`.
pub(super) fn single(opcode: &Opcode<'_>) -> Option<Function> {
    if let Some(function) = bits_of_single(opcode) {
        return Some(function);
    }
    let is_rounded = matches!(opcode.name, "add" | "sub" | "mul" | "fma" | "mad" | "div" | "rcp" | "sqrt");
    let function = match opcode.rounding() {
        Some(rounding) if rounding != Rounding::Nearest && is_rounded => directed(opcode.name, rounding),
        _ => nearest(opcode).or_else(|| approximate(opcode.name)),
    }?;
    let function = if opcode.has("ftz") { flushed(function) } else { function };
    if opcode.has("sat") { Some(saturated(function)) } else { Some(function) }
}

fn bits_of_single(opcode: &Opcode<'_>) -> Option<Function> {
    Some(match opcode.name {
        "mov" => one(|a: u32| a),
        "neg" => one(|a: u32| a ^ SIGN),
        "abs" => one(|a: u32| a & !SIGN),
        "copysign" => two(|a: u32, b: u32| a & SIGN | b & !SIGN),
        "slct" => three(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
        _ => return None,
    })
}

fn nearest(opcode: &Opcode<'_>) -> Option<Function> {
    let keeps_nan = opcode.has("NaN");
    Some(match opcode.name {
        "add" => two(|a: f32, b: f32| a + b),
        "sub" => two(|a: f32, b: f32| a - b),
        "mul" => two(|a: f32, b: f32| a * b),
        "div" => two(|a: f32, b: f32| a / b),
        "fma" | "mad" => three(f32::mul_add),
        "rcp" => one(|a: f32| 1.0 / a),
        "sqrt" => one(f32::sqrt),
        "min" => two(move |a: f32, b: f32| -greater(-a, -b, keeps_nan)),
        "max" => two(move |a: f32, b: f32| greater(a, b, keeps_nan)),
        _ => return None,
    })
}

/// The greater number; of a number and a NaN the number, unless NaNs are kept. 0 is greater than -0.
fn greater(a: f32, b: f32, keeps_nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        return if keeps_nan || a.is_nan() && b.is_nan() {
            f32::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        };
    }
    if a > b || a == b && a.is_sign_positive() { a } else { b }
}

fn directed(name: &str, rounding: Rounding) -> Option<Function> {
    Some(match name {
        "add" => two(move |a: f32, b: f32| to_f32(odd_sum(a.into(), b.into()), rounding)),
        "sub" => two(move |a: f32, b: f32| to_f32(odd_sum(a.into(), (-b).into()), rounding)),
        "mul" => two(move |a: f32, b: f32| to_f32(f64::from(a) * f64::from(b), rounding)),
        "fma" | "mad" => three(move |a: f32, b: f32, c: f32| to_f32(odd_fma(a, b, c), rounding)),
        "div" => two(move |a: f32, b: f32| to_f32(odd_quotient(a, b), rounding)),
        "rcp" => one(move |a: f32| to_f32(odd_quotient(1.0, a), rounding)),
        "sqrt" => one(move |a: f32| to_f32(odd_root(a), rounding)),
        _ => return None,
    })
}

fn approximate(name: &str) -> Option<Function> {
    let of: fn(f64) -> f64 = match name {
        "rsqrt" => |x| 1.0 / x.sqrt(),
        "ex2" => f64::exp2,
        "lg2" => f64::log2,
        "sin" => f64::sin,
        "cos" => f64::cos,
        "tanh" => f64::tanh,
        _ => return None,
    };
    Some(one(move |a: f32| of(f64::from(a)) as f32))
}

/// `.ftz`: subnormal sources and results become zero.
fn flushed(function: Function) -> Function {
    fn flush(bits: u64) -> u64 {
        let bits = bits as u32;
        u64::from(if f32::from_bits(bits).is_subnormal() { bits & SIGN } else { bits })
    }
    Box::new(move |a, b, c| function(&a.map(flush), &b.map(flush), &c.map(flush)).map(flush))
}

/// `.sat`: into [0, 1]; a NaN becomes 0.
fn saturated(function: Function) -> Function {
    Box::new(move |a, b, c| {
        function(a, b, c).map(|bits| {
            let value = f32::from_bits(bits as u32);
            u64::from(if value > 0.0 { value.min(1.0) } else { 0.0 }.to_bits())
        })
    })
}

/// The functions of `f64`, to nearest only.
pub(super) fn double(opcode: &Opcode<'_>) -> Option<Function> {
    if opcode.rounding().is_some_and(|rounding| rounding != Rounding::Nearest) {
        return None;
    }
    Some(match opcode.name {
        "mov" => one(|a: u64| a),
        "neg" => one(|a: u64| a ^ SIGN_64),
        "abs" => one(|a: u64| a & !SIGN_64),
        "copysign" => two(|a: u64, b: u64| a & SIGN_64 | b & !SIGN_64),
        "add" => two(|a: f64, b: f64| a + b),
        "sub" => two(|a: f64, b: f64| a - b),
        "mul" => two(|a: f64, b: f64| a * b),
        "div" => two(|a: f64, b: f64| a / b),
        "fma" | "mad" => three(f64::mul_add),
        "min" => two(f64::min),
        "max" => two(f64::max),
        "rcp" => one(|a: f64| 1.0 / a),
        "sqrt" => one(f64::sqrt),
        "rsqrt" => one(|a: f64| 1.0 / a.sqrt()),
        _ => return None,
    })
}
