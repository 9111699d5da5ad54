// Numbers from one format to another, element by element, each rounded once to nearest, ties to even.
//
//   grid ceil(n / 4096), block 256, no dynamic shared memory; n > 0. Arrays on 16 bytes take the fast way (4
//   values a load, whole sectors), others one value at a time.
//   Bytes a value: 4 in and 2 out (bf16_from_f32), 2 and 2 (bf16_from_f16), 2 and 4 (f32_from_bf16).
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int FOURS = 4;                         // of a thread
constexpr int VALUES = THREADS * FOURS * 4;      // of a block

// Four values of two or four bytes each.
template <typename T> struct Four;
template <> struct Four<float> { typedef float4 Words; };
template <> struct Four<u16> { typedef uint2 Words; };
template <> struct Four<bf16> { typedef uint2 Words; };

DEVICE float f16_to_f32(u32 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
}

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return to_f32(x); }
DEVICE float widen(u16 x) { return f16_to_f32(x); }
DEVICE void widen(float (&y)[4], float4 x, const float*) { y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w; }
DEVICE void widen(float (&y)[4], uint2 x, const bf16*) {
    y[0] = low_f32(x.x), y[1] = high_f32(x.x), y[2] = low_f32(x.y), y[3] = high_f32(x.y);
}
DEVICE void widen(float (&y)[4], uint2 x, const u16*) {
    y[0] = f16_to_f32(x.x & 0xffff), y[1] = f16_to_f32(x.x >> 16);
    y[2] = f16_to_f32(x.y & 0xffff), y[3] = f16_to_f32(x.y >> 16);
}

DEVICE void store(float* y, float x) { *y = x; }
DEVICE void store(bf16* y, float x) { *y = to_bf16(x); }
DEVICE float4 narrow(const float (&x)[4], float*) { return make_float4(x[0], x[1], x[2], x[3]); }
DEVICE uint2 narrow(const float (&x)[4], bf16*) {
    return make_uint2(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]));
}

template <typename To, typename From> DEVICE void convert(To* y, const From* x, i64 n) {
    bool in_fours = ((u64)y | (u64)x) % 16 == 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        i64 at = (i64)blockIdx.x * VALUES + 4 * (i * THREADS + threadIdx.x);
        if (in_fours && at + 4 <= n) {
            float four[4];
            widen(four, *(const typename Four<From>::Words*)(x + at), x);
            *(typename Four<To>::Words*)(y + at) = narrow(four, y);
        } else {
            for (i64 j = at; j < at + 4 && j < n; j++) store(y + j, widen(x[j]));
        }
    }
}

KERNEL bf16_from_f32(bf16* y, const float* x, i64 n) { convert(y, x, n); }

// x holds the bits of IEEE half floats.
KERNEL bf16_from_f16(bf16* y, const u16* x, i64 n) { convert(y, x, n); }

KERNEL f32_from_bf16(float* y, const bf16* x, i64 n) { convert(y, x, n); }
