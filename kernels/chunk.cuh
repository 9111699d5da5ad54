// What the scan in chunks and its gradient share: tiles of bf16 in shared memory, products of them on tensor
// cores, and a chunk's rows.
#pragma once

#include "common.cuh"
#include "eight.cuh"
#include "span.cuh"

// Rows of a chunk; rows of a head's state that a block takes; what keeps rows of shared memory in different banks.
constexpr int CHUNK = 64, HEAD_ROWS = 64, PAD = 8, LD = HEAD_ROWS + PAD;

// Fragments of a tile of 16 x 16 for `mma_m16n8k16`, from shared memory that has it by rows or by columns.
enum Order { ROWS, COLUMNS };

template <Order ORDER> DEVICE void load_a(u32 (&a)[4], const bf16* tile, int ld) {
    int lane = threadIdx.x % WARP, matrix = lane / 8, row = lane % 8;
    if (ORDER == ROWS) {
        load_matrices(a, tile + (matrix % 2 * 8 + row) * ld + matrix / 2 * 8);
    } else {
        load_matrices_transposed(a, tile + (matrix / 2 * 8 + row) * ld + matrix % 2 * 8);
    }
}

// The first two registers are columns 0 to 7 of the product, the others 8 to 15. By columns is (n, k) in memory.
template <Order ORDER> DEVICE void load_b(u32 (&b)[4], const bf16* tile, int ld) {
    int lane = threadIdx.x % WARP, matrix = lane / 8, row = lane % 8;
    if (ORDER == COLUMNS) {
        load_matrices(b, tile + (matrix / 2 * 8 + row) * ld + matrix % 2 * 8);
    } else {
        load_matrices_transposed(b, tile + (matrix % 2 * 8 + row) * ld + matrix / 2 * 8);
    }
}

template <int TILES> DEVICE void clear(float (&sum)[TILES][4]) {
#pragma unroll
    for (int j = 0; j < TILES; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
}

template <int TILES>
DEVICE void add_products(float (&sum)[TILES][4], int j, const u32 (&a)[4], const u32 (&b)[4]) {
    u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_m16n8k16(sum[j], a, left);
    mma_m16n8k16(sum[j + 1], a, right);
}

// sum (16, 8 · TILES) += a (16, DEPTH) · b (DEPTH, 8 · TILES).
template <Order A, Order B, int DEPTH, int TILES>
DEVICE void multiply(float (&sum)[TILES][4], const bf16* a, int lda, const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        u32 left[4], right[4];
        load_a<A>(left, A == ROWS ? a + k : a + k * lda, lda);
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            load_b<B>(right, B == ROWS ? b + k * ldb + j * 8 : b + j * 8 * ldb + k, ldb);
            add_products(sum, j, left, right);
        }
    }
}

// Begins to copy rows of `columns` values to a tile of 64 rows of WIDTH; what is missing becomes zero.
template <int WIDTH> DEVICE void load_tile(bf16* to, const bf16* from, i64 ld, int rows, int columns) {
    bool wide = aligned(from) && ld % 8 == 0;
    for (int i = threadIdx.x; i < CHUNK * WIDTH / 8; i += blockDim.x) {
        int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
        int count = row < rows ? max(min(columns - column, 8), 0) : 0;
        bf16* place = to + row * (WIDTH + PAD) + column;
        const bf16* source = count ? from + row * ld + column : from;
        if (wide) {
            copy_async(place, source, count * 2);
        } else {
            for (int j = 0; j < 8; j++) place[j] = j < count ? source[j] : bf16{0};
        }
    }
    commit_copies();
}

DEVICE void finish_loads() {
    wait_for_copies<0>();
    __syncthreads();
}

template <int WIDTH> DEVICE void store_tile(bf16* to, const bf16* from, i64 ld, int rows, int columns) {
    bool wide = aligned(to) && ld % 8 == 0;
    for (int i = threadIdx.x; i < CHUNK * WIDTH / 8; i += blockDim.x) {
        int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8, count = row < rows ? columns - column : 0;
        if (count <= 0) continue;
        const bf16* place = from + row * (WIDTH + PAD) + column;
        bf16* target = to + row * ld + column;
        if (wide && count >= 8) {
            *(uint4*)target = *(const uint4*)place;
        } else {
            for (int j = 0; j < min(count, 8); j++) target[j] = place[j];
        }
    }
}

struct Chunk {
    i64 row;
    int rows;
    bool first, last;
};

DEVICE Chunk chunk_of(const Span* spans, const int2* tiles, int tile) {
    int2 place = tiles[tile];
    int start = spans[place.x].queries_start, end = spans[place.x].queries_end, row = start + place.y;
    return {row, min(end - row, CHUNK), row == start, row + CHUNK >= end};
}

// Where the state of a head's rows from `first` on lies.
DEVICE i64 state_at(int tile, int heads, int head, int head_dim, int first, int states) {
    return (((i64)tile * heads + head) * head_dim + first) * states;
}

// dt and its running sums of one head in a chunk; after the last row dt is zero and the sum stays.
DEVICE void load_steps(float* step, float* sum, const float* steps, const float* sums, Chunk chunk, int heads,
                       int head) {
    if (threadIdx.x >= CHUNK) return;
    i64 last = chunk.row + chunk.rows - 1, row = chunk.row + threadIdx.x;
    step[threadIdx.x] = row <= last ? steps[row * heads + head] : 0.0f;
    sum[threadIdx.x] = sums[(row <= last ? row : last) * heads + head];
}
