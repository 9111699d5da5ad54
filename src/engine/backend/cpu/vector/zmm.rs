//! Sixteen f32 lanes: AVX-512 F. A CPU that has it has AVX2 too, so that only products, which gain by the wider
//! registers, and look-ups, which gain by the wider table, are written for it.

use std::arch::x86_64::*;

use super::avx2::bytes_transposed;
use super::{Code, Lanes};

/// One register.
#[derive(Clone, Copy)]
pub(in super::super) struct Zmm(pub(in super::super) __m512);

/// Each is one instruction; see [`Lanes`] for who may call.
impl Lanes for Zmm {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the CPU has AVX-512 F, says the trait.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as the trait says.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// Sixteen encoded values; as of [`super::Vector`], where the CPU has AVX-512 with VBMI.
impl Zmm {
    /// # Safety
    /// Sixteen little-endian bfloat16 must be there.
    #[inline(always)]
    pub(in super::super) unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: as the caller says.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }

    /// # Safety
    /// Sixteen little-endian IEEE halves must be there.
    #[inline(always)]
    pub(in super::super) unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: as the caller says.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    /// The values of `code` that sixteen 4-bit indices name, two a byte, the first in the high nibble.
    ///
    /// # Safety
    /// Eight bytes of indices must be there.
    #[inline(always)]
    pub(in super::super) unsafe fn load_codes(from: *const u8, code: &[f32; 16]) -> Self {
        // SAFETY: as the caller says. All bytes go to every pair of lanes, which shifts its own two indices down;
        // a permutation looks at the lowest four bits of each only.
        unsafe {
            let bytes = _mm512_set1_epi64(from.cast::<i64>().read_unaligned());
            let shifts = _mm512_loadu_si512(SHIFTS.as_ptr().cast());
            let indices = _mm512_multishift_epi64_epi8(shifts, bytes);
            Self(_mm512_permutexvar_ps(indices, _mm512_loadu_ps(code.as_ptr())))
        }
    }
}

/// Where in eight bytes the index of each lane begins, in bits; in the first byte of the lane.
static SHIFTS: [u32; 16] = {
    let mut shifts = [0; 16];
    let mut lane = 0;
    while lane < 16 {
        shifts[lane] = 4 * (lane as u32 ^ 1);
        lane += 1;
    }
    shifts
};

/// As [`super::Vector::codes_transposed`]: indices are transposed while they are bytes and then name values of a
/// table that one register holds.
///
/// # Safety
/// As there, where the CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn codes_transposed<C: Code>(
    from: *const u8,
    stride: usize,
    scales: &[f32; 16],
    out: *mut f32,
) {
    // SAFETY: passed on. A permutation looks at the lowest four bits of an index only.
    unsafe {
        let code = _mm512_loadu_ps(C::VALUES.as_ptr());
        let scales = _mm512_loadu_ps(scales.as_ptr());
        let bytes = bytes_transposed(from, stride, std::array::from_fn(|row| row));
        for (byte, both) in bytes.into_iter().enumerate() {
            let second = _mm512_cvtepu8_epi32(both);
            let first = _mm512_srli_epi32::<4>(second);
            for (step, indices) in [first, second].into_iter().enumerate() {
                let values = _mm512_mul_ps(_mm512_permutexvar_ps(indices, code), scales);
                _mm512_storeu_ps(out.add((2 * byte + step) * 16), values);
            }
        }
    }
}
