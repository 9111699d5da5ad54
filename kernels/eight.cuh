// What operations on rows share: eight values at a time, 16 bytes of bf16.
#pragma once

#include "common.cuh"

// Eight values that lie together: 16 bytes of bf16, the widest access there is.
struct Eight {
    float at[8];
};

// Whether arrays that begin here may be read and written in pieces of 16 bytes.
DEVICE bool aligned(const void* a, const void* b = nullptr, const void* c = nullptr) {
    return (((u64)a | (u64)b | (u64)c) & 15) == 0;
}

DEVICE Eight unpack(uint4 words) {
    return {low_f32(words.x), high_f32(words.x), low_f32(words.y), high_f32(words.y),
            low_f32(words.z), high_f32(words.z), low_f32(words.w), high_f32(words.w)};
}

// The first `count` of eight values, zeros after them; at once where they are whole and the array is aligned.
DEVICE Eight load_eight(const bf16* from, int count, bool aligned) {
    if (aligned && count >= 8) return unpack(*(const uint4*)from);
    Eight x;
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] = i < count ? to_f32(from[i]) : 0.0f;
    return x;
}

DEVICE Eight load_eight(const float* from, int count, bool aligned) {
    if (aligned && count >= 8) {
        float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
        return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    }
    Eight x;
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] = i < count ? from[i] : 0.0f;
    return x;
}

// Stores the first `count` of eight values.
DEVICE void store_eight(bf16* to, const Eight& x, int count, bool aligned) {
    if (aligned && count >= 8) {
        *(uint4*)to = make_uint4(to_bf16x2(x.at[0], x.at[1]), to_bf16x2(x.at[2], x.at[3]),
                                 to_bf16x2(x.at[4], x.at[5]), to_bf16x2(x.at[6], x.at[7]));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) to[i] = to_bf16(x.at[i]);
}

DEVICE void store_eight(float* to, const Eight& x, int count, bool aligned) {
    if (aligned && count >= 8) {
        ((float4*)to)[0] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
        ((float4*)to)[1] = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) to[i] = x.at[i];
}

// 1 / (1 + exp(-x)), within 3 ulp; 0 and 1 far out.
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
