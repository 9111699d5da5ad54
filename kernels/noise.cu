// What a training pass disturbs on purpose: values dropped before a LoRA pair, and noise on embeddings. The random
// bits are splitmix64's and the very ones of the CPU: a function of the row's stream, the linear layer and the
// channel.
//
//   bits(stream, index) = mix(stream + (index + 1) · 2⁶⁴ / golden ratio)
//   dropout: four values share the bits number channel / 4 of stream mix(row ^ linear_mixed), 16 bits each
//            from the lowest; a value is dropped where they are below `threshold`, else multiplied by `scale`
//   noise:   the upper 24 bits of number `channel` of the row's stream, as a number in [0, 1)
//
// Shapes: x, y (t, k) bf16; rows (t) u64, a stream a row; linear_mixed = mix(linear layer + 1).
//   dropout          y = or (add) += x with values dropped. Grid ceil(t · ceil(k / 8) / 256), block 256.
//   embedding_noise  x (t, c) += alpha / sqrt(lengths[row] · c) · (2 · unit - 1), lengths (t) i32. Grid
//                    ceil(t · ceil(c / 8) / 256), block 256.
// No shared memory. Moves 4 or 6 bytes a value; a mix is 2 wide multiplications, a quarter of one a dropped value:
// bound by memory.
#include "common.cuh"
#include "eight.cuh"

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15ull;

// splitmix64's output function.
DEVICE u64 mix(u64 value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

DEVICE u64 bits(u64 stream, int index) { return mix(stream + (u64)(index + 1) * GOLDEN); }

KERNEL __launch_bounds__(256) dropout(bf16* y, const bf16* x, const u64* rows, int t, int k, u64 linear_mixed,
                                      int threshold, float scale, int add) {
    u32 pieces = (k + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x, row = index / pieces;
    if (row >= t) return;
    int first = index % pieces * 8, count = min(k - first, 8);
    bool wide = aligned(x, y) && k % 8 == 0;
    i64 place = (i64)row * k + first;
    Eight values = load_eight(x + place, count, wide), before = {};
    if (add) before = load_eight(y + place, count, wide);
    u64 stream = mix(rows[row] ^ linear_mixed);
    u64 random[2] = {bits(stream, first / 4), bits(stream, first / 4 + 1)};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int own = (int)(random[i / 4] >> (16 * (i % 4)) & 0xffff);
        // No fused steps here and below: the CPU rounds the product first.
        float kept = __fmul_rn(own < threshold ? 0.0f : scale, values.at[i]);
        values.at[i] = add ? __fadd_rn(before.at[i], kept) : kept;
    }
    store_eight(y + place, values, count, wide);
}

KERNEL __launch_bounds__(256)
    embedding_noise(bf16* x, const u64* rows, const int* lengths, int t, int c, float alpha) {
    u32 pieces = (c + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x, row = index / pieces;
    if (row >= t) return;
    int first = index % pieces * 8, count = min(c - first, 8);
    bool wide = aligned(x) && c % 8 == 0;
    x += (i64)row * c + first;
    Eight values = load_eight(x, count, wide);
    float bound = alpha / sqrtf((float)((i64)lengths[row] * c));
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float unit = (float)(bits(rows[row], first + i) >> 40) * (1.0f / (1 << 24));
        values.at[i] = __fadd_rn(values.at[i], __fmul_rn(bound, 2.0f * unit - 1.0f));
    }
    store_eight(x, values, count, wide);
}
