//! Floating-point formats and rounding, bit by bit: what the host's `f32` and `f64` do not do.
//!
//! A sum that is to be rounded another way, or to a narrower format, is first made in `f64` rounded *to odd*: if it
//! is not exact its last bit is set. Rounding that once more, to a format at least two bits narrower, is right in
//! every direction (Boldo and Melquiond, 2008).

/// Where a result goes that lies between two numbers of a format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    /// `.rn`: to the nearest, ties to the even one.
    Nearest,
    /// `.rna`: to the nearest, ties away from zero.
    Away,
    /// `.rz`
    Zero,
    /// `.rm`
    Down,
    /// `.rp`
    Up,
}

impl Rounding {
    /// The integer next to `x` in this direction.
    pub(crate) fn integral(self, x: f64) -> f64 {
        match self {
            Self::Nearest => x.round_ties_even(),
            Self::Away => x.round(),
            Self::Zero => x.trunc(),
            Self::Down => x.floor(),
            Self::Up => x.ceil(),
        }
    }
}

/// A binary format of at most 32 bits: sign, exponent, mantissa without its leading one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Format {
    mantissa: u32,
    exponent: u32,
}

pub(crate) const F32: Format = Format { mantissa: 23, exponent: 8 };
pub(crate) const F16: Format = Format { mantissa: 10, exponent: 5 };
pub(crate) const BF16: Format = Format { mantissa: 7, exponent: 8 };
/// Its 19 bits are the upper bits of an `f32`.
pub(crate) const TF32: Format = Format { mantissa: 10, exponent: 8 };

impl Format {
    /// The bits of `value` rounded to this format.
    pub(crate) fn round(self, value: f64, rounding: Rounding) -> u32 {
        let sign = u32::from(value.is_sign_negative()) << (self.exponent + self.mantissa);
        let infinity = ((1u64 << self.exponent) - 1) << self.mantissa;
        if value.is_nan() {
            return (1 << (self.exponent + self.mantissa)) - 1;
        }
        if value.is_infinite() {
            return sign | infinity as u32;
        }
        if value == 0.0 {
            return sign;
        }
        let bits = value.to_bits();
        let biased = ((bits >> 52) & 0x7ff) as i32;
        let exponent = biased.max(1) - 1023;
        let fraction = bits & low(52) | u64::from(biased > 0) << 52;
        let bias = (1i32 << (self.exponent - 1)) - 1;
        // Below the smallest normal number the last place stays where it is.
        let below = (1 - bias - exponent).max(0) as u32;
        let shift = (52 - self.mantissa + below).min(63);
        let (kept, rest, half) = (fraction >> shift, fraction & low(shift), 1u64 << (shift - 1));
        let negative = sign != 0;
        let up = match rounding {
            Rounding::Nearest => rest > half || rest == half && kept & 1 == 1,
            Rounding::Away => rest >= half,
            Rounding::Zero => false,
            Rounding::Down => negative && rest != 0,
            Rounding::Up => !negative && rest != 0,
        };
        // The leading one of `kept` counts as one in the exponent.
        let base = if below == 0 { ((exponent + bias - 1) as u64) << self.mantissa } else { 0 };
        let magnitude = base + kept + u64::from(up);
        if magnitude < infinity {
            return sign | magnitude as u32;
        }
        let finite = match rounding {
            Rounding::Nearest | Rounding::Away => false,
            Rounding::Zero => true,
            Rounding::Down => !negative,
            Rounding::Up => negative,
        };
        sign | (infinity - u64::from(finite)) as u32
    }

    /// The number that `bits` are in this format.
    pub(crate) fn value(self, bits: u32) -> f64 {
        let negative = bits >> (self.exponent + self.mantissa) & 1 == 1;
        let exponent = (bits >> self.mantissa & ((1 << self.exponent) - 1)) as i32;
        let fraction = f64::from(bits & ((1 << self.mantissa) - 1)) / f64::from(1u32 << self.mantissa);
        let bias = (1i32 << (self.exponent - 1)) - 1;
        let magnitude = if exponent == (1 << self.exponent) - 1 {
            if fraction == 0.0 { f64::INFINITY } else { f64::NAN }
        } else if exponent == 0 {
            fraction * power_of_two(1 - bias)
        } else {
            (1.0 + fraction) * power_of_two(exponent - bias)
        };
        if negative { -magnitude } else { magnitude }
    }
}

/// The `f32` nearest to `value` in a direction.
pub(crate) fn to_f32(value: f64, rounding: Rounding) -> f32 {
    if rounding == Rounding::Nearest { value as f32 } else { f32::from_bits(F32.round(value, rounding)) }
}

/// The bits of the bf16 nearest to `value`, ties to even.
pub(crate) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if value.is_nan() { 0x7fff } else { rounded }
}

pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// `a + b`, rounded to odd.
pub(crate) fn odd_sum(a: f64, b: f64) -> f64 {
    let sum = a + b;
    // Knuth's exact error of the sum.
    let part = sum - a;
    let error = (a - (sum - part)) + (b - part);
    to_odd(sum, error)
}

/// `a * b + c`, rounded to odd: the product of two `f32` is exact.
pub(crate) fn odd_fma(a: f32, b: f32, c: f32) -> f64 {
    odd_sum(f64::from(a) * f64::from(b), f64::from(c))
}

/// `a / b`, rounded to odd.
pub(crate) fn odd_quotient(a: f32, b: f32) -> f64 {
    let (a, b) = (f64::from(a), f64::from(b));
    let quotient = a / b;
    if !quotient.is_finite() || a == 0.0 || b.is_infinite() {
        return quotient;
    }
    let error = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -error } else { error })
}

/// The root of `a`, rounded to odd.
pub(crate) fn odd_root(a: f32) -> f64 {
    let a = f64::from(a);
    let root = a.sqrt();
    if !root.is_finite() || root == 0.0 {
        return root;
    }
    to_odd(root, (-root).mul_add(root, a))
}

/// `rounded` is the number nearest to a value that lies `error` away.
fn to_odd(rounded: f64, error: f64) -> f64 {
    let bits = rounded.to_bits();
    if error == 0.0 || !rounded.is_finite() || bits & 1 == 1 {
        return rounded;
    }
    f64::from_bits(if (error > 0.0) == (rounded > 0.0) { bits + 1 } else { bits - 1 })
}

fn low(bits: u32) -> u64 {
    (1 << bits) - 1
}

fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_hold_what_they_were_given() {
        for bits in 0..=u16::MAX {
            for format in [F16, BF16] {
                let value = format.value(u32::from(bits));
                if !value.is_nan() {
                    assert_eq!(format.round(value, Rounding::Nearest), u32::from(bits), "{format:?}");
                }
            }
            let bf16 = bf16_value(bits);
            assert!(bf16.is_nan() || bf16_bits(bf16) == bits);
        }
    }

    #[test]
    fn rounding_to_f32_is_that_of_the_host() {
        let mut state = 1u64;
        for _ in 0..100_000 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let exponent = 1023 - 160 + (state >> 32) % 300;
            let value = f64::from_bits(exponent << 52 | state << 12 >> 12);
            assert_eq!(F32.round(value, Rounding::Nearest), (value as f32).to_bits(), "{value:e}");
        }
    }

    #[test]
    fn an_odd_sum_rounds_like_a_fused_multiply_add() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let exponent = 127 - 20 + (state >> 40) % 40;
            f32::from_bits((exponent << 23 | state >> 12 & 0x7f_ffff) as u32)
        };
        for _ in 0..100_000 {
            let (a, b, c) = (next(), -next(), next());
            assert_eq!(odd_fma(a, b, c) as f32, a.mul_add(b, c), "{a:e} {b:e} {c:e}");
            assert_eq!(odd_quotient(a, b) as f32, a / b);
            assert_eq!(odd_root(a) as f32, a.sqrt());
        }
    }

    #[test]
    fn directions_are_kept_apart() {
        let third = odd_quotient(1.0, 3.0);
        let [down, up] = [Rounding::Down, Rounding::Up].map(|rounding| to_f32(third, rounding));
        assert_eq!(up.to_bits(), down.to_bits() + 1);
        assert_eq!(to_f32(-third, Rounding::Zero), -down);
        assert_eq!(to_f32(1e300, Rounding::Zero), f32::MAX);
        assert_eq!(F16.round(65520.0, Rounding::Nearest), 0x7c00);
        assert_eq!(TF32.round(1.0 + 1.0 / 2048.0, Rounding::Away), 127 << 10 | 1);
    }
}
