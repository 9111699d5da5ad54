// Mamba2's scan, row after row: a state (head_dim, states) a head that decays and takes in dt · x ⊗ b.
//
//   dt = clamp(softplus(dt + dt_bias), dt_low, dt_high)
//   state = exp(dt · rate) · state + dt · x ⊗ b          y = state · c + skip · x
//
// Shapes: x, y (T, heads · head_dim) bf16; b, c (T, groups · states) bf16, head h reads group h · groups / heads;
// dt (T, heads) bf16; dt_bias, rate, skip (heads) f32. Rows are the query rows of spans. The state before a span's
// first row is zero, or that of its slot: slots (spans) i32, past and next (slots, heads, head_dim, states) f32,
// all three null where nothing is carried. Overwrites the rows of its spans; `next` gets the state after each
// span's last row.
//
//   scan_N for states up to N, N in {16, 32, 64, 128, 256}: grid (heads · ceil(head_dim / 64), spans), block 256,
//   no dynamic shared memory. Takes any head_dim.
//
// Four threads have a row of the state in registers, four states of each 16; b, c and x of 16 rows wait in shared
// memory. Moves 4 bytes a value of x, b and c once a head from L2, and where states are carried 8 bytes a value of
// them: that is all there is to a step of generation, which is bound by memory. Over many rows it is bound by the
// latency of a row (two exchanges and a sum of `states / 4` products): `scan_chunks.cu` is the form for training.
//
// Versions
//   v1  this.
#include "common.cuh"
#include "eight.cuh"
#include "span.cuh"
#include "scan.cuh"

constexpr int ROWS = 16, LANES = 4, HEAD_ROWS = 64, THREADS = LANES * HEAD_ROWS;

// Up to four values of a row, zeros after `count`; at once where rows allow it.
DEVICE float4 load_four(const bf16* from, int count, bool wide) {
    if (wide && count >= 4) {
        uint2 words = *(const uint2*)from;
        return make_float4(low_f32(words.x), high_f32(words.x), low_f32(words.y), high_f32(words.y));
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = i < count ? to_f32(from[i]) : 0.0f;
    return make_float4(x[0], x[1], x[2], x[3]);
}

DEVICE float4 load_four(const float* from, int count, bool wide) {
    if (wide && count >= 4) return *(const float4*)from;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = i < count ? from[i] : 0.0f;
    return make_float4(x[0], x[1], x[2], x[3]);
}

DEVICE void store_four(float* to, float4 x, int count, bool wide) {
    if (wide && count >= 4) {
        *(float4*)to = x;
        return;
    }
    if (count > 0) to[0] = x.x;
    if (count > 1) to[1] = x.y;
    if (count > 2) to[2] = x.z;
    if (count > 3) to[3] = x.w;
}

DEVICE void store_four(bf16* to, float4 x, int count, bool wide) {
    if (wide && count >= 4) {
        // The compiler would make two stores of a uint2.
        asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(to_bf16x2(x.x, x.y)), "r"(to_bf16x2(x.z, x.w))
                     : "memory");
        return;
    }
    if (count > 0) to[0] = to_bf16(x.x);
    if (count > 1) to[1] = to_bf16(x.y);
    if (count > 2) to[2] = to_bf16(x.z);
    if (count > 3) to[3] = to_bf16(x.w);
}

template <int N>
DEVICE void scan(bf16* y, const bf16* x, const bf16* b, const bf16* c, const bf16* dt, const float* dt_bias,
                 const float* rate, const float* skip, const Span* spans, const int* slots, const float* past,
                 float* next, int heads, int head_dim, int groups, int states, float dt_low, float dt_high) {
    __shared__ __align__(16) float bs[ROWS][N], cs[ROWS][N], xs[ROWS][HEAD_ROWS], ys[ROWS][HEAD_ROWS];
    __shared__ float steps[ROWS], decays[ROWS];
    int parts = (head_dim + HEAD_ROWS - 1) / HEAD_ROWS;
    int head = blockIdx.x / parts, first = blockIdx.x % parts * HEAD_ROWS, group = head * groups / heads;
    int start = spans[blockIdx.y].queries_start, end = spans[blockIdx.y].queries_end;
    int own = threadIdx.x / LANES, lane = threadIdx.x % LANES, part = min(head_dim - first, HEAD_ROWS);
    bool wide_states = states % 4 == 0 && aligned(past, next) && aligned(b, c);
    bool wide_rows = head_dim % 4 == 0 && aligned(x, y);
    i64 x_ld = (i64)heads * head_dim, b_ld = (i64)groups * states;
    x += (i64)head * head_dim + first;
    y += (i64)head * head_dim + first;
    b += (i64)group * states;
    c += (i64)group * states;

    float4 state[N / 16] = {};
    i64 place = slots ? (((i64)slots[blockIdx.y] * heads + head) * head_dim + first + own) * states : 0;
    if (slots && own < part) {
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            int n = i * 16 + lane * 4;
            state[i] = load_four(past + place + n, states - n, wide_states);
        }
    }
    for (int tile = start; tile < end; tile += ROWS) {
        int rows = min(end - tile, ROWS);
        for (int i = threadIdx.x; i < ROWS * N / 4; i += THREADS) {
            int row = i / (N / 4), n = i % (N / 4) * 4, count = row < rows ? states - n : 0;
            i64 from = (tile + row) * b_ld + n;
            *(float4*)&bs[row][n] = load_four(b + from, count, wide_states);
            *(float4*)&cs[row][n] = load_four(c + from, count, wide_states);
        }
        int row = threadIdx.x / (HEAD_ROWS / 4), column = threadIdx.x % (HEAD_ROWS / 4) * 4;
        *(float4*)&xs[row][column] =
            load_four(x + (tile + row) * x_ld + column, row < rows ? part - column : 0, wide_rows);
        if (threadIdx.x < rows) {
            float raw = to_f32(dt[(i64)(tile + threadIdx.x) * heads + head]) + dt_bias[head];
            float step = time_step(raw, dt_low, dt_high);
            steps[threadIdx.x] = step;
            decays[threadIdx.x] = __expf(step * rate[head]);
        }
        __syncthreads();
        for (int row = 0; row < rows; row++) {
            float decay = decays[row], value = xs[row][own], taken = steps[row] * value, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < N / 16; i++) {
                float4 b4 = *(const float4*)&bs[row][i * 16 + lane * 4],
                       c4 = *(const float4*)&cs[row][i * 16 + lane * 4];
                state[i].x = state[i].x * decay + taken * b4.x;
                state[i].y = state[i].y * decay + taken * b4.y;
                state[i].z = state[i].z * decay + taken * b4.z;
                state[i].w = state[i].w * decay + taken * b4.w;
                sum += state[i].x * c4.x + state[i].y * c4.y + state[i].z * c4.z + state[i].w * c4.w;
            }
            sum += exchange(sum, 1);
            sum += exchange(sum, 2);
            if (lane == 0) ys[row][own] = sum + skip[head] * value;
        }
        __syncthreads();
        if (row < rows)
            store_four(y + (tile + row) * x_ld + column, *(const float4*)&ys[row][column], part - column,
                       wide_rows);
    }
    if (slots && own < part) {
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            int n = i * 16 + lane * 4;
            store_four(next + place + n, state[i], states - n, wide_states);
        }
    }
}

#define SCAN(N)                                                                                                   \
    KERNEL __launch_bounds__(THREADS, N > 128 ? 1 : 2)                                                            \
        scan_##N(bf16* y, const bf16* x, const bf16* b, const bf16* c, const bf16* dt, const float* dt_bias,      \
                 const float* rate, const float* skip, const Span* spans, const int* slots, const float* past,    \
                 float* next, int heads, int head_dim, int groups, int states, float dt_low, float dt_high) {     \
        scan<N>(y, x, b, c, dt, dt_bias, rate, skip, spans, slots, past, next, heads, head_dim, groups, states,   \
                dt_low, dt_high);                                                                                 \
    }

SCAN(16)
SCAN(32)
SCAN(64)
SCAN(128)
SCAN(256)
