// Causal attention over spans, forward.
//
//   out = softmax(map(q · kᵀ)) · v     per head, map(s) = scale · s, or softcap · tanh(scale · s / softcap)
//   logsumexp = log(sum of exp(map(s)) over the keys seen), natural
//
// Shapes: q, out (T, heads·D) bf16; k, v (rows, kv_heads·D) bf16; logsumexp (T, heads) f32. scale > 0; softcap 0:
// none. Head h reads the keys and values of head h / (heads / kv_heads). Overwrites the rows of the spans'
// queries. A span's keys have positions: first those of its prefix, then its own; its queries are the last
// positions. A query sees the keys not after it, with window > 0 only the last `window` of them, itself among
// them.
//
//   entry                                         grid                        block  dynamic shared memory
//   attention_D, D = 16 32 64 96 128 256          (tiles, heads)              128    256 · D bytes
//   attention_parts_D, then attention_join,       (ceil(count/4), kv_heads)   128    256 · D bytes
//     for spans of few queries, instead           (joins, kv_heads)           128    0
// (64 KiB at D = 256: to be opted in.) -DHEAD_DIM=64 compiles the entries of that head dim only.
//
// tiles int2 (span, first query within the span), one for each 64 queries of a span or what is left of them:
//   for span in 0..spans { for first in (0..queries of span).step_by(64) { tiles.push((span, first)) } }
// In any order: no result depends on it. Those with the most keys first end soonest together.
//
// parts int4 (span, first row, first position, keys), `count` of them: some keys of a span for 16 of its rows,
// where row r is of query r / group and head r % group of the heads / kv_heads = group that share the keys. The
// parts of the same rows follow each other and hold every position that a query sees once, other positions may be
// among them. joins int4 (span, first row, first part, parts). partial f32: count · kv_heads · 16 · (D + 2). Parts
// of 64 keys are many enough to read a cache with the whole device; a result depends on how keys are parted.
//
// A warp has 16 queries in registers, with their output and its scores; a block's four warps share tiles of 64
// keys (32 at D = 256) that cp.async brings while they compute: values while scores are made, the next keys during
// softmax and output. Softmax is that of the keys so far, corrected as its maximum grows. Tiles begin at multiples
// of their size, so a query's bits are the same whatever queries share its tile. A warp leaves out the 16 keys at
// a time that none of its queries sees. Of parts, each warp has its own and meets no barrier; the heads of a group
// are rows of one tile, so that keys and values are read once.
//
// Moves q and out once, k and v once per tile of queries (mostly from L2). 4 · D flops a pair on tensor cores:
// bound by them from some 200 keys on, below by the latency of a tile. Parts: bound by reading k and v.
//
// Versions (instructions of the inner loop for sm_89 at D = 128, with those for masks and caps that are mostly
// jumped over; 128 of them products)
//   v1  permuted rows instead of padded ones and the queries' tile lent to the values: 32 KiB at D = 128 instead
//       of 52, so that registers alone limit blocks. Addresses of fragments in 64 bits: 1501.
//   v2  addresses of fragments are two lane constants and immediates: 1109.
//   v3  this: sums are corrected only where a maximum has grown.
//   Not tried: two blocks of 16 queries a warp, which would halve the loads of keys' and values' fragments where
//   those bind (cards with 8 cycles a product or less).
#include "common.cuh"
#include "attention.cuh"
#include "span.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int QUERIES = WARPS * 16;

// The softmax of the keys so far and their values' sum, of 16 queries: the lane's rows are lane / 4 and 8 more.
template <int D> struct Softmax {
    float sums[D / 8][4] = {}, most[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f};
    // The exponents of two that have been taken off.
    float shift[2];

    // Turns scores into probabilities, relative to the most so far; `factor` > 0 makes them exponents of two.
    // `total` is of the lane's columns only.
    template <int N> DEVICE void take(float (&scores)[N][4], float factor) {
        float correction[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float more = most[half];
#pragma unroll
            for (int n = 0; n < N; n++) more = fmaxf(more, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            more = fmaxf(more, exchange(more, 1));
            more = fmaxf(more, exchange(more, 2));
            shift[half] = more == MINUS_INFINITY ? 0.0f : more * factor;
            correction[half] = power_of_two(most[half] * factor - shift[half]);
            most[half] = more;
            total[half] *= correction[half];
        }
        if (__any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[n][i] *= correction[i / 2];
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = power_of_two(scores[n][i] * factor - shift[i / 2]);
                total[i / 2] += scores[n][i];
            }
    }

    // Adds the values of 16 keys, from `row` of a tile on, by their probabilities.
    DEVICE void add(const float (&left)[4], const float (&right)[4], Tile<D> values, int row) {
        u32 probabilities[4];
        round_left(probabilities, left, right);
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            u32 read[4];
            values.load_right(read, row, step * 2);
            mma_16x16(sums[step * 2], sums[step * 2 + 1], probabilities, read);
        }
    }

    // Makes `total` that of the row.
    DEVICE void close() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[half] += exchange(total[half], 1);
            total[half] += exchange(total[half], 2);
        }
    }
};

template <int D>
DEVICE void attend(bf16* out, float* logsumexp, const bf16* q, const bf16* k, const bf16* v, const Span* spans,
                   const int2* tiles, int heads, int kv_heads, float scale, float softcap, int window) {
    constexpr int KEYS = D <= 128 ? 64 : 32, GROUPS = KEYS / 16, STEPS = D / 16;
    // Whether queries stay in registers as fragments.
    constexpr bool HELD = D <= 128;
    extern __shared__ uint4 shared[];
    const Tile<D> k_tile = {shared_address(shared)}, v_tile = {k_tile.address + KEYS * D * 2};
    const Tile<D> q_tile = {HELD ? v_tile.address : v_tile.address + KEYS * D * 2};

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lane_row = lane / 4,
              lane_column = lane % 4 * 2;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const int2 tile = tiles[blockIdx.x];
    const Span span = spans[tile.x];
    const int row = span.queries_start + tile.y, queries = min(span.queries_end - row, QUERIES);
    const int prefix = span.prefix_end - span.prefix_start;
    // Positions: of the first query, and those the block looks at.
    const int first = prefix + span.keys_end - span.keys_start - (span.queries_end - row);
    const int begin = window > 0 ? max(first + 1 - window, 0) / KEYS * KEYS : 0, end = first + queries;
    q += head * D;
    k += kv_head * D;
    v += kv_head * D;

    auto copy_keys = [&](Tile<D> to, const bf16* from, int at) {
        to.template copy_rows<KEYS, THREADS>(from, kv_heads * D, end - at, [&](int r) {
            return at + r + (at + r < prefix ? span.prefix_start : span.keys_start - prefix);
        });
        commit_copies();
    };
    q_tile.template copy_rows<QUERIES, THREADS>(q, heads * D, queries, [&](int r) { return row + r; });
    copy_keys(k_tile, k, begin);

    u32 q_held[HELD ? STEPS : 1][4];
    if (HELD) {
        wait_for_copies<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < STEPS; step++) q_tile.load_left(q_held[HELD ? step : 0], warp * 16, step * 2);
    }

    // The keys that any query of this warp sees, and the position of its first query.
    const int own = first + warp * 16;
    const int seen_begin = window > 0 ? max(own + 1 - window, 0) : 0;
    const int seen_end = warp * 16 < queries ? min(own + 16, end) : 0;
    const ScoreMap map(scale, softcap);
    Softmax<D> softmax;

    for (int at = begin; at < end; at += KEYS) {
        wait_for_copies<0>();
        __syncthreads();
        copy_keys(v_tile, v, at);

        const int group_begin = max(seen_begin - at, 0) / 16, group_end = (min(seen_end - at, KEYS) + 15) / 16;
        float scores[GROUPS * 2][4];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float (&left)[4] = scores[group * 2], (&right)[4] = scores[group * 2 + 1];
            const bool seen = group_begin <= group && group < group_end;
#pragma unroll
            for (int i = 0; i < 4; i++) left[i] = right[i] = seen ? 0.0f : MINUS_INFINITY;
            if (!seen) continue;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                u32 q_read[4], k_read[4];
                if (!HELD) q_tile.load_left(q_read, warp * 16, step * 2);
                k_tile.load_right_transposed(k_read, group * 16, step * 2);
                mma_16x16(left, right, HELD ? q_held[HELD ? step : 0] : q_read, k_read);
            }
        }

        wait_for_copies<0>();
        __syncthreads();
        if (at + KEYS < end) copy_keys(k_tile, k, at + KEYS);
        if (group_begin >= group_end) continue;

        map.cap(scores);
        // What is not seen; a cap has made of it -1 where it was left out.
        if (at + KEYS > own + 1 || at < seen_begin + 15 && window > 0) {
#pragma unroll
            for (int n = 0; n < GROUPS * 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = at + n * 8 + lane_column + i % 2, query = own + lane_row + i / 2 * 8;
                    if (key > query || window > 0 && key <= query - window) scores[n][i] = MINUS_INFINITY;
                }
        }

        softmax.take(scores, map.factor);
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
            if (group_begin <= group && group < group_end)
                softmax.add(scores[group * 2], scores[group * 2 + 1], v_tile, group * 16);
    }

    // The output goes through shared memory, 16 rows a warp, to leave in whole pieces.
    __syncthreads();
    u8* staged = (u8*)shared + (q_tile.address - k_tile.address);
    softmax.close();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = warp * 16 + lane_row + half * 8;
        if (lane % 4 == 0 && r < queries)
            logsumexp[(i64)(row + r) * heads + head] = (softmax.shift[half] + __log2f(softmax.total[half])) * LN_2;
        const float inverse = __fdividef(1.0f, softmax.total[half]);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float* sums = softmax.sums[n] + half * 2;
            *(u32*)(staged + Tile<D>::offset(r, n) + lane_column * 2) =
                to_bf16x2(sums[0] * inverse, sums[1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll
    for (int index = 0; index < D / 16; index++) {
        const int r = warp * 16 + (index * WARP + lane) / (D / 8), piece = (index * WARP + lane) % (D / 8);
        if (r < queries)
            *(uint4*)(out + ((i64)(row + r) * heads + head) * D + piece * 8) =
                *(const uint4*)(staged + Tile<D>::offset(r, piece));
    }
}

template <int D>
DEVICE void attend_part(float* partial, const bf16* q, const bf16* k, const bf16* v, const Span* spans,
                        const int4* parts, int count, int heads, int kv_heads, float scale, float softcap,
                        int window) {
    constexpr int STEPS = D / 16;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lane_row = lane / 4,
              lane_column = lane % 4 * 2;
    const int index = blockIdx.x * WARPS + warp, kv_head = blockIdx.y, group = heads / kv_heads;
    // No barrier follows but those of warps.
    if (index >= count) return;
    extern __shared__ uint4 shared[];
    const Tile<D> k_tile = {shared_address(shared) + warp * 64 * D}, v_tile = {k_tile.address + 32 * D};

    const int4 part = parts[index];
    const Span span = spans[part.x];
    const int queries = span.queries_end - span.queries_start, rows = min(queries * group - part.y, 16);
    const int prefix = span.prefix_end - span.prefix_start, end = part.z + part.w;
    const int first = prefix + span.keys_end - span.keys_start - queries;
    k += kv_head * D;
    v += kv_head * D;
    auto copy_keys = [&](Tile<D> to, const bf16* from, int at) {
        auto row_of = [&](int r) {
            return at + r + (at + r < prefix ? span.prefix_start : span.keys_start - prefix);
        };
        if (at < end) to.template copy_rows<16, WARP>(from, kv_heads * D, end - at, row_of, lane);
        commit_copies();
    };
    copy_keys(k_tile, k, part.z);
    copy_keys(v_tile, v, part.z);

    // Rows beyond the last are like it.
    u32 held[STEPS][4];
    int position[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = part.y + min(lane_row + half * 8, rows - 1), query = row / group;
        position[half] = first + query;
        const i64 at = (i64)(span.queries_start + query) * heads + kv_head * group + row % group;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const u32* from = (const u32*)(q + at * D + step * 16 + lane_column);
            held[step][half] = from[0];
            held[step][half + 2] = from[4];
        }
    }

    const ScoreMap map(scale, softcap);
    Softmax<D> softmax;
    for (int at = part.z; at < end; at += 16) {
        wait_for_copies<1>();
        __syncwarp();
        float scores[2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 k_read[4];
            k_tile.load_right_transposed(k_read, 0, step * 2);
            mma_16x16(scores[0], scores[1], held[step], k_read);
        }
        __syncwarp();
        copy_keys(k_tile, k, at + 16);
        map.cap(scores);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = at + n * 8 + lane_column + i % 2, query = position[i / 2];
                if (key >= end || key > query || window > 0 && key <= query - window)
                    scores[n][i] = MINUS_INFINITY;
            }
        softmax.take(scores, map.factor);
        wait_for_copies<1>();
        __syncwarp();
        softmax.add(scores[0], scores[1], v_tile, 0);
        __syncwarp();
        copy_keys(v_tile, v, at + 16);
    }

    softmax.close();
    const i64 slot = (i64)index * kv_heads + kv_head;
    float* stats = partial + (i64)count * kv_heads * 16 * D + slot * 32;
    partial += slot * 16 * D;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane_row + half * 8;
        if (r >= rows) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            store_pair(partial + r * D + n * 8 + lane_column, softmax.sums[n][half * 2],
                       softmax.sums[n][half * 2 + 1]);
        const float total = softmax.total[half], shift = total > 0.0f ? softmax.shift[half] : MINUS_INFINITY;
        if (lane % 4 == 0) store_pair(stats + r * 2, shift, total);
    }
}

// A warp a row; its lanes hold four neighbouring values each, 128 at a time.
KERNEL __launch_bounds__(THREADS)
    attention_join(bf16* out, float* logsumexp, const float* partial, const Span* spans, const int4* joins,
                   int count, int heads, int kv_heads, int head_dim) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, kv_head = blockIdx.y, group = heads / kv_heads;
    // Span, first row, first part, parts.
    const int4 join = joins[blockIdx.x];
    const Span span = spans[join.x];
    const int rows = min((span.queries_end - span.queries_start) * group - join.y, 16);
    const float* stats = partial + (i64)count * kv_heads * 16 * head_dim;
    for (int r = warp; r < rows; r += WARPS) {
        auto slot = [&](int part) { return ((i64)(join.z + part) * kv_heads + kv_head) * 16 + r; };
        float most = MINUS_INFINITY, total = 0.0f;
        for (int part = lane; part < join.w; part += WARP) most = fmaxf(most, stats[slot(part) * 2]);
        most = warp_max(most);
        for (int part = lane; part < join.w; part += WARP)
            total += stats[slot(part) * 2 + 1] * power_of_two(stats[slot(part) * 2] - most);
        total = warp_sum(total);
        const i64 row = join.y + r,
                  at = (span.queries_start + row / group) * heads + kv_head * group + row % group;
        if (lane == 0) logsumexp[at] = (most + __log2f(total)) * LN_2;
        for (int d = lane * 4; d < head_dim; d += WARP * 4) {
            float4 sum = {};
            for (int part = 0; part < join.w; part++) {
                const float weight = power_of_two(stats[slot(part) * 2] - most);
                const float4 term = *(const float4*)(partial + slot(part) * head_dim + d);
                sum.x += term.x * weight;
                sum.y += term.y * weight;
                sum.z += term.z * weight;
                sum.w += term.w * weight;
            }
            const float inverse = __fdividef(1.0f, total);
            *(uint2*)(out + at * head_dim + d) = make_uint2(to_bf16x2(sum.x * inverse, sum.y * inverse),
                                                            to_bf16x2(sum.z * inverse, sum.w * inverse));
        }
    }
}

#define ATTENTION(D, BLOCKS)                                                                                      \
    KERNEL __launch_bounds__(THREADS, BLOCKS) attention_##D(                                                      \
        bf16* out, float* logsumexp, const bf16* q, const bf16* k, const bf16* v, const Span* spans,              \
        const int2* tiles, int heads, int kv_heads, float scale, float softcap, int window) {                     \
        attend<D>(out, logsumexp, q, k, v, spans, tiles, heads, kv_heads, scale, softcap, window);                \
    }                                                                                                             \
    KERNEL __launch_bounds__(THREADS, BLOCKS) attention_parts_##D(                                                \
        float* partial, const bf16* q, const bf16* k, const bf16* v, const Span* spans, const int4* parts,        \
        int count, int heads, int kv_heads, float scale, float softcap, int window) {                             \
        attend_part<D>(partial, q, k, v, spans, parts, count, heads, kv_heads, scale, softcap, window);           \
    }

// Blocks a multiprocessor are what registers allow.
#if !defined(HEAD_DIM) || HEAD_DIM == 16
ATTENTION(16, 4)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 32
ATTENTION(32, 4)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 64
ATTENTION(64, 3)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 96
ATTENTION(96, 2)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 128
ATTENTION(128, 2)
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 256
ATTENTION(256, 1)
#endif
