// What every kernel shares: number types, bf16 conversion, and the few instructions that CUDA C has no words for
// without NVIDIA's headers (ldmatrix, mma.sync, cp.async). NVRTC compiles this with no header at all.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The bits of a bfloat16. Arithmetic is in f32; a value is rounded once, when it is stored.
struct bf16 {
    u16 bits;
};

#define KERNEL extern "C" __global__ void
#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;

DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_f32(float x) { return x; }

// The lower and the upper bf16 of a word.
DEVICE float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounds to nearest, ties to even.
DEVICE bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two values in a word, `low` first in memory.
DEVICE u32 to_bf16x2(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The address of shared memory as its instructions want it.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// d (16,8) f32 += a (16,16) · b (16,8), fragments as in the PTX ISA for mma.m16n8k16.
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

DEVICE void load_matrices(u32 (&r)[4], const void* row) { load_matrices(r, shared_address(row)); }

// The same, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    load_matrices_transposed(r, shared_address(row));
}

// Copies 16 bytes to shared memory behind the program's back; of the source only `bytes` (0 to 16) are read, the
// rest becomes zero.
DEVICE void copy_async(u32 shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

DEVICE void copy_async(void* shared, const void* global, int bytes = 16) {
    copy_async(shared_address(shared), global, bytes);
}

// The same for 4 bytes.
DEVICE void copy_word_async(u32 shared, const void* global, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Two floats in one store: the compiler parts some that are written as a float2.
DEVICE void store_pair(float* global, float first, float second) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(global), "f"(first), "f"(second) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are under way. A barrier must follow.
template <int Pending> DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

DEVICE float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The sum over the lanes of a warp, the same bits in each.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += exchange(x, mask);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, exchange(x, mask));
    return x;
}

// The sum over a block of whole warps, the same bits in each thread. `scratch` has a float a warp.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / WARP; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = scratch[0];
    for (int warp = 1; warp < blockDim.x / WARP; warp++) most = fmaxf(most, scratch[warp]);
    __syncthreads();
    return most;
}
