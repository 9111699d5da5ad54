//! The values of a warp: 32 lanes of 64 bits, and functions over them made from functions of one lane.
//!
//! Every register holds 64 bits a lane, narrower values in the low bits; what reads them takes as many bits as its
//! type has. A function is boxed once, when an instruction is decoded, and called once a warp instruction: the loop
//! over lanes is inside, where the compiler vectorises it.

/// Lanes of a warp.
pub(crate) const WARP: usize = 32;

/// One value a lane.
pub(crate) type Lanes = [u64; WARP];

/// One bit a lane.
pub(crate) type Mask = u32;

/// The lanes of a mask, lowest first.
pub(crate) fn lanes_of(mask: Mask) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        Some(lane)
    })
}

/// Up to three sources to one result.
pub(crate) type Function = Box<dyn Fn(&Lanes, &Lanes, &Lanes) -> Lanes + Send + Sync>;

/// Two sources to a bit.
pub(crate) type Test = Box<dyn Fn(&Lanes, &Lanes) -> Mask + Send + Sync>;

/// A type that a register's bits can be read as.
pub(crate) trait Bits: Copy {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! integer_bits {
    ($($number:ty, $unsigned:ty);*) => {$(
        impl Bits for $number {
            fn of(bits: u64) -> Self {
                bits as Self
            }
            fn bits(self) -> u64 {
                self as $unsigned as u64
            }
        }
    )*};
}
integer_bits!(u8, u8; u16, u16; u32, u32; u64, u64; u128, u128; i16, u16; i32, u32; i64, u64; i128, u128);

impl Bits for f32 {
    fn of(bits: u64) -> Self {
        Self::from_bits(bits as u32)
    }

    /// Arithmetic gives one NaN only.
    fn bits(self) -> u64 {
        u64::from(if self.is_nan() { 0x7fff_ffff } else { self.to_bits() })
    }
}

impl Bits for f64 {
    fn of(bits: u64) -> Self {
        Self::from_bits(bits)
    }

    fn bits(self) -> u64 {
        if self.is_nan() { 0x7fff_ffff_ffff_ffff } else { self.to_bits() }
    }
}

pub(crate) fn one<A: Bits, R: Bits>(f: impl Fn(A) -> R + Send + Sync + 'static) -> Function {
    Box::new(move |a, _, _| std::array::from_fn(|lane| f(A::of(a[lane])).bits()))
}

pub(crate) fn two<A: Bits, B: Bits, R: Bits>(f: impl Fn(A, B) -> R + Send + Sync + 'static) -> Function {
    Box::new(move |a, b, _| std::array::from_fn(|lane| f(A::of(a[lane]), B::of(b[lane])).bits()))
}

pub(crate) fn three<A: Bits, B: Bits, C: Bits, R: Bits>(
    f: impl Fn(A, B, C) -> R + Send + Sync + 'static,
) -> Function {
    Box::new(move |a, b, c| {
        std::array::from_fn(|lane| f(A::of(a[lane]), B::of(b[lane]), C::of(c[lane])).bits())
    })
}

pub(crate) fn test<A: Bits>(f: impl Fn(A, A) -> bool + Send + Sync + 'static) -> Test {
    Box::new(move |a, b| {
        let mut mask = 0;
        for lane in 0..WARP {
            mask |= Mask::from(f(A::of(a[lane]), A::of(b[lane]))) << lane;
        }
        mask
    })
}

/// The low `width` bits of `bits` as a signed number.
pub(crate) fn sign_extend(bits: u64, width: u32) -> i64 {
    let unused = 64 - width.min(64);
    ((bits << unused) as i64) >> unused
}

/// The low `width` bits set.
pub(crate) fn low_bits(width: u32) -> u64 {
    if width >= 64 { u64::MAX } else { (1 << width) - 1 }
}
