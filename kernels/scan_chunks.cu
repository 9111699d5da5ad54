// Mamba2's scan and its gradient in chunks of 64 rows (state space duality, arXiv 2405.21060): inside a chunk the scan is
// a masked product of matrices on tensor cores, between chunks a state is passed on. For training: nothing is carried.
// With a = the running sum of dt · rate from the chunk's first row, L its last row, S the state before it:
//
//   y[t]  = exp(a[t]) · S c[t]  +  Σ_{s ≤ t} exp(a[t] - a[s]) · dt[s] · (c[t] · b[s]) · x[s]  +  skip · x[t]
//   S'    = exp(a[L]) · S       +  Σ_s exp(a[L] - a[s]) · dt[s] · x[s] ⊗ b[s]
//
// Shapes: x, y, dy, dx (T, heads · head_dim) bf16; b, c, db, dc (T, groups · states) bf16, head h reads group h · groups /
// heads; dt, ddt (T, heads) bf16; dt_bias, rate, skip (heads) f32; steps, sums, drate (T, heads) f32. Rows are the query
// rows of spans, which begin with a state of zero. `tiles`: (span, first row within it) of every 64 rows of every span,
// in the order of spans; span_tiles (spans + 1) i32: where each span's tiles begin. Scratch:
//   states (tiles, heads, head_dim, states) bf16, and dstates of the same size for the gradient
//   partial (2, parts, T, groups · states) f32 with parts = ceil(heads / groups / 8)
//
//   forward:   scan_steps, scan_states_N (backward 0), scan_pass (0), scan_outputs_N
//   backward:  scan_steps, scan_states_N (0) and scan_pass (0) once more unless kept; scan_states_N (1) of dy and c into
//              dstates, scan_pass (1); scan_gradients_N; scan_sum_parts
//
//   entry             grid                                             block  dynamic shared
//   scan_steps        (ceil(heads / 64), tiles)                        64     -
//   scan_states_N     (heads · ceil(head_dim / 64), tiles)             128    -
//   scan_pass         (ceil(head_dim · states / 1024), heads, spans)   128    -
//   scan_outputs_N    (heads · ceil(head_dim / 64), tiles)             128    -
//   scan_gradients_N  (groups · parts, tiles)                          256    N = 64: 68384, N = 128: 92960
//   scan_sum_parts    ceil(T · groups · states / 2048)                 256    -
// N in {64, 128}: the least that is not below `states`. Overwrites y, and dx, db, dc, ddt, drate (may be null).
//
// The factors of products are rounded to bf16 (states, masked products, scaled x); sums, decays and the gradients of dt
// are f32. A block of the gradient runs eight heads of a group one after the other, so that db and dc of these stay in
// registers; what is left is added in the order of parts. No atomics.
//
// Moves, a head and chunk at 64 · 128: 24 KB of rows and 16 KB of states four times forward; bound by memory on the
// large cards. Products: 2 (forward) and 7 (backward) of 64 · 64 · 64 or 64 · 64 · 128.
//
// Versions
//   v1  this. Tried next: chunks of 128 rows where shared memory allows it, which halves the states' traffic.
#include "common.cuh"

constexpr int CHUNK = 64, HEAD_ROWS = 64, PAD = 8, LD = 64 + PAD, BLOCK_HEADS = 8;

// --- Tiles and products -------------------------------------------------------------------------------------------------

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

template <int TILES> DEVICE void add_products(float (&sum)[TILES][4], int j, const u32 (&a)[4], const u32 (&b)[4]) {
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

// --- What all entries know of their chunk -------------------------------------------------------------------------------

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

KERNEL __launch_bounds__(64) scan_steps(float* steps, float* sums, const bf16* dt, const float* dt_bias, const float* rate,
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

// dt and its running sums of one head in a chunk; after the last row dt is zero and the sum stays.
DEVICE void load_steps(float* step, float* sum, const float* steps, const float* sums, Chunk chunk, int heads, int head) {
    if (threadIdx.x >= CHUNK) return;
    i64 last = chunk.row + chunk.rows - 1, row = chunk.row + threadIdx.x;
    step[threadIdx.x] = row <= last ? steps[row * heads + head] : 0.0f;
    sum[threadIdx.x] = sums[(row <= last ? row : last) * heads + head];
}

// --- States ---------------------------------------------------------------------------------------------------------

// What a chunk adds to the state: Σ exp(a[L] - a[s]) · dt[s] · u[s] ⊗ v[s], or to the gradient of the state before it:
// Σ exp(a[t]) · u[t] ⊗ v[t].
template <int N>
DEVICE void chunk_states(bf16* out, const bf16* u, const bf16* v, const float* steps, const float* sums, const Span* spans,
                         const int2* tiles, int heads, int head_dim, int groups, int states, int backward) {
    __shared__ __align__(16) bf16 us[CHUNK * LD], vs[CHUNK * (N + PAD)];
    __shared__ float step[CHUNK], sum[CHUNK];
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int parts = (head_dim + HEAD_ROWS - 1) / HEAD_ROWS, head = blockIdx.x / parts;
    int first = blockIdx.x % parts * HEAD_ROWS, part = min(head_dim - first, HEAD_ROWS), group = head * groups / heads;
    i64 u_ld = (i64)heads * head_dim, v_ld = (i64)groups * states;
    load_tile<N>(vs, v + chunk.row * v_ld + (i64)group * states, v_ld, chunk.rows, states);
    load_steps(step, sum, steps, sums, chunk, heads, head);
    __syncthreads();
    u += chunk.row * u_ld + (i64)head * head_dim + first;
    bool wide = aligned(u) && u_ld % 8 == 0;
    for (int i = threadIdx.x; i < CHUNK * HEAD_ROWS / 8; i += blockDim.x) {
        int row = i / (HEAD_ROWS / 8), column = i % (HEAD_ROWS / 8) * 8, count = row < chunk.rows ? part - column : 0;
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

// Turns what each chunk adds into the state before it, in place; backward, into the gradient of the state after it.
KERNEL __launch_bounds__(128) scan_pass(bf16* states, const float* sums, const Span* spans, const int* span_tiles, int heads,
                                        int size, int backward) {
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
        Eight more = load_eight(place, count, wide);
        int last = min(span.queries_start + (own + 1) * CHUNK, span.queries_end) - 1;
        float decay = __expf(sums[(i64)last * heads + head]);
        store_eight(place, state, count, wide);
#pragma unroll
        for (int j = 0; j < 8; j++) state.at[j] = state.at[j] * decay + more.at[j];
    }
}

// --- Outputs --------------------------------------------------------------------------------------------------------

template <int N>
DEVICE void chunk_outputs(bf16* y, const bf16* x, const bf16* b, const bf16* c, const float* steps, const float* sums,
                          const float* skip, const bf16* before, const Span* spans, const int2* tiles, int heads,
                          int head_dim, int groups, int states) {
    // The state takes the place of b.
    __shared__ __align__(16) bf16 xs[CHUNK * LD], cs[CHUNK * (N + PAD)], bs[CHUNK * (N + PAD)];
    __shared__ float step[CHUNK], sum[CHUNK];
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int parts = (head_dim + HEAD_ROWS - 1) / HEAD_ROWS, head = blockIdx.x / parts;
    int first = blockIdx.x % parts * HEAD_ROWS, part = min(head_dim - first, HEAD_ROWS), group = head * groups / heads;
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
        load_tile<N>(bs, before + state_at(blockIdx.y, heads, head, head_dim, first, states), states, part, states);
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
        const float(&left)[4] = mixed[k / 8], (&right)[4] = mixed[k / 8 + 1];
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
            *place = to_bf16x2(out[j][2 * i] + kept * low_f32(*place), out[j][2 * i + 1] + kept * high_f32(*place));
        }
    }
    __syncthreads();
    store_tile<64>(y + x_at, xs, x_ld, chunk.rows, part);
}

// --- Gradients ------------------------------------------------------------------------------------------------------

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
DEVICE float2 add_scaled(float (&sum)[TILES][4], const float (&more)[TILES][4], float2 factor, const bf16* with, int ld) {
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
DEVICE void chunk_gradients(bf16* dx, bf16* ddt, float* drate, float* partial, const bf16* dy, const bf16* x, const bf16* b,
                            const bf16* c, const bf16* dt, const float* dt_bias, const float* rate, const float* skip,
                            const float* steps, const float* sums, const bf16* before, const bf16* dafter,
                            const Span* spans, const int2* tiles, int total, int heads, int head_dim, int groups,
                            int states, float dt_low, float dt_high) {
    extern __shared__ __align__(16) u8 memory[];
    Stage<N>& stage = *(Stage<N>*)memory;
    constexpr int HALF = N / 2;
    Chunk chunk = chunk_of(spans, tiles, blockIdx.y);
    int own = heads / groups, blocks = (own + BLOCK_HEADS - 1) / BLOCK_HEADS;
    int group = blockIdx.x / blocks, block = blockIdx.x % blocks, begin = group * own + block * BLOCK_HEADS;
    int end = min(begin + BLOCK_HEADS, (group + 1) * own);
    i64 x_ld = (i64)heads * head_dim, b_ld = (i64)groups * states, b_at = chunk.row * b_ld + (i64)group * states;
    // Eight warps: 16 rows and half of the columns each.
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, top = warp % 4 * 16, side = warp / 4;
    int row = top + lane / 4;
    load_tile<N>(stage.b, b + b_at, b_ld, chunk.rows, states);
    load_tile<N>(stage.c, c + b_at, b_ld, chunk.rows, states);
    finish_loads();
    const bf16* own_b = stage.b + top * (N + PAD) + side * HALF;
    const bf16* own_c = stage.c + top * (N + PAD) + side * HALF;
    float seen[4][4], db[HALF / 8][4], dc[HALF / 8][4];
    clear(seen);
    clear(db);
    clear(dc);
    multiply<ROWS, COLUMNS, N>(seen, stage.c + top * (N + PAD), N + PAD, stage.b + side * 32 * (N + PAD), N + PAD);

    for (int head = begin; head < end; head++) {
        load_steps(stage.step, stage.sum, steps, sums, chunk, heads, head);
        if (threadIdx.x < CHUNK) stage.dstep[threadIdx.x] = stage.dsum[threadIdx.x] = stage.dlast[threadIdx.x] = 0.0f;
        for (int first = 0; first < head_dim; first += HEAD_ROWS) {
            int part = min(head_dim - first, HEAD_ROWS);
            i64 x_at = chunk.row * x_ld + (i64)head * head_dim + first;
            i64 state = state_at(blockIdx.y, heads, head, head_dim, first, states);
            load_tile<64>(stage.x, x + x_at, x_ld, chunk.rows, part);
            load_tile<64>(stage.dy, dy + x_at, x_ld, chunk.rows, part);
            load_tile<N>(stage.state, before + state, states, chunk.first ? 0 : part, states);
            finish_loads();
            mask_products(stage, seen, top, side);
            __syncthreads();
            // Inside the chunk.
            float dvalues[4][4], more[HALF / 8][4];
            clear(dvalues);
            multiply<ROWS, ROWS, CHUNK>(dc, stage.pulled + top * LD, LD, stage.b + side * HALF, N + PAD);
            multiply<COLUMNS, ROWS, CHUNK>(db, stage.pulled + top, LD, stage.c + side * HALF, N + PAD);
            multiply<COLUMNS, ROWS, CHUNK>(dvalues, stage.mixed + top, LD, stage.dy + side * 32, LD);
            // Through the state before it.
            clear(more);
            multiply<ROWS, ROWS, HEAD_ROWS>(more, stage.dy + top * LD, LD, stage.state + side * HALF, N + PAD);
            float2 decays = {__expf(stage.sum[row]), __expf(stage.sum[row + 8])};
            float2 dots = add_scaled(dc, more, decays, own_c, N + PAD);
            if (lane % 4 == 0) {
                stage.seen[side][row] = decays.x * dots.x;
                stage.seen[side][row + 8] = decays.y * dots.y;
            }
            __syncthreads();
            // Through the state after it.
            load_tile<N>(stage.state, dafter + state, states, chunk.last ? 0 : part, states);
            finish_loads();
            clear(more);
            multiply<ROWS, ROWS, HEAD_ROWS>(more, stage.x + top * LD, LD, stage.state + side * HALF, N + PAD);
            float2 lasts = {to_last(stage, row), to_last(stage, row + 8)};
            dots = add_scaled(db, more, lasts, own_b, N + PAD);
            if (lane % 4 == 0) {
                stage.taken[side][row] = dots.x;
                stage.taken[side][row + 8] = dots.y;
            }
            float through[4][4];
            clear(through);
            multiply<ROWS, COLUMNS, N>(through, stage.b + top * (N + PAD), N + PAD, stage.state + side * 32 * (N + PAD),
                                       N + PAD);
            float kept = chunk.first || chunk.last ? 0.0f : state_dot(stage, before + state, part, states);
            float direct = skip[head];
            int column = side * 32 + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int place = (row + i * 8) * LD + j * 8 + column;
                    u32 pair = *(const u32*)(stage.dy + place);
                    float last = i ? lasts.y : lasts.x;
                    *(u32*)(stage.mixed + place) =
                        to_bf16x2(dvalues[j][2 * i] + last * through[j][2 * i] + direct * low_f32(pair),
                                  dvalues[j][2 * i + 1] + last * through[j][2 * i + 1] + direct * high_f32(pair));
                }
            }
            __syncthreads();
            store_tile<64>(dx + x_at, stage.mixed, x_ld, chunk.rows, part);
            if (threadIdx.x < CHUNK) {
                int t = threadIdx.x;
                float taken = stage.taken[0][t] + stage.taken[1][t], through_last = to_last(stage, t) * taken;
                float column = stage.by_column[0][t] + stage.by_column[1][t] + stage.by_column[2][t] + stage.by_column[3][t];
                stage.dstep[t] += column + __expf(stage.sum[CHUNK - 1] - stage.sum[t]) * taken;
                stage.dsum[t] += stage.by_row[0][t] + stage.by_row[1][t] - stage.step[t] * column + stage.seen[0][t] +
                                 stage.seen[1][t] - through_last;
                stage.dlast[t] += through_last;
                if (t == 0) stage.dlast[t] += __expf(stage.sum[CHUNK - 1]) * kept;
            }
            __syncthreads();
        }
        // a is a running sum: what pulls at it pulls at every dt before.
        if (threadIdx.x < chunk.rows) {
            float pull = 0.0f;
            for (int t = 0; t < CHUNK; t++) pull += stage.dlast[t];
            for (int t = threadIdx.x; t < CHUNK; t++) pull += stage.dsum[t];
            i64 at = (chunk.row + threadIdx.x) * heads + head;
            float raw = to_f32(dt[at]) + dt_bias[head], soft = softplus(raw);
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

// --- Entries --------------------------------------------------------------------------------------------------------

#define SCAN(N)                                                                                                           \
    KERNEL __launch_bounds__(128) scan_states_##N(                                                                        \
        bf16* out, const bf16* u, const bf16* v, const float* steps, const float* sums, const Span* spans,                \
        const int2* tiles, int heads, int head_dim, int groups, int states, int backward) {                               \
        chunk_states<N>(out, u, v, steps, sums, spans, tiles, heads, head_dim, groups, states, backward);                 \
    }                                                                                                                     \
    KERNEL __launch_bounds__(128) scan_outputs_##N(                                                                       \
        bf16* y, const bf16* x, const bf16* b, const bf16* c, const float* steps, const float* sums, const float* skip,   \
        const bf16* before, const Span* spans, const int2* tiles, int heads, int head_dim, int groups, int states) {      \
        chunk_outputs<N>(y, x, b, c, steps, sums, skip, before, spans, tiles, heads, head_dim, groups, states);           \
    }                                                                                                                     \
    KERNEL __launch_bounds__(256, 1) scan_gradients_##N(                                                                  \
        bf16* dx, bf16* ddt, float* drate, float* partial, const bf16* dy, const bf16* x, const bf16* b, const bf16* c,   \
        const bf16* dt, const float* dt_bias, const float* rate, const float* skip, const float* steps,                   \
        const float* sums, const bf16* before, const bf16* dafter, const Span* spans, const int2* tiles, int total,       \
        int heads, int head_dim, int groups, int states, float dt_low, float dt_high) {                                   \
        chunk_gradients<N>(dx, ddt, drate, partial, dy, x, b, c, dt, dt_bias, rate, skip, steps, sums, before, dafter,    \
                           spans, tiles, total, heads, head_dim, groups, states, dt_low, dt_high);                        \
    }

SCAN(64)
SCAN(128)
