// y (T,C) bf16 = row tokens[t] of table (V,C) bf16 for each t: the rows of a decoder's input.
//
//   grid T, block 128, no dynamic shared memory. Bound by memory: 4 bytes a value. Rows on 16 bytes (C a multiple
//   of 8) go 8 values at a time, others one by one.
#include "common.cuh"

KERNEL embed(bf16* y, const bf16* table, const int* tokens, int c) {
    bf16* to = y + (i64)blockIdx.x * c;
    const bf16* from = table + (i64)tokens[blockIdx.x] * c;
    if (c % 8 == 0 && ((u64)y | (u64)table) % 16 == 0) {
        for (int at = threadIdx.x * 8; at < c; at += blockDim.x * 8)
            *(uint4*)(to + at) = *(const uint4*)(from + at);
    } else {
        for (int at = threadIdx.x; at < c; at += blockDim.x) to[at] = from[at];
    }
}
