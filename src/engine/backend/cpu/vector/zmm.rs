//! Sixteen f32 lanes: AVX-512 F. A CPU that has it has AVX2 too, so that only products, which gain by the wider
//! registers, and look-ups, which gain by the wider table, are written for it.

use std::arch::x86_64::*;

use super::avx2::bytes_transposed;
use super::{Code, Lanes};

/// One register.
#[derive(Clone, Copy)]
pub(in super::super) struct Zmm(__m512);

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
