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

// A tile of rows of D values in shared memory, D a multiple of 16. The pieces of eight values of a row are permuted by its
// number, so that no access meets a bank twice, without padding.
template <int D> struct Tile {
    static constexpr int BITS = D / 8 % 8 == 0 ? 3 : D / 8 % 4 == 0 ? 2 : 1;
    u32 address;

    static DEVICE int permuted(int row) { return (row >> (3 - BITS)) & ((1 << BITS) - 1); }

    // Where a piece begins, in bytes.
    static DEVICE u32 offset(int row, int piece) { return row * (D * 2) + (piece ^ permuted(row)) * 16; }

    // Brings the first `count` of ROWS rows, zeros for the rest. `row_of` gives the row of each; `from` is where the D
    // values of row 0 begin, `stride` from row to row. By THREADS threads, of which this is `thread`.
    template <int ROWS, int THREADS, class RowOf>
    DEVICE void copy_rows(const bf16* from, int stride, int count, RowOf row_of, int thread = threadIdx.x) const {
        constexpr int PIECES = D / 8;
#pragma unroll
        for (int first = 0; first < ROWS * PIECES; first += THREADS) {
            const int index = first + thread, r = index / PIECES, piece = index % PIECES;
            if (ROWS * PIECES % THREADS != 0 && r >= ROWS) break;
            const bf16* at = from + (i64)row_of(min(r, count - 1)) * stride + piece * 8;
            copy_async(address + offset(r, piece), at, r < count ? 16 : 0);
        }
    }

    // Fragments of 16 rows from `row` and 16 columns from that of `piece`, both multiples of 16 values. Lane l reads the
    // piece (l / 16) of row l % 16, or the other way round: of all that is in an address, only two bits depend on both
    // the lane and the piece.
    DEVICE u32 lane_address(int lane_row, int lane_piece, int row, int piece) const {
        const int low = piece & ((1 << BITS) - 1), high = piece - low;
        const u32 lane = address + lane_row * (D * 2);
        return lane + ((lane_piece ^ permuted(lane_row)) * 16 ^ low * 16) + (row * (D * 2) + high * 16);
    }

    // As the first factor of mma_16x16: rows by columns.
    DEVICE void load_left(u32 (&r)[4], int row, int piece) const {
        const int lane = threadIdx.x % WARP;
        load_matrices(r, lane_address(lane % 16, lane / 16, row, piece));
    }

    // As its second factor: rows by columns.
    DEVICE void load_right(u32 (&r)[4], int row, int piece) const {
        const int lane = threadIdx.x % WARP;
        load_matrices_transposed(r, lane_address(lane % 16, lane / 16, row, piece));
    }

    // As its second factor: columns by rows.
    DEVICE void load_right_transposed(u32 (&r)[4], int row, int piece) const {
        const int lane = threadIdx.x % WARP;
        load_matrices(r, lane_address(lane % 8 + lane / 16 * 8, lane / 8 % 2, row, piece));
    }
};

// d (16,16) += a (16,16) · b (16,16); d is two blocks of eight columns.
DEVICE void mma_16x16(float (&left)[4], float (&right)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    mma_m16n8k16(left, a, low);
    mma_m16n8k16(right, a, high);
}

// A product's two blocks of eight columns as the first factor of the next, rounded.
DEVICE void round_left(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = to_bf16x2(left[0], left[1]);
    a[1] = to_bf16x2(left[2], left[3]);
    a[2] = to_bf16x2(right[0], right[1]);
    a[3] = to_bf16x2(right[2], right[3]);
}

constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// 2^x within 2 ulp; 0 below the normal numbers.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh(x · factor / (2 · LOG2_E)) with an absolute error of some 2^-23.
DEVICE float hyperbolic_tangent(float x, float factor) {
    return 1.0f - __fdividef(2.0f, 1.0f + power_of_two(x * factor));
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
