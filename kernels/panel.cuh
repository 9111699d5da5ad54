// What products of matrices share: operands in global memory, and their panels in shared memory.
#pragma once

#include "common.cuh"

// A matrix of bf16 in global memory: rows `ld` values apart.
struct Operand {
    const bf16* at;
    int ld;
    int rows;
    int cols;
    bool aligned;       // rows begin on 16 bytes
};

DEVICE Operand operand(const bf16* at, int ld, int rows, int cols) {
    return Operand{at, ld, rows, cols, (u64)at % 16 == 0 && ld % 8 == 0};
}

// A part of an operand in shared memory, (ROWS,COLS) bf16 in chunks of 8 values. Chunks of a row are exchanged by the
// row's number, so that 8 rows of one column of chunks lie in different banks: ldmatrix and copies meet no conflicts.
template <int ROWS, int COLS> struct Panel {
    static constexpr int CHUNKS = COLS / 8;
    static constexpr int SIZE = ROWS * COLS;
    static constexpr int SHIFT = CHUNKS == 1 ? 3 : CHUNKS == 2 ? 2 : CHUNKS == 4 ? 1 : 0;
    static constexpr int MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;

    // Where a chunk begins.
    DEVICE static int chunk_at(int row, int chunk) { return row * COLS + (chunk ^ row >> SHIFT & MASK) * 8; }

    // Brings the panel that begins at (row,col); what lies outside of the operand becomes zero. Arrives with the copies
    // of the group; rows that are not aligned are there at the next barrier.
    template <int THREADS> DEVICE static void load(bf16* panel, const Operand& from, int first_row, int first_col) {
        constexpr int STEP = THREADS / CHUNKS;
        static_assert(THREADS % CHUNKS == 0 && STEP % 8 == 0 && ROWS % STEP == 0, "whole turns, one exchange");
        if (from.aligned) {
            int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, col = first_col + chunk * 8;
            int bytes = 2 * max(0, min(8, from.cols - col));
            const bf16* source = from.at + (i64)(first_row + row) * from.ld + col;
            bf16* to = panel + chunk_at(row, chunk);
#pragma unroll
            for (int i = 0; i < ROWS / STEP; i++) {
                bool inside = first_row + row + i * STEP < from.rows;
                copy_async(to + i * STEP * COLS, source, inside ? bytes : 0);
                source += (i64)STEP * from.ld;
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < SIZE; i += THREADS) {
                int row = i / COLS, col = i % COLS;
                bool inside = first_row + row < from.rows && first_col + col < from.cols;
                bf16 value = inside ? from.at[(i64)(first_row + row) * from.ld + first_col + col] : bf16{0};
                panel[chunk_at(row, col / 8) + col % 8] = value;
            }
        }
    }

    // The left factor (16,16) of an mma at (row,depth) of a panel (rows,depth). Rows and depths of factors are
    // multiples of 8, so that the exchange depends on the lane alone.
    DEVICE static void left(u32 (&a)[4], const bf16* panel, int row, int depth) {
        int lane = threadIdx.x % WARP;
        load_matrices(a, panel + chunk_at(lane % 16, depth / 8 + lane / 16) + row * COLS);
    }

    // The same of a panel (depth,rows).
    DEVICE static void left_of_transposed(u32 (&a)[4], const bf16* panel, int row, int depth) {
        int lane = threadIdx.x % WARP;
        load_matrices_transposed(a, panel + chunk_at(lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2) + depth * COLS);
    }

    // Two right factors (16,8), side by side, of a panel (columns,depth): the product is with its transpose.
    DEVICE static void right(u32 (&b)[4], const bf16* panel, int col, int depth) {
        int lane = threadIdx.x % WARP;
        load_matrices(b, panel + chunk_at(lane / 16 * 8 + lane % 8, depth / 8 + lane / 8 % 2) + col * COLS);
    }

    // The same of a panel (depth,columns).
    DEVICE static void right_of_transposed(u32 (&b)[4], const bf16* panel, int col, int depth) {
        int lane = threadIdx.x % WARP;
        load_matrices_transposed(b, panel + chunk_at(lane % 16, col / 8 + lane / 16) + depth * COLS);
    }
};
