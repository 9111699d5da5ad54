// Rotary positions: rotates the halves of each head in place by the angles of its row's position.
//
//   low'  = low · cos - high · sin
//   high' = high · cos + low · sin          backward: by the negative angle, which is the transpose
//
// Shapes: x (rows, heads, head_dim) bf16, dense; cos and sin (positions, head_dim / 2) f32; positions (rows) i32.
//
// A thread rotates eight pairs of up to four heads of a row, so that the angles are read once for the four.
// Grid ceil(rows · quarter · pieces / 256) with quarter = ceil(heads / 4) and pieces = ceil(head_dim / 2 / 8);
// block 256; no shared memory.
//
// Moves 4 bytes a value (read and write x) and a byte of tables, mostly from L2, for 7 PTX instructions: bound
// by memory.
//
// Versions
//   v1  this: 16 bytes an access, angles in registers for four heads. A thread a pair would be simpler, with two
//       bytes an access and the angles read for each head.
#include "common.cuh"
#include "eight.cuh"

constexpr int HEADS = 4;

KERNEL __launch_bounds__(256) rope(bf16* x, const float* cos, const float* sin, const int* positions, int rows,
                                   int heads, int head_dim, int backward) {
    int half = head_dim / 2;
    u32 pieces = (half + 7) / 8, quarter = (heads + HEADS - 1) / HEADS;
    u32 index = blockIdx.x * blockDim.x + threadIdx.x, turn = index / pieces;
    int first = index % pieces * 8, head = turn % quarter;
    i64 row = turn / quarter;
    if (row >= rows) return;
    int count = min(half - first, 8);
    i64 angles = (i64)positions[row] * half + first;
    bool wide = aligned(x, cos, sin) && half % 8 == 0;
    Eight cosine = load_eight(cos + angles, count, wide);
    Eight sine = load_eight(sin + angles, count, wide);
    float sign = backward ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < HEADS; i++, head += quarter) {
        if (head >= heads) return;
        bf16* at = x + (row * heads + head) * head_dim + first;
        Eight low = load_eight(at, count, wide), high = load_eight(at + half, count, wide), turned;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float along = cosine.at[j], across = sign * sine.at[j];
            turned.at[j] = low.at[j] * along - high.at[j] * across;
            high.at[j] = high.at[j] * along + low.at[j] * across;
        }
        store_eight(at, turned, count, wide);
        store_eight(at + half, high, count, wide);
    }
}
