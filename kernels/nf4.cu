// NF4, the 4-bit code of QLoRA: to bf16, and from f32, with plain or nested scales.
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
//   No dynamic shared memory. `packed` on 4 bytes, `w` and `out` on 16.
//
// Bound by memory: 2.6 bytes a value against 10.9 instructions of PTX (its 64-bit addresses counted).
//   v1  a thread a byte: 4-byte stores, and a load for each
//   v2  a thread 8 values: a word of codes in, 16 bytes out, four words in flight; the code book and the block's 128
//       scales in shared memory, so that a nested scale is decoded once and not by each of 8 threads
// A pair of values for each byte (a book of 256 pairs) would halve the look-ups, but its 2 KB meet in the same banks.
#include "common.cuh"

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

// Value i of a word of codes. The code is cut out four times as large: as the distance in the book in bytes.
DEVICE float decode(const float* book, u32 codes, int i) {
    int bit = code_bit(i) - 2;
    u32 distance = (bit < 0 ? codes << 2 : codes >> bit) & 60;
    return *(const float*)((const char*)book + distance);
}

// out (rows,cols) bf16, a row each `ld` values. `scale_of(i)` is the scale of block i of the whole.
template <typename Scale>
DEVICE void dequantize(const u8* packed, bf16* out, int rows, int cols, int ld, const Scale& scale_of) {
    __shared__ float book[16];
    __shared__ float scales[VALUES / SCALED];
    i64 first = (i64)blockIdx.x * VALUES;
    i64 left = (i64)rows * cols - first;
    u32 codes[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        int at = (i * THREADS + threadIdx.x) * WORD;
        codes[i] = load_codes(packed + (first + at) / 2, left - at);
    }
    if (threadIdx.x < 16) book[threadIdx.x] = CODE[threadIdx.x];
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
                pairs[j] = to_bf16x2(decode(book, codes[i], 2 * j) * scale, decode(book, codes[i], 2 * j + 1) * scale);
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

// The same; a scale is code[absmax_codes] * absmax2 + offset in two roundings, as bitsandbytes has it. code (256) f32.
KERNEL nf4_dequantize_nested(const u8* packed, const u8* absmax_codes, const float* code, const float* absmax2,
                             float offset, bf16* out, int rows, int cols, int ld) {
    dequantize(packed, out, rows, cols, ld, [&](i64 block) {
        return __fadd_rn(__fmul_rn(code[absmax_codes[block]], absmax2[block / NESTED]), offset);
    });
}

// The number of midpoints between neighbouring codes that lie strictly below: a value on a midpoint takes the lower
// code. The midpoints are f32 on purpose, as bitsandbytes has them.
DEVICE u32 nearest_code(float scaled) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += (CODE[i] + CODE[i + 1]) / 2.0f < scaled;
    return code;
}

// packed (ceil(n/2)) and absmax (ceil(n/64)) of w (n) f32, finite: bit for bit what the CPU encodes. 16 lanes a block
// of 64, four values each.
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

// codes (blocks) and absmax2 (ceil(blocks/256)) of absmax (blocks) f32 with its mean `offset` taken off; each takes
// the nearest of code (256) f32, sorted, the lower of two as near. A block without spread takes code 0.
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
