//! AVX2, FMA and F16C.

use std::arch::x86_64::*;

use super::{BAND, Code, GROUPS, LANES, Lanes, Vector, block_dot, zmm};

/// The bytes of sixteen rows of sixteen, `stride` apart and taken in `order`, as columns.
///
/// # Safety
/// The rows must exist.
#[inline(always)]
pub(super) unsafe fn bytes_transposed(from: *const u8, stride: usize, order: [usize; 16]) -> [__m128i; 16] {
    // SAFETY: passed on; the CPU has AVX2, says the module.
    unsafe {
        let mut bytes = [_mm_setzero_si128(); 16];
        for row in 0..16 {
            bytes[row] = _mm_loadu_si128(from.add(order[row] * stride).cast());
        }
        // Rows i and i + 8 side by side, four times over, is a transposition.
        for _ in 0..4 {
            let rows = bytes;
            for row in 0..8 {
                bytes[2 * row] = _mm_unpacklo_epi8(rows[row], rows[row + 8]);
                bytes[2 * row + 1] = _mm_unpackhi_epi8(rows[row], rows[row + 8]);
            }
        }
        bytes
    }
}

/// One register. Looks codes up by AVX-512's permutations if `WIDE`.
#[derive(Clone, Copy)]
pub(in super::super) struct Ymm<const WIDE: bool>(__m256);

pub(in super::super) type Avx2 = Ymm<false>;
pub(in super::super) type Avx512 = Ymm<true>;

/// Each is one instruction; see [`Lanes`] for who may call.
impl<const WIDE: bool> Lanes for Ymm<WIDE> {
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the CPU has AVX2, says the trait.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as the trait says.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// Each is a fixed handful of instructions.
impl<const WIDE: bool> Vector for Ymm<WIDE> {
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> Self {
        // SAFETY: as the trait says; x86 is little-endian.
        Self(unsafe { _mm256_loadu_ps(from.cast()) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: as the trait says.
        unsafe {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: as the trait says.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_codes(from: *const u8, code: &[f32; 16]) -> Self {
        // SAFETY: as the trait says: four bytes; a permutation looks at three bits of each index only, and
        // the fourth, moved to the sign's place, chooses between the two halves of the code.
        unsafe {
            let (low, high) = (_mm256_loadu_ps(code.as_ptr()), _mm256_loadu_ps(code.as_ptr().add(8)));
            let bytes = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            let indices = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
            if WIDE {
                // This one looks at four bits.
                return Self(_mm256_permutex2var_ps(low, indices, high));
            }
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
            let low = _mm256_permutevar8x32_ps(low, indices);
            let high = _mm256_permutevar8x32_ps(high, indices);
            Self(_mm256_blendv_ps(low, high, upper))
        }
    }

    #[inline(always)]
    unsafe fn codes_transposed<C: Code>(from: *const u8, stride: usize, scales: &[f32; 16], out: *mut f32) {
        if WIDE {
            // SAFETY: passed on.
            return unsafe { zmm::codes_transposed::<C>(from, stride, scales, out) };
        }
        // SAFETY: as the trait says. Indices are transposed while they are bytes; the four bytes of each
        // value are then looked up one by one, which no permutation of whole values does as fast, and put
        // together by interleaving.
        unsafe {
            let plane =
                |index: usize| _mm256_broadcastsi128_si256(_mm_loadu_si128(C::PLANES[index].as_ptr().cast()));
            let planes = [plane(0), plane(1), plane(2), plane(3)];
            let scales = [_mm256_loadu_ps(scales.as_ptr()), _mm256_loadu_ps(scales.as_ptr().add(8))];
            // In an order that leaves each half of a register the rows it ends with.
            const ORDER: [usize; 16] = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];
            let bytes = bytes_transposed(from, stride, ORDER);
            let low = _mm_set1_epi8(15);
            for byte in 0..16 {
                let first = _mm_and_si128(_mm_srli_epi16::<4>(bytes[byte]), low);
                let second = _mm_and_si128(bytes[byte], low);
                // Of both steps, rows 0-3 and 8-11, and rows 4-7 and 12-15.
                let indices =
                    _mm256_set_m128i(_mm_unpackhi_epi64(first, second), _mm_unpacklo_epi64(first, second));
                let mut parts = [_mm256_setzero_si256(); 4];
                for plane in 0..4 {
                    parts[plane] = _mm256_shuffle_epi8(planes[plane], indices);
                }
                let low =
                    [_mm256_unpacklo_epi8(parts[0], parts[1]), _mm256_unpackhi_epi8(parts[0], parts[1])];
                let high =
                    [_mm256_unpacklo_epi8(parts[2], parts[3]), _mm256_unpackhi_epi8(parts[2], parts[3])];
                for step in 0..2 {
                    let values = [
                        _mm256_unpacklo_epi16(low[step], high[step]),
                        _mm256_unpackhi_epi16(low[step], high[step]),
                    ];
                    for half in 0..2 {
                        let value = _mm256_mul_ps(_mm256_castsi256_ps(values[half]), scales[half]);
                        _mm256_storeu_ps(out.add((2 * byte + step) * 16 + half * 8), value);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        // SAFETY: as the trait says. Pairs, then fours within each half of a register, then the halves.
        unsafe {
            let [Self(a), Self(b), Self(c), Self(d), Self(e), Self(f), Self(g), Self(h)] = rows;
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ef, gh) = (_mm256_unpacklo_ps(e, f), _mm256_unpacklo_ps(g, h));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            let (ef_high, gh_high) = (_mm256_unpackhi_ps(e, f), _mm256_unpackhi_ps(g, h));
            let (ad_0, ad_1) = (_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xEE>(ab, cd));
            let (eh_0, eh_1) = (_mm256_shuffle_ps::<0x44>(ef, gh), _mm256_shuffle_ps::<0xEE>(ef, gh));
            let ad_2 = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
            let ad_3 = _mm256_shuffle_ps::<0xEE>(ab_high, cd_high);
            let eh_2 = _mm256_shuffle_ps::<0x44>(ef_high, gh_high);
            let eh_3 = _mm256_shuffle_ps::<0xEE>(ef_high, gh_high);
            [
                Self(_mm256_permute2f128_ps::<0x20>(ad_0, eh_0)),
                Self(_mm256_permute2f128_ps::<0x20>(ad_1, eh_1)),
                Self(_mm256_permute2f128_ps::<0x20>(ad_2, eh_2)),
                Self(_mm256_permute2f128_ps::<0x20>(ad_3, eh_3)),
                Self(_mm256_permute2f128_ps::<0x31>(ad_0, eh_0)),
                Self(_mm256_permute2f128_ps::<0x31>(ad_1, eh_1)),
                Self(_mm256_permute2f128_ps::<0x31>(ad_2, eh_2)),
                Self(_mm256_permute2f128_ps::<0x31>(ad_3, eh_3)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn codes_dot<C: Code, const M: usize>(
        from: *const u8,
        stride: usize,
        scales: &[f32; BAND],
        (x, x_row): (*const f32, usize),
        sums: &mut [[Self; GROUPS]; M],
    ) {
        // SAFETY: as the trait says. Four bytes of eight rows become a register, byte after byte of rows 0-3 in
        // its lower half and of rows 4-7 in its upper, so that the bytes of the values, looked up one by one
        // as in `codes_transposed`, end in the rows' order by interleaving alone.
        unsafe {
            let mut words = [[_mm256_setzero_si256(); GROUPS]; 4];
            let by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
            ));
            for group in 0..GROUPS {
                let mut rows = [_mm256_setzero_si256(); 4];
                for row in 0..4 {
                    let low = from.add((group * LANES + row) * stride);
                    rows[row] = _mm256_inserti128_si256::<1>(
                        _mm256_castsi128_si256(_mm_loadu_si128(low.cast())),
                        _mm_loadu_si128(low.add(4 * stride).cast()),
                    );
                }
                let (ab, ab_high) =
                    (_mm256_unpacklo_epi32(rows[0], rows[1]), _mm256_unpackhi_epi32(rows[0], rows[1]));
                let (cd, cd_high) =
                    (_mm256_unpacklo_epi32(rows[2], rows[3]), _mm256_unpackhi_epi32(rows[2], rows[3]));
                let columns = [
                    _mm256_unpacklo_epi64(ab, cd),
                    _mm256_unpackhi_epi64(ab, cd),
                    _mm256_unpacklo_epi64(ab_high, cd_high),
                    _mm256_unpackhi_epi64(ab_high, cd_high),
                ];
                for word in 0..4 {
                    words[word][group] = _mm256_shuffle_epi8(columns[word], by_byte);
                }
            }
            let mut planes = [_mm256_setzero_si256(); 4];
            for plane in 0..4 {
                let bytes = _mm_loadu_si128(C::PLANES[plane].as_ptr().cast());
                planes[plane] = _mm256_broadcastsi128_si256(bytes);
            }
            let low = _mm256_set1_epi8(15);
            for word in 0..4 {
                for group in 0..GROUPS {
                    let codes = words[word][group];
                    let scale = _mm256_loadu_ps(scales.as_ptr().add(group * LANES));
                    let nibbles =
                        [_mm256_and_si256(_mm256_srli_epi16::<4>(codes), low), _mm256_and_si256(codes, low)];
                    let mut block = [Self(_mm256_setzero_ps()); LANES];
                    for nibble in 0..2 {
                        let mut parts = [_mm256_setzero_si256(); 4];
                        for plane in 0..4 {
                            parts[plane] = _mm256_shuffle_epi8(planes[plane], nibbles[nibble]);
                        }
                        let [a, b, c, d] = parts;
                        let (lower, upper) = (
                            [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)],
                            [_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)],
                        );
                        for half in 0..2 {
                            let pair = [
                                _mm256_unpacklo_epi16(lower[half], upper[half]),
                                _mm256_unpackhi_epi16(lower[half], upper[half]),
                            ];
                            for byte in 0..2 {
                                let value = _mm256_mul_ps(_mm256_castsi256_ps(pair[byte]), scale);
                                block[4 * half + 2 * byte + nibble] = Self(value);
                            }
                        }
                    }
                    block_dot(block, (x.add(word * LANES), x_row), group, sums);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn bf16_dot<const M: usize>(
        from: *const u8,
        stride: usize,
        (x, x_row): (*const f32, usize),
        sums: &mut [[Self; GROUPS]; M],
    ) {
        // SAFETY: as the trait says. Pairs of values are transposed as one, then taken apart.
        unsafe {
            for group in 0..GROUPS {
                let mut rows = [_mm256_setzero_si256(); 4];
                for row in 0..4 {
                    let low = from.add((group * LANES + row) * stride);
                    rows[row] = _mm256_inserti128_si256::<1>(
                        _mm256_castsi128_si256(_mm_loadu_si128(low.cast())),
                        _mm_loadu_si128(low.add(4 * stride).cast()),
                    );
                }
                let (ab, ab_high) =
                    (_mm256_unpacklo_epi32(rows[0], rows[1]), _mm256_unpackhi_epi32(rows[0], rows[1]));
                let (cd, cd_high) =
                    (_mm256_unpacklo_epi32(rows[2], rows[3]), _mm256_unpackhi_epi32(rows[2], rows[3]));
                let pairs = [
                    _mm256_unpacklo_epi64(ab, cd),
                    _mm256_unpackhi_epi64(ab, cd),
                    _mm256_unpacklo_epi64(ab_high, cd_high),
                    _mm256_unpackhi_epi64(ab_high, cd_high),
                ];
                let second = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
                let mut block = [Self(_mm256_setzero_ps()); LANES];
                for pair in 0..4 {
                    block[2 * pair] = Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[pair])));
                    block[2 * pair + 1] = Self(_mm256_castsi256_ps(_mm256_and_si256(pairs[pair], second)));
                }
                block_dot(block, (x, x_row), group, sums);
            }
        }
    }
}
