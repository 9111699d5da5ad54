//! `setp` and `set`: two sources to a bit.

use super::Opcode;
use crate::lanes::{Bits, Test, test};
use crate::number::{BF16, F16, Format};
use crate::syntax::{Kind, Type};

/// The comparison that the modifiers name, on the type of the sources: the last one.
pub(crate) fn comparison(opcode: &Opcode<'_>) -> Option<Test> {
    let of = *opcode.types.last()?;
    let how = *opcode.modifiers.first()?;
    if of.pair || opcode.has("ftz") {
        return None;
    }
    match (of.kind, of.bits) {
        (Kind::Float, 32) => floats::<f32>(how, f64::from),
        (Kind::Float, 64) => floats::<f64>(how, |x| x),
        (Kind::Float, 16) => half_floats(how, F16),
        (Kind::Brain, 16) => half_floats(how, BF16),
        (Kind::Signed, 16) => integers::<i16>(how),
        (Kind::Signed, 32) => integers::<i32>(how),
        (Kind::Signed, 64) => integers::<i64>(how),
        (_, 16) => integers::<u16>(how),
        (_, 32) => integers::<u32>(how),
        (_, 64) => integers::<u64>(how),
        _ => None,
    }
}

fn integers<T: Bits + Ord + 'static>(how: &str) -> Option<Test> {
    Some(match how {
        "eq" => test(|a: T, b: T| a == b),
        "ne" => test(|a: T, b: T| a != b),
        "lt" | "lo" => test(|a: T, b: T| a < b),
        "le" | "ls" => test(|a: T, b: T| a <= b),
        "gt" | "hi" => test(|a: T, b: T| a > b),
        "ge" | "hs" => test(|a: T, b: T| a >= b),
        _ => return None,
    })
}

/// With a NaN the plain comparisons are false and those with a `u` are true.
fn floats<T: Bits + PartialOrd + 'static>(
    how: &str,
    value: impl Fn(T) -> f64 + Copy + Send + Sync + 'static,
) -> Option<Test> {
    let unordered = move |a: T, b: T| value(a).is_nan() || value(b).is_nan();
    Some(match how {
        "eq" => test(|a: T, b: T| a == b),
        "ne" => test(move |a: T, b: T| a != b && !unordered(a, b)),
        "lt" => test(|a: T, b: T| a < b),
        "le" => test(|a: T, b: T| a <= b),
        "gt" => test(|a: T, b: T| a > b),
        "ge" => test(|a: T, b: T| a >= b),
        "equ" => test(move |a: T, b: T| a == b || unordered(a, b)),
        "neu" => test(|a: T, b: T| a != b),
        "ltu" => test(move |a: T, b: T| a < b || unordered(a, b)),
        "leu" => test(move |a: T, b: T| a <= b || unordered(a, b)),
        "gtu" => test(move |a: T, b: T| a > b || unordered(a, b)),
        "geu" => test(move |a: T, b: T| a >= b || unordered(a, b)),
        "num" => test(move |a: T, b: T| !unordered(a, b)),
        "nan" => test(unordered),
        _ => return None,
    })
}

fn half_floats(how: &str, format: Format) -> Option<Test> {
    let wide = floats::<f64>(how, |x| x)?;
    let value = move |bits: &u64| format.value(*bits as u16 as u32).to_bits();
    Some(Box::new(move |a, b| wide(&a.each_ref().map(value), &b.each_ref().map(value))))
}

/// `testp`: a property of one number.
pub(crate) fn property(opcode: &Opcode<'_>) -> Option<Test> {
    let of: Type = opcode.of()?;
    let holds: fn(f64, bool) -> bool = match *opcode.modifiers.first()? {
        "finite" => |x, _| x.is_finite(),
        "infinite" => |x, _| x.is_infinite(),
        "number" => |x, _| !x.is_nan(),
        "notanumber" => |x, _| x.is_nan(),
        "normal" => |x, tiny| x.is_finite() && x != 0.0 && !tiny,
        "subnormal" => |x, tiny| x != 0.0 && tiny,
        _ => return None,
    };
    match of.bits {
        32 => Some(test(move |a: f32, _: f32| holds(f64::from(a), a.is_subnormal()))),
        64 => Some(test(move |a: f64, _: f64| holds(a, a.is_subnormal()))),
        _ => None,
    }
}
