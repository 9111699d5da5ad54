// Causal attention over spans, forward.
//
//   out = softmax(map(q · kᵀ)) · v     per head, map(s) = scale · s, or softcap · tanh(scale · s / softcap)
//   logsumexp = log(sum of exp(map(s)) over the keys seen), natural
//
// Shapes: q, out (T, heads·D) bf16; k, v (rows, kv_heads·D) bf16; logsumexp (T, heads) f32. scale > 0; softcap 0: none.
// Head h reads the keys and values of head h / (heads / kv_heads). Overwrites the rows of the spans' queries.
// A span's keys have positions: first those of its prefix, then its own; its queries are the last positions. A query
// sees the keys not after it, with window > 0 only the last `window` of them, itself among them.
//
//   entry                                   grid            block  dynamic shared memory
//   attention_D, D = 16 32 64 96 128 256    (tiles, heads)  128    256 · D bytes (64 KiB at D = 256: opt in)
//
// tiles int2 (span, first query within the span), one for each 64 queries of a span or what is left of them:
//   for span in 0..spans { for first in (0..queries of span).step_by(64) { tiles.push((span, first)) } }
// In any order: no result depends on it. Those with the most keys first end soonest together.
//
// A warp has 16 queries in registers, with their output and its scores; a block's four warps share tiles of 64 keys (32 at
// D = 256) that cp.async brings while they compute: values while scores are made, the next keys during softmax and
// output. Softmax is that of the keys so far, corrected as its maximum grows. Tiles begin at multiples of their size, so
// a query's bits are the same whatever queries share its tile. A warp leaves out the 16 keys at a time that none of its
// queries sees.
//
// Moves q and out once, k and v once per tile of queries (mostly from L2). 4 · D flops a pair on tensor cores: bound by
// them from some 200 keys on, below by the latency of a tile.
//
// Versions
//   v1  padded rows in shared memory: 52 KiB at D = 128, one block a multiprocessor on consumer cards.
//   v2  this: permuted rows, the tile of queries lends its place to the values: 32 KiB, three blocks.
#include "common.cuh"
#include "attention.cuh"
#include "span.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int QUERIES = WARPS * 16;

template <int D>
DEVICE void attention(bf16* out, float* logsumexp, const bf16* q, const bf16* k, const bf16* v, const Span* spans,
                      const int2* tiles, int heads, int kv_heads, float scale, float softcap, int window) {
    constexpr int KEYS = D <= 128 ? 64 : 32, GROUPS = KEYS / 16, STEPS = D / 16;
    // Whether queries stay in registers as fragments.
    constexpr bool HELD = D <= 128;
    extern __shared__ uint4 shared[];
    const Tile<D> k_tile = {shared_address(shared)}, v_tile = {k_tile.address + KEYS * D * 2};
    const Tile<D> q_tile = {HELD ? v_tile.address : v_tile.address + KEYS * D * 2};

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, lane_row = lane / 4, lane_column = lane % 4 * 2;
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
    const float capped = 2.0f * LOG2_E * scale / softcap;
    const float factor = (softcap > 0.0f ? softcap : scale) * LOG2_E;
    float sums[D / 8][4] = {}, most[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f};

    for (int at = begin; at < end; at += KEYS) {
        wait_for_copies<0>();
        __syncthreads();
        copy_keys(v_tile, v, at);

        const int group_begin = max(seen_begin - at, 0) / 16, group_end = (min(seen_end - at, KEYS) + 15) / 16;
        float scores[GROUPS * 2][4];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float(&left)[4] = scores[group * 2], (&right)[4] = scores[group * 2 + 1];
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

        if (softcap > 0.0f) {
#pragma unroll
            for (int n = 0; n < GROUPS * 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    scores[n][i] = hyperbolic_tangent(scores[n][i], capped);
        }
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

        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float more = most[half];
#pragma unroll
            for (int n = 0; n < GROUPS * 2; n++) more = fmaxf(more, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            more = fmaxf(more, exchange(more, 1));
            more = fmaxf(more, exchange(more, 2));
            shift[half] = more == MINUS_INFINITY ? 0.0f : more * factor;
            const float correction = power_of_two(most[half] * factor - shift[half]);
            most[half] = more;
            total[half] *= correction;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                sums[n][half * 2] *= correction;
                sums[n][half * 2 + 1] *= correction;
            }
        }
#pragma unroll
        for (int n = 0; n < GROUPS * 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = power_of_two(scores[n][i] * factor - shift[i / 2]);
                total[i / 2] += scores[n][i];
            }

#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            if (group < group_begin || group_end <= group) continue;
            u32 probabilities[4];
            round_left(probabilities, scores[group * 2], scores[group * 2 + 1]);
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                u32 v_read[4];
                v_tile.load_right(v_read, group * 16, step * 2);
                mma_16x16(sums[step * 2], sums[step * 2 + 1], probabilities, v_read);
            }
        }
    }

    // The output goes through shared memory, 16 rows a warp, to leave in whole pieces.
    __syncthreads();
    u8* staged = (u8*)shared + (q_tile.address - k_tile.address);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] += exchange(total[half], 1);
        total[half] += exchange(total[half], 2);
        const int r = warp * 16 + lane_row + half * 8;
        if (lane % 4 == 0 && r < queries)
            logsumexp[(i64)(row + r) * heads + head] = (most[half] * factor + __log2f(total[half])) * LN_2;
        const float inverse = __fdividef(1.0f, total[half]);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const u32 pair = to_bf16x2(sums[n][half * 2] * inverse, sums[n][half * 2 + 1] * inverse);
            *(u32*)(staged + Tile<D>::offset(r, n) + lane_column * 2) = pair;
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

#define ATTENTION(D, BLOCKS)                                                                                           \
    KERNEL __launch_bounds__(THREADS, BLOCKS) attention_##D(                                                                   \
        bf16* out, float* logsumexp, const bf16* q, const bf16* k, const bf16* v, const Span* spans, const int2* tiles, \
        int heads, int kv_heads, float scale, float softcap, int window) {                                            \
        attention<D>(out, logsumexp, q, k, v, spans, tiles, heads, kv_heads, scale, softcap, window);                  \
    }

// Blocks a multiprocessor are what registers allow.
ATTENTION(16, 4)
ATTENTION(32, 4)
ATTENTION(64, 3)
ATTENTION(96, 2)
ATTENTION(128, 2)
ATTENTION(256, 1)
