// The gradient of causal attention over spans, where queries and keys are the same rows.
//
//   p  = exp(map(q · kᵀ) - logsumexp)          delta = sum over d of dout · out
//   ds = p · (dout · vᵀ - delta) · map'(q · kᵀ)
//   dq = ds · k,   dk = dsᵀ · q,   dv = pᵀ · dout
//
// Shapes: q, out, dout, dq (T, heads·D) bf16; k, v, dk, dv (T, kv_heads·D) bf16; logsumexp, delta (T, heads) f32,
// saved by the forward and made by attention_delta. Overwrites; dk and dv of a prefix are sums over all spans that
// see it, and all of them over the heads of a group. scale, softcap, window and spans as in the forward.
//
//   entry                         grid                                block  dynamic shared memory
//   attention_delta               ceil(t · heads / 64)                256    0
//   attention_backward_queries_D  (tiles, heads)                      128    512·D bytes, 384·D from D = 96 on
//   attention_backward_keys_D     (key tiles, kv_heads, ceil(D/128))  128    the same and 512
//   attention_backward_sums       (sums, kv_heads, 2)                 256    0; after keys, if there are sums
// D = 16 32 64 96 128 256; head_dim is a multiple of 8. -DHEAD_DIM=64 compiles the entries of that head dim only.
//
// tiles: those of the forward, one list for both. A dq of 64 queries is one block's.
// key tiles: at most 64 rows each, all in one span's keys and all or none of them in a prefix. Each has at least
// one visit. visits int4 (first row, queries, offset, 0): the queries of one span that see any key of the tile,
// where query i (from 0) sees key j of the tile if j <= offset + i, and with a window if j > offset + i - window:
//   offset = position of the first query - position of the tile's first key, in the query's span
// Queries that see nothing may be in a visit, no query may be in two visits of a tile. So that one list serves
// layers with a window and without, make it without. A visit may be cut: (row + n, queries - n, offset + n) is its
// rest. One block adds up the visits of a key tile in their order, heads outside. A tile that very many queries
// see (that of a prefix) is cut: it is in the list several times with other visits, and slots that follow each
// other; the sums of each go to `partial` (slots, kv_heads, 2, 64, D) f32 and are added in the slots' order by
// attention_backward_sums:
//   sums int4 (first row, rows, first slot, slots)
// All orders are the lists', so dk and dv are the same bits in every run.
//
// A warp has 16 rows (queries, or keys) with their sums in registers. What it meets is streamed through two stages
// of shared memory, 32 columns a stage (16 from D = 96 on): a barrier each, copies under way meanwhile. Up to D =
// 64 the fragments of the rows stay in registers too. dk and dv of 256 values do not fit: two blocks have 128
// columns each and both make the scores.
//
// 6 · D flops a pair for dq and 8 · D for dk and dv (12 · D at D = 256): bound by tensor cores. Rounds p and ds to
// bf16.
//
// Versions
//   v1  no tile cut. A prefix of 128 tokens before 8192 others is two tiles: with 8 kv heads of 4 heads sixteen
//       blocks of 2048 iterations, while all else has ended.
//   v2  this: such tiles are cut.
//   Not tried: one stage of twice the columns (a sixth fewer loads of fragments, copies waited for); two blocks of
//   rows a warp, which would halve the loads of columns' fragments where those bind (cards with 8 cycles a product
//   or less).
#include "common.cuh"
#include "attention.cuh"
#include "span.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = WARPS * 16;

// Four lanes for each row and head.
KERNEL __launch_bounds__(256)
    attention_delta(float* delta, const bf16* out, const bf16* dout, int t, int heads, int head_dim) {
    const i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 4;
    float sum = 0.0f;
    if (index < (i64)t * heads) {
        for (int first = threadIdx.x % 4 * 8; first < head_dim; first += 32) {
            const uint4 a = *(const uint4*)(out + index * head_dim + first);
            const uint4 b = *(const uint4*)(dout + index * head_dim + first);
            const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++) sum += low_f32(as[i]) * low_f32(bs[i]) + high_f32(as[i]) * high_f32(bs[i]);
        }
    }
    sum += exchange(sum, 1);
    sum += exchange(sum, 2);
    if (threadIdx.x % 4 == 0 && index < (i64)t * heads) delta[index] = sum;
}

// The 16 rows of each warp in two tiles of 64, and what they are multiplied with: two tiles of COLUMNS rows.
template <int D> struct Rows {
    static constexpr int STEPS = D / 16;
    static constexpr bool HELD = D <= 64;
    static constexpr int COLUMNS = D <= 64 ? 32 : 16;
    static constexpr int BYTES = 2 * ROWS * D * 2, STAGE_BYTES = 2 * COLUMNS * D * 2;

    Tile<D> first, second;
    u32 held[HELD ? STEPS : 1][2][4];

    DEVICE explicit Rows(u32 address) : first{address}, second{address + BYTES / 2} {}

    // The tiles of a stage.
    DEVICE Tile<D> left(int stage) const { return {first.address + BYTES + stage * STAGE_BYTES}; }
    DEVICE Tile<D> right(int stage) const { return {left(stage).address + STAGE_BYTES / 2}; }

    // To be called when the rows have arrived.
    DEVICE void hold() {
        if constexpr (HELD) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) load(held[step], step);
        }
    }

    DEVICE void load(u32 (&r)[2][4], int step) const {
        const int row = threadIdx.x / WARP * 16;
        first.load_left(r[0], row, step * 2);
        second.load_left(r[1], row, step * 2);
    }

    // scores = first · left ᵀ, gradients = second · rightᵀ, in the groups of 16 columns that are seen.
    DEVICE void multiply(float (&scores)[COLUMNS / 8][4], float (&gradients)[COLUMNS / 8][4], int stage,
                         int group_begin, int group_end) const {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = gradients[n][i] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 read[2][4], columns[4];
            if constexpr (!HELD) load(read, step);
            const u32(*a)[4] = HELD ? held[HELD ? step : 0] : read;
#pragma unroll
            for (int group = 0; group < COLUMNS / 16; group++) {
                if (group < group_begin || group_end <= group) continue;
                left(stage).load_right_transposed(columns, group * 16, step * 2);
                mma_16x16(scores[group * 2], scores[group * 2 + 1], a[0], columns);
                right(stage).load_right_transposed(columns, group * 16, step * 2);
                mma_16x16(gradients[group * 2], gradients[group * 2 + 1], a[1], columns);
            }
        }
    }
};

// sums (16, N·8) += factor (16, 16) · the 16 rows from `row` and the columns from that of `piece` on of a tile.
template <int D, int N>
DEVICE void add_product(float (&sums)[N][4], const u32 (&factor)[4], Tile<D> tile, int row, int piece) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 columns[4];
        tile.load_right(columns, row, piece + n);
        mma_16x16(sums[n], sums[n + 1], factor, columns);
    }
}

// Stores the first `count` rows of the block's sums, each warp by way of its rows of `tile`, which it alone still
// uses.
template <int D, int N>
DEVICE void store_rows(bf16* out, int stride, int count, const float (&sums)[N][4], float factor, u8* tile) {
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < N; n++)
            *(u32*)(tile + Tile<D>::offset(first + lane / 4 + half * 8, n) + lane % 4 * 4) =
                to_bf16x2(sums[n][half * 2] * factor, sums[n][half * 2 + 1] * factor);
    __syncwarp();
#pragma unroll
    for (int index = lane; index < 16 * N; index += WARP) {
        const int r = first + index / N, piece = index % N;
        if (r < count)
            *(uint4*)(out + (i64)r * stride + piece * 8) = *(const uint4*)(tile + Tile<D>::offset(r, piece));
    }
    __syncwarp();
}

template <int D>
DEVICE void backward_queries(bf16* dq, const bf16* dout, const bf16* q, const bf16* k, const bf16* v,
                             const float* logsumexp, const float* delta, const Span* spans, const int2* tiles,
                             int heads, int kv_heads, float scale, float softcap, int window) {
    constexpr int KEYS = Rows<D>::COLUMNS, GROUPS = KEYS / 16;
    extern __shared__ uint4 shared[];
    Rows<D> rows(shared_address(shared));

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lane_row = lane / 4,
              lane_column = lane % 4 * 2;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const int2 tile = tiles[blockIdx.x];
    const Span span = spans[tile.x];
    const int row = span.queries_start + tile.y, queries = min(span.queries_end - row, ROWS);
    const int prefix = span.prefix_end - span.prefix_start;
    // Positions: of the first query, and those the block looks at.
    const int first = prefix + span.keys_end - span.keys_start - (span.queries_end - row);
    const int begin = window > 0 ? max(first + 1 - window, 0) / KEYS * KEYS : 0, end = first + queries;
    const i64 at_row = ((i64)row * heads + head) * D;
    k += kv_head * D;
    v += kv_head * D;

    auto copy_keys = [&](int stage, int at) {
        auto row_of = [&](int r) {
            return at + r + (at + r < prefix ? span.prefix_start : span.keys_start - prefix);
        };
        rows.left(stage).template copy_rows<KEYS, THREADS>(k, kv_heads * D, end - at, row_of);
        rows.right(stage).template copy_rows<KEYS, THREADS>(v, kv_heads * D, end - at, row_of);
        commit_copies();
    };
    auto same = [](int r) { return r; };
    rows.first.template copy_rows<ROWS, THREADS>(q + at_row, heads * D, queries, same);
    rows.second.template copy_rows<ROWS, THREADS>(dout + at_row, heads * D, queries, same);
    copy_keys(0, begin);

    // The keys that any query of this warp sees, and the position of its first query.
    const int own = first + warp * 16;
    const int seen_begin = window > 0 ? max(own + 1 - window, 0) : 0;
    const int seen_end = warp * 16 < queries ? min(own + 16, end) : 0;
    const ScoreMap map(scale, softcap);
    float shift[2], deltas[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const i64 at = (i64)(row + min(warp * 16 + lane_row + half * 8, queries - 1)) * heads + head;
        shift[half] = logsumexp[at] * LOG2_E;
        deltas[half] = delta[at];
    }

    float sums[D / 8][4] = {};
    for (int at = begin, stage = 0; at < end; at += KEYS, stage ^= 1) {
        wait_for_copies<0>();
        __syncthreads();
        if (at == begin) rows.hold();
        if (at + KEYS < end) copy_keys(stage ^ 1, at + KEYS);

        const int group_begin = max(seen_begin - at, 0) / 16, group_end = (min(seen_end - at, KEYS) + 15) / 16;
        if (group_begin >= group_end) continue;
        float scores[KEYS / 8][4], gradients[KEYS / 8][4];
        rows.multiply(scores, gradients, stage, group_begin, group_end);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) gradients[n][i] -= deltas[i / 2];
        map.cap(scores, gradients);
        if (at + KEYS > own + 1 || at < seen_begin + 15 && window > 0) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = at + n * 8 + lane_column + i % 2, query = own + lane_row + i / 2 * 8;
                    if (key > query || window > 0 && key <= query - window) scores[n][i] = MINUS_INFINITY;
                }
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            if (group < group_begin || group_end <= group) continue;
#pragma unroll
            for (int n = group * 2; n < group * 2 + 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    gradients[n][i] *= power_of_two(scores[n][i] * map.factor - shift[i / 2]);
            u32 dscores[4];
            round_left(dscores, gradients[group * 2], gradients[group * 2 + 1]);
            add_product<D>(sums, dscores, rows.left(stage), group * 16, 0);
        }
    }
    // Only this warp reads its rows of the first tile.
    store_rows<D>(dq + at_row, heads * D, queries, sums, scale, (u8*)shared);
}

// Stores the first `count` rows of the block's sums as they are, in f32.
template <int D, int N> DEVICE void store_partial(float* out, int count, const float (&sums)[N][4]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = threadIdx.x / WARP * 16 + lane / 4 + half * 8;
        if (r >= count) continue;
#pragma unroll
        for (int n = 0; n < N; n++)
            store_pair(out + r * D + n * 8 + lane % 4 * 2, sums[n][half * 2], sums[n][half * 2 + 1]);
    }
}

// Keys whose gradients a block makes. `slot` is that of its partial sums, or -1 where they are whole.
struct KeyTile {
    int first_row, rows, visits_begin, visits_end, slot;
};

template <int D>
DEVICE void backward_keys(bf16* dk, bf16* dv, float* partial, const bf16* dout, const bf16* q, const bf16* k,
                          const bf16* v, const float* logsumexp, const float* delta, const KeyTile* tiles,
                          const int4* visits, int heads, int kv_heads, float scale, float softcap, int window) {
    constexpr int QUERIES = Rows<D>::COLUMNS, GROUPS = QUERIES / 16, WIDTH = D <= 128 ? D : 128;
    extern __shared__ uint4 shared[];
    Rows<D> rows(shared_address(shared));
    // Of each stage: the log-sum-exp of its queries, then their deltas.
    float* saved = (float*)((u8*)shared + Rows<D>::BYTES + 2 * Rows<D>::STAGE_BYTES);

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lane_row = lane / 4,
              lane_column = lane % 4 * 2;
    const int kv_head = blockIdx.y, group_heads = heads / kv_heads, piece = blockIdx.z * (WIDTH / 8);
    const KeyTile tile = tiles[blockIdx.x];
    const int keys = tile.rows;
    const i64 at_row = ((i64)tile.first_row * kv_heads + kv_head) * D;

    auto same = [](int r) { return r; };
    auto copy_queries = [&](int stage, int head, const int4& visit, int base) {
        const i64 row = visit.x + base;
        const int count = visit.y - base;
        rows.left(stage).template copy_rows<QUERIES, THREADS>(q + (row * heads + head) * D, heads * D, count,
                                                              same);
        rows.right(stage).template copy_rows<QUERIES, THREADS>(dout + (row * heads + head) * D, heads * D, count,
                                                               same);
        if (threadIdx.x < 2 * QUERIES) {
            const int r = threadIdx.x % QUERIES;
            const float* from = threadIdx.x < QUERIES ? logsumexp : delta;
            copy_word_async(shared_address(saved + stage * 2 * QUERIES + threadIdx.x),
                            from + (row + min(r, count - 1)) * heads + head, r < count ? 4 : 0);
        }
        commit_copies();
    };
    rows.first.template copy_rows<ROWS, THREADS>(k + at_row, kv_heads * D, keys, same);
    rows.second.template copy_rows<ROWS, THREADS>(v + at_row, kv_heads * D, keys, same);

    const ScoreMap map(scale, softcap);
    float dk_sums[WIDTH / 8][4] = {}, dv_sums[WIDTH / 8][4] = {};
    int head = kv_head * group_heads, index = tile.visits_begin, base = 0;
    const int head_begin = head, head_end = head + group_heads, own = warp * 16;
    int4 visit = visits[index];
    copy_queries(0, head, visit, base);
    for (int stage = 0; head < head_end; stage ^= 1) {
        wait_for_copies<0>();
        __syncthreads();
        if (head == head_begin && index == tile.visits_begin && base == 0) rows.hold();

        // The queries of this stage, and those of the next.
        const int offset = visit.z + base, queries = min(visit.y - base, QUERIES);
        base += QUERIES;
        if (base >= visit.y) {
            base = 0;
            if (++index == tile.visits_end) {
                index = tile.visits_begin;
                head++;
            }
            visit = visits[index];
        }
        if (head < head_end) copy_queries(stage ^ 1, head, visit, base);

        // Those that see any key of this warp.
        const int seen_begin = max(own - offset, 0);
        const int seen_end = own >= keys ? 0 : window > 0 ? min(own + 15 + window - offset, queries) : queries;
        const int group_begin = seen_begin / 16, group_end = (seen_end + 15) / 16;
        if (group_begin >= group_end) continue;
        float scores[QUERIES / 8][4], gradients[QUERIES / 8][4];
        rows.multiply(scores, gradients, stage, group_begin, group_end);
        const float* logsumexps = saved + stage * 2 * QUERIES + lane_column;
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float2 deltas = *(const float2*)(logsumexps + QUERIES + n * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) gradients[n][i] -= i % 2 == 0 ? deltas.x : deltas.y;
        }
        map.cap(scores, gradients);
        if (own + 15 > offset || window > 0 && own <= offset + QUERIES - 1 - window) {
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = own + lane_row + i / 2 * 8, query = offset + n * 8 + lane_column + i % 2;
                    if (key > query || window > 0 && key <= query - window) scores[n][i] = MINUS_INFINITY;
                }
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            if (group < group_begin || group_end <= group) continue;
#pragma unroll
            for (int n = group * 2; n < group * 2 + 2; n++) {
                const float2 shift = *(const float2*)(logsumexps + n * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float exponent = scores[n][i] * map.factor - (i % 2 == 0 ? shift.x : shift.y) * LOG2_E;
                    scores[n][i] = power_of_two(exponent);
                    gradients[n][i] *= scores[n][i];
                }
            }
            u32 factor[4];
            round_left(factor, scores[group * 2], scores[group * 2 + 1]);
            add_product<D>(dv_sums, factor, rows.right(stage), group * 16, piece);
            round_left(factor, gradients[group * 2], gradients[group * 2 + 1]);
            add_product<D>(dk_sums, factor, rows.left(stage), group * 16, piece);
        }
    }
    if (tile.slot >= 0) {
        partial += ((i64)tile.slot * kv_heads + kv_head) * 2 * ROWS * D + piece * 8;
        store_partial<D>(partial, keys, dk_sums);
        store_partial<D>(partial + ROWS * D, keys, dv_sums);
        return;
    }
    // Only this warp reads its rows of the first tile.
    u8* const k_staged = (u8*)shared;
    store_rows<D>(dk + at_row + piece * 8, kv_heads * D, keys, dk_sums, scale, k_staged);
    store_rows<D>(dv + at_row + piece * 8, kv_heads * D, keys, dv_sums, 1.0f, k_staged);
}

KERNEL __launch_bounds__(256) attention_backward_sums(bf16* dk, bf16* dv, const float* partial, const int4* sums,
                                                      int kv_heads, int head_dim, float scale) {
    const int4 tile = sums[blockIdx.x];
    const int kv_head = blockIdx.y, values = ROWS * head_dim;
    bf16* out = blockIdx.z == 0 ? dk : dv;
    const float factor = blockIdx.z == 0 ? scale : 1.0f;
    for (int at = threadIdx.x * 4; at < tile.y * head_dim; at += blockDim.x * 4) {
        float4 sum = {};
        for (int slot = tile.z; slot < tile.z + tile.w; slot++) {
            const float4 term =
                *(const float4*)(partial + (((i64)slot * kv_heads + kv_head) * 2 + blockIdx.z) * values + at);
            sum.x += term.x;
            sum.y += term.y;
            sum.z += term.z;
            sum.w += term.w;
        }
        const i64 row = tile.x + at / head_dim;
        *(uint2*)(out + (row * kv_heads + kv_head) * head_dim + at % head_dim) =
            make_uint2(to_bf16x2(sum.x * factor, sum.y * factor), to_bf16x2(sum.z * factor, sum.w * factor));
    }
}

// Blocks a multiprocessor are what registers and shared memory allow.
#define BACKWARD(D, BLOCKS)                                                                                       \
    KERNEL __launch_bounds__(THREADS, BLOCKS) attention_backward_queries_##D(                                     \
        bf16* dq, const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* logsumexp,          \
        const float* delta, const Span* spans, const int2* tiles, int heads, int kv_heads, float scale,           \
        float softcap, int window) {                                                                              \
        backward_queries<D>(dq, dout, q, k, v, logsumexp, delta, spans, tiles, heads, kv_heads, scale, softcap,   \
                            window);                                                                              \
    }                                                                                                             \
    KERNEL __launch_bounds__(THREADS, BLOCKS) attention_backward_keys_##D(                                        \
        bf16* dk, bf16* dv, float* partial, const bf16* dout, const bf16* q, const bf16* k, const bf16* v,        \
        const float* logsumexp, const float* delta, const KeyTile* tiles, const int4* visits, int heads,          \
        int kv_heads, float scale, float softcap, int window) {                                                   \
        backward_keys<D>(dk, dv, partial, dout, q, k, v, logsumexp, delta, tiles, visits, heads, kv_heads, scale, \
                         softcap, window);                                                                        \
    }

#if !defined(HEAD_DIM) || HEAD_DIM == 16
BACKWARD(16, 4)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 32
BACKWARD(32, 4)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 64
BACKWARD(64, 3)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 96
BACKWARD(96, 2)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 128
BACKWARD(128, 2)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 256
BACKWARD(256, 1)
#endif
