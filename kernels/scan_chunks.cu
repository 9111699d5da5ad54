// Mamba2's scan in chunks of 64 rows (state space duality, arXiv 2405.21060): inside a chunk the scan is a masked
// product of matrices on tensor cores, between chunks a state is passed on. For training: nothing is carried. Its
// gradient is in `scan_gradients.cu`. With a = the running sum of dt · rate from the chunk's first row, L its last
// row, S the state before:
//
//   y[t] = exp(a[t]) · S c[t]  +  Σ_{s ≤ t} exp(a[t] - a[s]) · dt[s] · (c[t] · b[s]) · x[s]  +  skip · x[t]
//   S'   = exp(a[L]) · S       +  Σ_s exp(a[L] - a[s]) · dt[s] · x[s] ⊗ b[s]
//
// Shapes: x, y (T, heads · head_dim) bf16; b, c (T, groups · states) bf16, head h reads group h · groups / heads;
// dt (T, heads) bf16; dt_bias, rate, skip (heads) f32; steps (dt after its softplus) and sums (a) (T, heads) f32.
// Rows are the query rows of spans, which begin with a state of zero. `tiles`: (span, first row within it) of
// every 64 rows of every span, in the order of spans; span_tiles (spans + 1) i32: where each span's tiles begin.
// Scratch: states (tiles, heads, head_dim, states) bf16. Overwrites the rows of y in spans.
//
//   order, entry       grid                                             block
//   1 scan_steps       (ceil(heads / 64), tiles)                        64
//   2 scan_states_N    (heads · ceil(head_dim / 64), tiles)             128
//   3 scan_pass        (ceil(head_dim · states / 1024), heads, spans)   128
//   4 scan_outputs_N   (heads · ceil(head_dim / 64), tiles)             128
// N in {64, 128}: the least that is not below `states`. No dynamic shared memory. backward = 0 in 2 and 3; with 1,
// and dy and c for u and v, they give the gradient of the state after each chunk.
//
// The factors of products are rounded to bf16 (states, masked products, scaled x); sums and decays are f32.
//
// Moves, a head and chunk at 64 · 128: 24 KB of rows (b and c mostly from L2) and 16 KB of states four times:
// bound by memory. Products: 64 · 64 · 64 once and 64 · 64 · 128 three times.
//
// Versions
//   v1  this. To try on a device: chunks of 128 rows, which halve the states' traffic; several heads of a group a
//       block in `scan_outputs`, which share c · b and its loads.
#include "common.cuh"
#include "chunk.cuh"
#include "eight.cuh"
#include "scan.cuh"
#include "span.cuh"

KERNEL __launch_bounds__(64)
    scan_steps(float* steps, float* sums, const bf16* dt, const float* dt_bias, const float* rate,
               const Span* spans, const int2* tiles, int heads, float dt_low, float dt_high) {
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    float sum = 0.0f;
    for (i64 row = chunk.row; row < chunk.row + chunk.rows; row++) {
        float step = time_step(to_f32(dt[row * heads + head]) + dt_bias[head], dt_low, dt_high);
        sum += step * rate[head];
        steps[row * heads + head] = step;
        sums[row * heads + head] = sum;
    }
}

// What a chunk adds to the state: Σ exp(a[L] - a[s]) · dt[s] · u[s] ⊗ v[s], or to the gradient of the state before
// it: Σ exp(a[t]) · u[t] ⊗ v[t].
template <int N>
DEVICE void chunk_states(bf16* out, const bf16* u, const bf16* v, const float* steps, const float* sums,
                         const Span* spans, const int2* tiles, int heads, int head_dim, int groups, int states,
                         int backward) {
    __shared__ __align__(16) bf16 us[CHUNK * LD], vs[CHUNK * (N + PAD)];
    __shared__ float step[CHUNK], sum[CHUNK];
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    // Nothing comes of what the last chunk of a span would pass on.
    if (backward ? chunk.first : chunk.last) return;
    int parts = (head_dim + HEAD_ROWS - 1) / HEAD_ROWS, head = blockIdx.x / parts;
    int first = blockIdx.x % parts * HEAD_ROWS, part = min(head_dim - first, HEAD_ROWS),
        group = head * groups / heads;
    i64 u_ld = (i64)heads * head_dim, v_ld = (i64)groups * states;
    load_tile<N>(vs, v + chunk.row * v_ld + (i64)group * states, v_ld, chunk.rows, states);
    load_steps(step, sum, steps, sums, chunk, heads, head);
    __syncthreads();
    u += chunk.row * u_ld + (i64)head * head_dim + first;
    bool wide = aligned(u) && u_ld % 8 == 0;
    for (int i = threadIdx.x; i < CHUNK * HEAD_ROWS / 8; i += blockDim.x) {
        int row = i / (HEAD_ROWS / 8), column = i % (HEAD_ROWS / 8) * 8,
            count = row < chunk.rows ? part - column : 0;
        Eight values = load_eight(u + row * u_ld + column, count, wide);
        float factor = backward ? __expf(sum[row]) : __expf(sum[CHUNK - 1] - sum[row]) * step[row];
#pragma unroll
        for (int j = 0; j < 8; j++) values.at[j] *= factor;
        store_eight(us + row * LD + column, values, 8, true);
    }
    finish_loads();
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float state[N / 8][4];
    clear(state);
    multiply<COLUMNS, ROWS, CHUNK>(state, us + warp * 16, LD, vs, N + PAD);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        bf16* place = vs + (warp * 16 + lane / 4) * (N + PAD) + j * 8 + lane % 4 * 2;
        *(u32*)place = to_bf16x2(state[j][0], state[j][1]);
        *(u32*)(place + 8 * (N + PAD)) = to_bf16x2(state[j][2], state[j][3]);
    }
    __syncthreads();
    store_tile<N>(out + state_at(blockIdx.y, heads, head, head_dim, first, states), vs, states, part, states);
}

// Turns what each chunk adds into the state before it, in place; backward, into the gradient of the state after
// it.
KERNEL __launch_bounds__(128) scan_pass(bf16* states, const float* sums, const Span* spans, const int* span_tiles,
                                        int heads, int size, int backward) {
    int head = blockIdx.y, at = (blockIdx.x * blockDim.x + threadIdx.x) * 8, count = min(size - at, 8);
    if (count <= 0) return;
    Span span = spans[blockIdx.z];
    int begin = span_tiles[blockIdx.z], tiles = span_tiles[blockIdx.z + 1] - begin;
    bool wide = aligned(states) && size % 8 == 0;
    Eight state = {};
#pragma unroll 4
    for (int i = 0; i < tiles; i++) {
        int own = backward ? tiles - 1 - i : i;
        bf16* place = states + ((i64)(begin + own) * heads + head) * size + at;
        Eight more = {};
        if (i + 1 < tiles) more = load_eight(place, count, wide);
        if (i > 0) store_eight(place, state, count, wide);
        int last = min(span.queries_start + (own + 1) * CHUNK, span.queries_end) - 1;
        float decay = __expf(sums[(i64)last * heads + head]);
#pragma unroll
        for (int j = 0; j < 8; j++) state.at[j] = state.at[j] * decay + more.at[j];
    }
}

template <int N>
DEVICE void chunk_outputs(bf16* y, const bf16* x, const bf16* b, const bf16* c, const float* steps,
                          const float* sums, const float* skip, const bf16* before, const Span* spans,
                          const int2* tiles, int heads, int head_dim, int groups, int states) {
    // The state takes the place of b.
    __shared__ __align__(16) bf16 xs[CHUNK * LD], cs[CHUNK * (N + PAD)], bs[CHUNK * (N + PAD)];
    __shared__ float step[CHUNK], sum[CHUNK];
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int parts = (head_dim + HEAD_ROWS - 1) / HEAD_ROWS, head = blockIdx.x / parts;
    int first = blockIdx.x % parts * HEAD_ROWS, part = min(head_dim - first, HEAD_ROWS),
        group = head * groups / heads;
    i64 x_ld = (i64)heads * head_dim, b_ld = (i64)groups * states, b_at = chunk.row * b_ld + (i64)group * states;
    i64 x_at = chunk.row * x_ld + (i64)head * head_dim + first;
    load_tile<64>(xs, x + x_at, x_ld, chunk.rows, part);
    load_tile<N>(cs, c + b_at, b_ld, chunk.rows, states);
    load_tile<N>(bs, b + b_at, b_ld, chunk.rows, states);
    load_steps(step, sum, steps, sums, chunk, heads, head);
    finish_loads();

    int top = threadIdx.x / WARP * 16, lane = threadIdx.x % WARP, row = top + lane / 4, column = lane % 4 * 2;
    float mixed[CHUNK / 8][4], out[HEAD_ROWS / 8][4];
    clear(mixed);
    clear(out);
    multiply<ROWS, COLUMNS, N>(mixed, cs + top * (N + PAD), N + PAD, bs, N + PAD);
    __syncthreads();
    if (!chunk.first) {
        load_tile<N>(bs, before + state_at(blockIdx.y, heads, head, head_dim, first, states), states, part,
                     states);
        finish_loads();
        multiply<ROWS, COLUMNS, N>(out, cs + top * (N + PAD), N + PAD, bs, N + PAD);
    }
    float decays[2] = {__expf(sum[row]), __expf(sum[row + 8])};
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int t = row + i / 2 * 8, s = j * 8 + column + i % 2;
            mixed[j][i] = s <= t ? mixed[j][i] * __expf(sum[t] - sum[s]) * step[s] : 0.0f;
            out[j][i] *= decays[i / 2];
        }
    }
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
        // The sums of a product lie as the left factor of the next one wants them.
        const float (&left)[4] = mixed[k / 8], (&right)[4] = mixed[k / 8 + 1];
        u32 a[4] = {to_bf16x2(left[0], left[1]), to_bf16x2(left[2], left[3]), to_bf16x2(right[0], right[1]),
                    to_bf16x2(right[2], right[3])};
#pragma unroll
        for (int j = 0; j < HEAD_ROWS / 8; j += 2) {
            u32 values[4];
            load_b<ROWS>(values, xs + k * LD + j * 8, LD);
            add_products(out, j, a, values);
        }
    }
    __syncthreads();
    float kept = skip[head];
#pragma unroll
    for (int j = 0; j < HEAD_ROWS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32* place = (u32*)(xs + (row + i * 8) * LD + j * 8 + column);
            *place =
                to_bf16x2(out[j][2 * i] + kept * low_f32(*place), out[j][2 * i + 1] + kept * high_f32(*place));
        }
    }
    __syncthreads();
    store_tile<64>(y + x_at, xs, x_ld, chunk.rows, part);
}

#define SCAN(N)                                                                                                   \
    KERNEL __launch_bounds__(128) scan_states_##N(                                                                \
        bf16* out, const bf16* u, const bf16* v, const float* steps, const float* sums, const Span* spans,        \
        const int2* tiles, int heads, int head_dim, int groups, int states, int backward) {                       \
        chunk_states<N>(out, u, v, steps, sums, spans, tiles, heads, head_dim, groups, states, backward);         \
    }                                                                                                             \
    KERNEL __launch_bounds__(128)                                                                                 \
        scan_outputs_##N(bf16* y, const bf16* x, const bf16* b, const bf16* c, const float* steps,                \
                         const float* sums, const float* skip, const bf16* before, const Span* spans,             \
                         const int2* tiles, int heads, int head_dim, int groups, int states) {                    \
        chunk_outputs<N>(y, x, b, c, steps, sums, skip, before, spans, tiles, heads, head_dim, groups, states);   \
    }

SCAN(64)
SCAN(128)
