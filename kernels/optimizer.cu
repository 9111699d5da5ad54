// AdamW over flat f32 tensors, with its moments in f32 or in 8-bit codes, and the clipping of gradients. Every
// operation rounds on its own, in the order of torch on the CPU and of src/engine/optimizer.rs: bits agree with
// both.
//
//   kernel          grid              block  moves a value (bytes)
//   adamw           ceil(n / 1024)    256    16 in, 14 out
//   adamw8          ceil(n / 2048)    256    10 in, 8 out; 256 values share a scale
//   sum_of_squares  ceil(n / 4096)    256    4 in; a partial sum a block, so that their order is fixed
//   clip_factor     1                 256
//   No dynamic shared memory. Arrays on 16 bytes (codes and rounded values on 4 and 8) go four values at a time.
//
// The scalars of a step are computed by the host in f64 as Python does, and rounded once:
//   keep = 1 - lr * weight_decay    first_weight = 1 - beta1      second_keep = beta2    second_weight = 1 - beta2
//   correction = sqrt(1 - beta2^t)  step_size = -lr / (1 - beta1^t)
// In f32 on the device 1 - 0.9f would be another number than (float)(1 - 0.9).
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int CODED = 256;          // values that share a scale

struct Update {
    float keep, first_weight, second_keep, second_weight, correction, epsilon, step_size;

    DEVICE void operator()(float& w, float g, float& first, float& second) const {
        w = __fmul_rn(w, keep);
        // torch writes the first moment as a `lerp`, which picks the end nearer to the result.
        float distance = __fadd_rn(g, -first);
        if (first_weight < 0.5f) first = __fadd_rn(first, __fmul_rn(first_weight, distance));
        else first = __fadd_rn(g, -__fmul_rn(distance, __fadd_rn(1.0f, -first_weight)));
        second = __fadd_rn(__fmul_rn(second, second_keep), __fmul_rn(__fmul_rn(second_weight, g), g));
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(second), correction), epsilon);
        w = __fadd_rn(w, __fdiv_rn(__fmul_rn(step_size, first), denominator));
    }
};

DEVICE void load_four(float (&x)[4], const float* from) {
    float4 four = *(const float4*)from;
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
// In words of PTX: the compiler took these stores apart where the same values are also stored one by one.
DEVICE void store_four(float* to, const float (&x)[4]) {
    asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
DEVICE void store_four(bf16* to, const float (&x)[4]) {
    u32 first = to_bf16x2(x[0], x[1]), second = to_bf16x2(x[2], x[3]);
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(first), "r"(second) : "memory");
}

// w (n), m, v (n) are moved one step against g * clip[0] (n); rounded (n) bf16 becomes w rounded. rounded and clip
// may be null.
KERNEL __launch_bounds__(THREADS) adamw(float* w, bf16* rounded, const float* g, float* m, float* v, i64 n,
                                        float keep, float first_weight, float second_keep, float second_weight,
                                        float correction, float epsilon, float step_size, const float* clip) {
    Update update{keep, first_weight, second_keep, second_weight, correction, epsilon, step_size};
    float factor = clip ? *clip : 1.0f;
    i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first + 4 <= n && ((u64)w | (u64)g | (u64)m | (u64)v | (u64)rounded << 1) % 16 == 0) {
        float ws[4], gs[4], ms[4], vs[4];
        load_four(ws, w + first);
        load_four(gs, g + first);
        load_four(ms, m + first);
        load_four(vs, v + first);
#pragma unroll
        for (int i = 0; i < 4; i++) update(ws[i], __fmul_rn(gs[i], factor), ms[i], vs[i]);
        store_four(w + first, ws);
        store_four(m + first, ms);
        store_four(v + first, vs);
        if (rounded) store_four(rounded + first, ws);
    } else {
        for (i64 i = first; i < first + 4 && i < n; i++) {
            update(w[i], __fmul_rn(g[i], factor), m[i], v[i]);
            if (rounded) rounded[i] = to_bf16(w[i]);
        }
    }
}

// The sorted values of an 8-bit code and the midpoints between them.
struct Book {
    float values[256];
    float midpoints[256];

    DEVICE void fill(const float* map) {
        int i = threadIdx.x;
        values[i] = map[i];
        midpoints[i] = i < 255 ? __fadd_rn(map[i], map[i + 1]) / 2.0f : 0.0f;
    }

    // The nearest value, the lower of two as near: as many midpoints lie strictly below.
    DEVICE u32 code(float scaled) const {
        u32 below = 0;
#pragma unroll
        for (u32 step = 128; step > 0; step >>= 1)
            if (midpoints[below + step - 1] < scaled) below += step;
        return below;
    }
};

// The 8 moments of a lane: 4 from `lane * 4` on, 4 from 128 later.
DEVICE void decode(float (&x)[8], const u32 (&codes)[2], const Book& book, float scale) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fmul_rn(book.values[codes[i / 4] >> 8 * (i % 4) & 255], scale);
}

// The codes of a warp's 256 values, and their scale. Those beyond the end are 0.
DEVICE float encode(u32 (&codes)[2], const float (&x)[8], const Book& book) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
    largest = warp_max(largest);
    float scale = largest == 0.0f ? 1.0f : largest;
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i / 4] |= book.code(__fdiv_rn(x[i], scale)) << 8 * (i % 4);
    return scale;
}

// adamw with both moments in codes (n) and scales (ceil(n/256)). signed_map and unsigned_map (256) f32 are sorted.
// A warp a block of 256 values.
KERNEL __launch_bounds__(THREADS)
    adamw8(float* w, bf16* rounded, const float* g, u8* m_codes, float* m_absmax, u8* v_codes, float* v_absmax,
           const float* signed_map, const float* unsigned_map, i64 n, float keep, float first_weight,
           float second_keep, float second_weight, float correction, float epsilon, float step_size,
           const float* clip) {
    __shared__ Book firsts, seconds;
    firsts.fill(signed_map);
    seconds.fill(unsigned_map);
    __syncthreads();
    Update update{keep, first_weight, second_keep, second_weight, correction, epsilon, step_size};
    float factor = clip ? *clip : 1.0f;
    i64 block = (i64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    i64 first = block * CODED + threadIdx.x % WARP * 4;
    if (block * CODED >= n) return;
    bool in_fours = (block + 1) * CODED <= n && ((u64)w | (u64)g | (u64)rounded << 1 | (u64)m_codes << 2
                                                 | (u64)v_codes << 2) % 16 == 0;
    float ws[8] = {}, gs[8] = {}, ms[8], vs[8];
    u32 m_words[2] = {}, v_words[2] = {};
    auto place = [&](int i) { return first + i / 4 * (CODED / 2) + i % 4; };
    if (in_fours) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            i64 at = first + i * (CODED / 2);
            load_four((float(&)[4])ws[4 * i], w + at);
            load_four((float(&)[4])gs[4 * i], g + at);
            m_words[i] = *(const u32*)(m_codes + at);
            v_words[i] = *(const u32*)(v_codes + at);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            i64 at = place(i);
            if (at >= n) continue;
            ws[i] = w[at], gs[i] = g[at];
            m_words[i / 4] |= (u32)m_codes[at] << 8 * (i % 4);
            v_words[i / 4] |= (u32)v_codes[at] << 8 * (i % 4);
        }
    }
    decode(ms, m_words, firsts, m_absmax[block]);
    decode(vs, v_words, seconds, v_absmax[block]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        update(ws[i], __fmul_rn(gs[i], factor), ms[i], vs[i]);
        if (place(i) >= n) ms[i] = vs[i] = 0.0f;
    }
    float m_scale = encode(m_words, ms, firsts), v_scale = encode(v_words, vs, seconds);
    if (threadIdx.x % WARP == 0) m_absmax[block] = m_scale, v_absmax[block] = v_scale;
    if (in_fours) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            i64 at = first + i * (CODED / 2);
            store_four(w + at, (const float(&)[4])ws[4 * i]);
            if (rounded) store_four(rounded + at, (const float(&)[4])ws[4 * i]);
            *(u32*)(m_codes + at) = m_words[i];
            *(u32*)(v_codes + at) = v_words[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            i64 at = place(i);
            if (at >= n) continue;
            w[at] = ws[i];
            if (rounded) rounded[at] = to_bf16(ws[i]);
            m_codes[at] = (u8)(m_words[i / 4] >> 8 * (i % 4));
            v_codes[at] = (u8)(v_words[i / 4] >> 8 * (i % 4));
        }
    }
}

constexpr int SQUARED = 4096;       // values of a partial sum

// partial (ceil(n/4096)) f32: the sum of the squares of each 4096 values of g (n).
KERNEL __launch_bounds__(THREADS) sum_of_squares(const float* g, float* partial, i64 n) {
    __shared__ float scratch[THREADS / WARP];
    i64 first = (i64)blockIdx.x * SQUARED;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SQUARED / (4 * THREADS); i++) {
        i64 at = first + (i * THREADS + threadIdx.x) * 4;
        float x[4] = {};
        if (at + 4 <= n && (u64)g % 16 == 0) {
            load_four(x, g + at);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (at + j < n) x[j] = g[at + j];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) sum += x[j] * x[j];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out: the norm, and min(1, max_norm / (norm + 1e-6)) as torch has it; max_norm 0 clips nothing. The sums of
// `count` partial sums are f64, for they are few.
KERNEL __launch_bounds__(THREADS) clip_factor(float* out, const float* partial, int count, float max_norm) {
    __shared__ double sums[THREADS];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += partial[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll 1
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x > 0) return;
    double norm = sqrt(sums[0]), factor = max_norm / (norm + 1e-6);
    out[0] = (float)norm;
    out[1] = max_norm > 0.0f && factor < 1.0 ? (float)factor : 1.0f;
}
