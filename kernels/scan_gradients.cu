// The gradient of Mamba2's scan in chunks of 64 rows; names and arrays as in `scan_chunks.cu`. With S the state
// before the chunk, D the gradient of that after it, L its last row, m[t,s] = exp(a[t] - a[s]) where s ≤ t,
// last[s] = exp(a[L] - a[s]) · dt[s]:
//
//   dx[s] = Σ_t m[t,s] · dt[s] · (c[t] · b[s]) · dy[t]    +  last[s] · D b[s]            +  skip · dy[s]
//   db[s] = Σ_t m[t,s] · dt[s] · (dy[t] · x[s]) · c[t]    +  last[s] · x[s] D
//   dc[t] = Σ_s m[t,s] · dt[s] · (dy[t] · x[s]) · b[s]    +  exp(a[t]) · dy[t] S
// The gradients of a are sums of the same terms, and those of dt and rate come of a being a running sum.
//
// Shapes: dy, dx (T, heads · head_dim) bf16; db, dc (T, groups · states) bf16; ddt (T, heads) bf16 of dt before
// bias and softplus; drate (T, heads) f32, what each row adds to the gradient of its head's rate, may be null;
// `total` = T. `before` and `dafter`: the states of `scan_states_N` and `scan_pass`, once with (x, b, 0), once
// with (dy, c, 1). Scratch: partial (2, parts, T, groups · states) f32 with parts = ceil(heads / groups / 8).
// Overwrites the rows in spans.
//
//   order, entry           grid                                     block   dynamic shared
//   1 scan_steps, 2 scan_states_N, 3 scan_pass (unless kept from the forward), 4 scan_states_N, 5 scan_pass
//   6 scan_gradients_N     (groups · parts, tiles)                  256     N = 64: 68384, N = 128: 92960
//   7 scan_sum_parts       ceil(T · groups · states / 2048)         256     -
// N in {64, 128}: the least that is not below `states`. n of 7 = T · groups · states.
//
// A block takes eight heads of a group one after the other, so that db and dc of these stay in registers; what is
// left is added in the order of parts. No atomics. Factors of products are rounded to bf16; the gradients of dt
// are f32 sums.
//
// Products a head and chunk: 64 · 64 · 64 twice and 64 · 64 · 128 five times, 6 MFLOP for 24 KB of rows and 48 KB
// of states, with 14 PTX instructions a warp for each of mma.sync. One block a multiprocessor, so expected to be
// bound by the latency of its loads.
//
// Versions
//   v1  this.
#include "common.cuh"
#include "chunk.cuh"
#include "eight.cuh"
#include "scan.cuh"
#include "span.cuh"

// Heads that a block takes.
constexpr int BLOCK_HEADS = 8;

// Shared memory of a block of `chunk_gradients`.
template <int N> struct Stage {
    bf16 b[CHUNK * (N + PAD)], c[CHUNK * (N + PAD)];
    // The state before the chunk, then the gradient of that after it.
    bf16 state[HEAD_ROWS * (N + PAD)];
    bf16 x[CHUNK * LD], dy[CHUNK * LD];
    // (t, s): exp(a[t] - a[s]) · dt[s] times c[t] · b[s], later dx, and times dy[t] · x[s].
    bf16 mixed[CHUNK * LD], pulled[CHUNK * LD];
    float step[CHUNK], sum[CHUNK];
    // Sums over rows and columns of (t, s), by the warps that share them.
    float by_row[2][CHUNK], by_column[4][CHUNK];
    // c · dy · state and b · x · dstate, by row.
    float seen[2][CHUNK], taken[2][CHUNK];
    // Of a head, over its parts: the gradients of dt[s] alone, of a[t], and of a[L] by the rows.
    float dstep[CHUNK], dsum[CHUNK], dlast[CHUNK];
    float warps[8];
};

static_assert(sizeof(Stage<64>) == 68384, "as the head of the file says");
static_assert(sizeof(Stage<128>) == 92960, "as the head of the file says");

// The sum over the four lanes that share a row of a product.
DEVICE float quad_sum(float x) {
    x += exchange(x, 1);
    return x + exchange(x, 2);
}

// The sum over the eight lanes that share a column.
DEVICE float column_sum(float x) {
    x += exchange(x, 4);
    x += exchange(x, 8);
    return x + exchange(x, 16);
}

// sum += factor (by row) · more, and what the rows of `more` give with those of `with`, a tile that begins at this
// warp's part: dots of the rows `row` and `row + 8`.
template <int TILES>
DEVICE float2 add_scaled(float (&sum)[TILES][4], const float (&more)[TILES][4], float2 factor, const bf16* with,
                         int ld) {
    int lane = threadIdx.x % WARP;
    with += lane / 4 * ld + lane % 4 * 2;
    float2 dots = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        u32 above = *(const u32*)(with + j * 8), below = *(const u32*)(with + 8 * ld + j * 8);
        dots.x += more[j][0] * low_f32(above) + more[j][1] * high_f32(above);
        dots.y += more[j][2] * low_f32(below) + more[j][3] * high_f32(below);
        sum[j][0] += factor.x * more[j][0];
        sum[j][1] += factor.x * more[j][1];
        sum[j][2] += factor.y * more[j][2];
        sum[j][3] += factor.y * more[j][3];
    }
    return {quad_sum(dots.x), quad_sum(dots.y)};
}

// One row's dt[s] from the chunk's: what x[s] ⊗ b[s] counts for after the last row.
template <int N> DEVICE float to_last(const Stage<N>& stage, int row) {
    return __expf(stage.sum[CHUNK - 1] - stage.sum[row]) * stage.step[row];
}

// The masked products of one head's part: fills `mixed` and `pulled`, and sums their gradients of dt and a.
template <int N> DEVICE void mask_products(Stage<N>& stage, const float (&seen)[4][4], int top, int side) {
    int lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    float pulls[4][4];
    clear(pulls);
    multiply<ROWS, COLUMNS, HEAD_ROWS>(pulls, stage.dy + top * LD, LD, stage.x + side * 32 * LD, LD);
    float rows[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float columns[2] = {0.0f, 0.0f}, mixed[4], pulled[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int t = top + row + i / 2 * 8, s = side * 32 + j * 8 + column + i % 2;
            float decay = s <= t ? __expf(stage.sum[t] - stage.sum[s]) : 0.0f, step = stage.step[s];
            float both = decay * seen[j][i] * pulls[j][i];
            mixed[i] = decay * seen[j][i] * step;
            pulled[i] = decay * pulls[j][i] * step;
            rows[i / 2] += both * step;
            columns[i % 2] += both;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int place = (top + row + i * 8) * LD + side * 32 + j * 8 + column;
            *(u32*)(stage.mixed + place) = to_bf16x2(mixed[2 * i], mixed[2 * i + 1]);
            *(u32*)(stage.pulled + place) = to_bf16x2(pulled[2 * i], pulled[2 * i + 1]);
            float sum = column_sum(columns[i]);
            if (row == 0) stage.by_column[top / 16][side * 32 + j * 8 + column + i] = sum;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = quad_sum(rows[i]);
        if (column == 0) stage.by_row[side][top + row + i * 8] = sum;
    }
}

// Through the state before the chunk, for which `stage.state` is: adds to dc, and sums what a gets of it.
template <int N> DEVICE void pass_before(Stage<N>& stage, float (&dc)[N / 16][4], int top, int side) {
    int lane = threadIdx.x % WARP, row = top + lane / 4;
    float more[N / 16][4];
    clear(more);
    multiply<ROWS, ROWS, HEAD_ROWS>(more, stage.dy + top * LD, LD, stage.state + side * N / 2, N + PAD);
    float2 decays = {__expf(stage.sum[row]), __expf(stage.sum[row + 8])};
    float2 dots = add_scaled(dc, more, decays, stage.c + top * (N + PAD) + side * N / 2, N + PAD);
    if (lane % 4 == 0) {
        stage.seen[side][row] = decays.x * dots.x;
        stage.seen[side][row + 8] = decays.y * dots.y;
    }
}

// Through the state after the chunk, of which `stage.state` is the gradient: adds to db and dx, and sums what dt
// and a get of it.
template <int N>
DEVICE void pass_after(Stage<N>& stage, float (&db)[N / 16][4], float (&dx)[4][4], int top, int side) {
    int lane = threadIdx.x % WARP, row = top + lane / 4;
    float more[N / 16][4], through[4][4];
    clear(more);
    clear(through);
    multiply<ROWS, ROWS, HEAD_ROWS>(more, stage.x + top * LD, LD, stage.state + side * N / 2, N + PAD);
    const bf16* b = stage.b + top * (N + PAD);
    float2 lasts = {to_last(stage, row), to_last(stage, row + 8)};
    float2 dots = add_scaled(db, more, lasts, b + side * N / 2, N + PAD);
    if (lane % 4 == 0) {
        stage.taken[side][row] = dots.x;
        stage.taken[side][row + 8] = dots.y;
    }
    multiply<ROWS, COLUMNS, N>(through, b, N + PAD, stage.state + side * 32 * (N + PAD), N + PAD);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) dx[j][i] += (i < 2 ? lasts.x : lasts.y) * through[j][i];
    }
}

// dx, with what x adds to y at once, takes the place of `mixed`.
template <int N> DEVICE void place_dx(Stage<N>& stage, const float (&dx)[4][4], float skip, int top, int side) {
    int lane = threadIdx.x % WARP, first = (top + lane / 4) * LD + side * 32 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int place = first + i * 8 * LD + j * 8;
            u32 dy = *(const u32*)(stage.dy + place);
            *(u32*)(stage.mixed + place) =
                to_bf16x2(dx[j][2 * i] + skip * low_f32(dy), dx[j][2 * i + 1] + skip * high_f32(dy));
        }
    }
}

// Adds what a head's part gives to the gradients of dt and a, a thread a row. `kept` is that of the state's decay.
template <int N> DEVICE void add_pulls(Stage<N>& stage, Chunk chunk, float kept) {
    int t = threadIdx.x;
    if (t >= CHUNK) return;
    float column = 0.0f, row = stage.by_row[0][t] + stage.by_row[1][t], taken = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) column += stage.by_column[i][t];
    if (!chunk.first) row += stage.seen[0][t] + stage.seen[1][t];
    if (!chunk.last) taken = stage.taken[0][t] + stage.taken[1][t];
    float decay = __expf(stage.sum[CHUNK - 1]), through = to_last(stage, t) * taken;
    stage.dstep[t] += column + __expf(stage.sum[CHUNK - 1] - stage.sum[t]) * taken;
    stage.dsum[t] += row - stage.step[t] * column - through;
    stage.dlast[t] += t == 0 ? through + decay * kept : through;
}

// What pulls at a[t], or at a[L], pulls at dt · rate of every row up to it. The sum for this thread's row.
template <int N> DEVICE float pull_of(const Stage<N>& stage) {
    float pull = 0.0f;
    for (int t = 0; t < CHUNK; t++) pull += stage.dlast[t];
    for (int t = threadIdx.x; t < CHUNK; t++) pull += stage.dsum[t];
    return pull;
}

// The sum of products of a state and its gradient over a block.
template <int N> DEVICE float state_dot(Stage<N>& stage, const bf16* state, int rows, int states) {
    bool wide = aligned(state) && states % 8 == 0;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < HEAD_ROWS * N / 8; i += blockDim.x) {
        int row = i / (N / 8), column = i % (N / 8) * 8, count = row < rows ? states - column : 0;
        if (count <= 0) continue;
        Eight before = load_eight(state + (i64)row * states + column, count, wide);
        Eight gradient = load_eight(stage.state + row * (N + PAD) + column, 8, true);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += before.at[j] * gradient.at[j];
    }
    return block_sum(sum, stage.warps);
}

// A tile of sums, 16 rows of 8 · TILES columns, to rows of f32.
template <int TILES>
DEVICE void store_sums(float* to, const float (&sum)[TILES][4], i64 ld, int rows, int columns) {
    int row = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
    bool wide = (u64)to % 8 == 0 && ld % 2 == 0;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int place = j * 8 + column;
            if (row + i * 8 >= rows || place >= columns) continue;
            float* target = to + (row + i * 8) * ld + place;
            if (wide && place + 1 < columns) {
                *(float2*)target = make_float2(sum[j][2 * i], sum[j][2 * i + 1]);
            } else {
                target[0] = sum[j][2 * i];
                if (place + 1 < columns) target[1] = sum[j][2 * i + 1];
            }
        }
    }
}

template <int N>
DEVICE void chunk_gradients(bf16* dx, bf16* ddt, float* drate, float* partial, const bf16* dy, const bf16* x,
                            const bf16* b, const bf16* c, const bf16* dt, const float* dt_bias, const float* rate,
                            const float* skip, const float* steps, const float* sums, const bf16* before,
                            const bf16* dafter, const Span* spans, const int2* tiles, int total, int heads,
                            int head_dim, int groups, int states, float dt_low, float dt_high) {
    extern __shared__ __align__(16) u8 memory[];
    Stage<N>& stage = *(Stage<N>*)memory;
    constexpr int HALF = N / 2;
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int own = heads / groups, blocks = (own + BLOCK_HEADS - 1) / BLOCK_HEADS;
    int group = blockIdx.x / blocks, block = blockIdx.x % blocks, begin = group * own + block * BLOCK_HEADS;
    int end = min(begin + BLOCK_HEADS, (group + 1) * own);
    i64 x_ld = (i64)heads * head_dim, b_ld = (i64)groups * states, b_at = chunk.row * b_ld + (i64)group * states;
    // Eight warps: 16 rows and half of the columns each.
    int warp = threadIdx.x / WARP, top = warp % 4 * 16, side = warp / 4;
    load_tile<N>(stage.b, b + b_at, b_ld, chunk.rows, states);
    load_tile<N>(stage.c, c + b_at, b_ld, chunk.rows, states);
    finish_loads();
    float seen[4][4], db[HALF / 8][4], dc[HALF / 8][4];
    clear(seen);
    clear(db);
    clear(dc);
    multiply<ROWS, COLUMNS, N>(seen, stage.c + top * (N + PAD), N + PAD, stage.b + side * 32 * (N + PAD), N + PAD);

    for (int head = begin; head < end; head++) {
        load_steps(stage.step, stage.sum, steps, sums, chunk, heads, head);
        if (threadIdx.x < CHUNK)
            stage.dstep[threadIdx.x] = stage.dsum[threadIdx.x] = stage.dlast[threadIdx.x] = 0.0f;
        for (int first = 0; first < head_dim; first += HEAD_ROWS) {
            int part = min(head_dim - first, HEAD_ROWS);
            i64 x_at = chunk.row * x_ld + (i64)head * head_dim + first;
            i64 state = state_at(blockIdx.y, heads, head, head_dim, first, states);
            load_tile<64>(stage.x, x + x_at, x_ld, chunk.rows, part);
            load_tile<64>(stage.dy, dy + x_at, x_ld, chunk.rows, part);
            if (!chunk.first) load_tile<N>(stage.state, before + state, states, part, states);
            finish_loads();
            mask_products(stage, seen, top, side);
            __syncthreads();
            float dvalues[4][4];
            clear(dvalues);
            multiply<ROWS, ROWS, CHUNK>(dc, stage.pulled + top * LD, LD, stage.b + side * HALF, N + PAD);
            multiply<COLUMNS, ROWS, CHUNK>(db, stage.pulled + top, LD, stage.c + side * HALF, N + PAD);
            multiply<COLUMNS, ROWS, CHUNK>(dvalues, stage.mixed + top, LD, stage.dy + side * 32, LD);
            if (!chunk.first) pass_before(stage, dc, top, side);
            __syncthreads();
            float kept = 0.0f;
            if (!chunk.last) {
                load_tile<N>(stage.state, dafter + state, states, part, states);
                finish_loads();
                pass_after(stage, db, dvalues, top, side);
                if (!chunk.first) kept = state_dot(stage, before + state, part, states);
            }
            place_dx(stage, dvalues, skip[head], top, side);
            __syncthreads();
            store_tile<64>(dx + x_at, stage.mixed, x_ld, chunk.rows, part);
            add_pulls(stage, chunk, kept);
            __syncthreads();
        }
        if (threadIdx.x < chunk.rows) {
            i64 at = (chunk.row + threadIdx.x) * heads + head;
            float pull = pull_of(stage), raw = to_f32(dt[at]) + dt_bias[head], soft = softplus(raw);
            float slope = soft < dt_low || soft > dt_high ? 0.0f : sigmoid(raw);
            ddt[at] = to_bf16((stage.dstep[threadIdx.x] + rate[head] * pull) * slope);
            if (drate) drate[at] = stage.step[threadIdx.x] * pull;
        }
        __syncthreads();
    }
    i64 size = (i64)total * b_ld, at = block * size + b_at + top * b_ld + side * HALF;
    store_sums(partial + at, db, b_ld, chunk.rows - top, states - side * HALF);
    store_sums(partial + blocks * size + at, dc, b_ld, chunk.rows - top, states - side * HALF);
}

// db and dc (n) = the parts of each added in order.
KERNEL __launch_bounds__(256) scan_sum_parts(bf16* db, bf16* dc, const float* partial, i64 n, int parts) {
    i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n) return;
    int count = (int)min(n - first, (i64)8);
    bool wide = aligned(db, dc, partial) && n % 8 == 0;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        Eight sum = {};
        for (int part = 0; part < parts; part++) {
            Eight more = load_eight(partial + ((i64)which * parts + part) * n + first, count, wide);
#pragma unroll
            for (int i = 0; i < 8; i++) sum.at[i] += more.at[i];
        }
        store_eight((which ? dc : db) + first, sum, count, wide);
    }
}

#define SCAN(N)                                                                                                   \
    KERNEL __launch_bounds__(256, 1)                                                                              \
        scan_gradients_##N(bf16* dx, bf16* ddt, float* drate, float* partial, const bf16* dy, const bf16* x,      \
                           const bf16* b, const bf16* c, const bf16* dt, const float* dt_bias, const float* rate, \
                           const float* skip, const float* steps, const float* sums, const bf16* before,          \
                           const bf16* dafter, const Span* spans, const int2* tiles, int total, int heads,        \
                           int head_dim, int groups, int states, float dt_low, float dt_high) {                   \
        chunk_gradients<N>(dx, ddt, drate, partial, dy, x, b, c, dt, dt_bias, rate, skip, steps, sums, before,    \
                           dafter, spans, tiles, total, heads, head_dim, groups, states, dt_low, dt_high);        \
    }

SCAN(64)
SCAN(128)
