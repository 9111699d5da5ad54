// A product with everything that goes wrong in one: asynchronous copies in two stages, a table in shared memory,
// padded tiles read by ldmatrix, tensor cores. c (m,n) = a (m,k) · lookup(codes (n,k))ᵀ, all multiples of 64; the
// grid is (n/64, m/64), the block 128 threads, four warps of 32x32.
#include "common.cuh"

constexpr int TILE = 64;
constexpr int LINE = TILE + 8;

KERNEL lookup_gemm(bf16* c, const bf16* a, const u8* codes, const float* table, int n, int k) {
    __shared__ __align__(16) bf16 left[2][TILE * LINE];
    __shared__ __align__(16) bf16 right[TILE * LINE];
    __shared__ float values[16];
    int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    int row_of_warp = warp % 2 * 32, column_of_warp = warp / 2 * 32;
    if (thread < 16) values[thread] = table[thread];
    float sums[2][4][4] = {};

    auto copy_left = [&](int stage, int depth) {
        for (int i = 0; i < 4; i++) {
            int piece = thread + i * 128, row = piece / 8, column = piece % 8 * 8;
            copy_async(&left[stage][row * LINE + column], a + (i64)(first_row + row) * k + depth + column);
        }
        commit_copies();
    };

    copy_left(0, 0);
    __syncthreads();  // the table
    for (int depth = 0; depth < k; depth += TILE) {
        int stage = depth / TILE % 2;
        int row = thread / 2, half = thread % 2;
        const u8* packed = codes + ((i64)(first_column + row) * k + depth + half * 32) / 2;
        for (int i = 0; i < 16; i++) {
            u32 pair = to_bf16x2(values[packed[i] >> 4], values[packed[i] & 15]);
            *(u32*)&right[row * LINE + half * 32 + i * 2] = pair;
        }
        if (depth + TILE < k) copy_left(1 - stage, depth + TILE);
        else commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        for (int inner = 0; inner < TILE; inner += 16) {
            u32 rows[2][4], columns[4][2];
            for (int i = 0; i < 2; i++) {
                int row = row_of_warp + i * 16 + lane % 16;
                load_matrices(rows[i], &left[stage][row * LINE + inner + lane / 16 * 8]);
            }
            for (int j = 0; j < 2; j++) {
                u32 four[4];
                int row = column_of_warp + j * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(four, &right[row * LINE + inner + lane / 8 % 2 * 8]);
                columns[2 * j][0] = four[0], columns[2 * j][1] = four[1];
                columns[2 * j + 1][0] = four[2], columns[2 * j + 1][1] = four[3];
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) mma_m16n8k16(sums[i][j], rows[i], columns[j]);
        }
        __syncthreads();  // all have read
    }

    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            i64 row = first_row + row_of_warp + i * 16 + lane / 4;
            i64 column = first_column + column_of_warp + j * 8 + lane % 4 * 2;
            *(u32*)&c[row * n + column] = to_bf16x2(sums[i][j][0], sums[i][j][1]);
            *(u32*)&c[(row + 8) * n + column] = to_bf16x2(sums[i][j][2], sums[i][j][3]);
        }
}
