// A causal convolution of each channel by itself with a silu, and its gradient.
//
//   u[t] = bias + Σ weight[k] · x[t - taps + 1 + k]         y = u · sigmoid(u)
//   dx[s] = Σ weight[taps - 1 - k] · du[s + k]              du = dy · sigmoid(u) · (1 + u · (1 - sigmoid(u)))
//
// Shapes: x, y, dy, dx (T, channels) bf16, dense; weight (channels, taps) f32, bias (channels) f32; taps 2 to 4.
// Rows are the query rows of spans. `tiles`: (span, first row within that span) of every 32 rows of every span, in
// any order. Rows before a span's first are zero, or those of its slot: past and next (slots, taps - 1, channels)
// f32 with slots (spans), all three null where nothing is carried. `next` gets the last taps - 1 rows of each
// span. Overwrites the rows of its spans. The gradient takes no carry and saves nothing: it recomputes u.
//
// Both: grid (ceil(channels / 1024), tiles), block 128; no shared memory. A thread has eight channels and goes
// down the rows with the last ones in registers, so a value is read once, but for three rows at either end of a
// tile.
//
// Moves 4 bytes a value forward (+ 9% at the ends), 6 backward (+ 14%), for 15 and 33 PTX instructions: bound by
// memory.
//
// Versions
//   v1  this. Fewer taps than four are four with zeros before them. A thread a value would be simpler, with four
//       times the accesses, of two bytes each.
#include "common.cuh"
#include "eight.cuh"
#include "span.cuh"

constexpr int TAPS = 4, ROWS = 32;

// The rows of a tile, and what a thread has of them.
struct Tile {
    // First and end of the span, and of the tile.
    int start, stop, first, end;
    int channel, count;
    bool wide;
};

DEVICE Tile tile_of(const Span* spans, const int2* tiles, int channels, bool wide) {
    int2 place = tiles[blockIdx.y];
    int start = spans[place.x].queries_start, stop = spans[place.x].queries_end;
    int first = start + place.y, channel = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    return {start,
            stop,
            first,
            min(first + ROWS, stop),
            channel,
            min(channels - channel, 8),
            wide && channels % 8 == 0};
}

// The taps of eight channels, oldest first; those that are missing are zero.
DEVICE void load_taps(Eight (&weights)[TAPS], const float* weight, int channel, int count, int taps) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float* own = weight + (i64)(channel + i) * taps - (TAPS - taps);
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++)
            weights[tap].at[i] = i < count && tap >= TAPS - taps ? own[tap] : 0.0f;
    }
}

DEVICE Eight convolve(const Eight (&weights)[TAPS], const Eight (&rows)[TAPS], const Eight& bias) {
    Eight u = bias;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
#pragma unroll
        for (int i = 0; i < 8; i++) u.at[i] += weights[tap].at[i] * rows[tap].at[i];
    }
    return u;
}

// Makes room for a row at the end.
DEVICE void advance(Eight (&rows)[TAPS]) {
#pragma unroll
    for (int tap = 0; tap + 1 < TAPS; tap++) rows[tap] = rows[tap + 1];
}

KERNEL __launch_bounds__(128, 4)
    causal_conv(bf16* y, const bf16* x, const float* weight, const float* bias, const Span* spans,
                const int2* tiles, const int* slots, const float* past, float* next, int channels, int taps) {
    Tile tile = tile_of(spans, tiles, channels, aligned(x, y) && aligned(bias, past, next));
    if (tile.count <= 0) return;
    x += tile.channel;
    y += tile.channel;
    i64 state = slots ? (i64)slots[tiles[blockIdx.y].x] * (taps - 1) * channels + tile.channel : 0;
    Eight weights[TAPS], rows[TAPS] = {}, biases = load_eight(bias + tile.channel, tile.count, tile.wide);
    load_taps(weights, weight, tile.channel, tile.count, taps);
#pragma unroll
    for (int tap = 1; tap < TAPS; tap++) {
        int row = tile.first - TAPS + tap, kept = row - tile.start + taps - 1;
        if (row >= tile.start) {
            rows[tap] = load_eight(x + (i64)row * channels, tile.count, tile.wide);
        } else if (slots && kept >= 0) {
            rows[tap] = load_eight(past + state + (i64)kept * channels, tile.count, tile.wide);
        }
    }
#pragma unroll 4
    for (int row = tile.first; row < tile.end; row++) {
        advance(rows);
        rows[TAPS - 1] = load_eight(x + (i64)row * channels, tile.count, tile.wide);
        Eight u = convolve(weights, rows, biases);
#pragma unroll
        for (int i = 0; i < 8; i++) u.at[i] *= sigmoid(u.at[i]);
        store_eight(y + (i64)row * channels, u, tile.count, tile.wide);
    }
    if (!slots || tile.end < tile.stop) return;
#pragma unroll
    for (int tap = 1; tap < TAPS; tap++) {
        int kept = tap - TAPS + taps - 1;
        if (kept >= 0) store_eight(next + state + (i64)kept * channels, rows[tap], tile.count, tile.wide);
    }
}

KERNEL __launch_bounds__(128, 3)
    causal_conv_backward(bf16* dx, const bf16* dy, const bf16* x, const float* weight, const float* bias,
                         const Span* spans, const int2* tiles, int channels, int taps) {
    Tile tile = tile_of(spans, tiles, channels, aligned(x, dy, dx) && aligned(bias));
    if (tile.count <= 0) return;
    x += tile.channel;
    dy += tile.channel;
    dx += tile.channel;
    Eight weights[TAPS], rows[TAPS] = {}, slopes[TAPS] = {};
    Eight biases = load_eight(bias + tile.channel, tile.count, tile.wide);
    load_taps(weights, weight, tile.channel, tile.count, taps);
#pragma unroll
    for (int tap = 1; tap < TAPS; tap++) {
        int row = tile.first - TAPS + tap;
        if (row >= tile.start) rows[tap] = load_eight(x + (i64)row * channels, tile.count, tile.wide);
    }
#pragma unroll 2
    for (int row = tile.first; row < tile.end + TAPS - 1; row++) {
        advance(rows);
        advance(slopes);
        Eight du = {};
        if (row < tile.stop) {
            rows[TAPS - 1] = load_eight(x + (i64)row * channels, tile.count, tile.wide);
            du = load_eight(dy + (i64)row * channels, tile.count, tile.wide);
            Eight u = convolve(weights, rows, biases);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float share = sigmoid(u.at[i]);
                du.at[i] *= share * (1.0f + u.at[i] * (1.0f - share));
            }
        }
        slopes[TAPS - 1] = du;
        int ready = row - TAPS + 1;
        if (ready < tile.first) continue;
        Eight sum = {};
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum.at[i] += weights[TAPS - 1 - tap].at[i] * slopes[tap].at[i];
        }
        store_eight(dx + (i64)ready * channels, sum, tile.count, tile.wide);
    }
}
