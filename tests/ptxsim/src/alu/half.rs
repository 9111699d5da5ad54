//! bf16 and f16, alone and in pairs. Each operation is made in `f64`, rounded to odd, and rounded once to the format.

use super::Opcode;
use crate::lanes::{Function, three};
use crate::number::{BF16, F16, Format, Rounding, odd_fma, odd_sum};
use crate::syntax::{Kind, Type};

type Half = Box<dyn Fn(u16, u16, u16) -> u16 + Send + Sync>;

pub(super) fn function(opcode: &Opcode<'_>, of: Type) -> Option<Function> {
    let format = if of.kind == Kind::Brain { BF16 } else { F16 };
    let half = half(opcode, format)?;
    if !of.pair {
        return Some(three(half));
    }
    Some(three(move |a: u32, b: u32, c: u32| {
        let low = half(a as u16, b as u16, c as u16);
        let high = half((a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16);
        u32::from(high) << 16 | u32::from(low)
    }))
}

fn half(opcode: &Opcode<'_>, format: Format) -> Option<Half> {
    let is_clamped = opcode.has("relu") || opcode.has("sat");
    if opcode.has("ftz") || is_clamped && !matches!(opcode.name, "add" | "sub" | "mul" | "fma") {
        return None;
    }
    let value = move |bits: u16| format.value(bits.into());
    let single = move |bits: u16| format.value(bits.into()) as f32;
    let round = move |exact: f64| format.round(exact, Rounding::Nearest) as u16;
    let keeps_nan = opcode.has("NaN");
    let clamp: fn(f64) -> f64 = if opcode.has("relu") {
        |x| if x > 0.0 || x.is_nan() { x } else { 0.0 }
    } else if opcode.has("sat") {
        |x| if x > 0.0 { x.min(1.0) } else { 0.0 }
    } else {
        |x| x
    };
    let pick = move |a: f64, b: f64, greater: bool| {
        if a.is_nan() || b.is_nan() {
            return if keeps_nan || a.is_nan() && b.is_nan() { f64::NAN } else { a.min(b) };
        }
        let first = if greater { a > b } else { a < b };
        let signed_zero = a == b && (a.is_sign_positive() == greater);
        if first || signed_zero { a } else { b }
    };
    Some(match opcode.name {
        "mov" => Box::new(|a, _, _| a),
        "neg" => Box::new(|a, _, _| a ^ 0x8000),
        "abs" => Box::new(|a, _, _| a & 0x7fff),
        "add" => Box::new(move |a, b, _| round(clamp(odd_sum(value(a), value(b))))),
        "sub" => Box::new(move |a, b, _| round(clamp(odd_sum(value(a), -value(b))))),
        "mul" => Box::new(move |a, b, _| round(clamp(value(a) * value(b)))),
        "fma" => Box::new(move |a, b, c| round(clamp(odd_fma(single(a), single(b), single(c))))),
        "min" => Box::new(move |a, b, _| round(pick(value(a), value(b), false))),
        "max" => Box::new(move |a, b, _| round(pick(value(a), value(b), true))),
        "ex2" => Box::new(move |a, _, _| round(value(a).exp2())),
        "tanh" => Box::new(move |a, _, _| round(value(a).tanh())),
        _ => return None,
    })
}
