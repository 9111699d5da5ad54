// The small operations on rows: sums, biases, copies of columns and rows, DoRA's two, and the search for what is
// not finite. All are bound by memory; all move 16 bytes an access where the shape allows it.
//
// Shapes: bf16, row-major; f32 where a bias, factor or norm is meant. A "piece" is eight columns of a row.
//
//   entry                              grid                                 block
//   add, scale                         ceil(n / 2048)                       256
//   not_finite, not_finite_f32         ceil(n / 8192)                       256
//   add_bias, combine_columns          ceil(rows · ceil(n / 8) / 256)       256
//   copy_columns                       ceil(rows · ceil(width / 8) / 256)   256
//   gather_rows, scatter_rows          ceil(count · ceil(c / 8) / 256)      256
//   column_dots                        (ceil(n / 1024), ceil(rows / 32))    128
//   add_column_dots                    ceil(n / 256)                        256
// No dynamic shared memory. Every thread works by itself: no barriers, and no order but that of the rows in a sum.
#include "common.cuh"
#include "eight.cuh"

// Where a thread's piece lies among rows of `columns` values.
struct Piece {
    i64 row;
    int first, count;
};

DEVICE Piece piece_of(int columns) {
    u32 pieces = (columns + 7) / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    int first = index % pieces * 8;
    return {index / pieces, first, min(columns - first, 8)};
}

// y (n) += x (n). Moves 6 bytes a value.
KERNEL __launch_bounds__(256) add(bf16* y, const bf16* x, i64 n) {
    i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n) return;
    int count = (int)min(n - first, (i64)8);
    bool wide = aligned(x, y);
    Eight sum = load_eight(y + first, count, wide), more = load_eight(x + first, count, wide);
#pragma unroll
    for (int i = 0; i < 8; i++) sum.at[i] += more.at[i];
    store_eight(y + first, sum, count, wide);
}

// y (n) *= factor. Moves 4 bytes a value.
KERNEL __launch_bounds__(256) scale(bf16* y, float factor, i64 n) {
    i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n) return;
    int count = (int)min(n - first, (i64)8);
    bool wide = aligned(y);
    Eight values = load_eight(y + first, count, wide);
#pragma unroll
    for (int i = 0; i < 8; i++) values.at[i] *= factor;
    store_eight(y + first, values, count, wide);
}

// y (rows, n) += bias (n) in each row. Moves 4 bytes a value; the bias comes from L2.
KERNEL __launch_bounds__(256) add_bias(bf16* y, const float* bias, int rows, int n) {
    Piece at = piece_of(n);
    if (at.row >= rows) return;
    bool wide = aligned(y, bias) && n % 8 == 0;
    y += at.row * n + at.first;
    Eight sum = load_eight(y, at.count, wide), more = load_eight(bias + at.first, at.count, wide);
#pragma unroll
    for (int i = 0; i < 8; i++) sum.at[i] += more.at[i];
    store_eight(y, sum, at.count, wide);
}

// Copies up to eight values, bits as they are.
DEVICE void copy(bf16* to, const bf16* from, int count, bool wide) {
    if (wide && count == 8) {
        *(uint4*)to = *(const uint4*)from;
        return;
    }
    for (int i = 0; i < count; i++) to[i] = from[i];
}

// Columns to_first.. of `to` (rows, to_ld) = columns from_first.. of `from` (rows, from_ld), `width` of them.
// Moves 4 bytes a value. Splits x into parts, joins parts to x.
KERNEL __launch_bounds__(256) copy_columns(bf16* to, int to_ld, int to_first, const bf16* from, int from_ld,
                                           int from_first, int rows, int width) {
    Piece at = piece_of(width);
    if (at.row >= rows) return;
    to += to_first;
    from += from_first;
    bool wide = aligned(to, from) && to_ld % 8 == 0 && from_ld % 8 == 0;
    copy(to + at.row * to_ld + at.first, from + at.row * from_ld + at.first, at.count, wide);
}

// Row i of y (count, c) = row rows[i] of x (·, c). Moves 4 bytes a value.
KERNEL __launch_bounds__(256) gather_rows(bf16* y, const bf16* x, const int* rows, int count, int c) {
    Piece at = piece_of(c);
    if (at.row >= count) return;
    bool wide = aligned(x, y) && c % 8 == 0;
    copy(y + at.row * c + at.first, x + (i64)rows[at.row] * c + at.first, at.count, wide);
}

// Row rows[i] of y (·, c) = row i of x (count, c); rows that are not named stay. No row may be named twice. Moves
// 4 bytes a value.
KERNEL __launch_bounds__(256) scatter_rows(bf16* y, const bf16* x, const int* rows, int count, int c) {
    Piece at = piece_of(c);
    if (at.row >= count) return;
    bool wide = aligned(x, y) && c % 8 == 0;
    copy(y + (i64)rows[at.row] * c + at.first, x + at.row * c + at.first, at.count, wide);
}

// y (rows, n) = keep · y + sign · factors (n) · x (rows, n); without factors (null) they are 1. y is not read
// where keep is 0. Moves 6 bytes a value. DoRA's outputs are magnitude / norm times those of the adapted weight.
KERNEL __launch_bounds__(256)
    combine_columns(bf16* y, const bf16* x, const float* factors, int rows, int n, float keep, float sign) {
    Piece at = piece_of(n);
    if (at.row >= rows) return;
    bool wide = aligned(x, y, factors) && n % 8 == 0;
    i64 place = at.row * n + at.first;
    Eight values = load_eight(x + place, at.count, wide), before = {};
    if (keep != 0.0f) before = load_eight(y + place, at.count, wide);
    Eight scales = {};
    if (factors) scales = load_eight(factors + at.first, at.count, wide);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float value = sign * (factors ? scales.at[i] * values.at[i] : values.at[i]);
        values.at[i] = keep != 0.0f ? keep * before.at[i] + value : value;
    }
    store_eight(y + place, values, at.count, wide);
}

// partial (ceil(rows / 32), n) f32 = the sums of x · y (rows, n) over 32 rows each, column by column. With
// `add_column_dots` that is the gradient of DoRA's magnitudes. Moves 4 bytes a value. A thread has eight columns.
constexpr int DOT_ROWS = 32;

KERNEL __launch_bounds__(128) column_dots(float* partial, const bf16* x, const bf16* y, int rows, int n) {
    int first = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n) return;
    int count = min(n - first, 8);
    bool wide = aligned(x, y, partial) && n % 8 == 0;
    int start = blockIdx.y * DOT_ROWS, end = min(start + DOT_ROWS, rows);
    Eight sum = {};
#pragma unroll 4
    for (int row = start; row < end; row++) {
        i64 place = (i64)row * n + first;
        Eight a = load_eight(x + place, count, wide), b = load_eight(y + place, count, wide);
#pragma unroll
        for (int i = 0; i < 8; i++) sum.at[i] += a.at[i] * b.at[i];
    }
    store_eight(partial + (i64)blockIdx.y * n + first, sum, count, wide);
}

// gradient (n) += the partial sums (parts, n) added in order, over norms (n).
KERNEL __launch_bounds__(256)
    add_column_dots(float* gradient, const float* partial, const float* norms, int parts, int n) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= n) return;
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += partial[(i64)part * n + column];
    gradient[column] += sum / norms[column];
}

// Sets *flag to 1 where any value of x (n) is infinite or no number; never clears it. Moves 2 bytes a value. A
// thread looks at four pieces, so that their loads are under way together.
KERNEL __launch_bounds__(256) not_finite(u32* flag, const bf16* x, i64 n) {
    constexpr u32 LOW = 0x7f80u, HIGH = LOW << 16;
    bool wide = aligned(x), found = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        i64 first = (((i64)blockIdx.x * 4 + i) * blockDim.x + threadIdx.x) * 8;
        if (wide && first + 8 <= n) {
            uint4 words = *(const uint4*)(x + first);
            auto full = [](u32 word) { return (word & LOW) == LOW || (word & HIGH) == HIGH; };
            found |= full(words.x) || full(words.y) || full(words.z) || full(words.w);
        } else {
            for (i64 at = first; at < min(first + 8, n); at++) found |= (x[at].bits & LOW) == LOW;
        }
    }
    if (found) atomicOr(flag, 1u);
}

KERNEL __launch_bounds__(256) not_finite_f32(u32* flag, const float* x, i64 n) {
    constexpr u32 FULL = 0x7f800000u;
    bool wide = aligned(x), found = false;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        i64 first = (((i64)blockIdx.x * 8 + i) * blockDim.x + threadIdx.x) * 4;
        if (wide && first + 4 <= n) {
            uint4 words = *(const uint4*)(x + first);
            auto full = [](u32 word) { return (word & FULL) == FULL; };
            found |= full(words.x) || full(words.y) || full(words.z) || full(words.w);
        } else {
            for (i64 at = first; at < min(first + 4, n); at++) found |= (__float_as_uint(x[at]) & FULL) == FULL;
        }
    }
    if (found) atomicOr(flag, 1u);
}
