// NF4, the 4-bit code of QLoRA: to bf16, and from f32, with plain or nested scales; and products with few rows,
// which read the weight as it is.
//
//   packed  two codes a byte, the first value in the high nibble
//   absmax  f32, the largest magnitude of 64 values; blocks are flat: they go on across the ends of rows
//   nested  absmax itself as u8 codes, 256 to an f32 scale: absmax = code[c] * absmax2 + offset, two roundings
//
//   kernel                  grid                         block  moves a value (bytes)
//   nf4_dequantize          ceil(rows * cols / 8192)     256    0.5 + 1/16 in, 2 out
//   nf4_dequantize_nested   ceil(rows * cols / 8192)     256    0.5 + 1/64 in, 2 out
//   nf4_quantize            ceil(n / 1024)               256    4 in, 0.5 + 1/16 out
//   absmax_nest             ceil(blocks / 256)           256    4 in, 1 out
//   nf4_gemv                ceil(n / 16)                 256    0.56 a value of the weight; m <= 8 rows of x
//   nf4_gemm                ceil(n / 64), ceil(m / 64)   128    0.56 a value of the weight each 64 rows of x
//   No dynamic shared memory. `packed` on 4 bytes and `w` and `out` on 16; of products `packed` and x on 16, and k
//   is a multiple of 64.
//
// Decoding is bound by memory: 2.6 bytes a value against 10.4 instructions of PTX (7.2 and 0.75 bytes of
// nf4_gemv).
//   v1  stores that used half of each sector
//   v2  a thread 8 values: a word of codes in, 16 bytes out, four words in flight; the code book and the block's
//       128 scales in shared memory, so that a nested scale is decoded once and not by each of 8 threads
// A pair of values for each byte (a book of 256 pairs) would halve the look-ups, but its 2 KB meet in the same
// banks. Products have the numbers of decoding and gemm_nt: a value of the weight is rounded to bf16 before it is
// multiplied.
//   v1  decoded into shared memory and read back by ldmatrix: 4 bytes through shared memory a value, two barriers
//       a step
//   v2  decoded into the registers of an mma's left factor: x alone, and its codes, go through shared memory
#include "common.cuh"
#include "panel.cuh"

constexpr int THREADS = 256;
constexpr int SCALED = 64;                          // values that share a scale
constexpr int NESTED = 256;                         // scales that share a scale
constexpr int WORD = 8;                             // codes in 32 bits
constexpr int WORDS = 4;                            // of a thread
constexpr int VALUES = THREADS * WORDS * WORD;      // of a block
constexpr u8 ZERO_CODE = 7;

// Quantiles of a normal distribution, from bitsandbytes.
__constant__ float CODE[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The codes of up to 8 values; what is missing is 0.
DEVICE u32 load_codes(const u8* packed, i64 values) {
    if (values >= WORD) return *(const u32*)packed;
    u32 codes = 0;
    for (int byte = 0; 2 * byte < values; byte++) codes |= (u32)packed[byte] << 8 * byte;
    return codes;
}

// Where code i of a word begins: bytes come low end first, and of a byte the high nibble.
DEVICE int code_bit(int i) { return i % 2 == 0 ? 4 * i + 4 : 4 * i - 4; }

// The code book in shared memory, on 64 bytes: the distance in it is a part of the address like another.
struct __align__(64) Book {
    float values[16];
};

// Value i of a word of codes; `book` is its address in shared memory. The code is cut out four times as large, as
// a distance in bytes: cutting and placing is one instruction.
DEVICE float decode(u32 book, u32 codes, int i) {
    int bit = code_bit(i) - 2;
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"((bit < 0 ? codes << 2 : codes >> bit) & 60 | book));
    return value;
}

// Values 2 i and 2 i + 1.
DEVICE u32 decode_pair(u32 book, u32 codes, int i, float scale) {
    return to_bf16x2(decode(book, codes, 2 * i) * scale, decode(book, codes, 2 * i + 1) * scale);
}

// out (rows,cols) bf16, a row each `ld` values. `scale_of(i)` is the scale of block i of the whole.
template <typename Scale>
DEVICE void dequantize(const u8* packed, bf16* out, int rows, int cols, int ld, const Scale& scale_of) {
    __shared__ Book shared_book;
    __shared__ float scales[VALUES / SCALED];
    i64 first = (i64)blockIdx.x * VALUES;
    i64 left = (i64)rows * cols - first;
    u32 codes[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        int at = (i * THREADS + threadIdx.x) * WORD;
        codes[i] = load_codes(packed + (first + at) / 2, left - at);
    }
    if (threadIdx.x < 16) shared_book.values[threadIdx.x] = CODE[threadIdx.x];
    u32 book = shared_address(&shared_book);
    if (threadIdx.x < VALUES / SCALED && threadIdx.x * SCALED < left)
        scales[threadIdx.x] = scale_of(first / SCALED + threadIdx.x);
    __syncthreads();

    bool in_words = cols % WORD == 0 && ld % WORD == 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        int at = (i * THREADS + threadIdx.x) * WORD;
        if (at >= left) return;
        float scale = scales[at / SCALED];
        if (in_words) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                pairs[j] = decode_pair(book, codes[i], j, scale);
            i64 to = first + at;
            if (ld != cols) {
                u32 word = (u32)(to / WORD), row = word / (u32)(cols / WORD);
                to = (i64)row * ld + (word - row * (cols / WORD)) * WORD;
            }
            *(uint4*)(out + to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
            i64 row = (first + at) / cols;
            int col = (int)(first + at - row * cols);
            for (int j = 0; j < WORD && at + j < left; j++) {
                out[row * ld + col] = to_bf16(decode(book, codes[i], j) * scale);
                if (++col == cols) row++, col = 0;
            }
        }
    }
}

// out (rows,cols) bf16 = code * absmax, rounded once.
KERNEL nf4_dequantize(const u8* packed, const float* absmax, bf16* out, int rows, int cols, int ld) {
    dequantize(packed, out, rows, cols, ld, [&](i64 block) { return absmax[block]; });
}

// The same; a scale is code[absmax_codes] * absmax2 + offset in two roundings, as bitsandbytes has it. code (256)
// f32.
KERNEL nf4_dequantize_nested(const u8* packed, const u8* absmax_codes, const float* code, const float* absmax2,
                             float offset, bf16* out, int rows, int cols, int ld) {
    dequantize(packed, out, rows, cols, ld, [&](i64 block) {
        return __fadd_rn(__fmul_rn(code[absmax_codes[block]], absmax2[block / NESTED]), offset);
    });
}

// The number of midpoints between neighbouring codes that lie strictly below: a value on a midpoint takes the
// lower code. The midpoints are f32 on purpose, as bitsandbytes has them.
DEVICE u32 nearest_code(float scaled) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += (CODE[i] + CODE[i + 1]) / 2.0f < scaled;
    return code;
}

// packed (ceil(n/2)) and absmax (ceil(n/64)) of w (n) f32, finite: bit for bit what the CPU encodes. 16 lanes a
// block of 64, four values each.
KERNEL nf4_quantize(const float* w, u8* packed, float* absmax, i64 n) {
    i64 first = (i64)blockIdx.x * (4 * THREADS) + 4 * threadIdx.x;
    i64 block = first / SCALED;
    bool whole = (block + 1) * SCALED <= n;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (whole) {
        float4 four = *(const float4*)(w + first);
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
        for (int i = 0; i < 4 && first + i < n; i++) values[i] = w[first + i];
    }
    float scale = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) scale = fmaxf(scale, fabsf(values[i]));
#pragma unroll
    for (int mask = 8; mask > 0; mask >>= 1) scale = fmaxf(scale, exchange(scale, mask));

    // bitsandbytes multiplies whole blocks with a clamped reciprocal and divides in the last, ragged one; the two
    // differ in the last bit.
    float reciprocal = fminf(__fdiv_rn(1.0f, scale), 1e38f);
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 code = ZERO_CODE;
        if (whole) code = nearest_code(__fmul_rn(values[i], reciprocal));
        else if (scale > 0.0f && first + i < n) code = nearest_code(__fdiv_rn(values[i], scale));
        codes |= code << code_bit(i);
    }
    if (whole) *(u16*)(packed + first / 2) = (u16)codes;
    else {
        for (int i = 0; i < 4 && first + i < n; i += 2) packed[(first + i) / 2] = (u8)(codes >> 4 * i);
    }
    if (first % SCALED == 0 && first < n) absmax[block] = scale;
}

// codes (blocks) and absmax2 (ceil(blocks/256)) of absmax (blocks) f32 with its mean `offset` taken off; each
// takes the nearest of code (256) f32, sorted, the lower of two as near. A block without spread takes code 0.
KERNEL absmax_nest(const float* absmax, float offset, const float* code, u8* codes, float* absmax2, i64 blocks) {
    __shared__ float midpoints[NESTED];
    __shared__ float scratch[THREADS / WARP];
    int lane = threadIdx.x;
    if (lane + 1 < NESTED) midpoints[lane] = __fadd_rn(code[lane], code[lane + 1]) / 2.0f;
    i64 at = (i64)blockIdx.x * NESTED + lane;
    float value = at < blocks ? __fadd_rn(absmax[at], -offset) : 0.0f;
    float scale = block_max(fabsf(value), scratch);
    if (lane == 0) absmax2[blockIdx.x] = scale;
    if (at >= blocks) return;
    float scaled = __fdiv_rn(value, scale);
    int below = 0;
#pragma unroll
    for (int step = 128; step > 0; step >>= 1)
        if (midpoints[below + step - 1] < scaled) below += step;
    codes[at] = scale > 0.0f ? (u8)below : 0;
}

// The products below take the weight as the left factor of an mma: 16 of its rows a warp, decoded straight into
// registers. The depth may be walked in any order as long as both factors walk it alike: lane t of four takes runs
// of consecutive values, so that its codes are words and its x are 16 bytes.

// The bf16 pairs of a word of codes.
DEVICE void decode_word(u32 (&pairs)[4], u32 book, u32 codes, float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = decode_pair(book, codes, i, scale);
}

// sums (16 rows of the weight, 8 rows of x) += upper and lower 8 rows of the left · 8 values of x in each lane.
DEVICE void multiply_word(float (&sums)[4], const u32 (&upper)[4], const u32 (&lower)[4], uint4 x) {
    u32 first[4] = {upper[0], lower[0], upper[1], lower[1]}, first_x[2] = {x.x, x.y};
    u32 second[4] = {upper[2], lower[2], upper[3], lower[3]}, second_x[2] = {x.z, x.w};
    mma_m16n8k16(sums, first, first_x);
    mma_m16n8k16(sums, second, second_x);
}

// Up to 8 values of a row, what is missing is 0.
DEVICE uint4 load_eight(const bf16* from, int values, bool aligned) {
    if (values >= 8 && aligned) return *(const uint4*)from;
    u32 words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < values) words[i / 2] |= (u32)from[i].bits << 16 * (i % 2);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

constexpr int NARROW_ROWS = 16;         // of the weight, a block
constexpr int NARROW_STEP = 128;        // values of the depth, a warp

// y (m,n) bf16 = x (m,k) · Wᵀ + h (m,r) · b (n,r)ᵀ for m <= 8, k a multiple of 64; r = 0 for no pair. The weight
// is read once. Warps take every 8th 128 values of the depth; their sums are added in order.
KERNEL __launch_bounds__(THREADS) nf4_gemv(bf16* y, const bf16* x, const u8* packed, const float* absmax,
                                           const bf16* h, const bf16* b, int m, int n, int k, int r) {
    __shared__ Book shared_book;
    __shared__ float parts[THREADS / WARP][8][NARROW_ROWS + 4];       // padded against conflicts
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, line = lane / 4, quarter = lane % 4;
    int row = blockIdx.x * NARROW_ROWS;
    if (threadIdx.x < 16) shared_book.values[threadIdx.x] = CODE[threadIdx.x];
    u32 book = shared_address(&shared_book);
    __syncthreads();
    float sums[4] = {};
#pragma unroll 2
    for (int start = warp * NARROW_STEP; start < k; start += THREADS / WARP * NARROW_STEP) {
        int depth = start + quarter * 32;
        uint4 codes[2] = {};
        float scales[2] = {};
        uint4 values[4] = {};
        if (depth < k) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (row + line + 8 * i >= n) continue;
                i64 at = (i64)(row + line + 8 * i) * k + depth;
                codes[i] = *(const uint4*)(packed + at / 2);
                scales[i] = absmax[at / SCALED];
            }
            if (line < m) {
#pragma unroll
                for (int i = 0; i < 4; i++) values[i] = *(const uint4*)(x + (i64)line * k + depth + 8 * i);
            }
        }
        u32 words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                           {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 upper[4], lower[4];
            decode_word(upper, book, words[0][i], scales[0]);
            decode_word(lower, book, words[1][i], scales[1]);
            multiply_word(sums, upper, lower, values[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) parts[warp][quarter * 2 + i % 2][line + i / 2 * 8] = sums[i];
    __syncthreads();

    int at_x = threadIdx.x / NARROW_ROWS, at_row = row + threadIdx.x % NARROW_ROWS;
    if (at_x >= m || at_row >= n) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) sum += parts[i][at_x][threadIdx.x % NARROW_ROWS];
    for (int i = 0; i < r; i++) sum += to_f32(h[at_x * r + i]) * to_f32(b[(i64)at_row * r + i]);
    y[(i64)at_x * n + at_row] = to_bf16(sum);
}

constexpr int WIDE_THREADS = 128;
constexpr int WIDE = 64;                // rows of the weight, rows of x, and depth of a step
constexpr int WIDE_STAGES = 4;

// y (m,n) bf16 = x (m,k) · Wᵀ + h (m,r) · b (n,r)ᵀ for any m, k a multiple of 64; r = 0 for no pair. Each 64 rows
// of x read and decode the weight anew: beyond 256 nf4_dequantize and gemm_nt are faster.
KERNEL __launch_bounds__(WIDE_THREADS) nf4_gemm(bf16* y, const bf16* x, const u8* packed, const float* absmax,
                                                const bf16* h, const bf16* b, int m, int n, int k, int r) {
    typedef Panel<WIDE, WIDE> X;
    constexpr int CODES = WIDE * WIDE / 2;
    constexpr int STAGE = X::SIZE * 2 + CODES;          // bytes
    __shared__ __align__(128) u8 stages[WIDE_STAGES * STAGE];
    __shared__ Book shared_book;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, line = lane / 4, quarter = lane % 4;
    int row = blockIdx.x * WIDE, x_row = blockIdx.y * WIDE;
    int own_row = row + warp * 16 + line;               // and the 8th after it
    Operand left = operand(x, k, m, k), down = operand(h, r, m, r);
    if (threadIdx.x < 16) shared_book.values[threadIdx.x] = CODE[threadIdx.x];
    u32 book = shared_address(&shared_book);
    float sums[8][4] = {};
    int own = k / WIDE, steps = own + (r + WIDE - 1) / WIDE;
    int filled = 0, read = 0;
    float next_scales[2] = {};
#pragma unroll 1
    for (int step = 1 - WIDE_STAGES; step < steps; step++) {
        if (step >= 0) {
            wait_for_copies<WIDE_STAGES - 2>();
            // The stage is there for all, and all are done with the one before it, which is filled next.
            __syncthreads();
        }
        int next = step + WIDE_STAGES - 1;
        if (next < own) {
            X::load<WIDE_THREADS>((bf16*)(stages + filled), left, x_row, next * WIDE);
            int from = row + threadIdx.x / 2;
            const u8* codes = packed + ((i64)from * k + next * WIDE) / 2 + threadIdx.x % 2 * 16;
            copy_async(stages + filled + X::SIZE * 2 + threadIdx.x * 16, codes, from < n ? 16 : 0);
        } else if (next < steps) {
            X::load<WIDE_THREADS>((bf16*)(stages + filled), down, x_row, (next - own) * WIDE);
        }
        commit_copies();
        filled = filled == (WIDE_STAGES - 1) * STAGE ? 0 : filled + STAGE;
        float scales[2] = {next_scales[0], next_scales[1]};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (step + 1 >= 0 && step + 1 < own && own_row + 8 * i < n)
                next_scales[i] = absmax[(i64)(own_row + 8 * i) * own + step + 1];
        if (step < 0) continue;

        const u8* stage = stages + read;
        read = read == (WIDE_STAGES - 1) * STAGE ? 0 : read + STAGE;
        u32 rows[2][2][4];              // word, upper or lower 8 rows
        if (step < own) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u8* codes = stage + X::SIZE * 2 + (warp * 16 + line + 8 * i) * (WIDE / 2) + quarter * 8;
                uint2 words = *(const uint2*)codes;
                decode_word(rows[0][i], book, words.x, scales[i]);
                decode_word(rows[1][i], book, words.y, scales[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int word = 0; word < 2; word++) {
                    int depth = (step - own) * WIDE + quarter * 16 + word * 8;
                    const bf16* from = b + (i64)(own_row + 8 * i) * r + depth;
                    uint4 eight = load_eight(from, own_row + 8 * i < n ? r - depth : 0, r % 8 == 0);
                    rows[word][i][0] = eight.x, rows[word][i][1] = eight.y;
                    rows[word][i][2] = eight.z, rows[word][i][3] = eight.w;
                }
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int word = 0; word < 2; word++) {
                const bf16* panel = (const bf16*)stage + X::chunk_at(j * 8 + line, quarter * 2 + word);
                multiply_word(sums[j], rows[word][0], rows[word][1], *(const uint4*)panel);
            }
    }

    // Rows of y by way of shared memory: a sum's lanes lie along the columns of y.
    constexpr int LINE = WIDE + 4;
    static_assert(WIDE * LINE * 4 <= WIDE_STAGES * STAGE, "fits the stages");
    float* lines = (float*)stages;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            lines[(j * 8 + quarter * 2 + i % 2) * LINE + warp * 16 + line + i / 2 * 8] = sums[j][i];
    __syncthreads();
    bool in_fours = (u64)y % 8 == 0 && n % 4 == 0;
#pragma unroll 1
    for (int index = threadIdx.x; index < WIDE * WIDE / 4; index += WIDE_THREADS) {
        int at_x = index / (WIDE / 4), col = index % (WIDE / 4) * 4;
        if (x_row + at_x >= m) break;
        const float* from = lines + at_x * LINE + col;
        bf16* to = y + (i64)(x_row + at_x) * n + row + col;
        if (in_fours && row + col + 4 <= n) {
            float4 four = *(const float4*)from;
            *(uint2*)to = make_uint2(to_bf16x2(four.x, four.y), to_bf16x2(four.z, four.w));
        } else {
            for (int i = 0; i < 4; i++)
                if (row + col + i < n) to[i] = to_bf16(from[i]);
        }
    }
}
