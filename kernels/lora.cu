// The narrow products of LoRA pairs: a wide matrix times one of R columns. Gradients of pairs are
// gemm_tn_partial's, and y += h · Bᵀ and dx += dh · A are the second pair of gemm_nt and gemm_nn.
//
//   lora_down           h (T,R) bf16 = scale * x (T,K) · A (R,K)ᵀ
//   lora_up_transposed  dh (T,R) bf16 = scale * dy (T,N) · B (N,R)
//
//   grid (ceil(R/64), ceil(T/32)), block 128, dynamic shared memory (32 + W) * 512 bytes with W = 16 for R <= 16,
//   32 for R <= 32, else 64: 24,576, 32,768 or 49,152. Rows on 16 bytes come by cp.async, others value by value.
//
// Bound by memory: x is read once (2 T K bytes), A once a block by way of L2 (R/32 as much). The depth is cut
// among the warps of a block, 16 of each 64, so that 32 rows are enough work for four warps and T = 4096 fills 128
// processors; their sums are added in the order of the warps. Blocks of the same rows and other columns of R > 64
// run side by side: x comes out of L2 for all but the first.
//   v1  this, four stages of 64 deep
#include "common.cuh"
#include "panel.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 32;
constexpr int DEPTH = 64;
constexpr int STAGES = 4;

extern __shared__ __align__(128) bf16 stages[];

// h (T,R) at columns `col`.. = scale * x (T,K) · a, with a (R,K)ᵀ or, DOWN, (K,R).
template <int R, bool DOWN>
DEVICE void narrow(bf16* h, int ldh, const Operand& x, const Operand& a, float scale, int ranks, int row,
                   int col) {
    typedef Panel<ROWS, DEPTH> X;
    typedef Panel<DOWN ? DEPTH : R, DOWN ? R : DEPTH> A;
    constexpr int STAGE = X::SIZE + A::SIZE;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sums[2][R / 8][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) sums[i][j][l] = 0.0f;

    int steps = (x.cols + DEPTH - 1) / DEPTH;
    int filled = 0, read = 0;
#pragma unroll 1
    for (int step = 1 - STAGES; step < steps; step++) {
        if (step >= 0) {
            wait_for_copies<STAGES - 2>();
            // The stage is there for all, and all are done with the one before it, which is filled next.
            __syncthreads();
        }
        int depth = (step + STAGES - 1) * DEPTH;
        if (depth < x.cols) {
            X::template load<THREADS>(stages + filled, x, row, depth);
            A::template load<THREADS>(stages + filled + X::SIZE, a, DOWN ? depth : col, DOWN ? col : depth);
        }
        commit_copies();
        filled = filled == (STAGES - 1) * STAGE ? 0 : filled + STAGE;
        if (step < 0) continue;
        const bf16* panel = stages + read;
        read = read == (STAGES - 1) * STAGE ? 0 : read + STAGE;
        u32 left[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) X::left(left[i], panel, i * 16, warp * 16);
#pragma unroll
        for (int j = 0; j < R / 16; j++) {
            u32 right[4];
            if (DOWN) A::right_of_transposed(right, panel + X::SIZE, j * 16, warp * 16);
            else A::right(right, panel + X::SIZE, j * 16, warp * 16);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    u32 of_eight[2] = {right[2 * l], right[2 * l + 1]};
                    mma_m16n8k16(sums[i][2 * j + l], left[i], of_eight);
                }
        }
    }

    // The warps' sums by way of shared memory, padded so that rows of a result lie in different banks.
    constexpr int LINE = R + 8;
    static_assert(WARPS * ROWS * LINE * 4 <= STAGES * STAGE * 2, "fits the stages");
    float* lines = (float*)stages;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < R / 8; j++) {
            float* line = lines + (warp * ROWS + i * 16 + lane / 4) * LINE + j * 8 + lane % 4 * 2;
            *(float2*)line = make_float2(sums[i][j][0], sums[i][j][1]);
            *(float2*)(line + 8 * LINE) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
    __syncthreads();
    bool in_fours = (u64)h % 8 == 0 && ldh % 4 == 0;
#pragma unroll 1
    for (int index = threadIdx.x; index < ROWS * R / 4; index += THREADS) {
        int line = index / (R / 4), within = index % (R / 4) * 4, values = ranks - col - within;
        if (row + line >= x.rows || values <= 0) continue;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            float4 part = *(const float4*)(lines + (i * ROWS + line) * LINE + within);
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
        bf16* to = h + (i64)(row + line) * ldh + col + within;
        if (in_fours && values >= 4) {
            *(uint2*)to =
                make_uint2(to_bf16x2(scale * sum[0], scale * sum[1]), to_bf16x2(scale * sum[2], scale * sum[3]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < values) to[i] = to_bf16(scale * sum[i]);
        }
    }
}

template <bool DOWN>
DEVICE void narrow_of_rank(bf16* h, int ldh, const Operand& x, const Operand& a, float scale, int r) {
    int row = blockIdx.y * ROWS, col = blockIdx.x * 64;
    if (r <= 16) narrow<16, DOWN>(h, ldh, x, a, scale, r, row, col);
    else if (r <= 32) narrow<32, DOWN>(h, ldh, x, a, scale, r, row, col);
    else narrow<64, DOWN>(h, ldh, x, a, scale, r, row, col);
}

KERNEL __launch_bounds__(THREADS) lora_down(bf16* h, int ldh, const bf16* x, int ldx, const bf16* a, float scale,
                                            int t, int r, int k) {
    narrow_of_rank<false>(h, ldh, operand(x, ldx, t, k), operand(a, k, r, k), scale, r);
}

KERNEL __launch_bounds__(THREADS) lora_up_transposed(bf16* dh, int ldh, const bf16* dy, int ldy, const bf16* b,
                                                     float scale, int t, int r, int n) {
    narrow_of_rank<true>(dh, ldh, operand(dy, ldy, t, n), operand(b, r, n, r), scale, r);
}
