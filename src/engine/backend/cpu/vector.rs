//! Eight f32 lanes, in plain Rust and as AVX2 registers, and sixteen as those of AVX-512 (`zmm`): what kernels
//! are written over, so that one body serves every instruction set. Knows arithmetic and loads; nothing of
//! tiles, panels or encodings.

/// Lanes of a [`Vector`].
pub(super) const LANES: usize = 8;

/// Sixteen values that 4-bit indices name.
pub(super) trait Code {
    const VALUES: [f32; 16];
    /// Their first bytes, second bytes, third and fourth.
    const PLANES: [[u8; 16]; 4] = {
        let mut planes = [[0; 16]; 4];
        let mut place = 0;
        while place < 64 {
            planes[place % 4][place / 4] = Self::VALUES[place / 4].to_le_bytes()[place % 4];
            place += 1;
        }
        planes
    };
}

/// A register of f32 values: what products are written over.
///
/// # Safety
/// Every function may be called only where the CPU has the implementor's instructions; those that take a
/// pointer need as many values there as there are lanes, at any alignment.
pub(super) trait Lanes: Copy {
    /// How many values; a divisor of 16.
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// self * factor + addend; fused where the instruction set fuses.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Asks for the memory at `from`, which need not exist, to be brought near.
    unsafe fn prefetch(from: *const u8);
}

/// Eight f32 values, and the ways from encoded ones to them.
///
/// # Safety
/// As of [`Lanes`]; pointers to encoded values need eight of these.
pub(super) trait Vector: Lanes {
    /// Little-endian f32.
    unsafe fn load_f32(from: *const u8) -> Self;
    /// Little-endian bfloat16.
    unsafe fn load_bf16(from: *const u8) -> Self;
    /// Little-endian IEEE half precision.
    unsafe fn load_f16(from: *const u8) -> Self;
    /// The values of `code` that eight 4-bit indices name, two a byte, the first in the high nibble.
    unsafe fn load_codes(from: *const u8, code: &[f32; 16]) -> Self;
    /// out (32,16) = the values of `C` that the 4-bit indices of sixteen rows name, transposed and each row
    /// times its scale: 32 indices of row i start at `from + i * stride`, two a byte, the first in the high
    /// nibble.
    unsafe fn codes_transposed<C: Code>(from: *const u8, stride: usize, scales: &[f32; 16], out: *mut f32);
    /// Lane j of row i becomes lane i of row j.
    unsafe fn transpose(rows: [Self; LANES]) -> [Self; LANES];

    /// sums (M, 32 rows) += x (M,32) · the values of a band, step after step: 32 indices of each of 32 rows, as for
    /// `codes_transposed`. Rows of x lie `x_row` apart.
    #[inline(always)]
    unsafe fn codes_dot<C: Code, const M: usize>(
        from: *const u8,
        stride: usize,
        scales: &[f32; BAND],
        (x, x_row): (*const f32, usize),
        sums: &mut [[Self; GROUPS]; M],
    ) {
        for group in 0..GROUPS {
            for k in (0..32).step_by(LANES) {
                // SAFETY: as the trait says.
                unsafe {
                    let mut block = [Self::splat(0.0); LANES];
                    for lane in 0..LANES {
                        let row = group * LANES + lane;
                        let values = Self::load_codes(from.add(row * stride + k / 2), &C::VALUES);
                        block[lane] = values.mul(Self::splat(scales[row]));
                    }
                    block_dot(Self::transpose(block), (x.add(k), x_row), group, sums);
                }
            }
        }
    }

    /// sums (M, 32 rows) += x (M,8) · eight bfloat16 of each of 32 rows `stride` bytes apart, step after step.
    #[inline(always)]
    unsafe fn bf16_dot<const M: usize>(
        from: *const u8,
        stride: usize,
        (x, x_row): (*const f32, usize),
        sums: &mut [[Self; GROUPS]; M],
    ) {
        for group in 0..GROUPS {
            // SAFETY: as the trait says.
            unsafe {
                let mut block = [Self::splat(0.0); LANES];
                for lane in 0..LANES {
                    block[lane] = Self::load_bf16(from.add((group * LANES + lane) * stride));
                }
                block_dot(Self::transpose(block), (x, x_row), group, sums);
            }
        }
    }
}

/// Rows of a band: as many sums as keep the CPU busy with one row of x.
pub(super) const BAND: usize = 32;
/// Vectors across a band.
pub(super) const GROUPS: usize = BAND / LANES;

/// sums of a group += x (M,8) · a block of eight steps.
///
/// # Safety
/// As for [`Vector`].
#[inline(always)]
pub(super) unsafe fn block_dot<V: Vector, const M: usize>(
    block: [V; LANES],
    (x, x_row): (*const f32, usize),
    group: usize,
    sums: &mut [[V; GROUPS]; M],
) {
    for m in 0..M {
        let mut sum = sums[m][group];
        for step in 0..LANES {
            // SAFETY: as promised.
            sum = unsafe { V::splat(*x.add(m * x_row + step)).mul_add(block[step], sum) };
        }
        sums[m][group] = sum;
    }
}

/// The lanes as an array: no instructions beyond the target's own.
pub(super) type Portable = [f32; LANES];

impl Lanes for Portable {
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: eight values are there, says the trait.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: there is room for eight values, says the trait.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * other[lane])
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Where fusing is no instruction it is a slow call.
        let fuse = |lane: usize| match cfg!(target_arch = "aarch64") {
            true => self[lane].mul_add(factor[lane], addend[lane]),
            false => self[lane] * factor[lane] + addend[lane],
        };
        std::array::from_fn(fuse)
    }

    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}

impl Vector for Portable {
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> Self {
        // SAFETY: eight values are there, says the trait.
        let bytes = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        bytes.map(f32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: eight values are there, says the trait.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        bytes.map(|bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: eight values are there, says the trait.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        bytes.map(|bytes| half::f16::from_le_bytes(bytes).to_f32())
    }

    #[inline(always)]
    unsafe fn load_codes(from: *const u8, code: &[f32; 16]) -> Self {
        // SAFETY: eight codes are there, says the trait.
        let bytes = unsafe { from.cast::<[u8; LANES / 2]>().read_unaligned() };
        std::array::from_fn(|lane| code[usize::from(bytes[lane / 2] >> (4 * (1 - lane % 2)) & 15)])
    }

    #[inline(always)]
    unsafe fn codes_transposed<C: Code>(from: *const u8, stride: usize, scales: &[f32; 16], out: *mut f32) {
        for (row, scale) in scales.iter().enumerate() {
            for byte in 0..16 {
                // SAFETY: as the trait says.
                unsafe {
                    let both = *from.add(row * stride + byte);
                    *out.add(2 * byte * 16 + row) = C::VALUES[usize::from(both >> 4)] * scale;
                    *out.add((2 * byte + 1) * 16 + row) = C::VALUES[usize::from(both & 15)] * scale;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|lane| std::array::from_fn(|row| rows[row][lane]))
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod zmm;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
pub(super) use zmm::Zmm;
