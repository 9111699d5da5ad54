// What the forward and the backward of attention share: tiles in shared memory, fragments, and the functions of
// scores.
#pragma once

#include "common.cuh"

// A tile of rows of D values in shared memory, D a multiple of 16. The pieces of eight values of a row are
// permuted by its number, so that no access meets a bank twice, without padding.
template <int D> struct Tile {
    static constexpr int BITS = D / 8 % 8 == 0 ? 3 : D / 8 % 4 == 0 ? 2 : 1;
    u32 address;

    static DEVICE int permuted(int row) { return (row >> (3 - BITS)) & ((1 << BITS) - 1); }

    // Where a piece begins, in bytes.
    static DEVICE u32 offset(int row, int piece) { return row * (D * 2) + (piece ^ permuted(row)) * 16; }

    // Brings the first `count` of ROWS rows, zeros for the rest. `row_of` gives the row of each; `from` is where
    // the D values of row 0 begin, `stride` from row to row. By THREADS threads, of which this is `thread`.
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

    // Fragments of 16 rows from `row` and 16 columns from that of `piece`, both multiples of 16 values. Lane l
    // reads the piece (l / 16) of row l % 16, or the other way round: of all that is in an address, only two bits
    // depend on both the lane and the piece.
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

// The map of attention's scores, scale · s or softcap · tanh(scale · s / softcap), in two parts: what is done to
// them first where there is a cap, and the factor that makes exponents of two of them.
struct ScoreMap {
    float capped, factor;

    DEVICE ScoreMap(float scale, float softcap)
        : capped(softcap > 0.0f ? 2.0f * LOG2_E * scale / softcap : 0.0f),
          factor((softcap > 0.0f ? softcap : scale) * LOG2_E) {}

    template <int N> DEVICE void cap(float (&scores)[N][4]) const {
        if (capped == 0.0f) return;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = hyperbolic_tangent(scores[n][i], capped);
    }

    // Multiplies the gradients of what is capped by the slope there.
    template <int N> DEVICE void cap(float (&scores)[N][4], float (&gradients)[N][4]) const {
        if (capped == 0.0f) return;
        cap(scores);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) gradients[n][i] *= 1.0f - scores[n][i] * scores[n][i];
    }
};
