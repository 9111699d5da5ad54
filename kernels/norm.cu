// Root mean square norm, and its gradient.
//
//   inverse = 1 / sqrt(mean(x²) + epsilon)
//   y       = x · inverse · weight
//   dx     += inverse · (weight · dy) - inverse³ / group · (weight · dy · x summed) · x
//
// Shapes: x, y, dy, dx bf16, `groups` groups of `group` values each, dense: a row of T where the norm is of whole
// rows, a head where it is of heads. weight (channels) f32; group g uses weight[g · group % channels ...], and
// `group` divides `channels`.
// Overwrites y, adds to dx. The gradient recomputes the norm from x: nothing is saved. Sums in f32.
//
//   entry                       group        grid                         block
//   rms_norm, _backward         1 to 16384   groups                       ceil(group / 16) up to whole warps
//   rms_norm_heads, _backward   1 to 256     ceil(groups · lanes / 256)   256
// with lanes = ceil(group / 8) up to a power of two. No dynamic shared memory. Both are right for any group in
// their range; take `heads` up to 256, where a block a group would be mostly barriers.
//
// Moves 4 bytes a value forward (read x, write y) and 8 backward (x, dy, dx, dx), plus the weights once a row from
// L2, for 15 and 26 PTX instructions (heads: 21 and 37): bound by memory. A value is read once: it stays in
// registers between the sum and the product.
//
// Versions
//   v1  256 threads a row, two bytes an access, x read twice, the second time from L2.
//   v2  this: 16 bytes an access, at most two pieces of eight a thread, values kept in registers; groups of heads
//       share a warp, so that no lane is idle at 64 or 128 channels and there is no barrier at all.
#include "common.cuh"
#include "eight.cuh"

constexpr int HELD = 2;

// Where the eight values of a piece begin, and how many of them there are.
struct Piece {
    int first, count;
};

DEVICE Piece held(int index, int group) {
    int first = (index * blockDim.x + threadIdx.x) * 8;
    return {first, max(min(group - first, 8), 0)};
}

DEVICE float squares(const Eight& x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x.at[i] * x.at[i];
    return sum;
}

DEVICE float dot(const Eight& x, const Eight& y) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x.at[i] * y.at[i];
    return sum;
}

DEVICE Eight product(const Eight& x, const Eight& y, float factor) {
    Eight z;
#pragma unroll
    for (int i = 0; i < 8; i++) z.at[i] = x.at[i] * factor * y.at[i];
    return z;
}

// dx + inverse · weighted - pull · x
DEVICE Eight gradient(const Eight& dx, const Eight& weighted, const Eight& x, float inverse, float pull) {
    Eight sum;
#pragma unroll
    for (int i = 0; i < 8; i++) sum.at[i] = dx.at[i] + (inverse * weighted.at[i] - pull * x.at[i]);
    return sum;
}

// The sums of two numbers over a block of whole warps, the same bits in each thread.
DEVICE float2 block_sums(float2 x) {
    __shared__ float2 scratch[WARP];
    x = {warp_sum(x.x), warp_sum(x.y)};
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float2 sum = {0.0f, 0.0f};
    for (int warp = 0; warp < blockDim.x / WARP; warp++) {
        sum.x += scratch[warp].x;
        sum.y += scratch[warp].y;
    }
    return sum;
}

KERNEL __launch_bounds__(1024)
    rms_norm(bf16* y, const bf16* x, const float* weight, int groups, int group, int channels, float epsilon) {
    __shared__ float scratch[WARP];
    i64 start = (i64)blockIdx.x * group;
    weight += blockIdx.x % (channels / group) * group;
    bool wide = aligned(x, y, weight) && group % 8 == 0;
    Eight values[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        Piece piece = held(i, group);
        values[i] = load_eight(x + start + piece.first, piece.count, wide);
        sum += squares(values[i]);
    }
    float inverse = rsqrtf(block_sum(sum, scratch) / group + epsilon);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        Piece piece = held(i, group);
        Eight factors = load_eight(weight + piece.first, piece.count, wide);
        store_eight(y + start + piece.first, product(values[i], factors, inverse), piece.count, wide);
    }
}

KERNEL __launch_bounds__(1024) rms_norm_backward(bf16* dx, const bf16* dy, const bf16* x, const float* weight,
                                                 int groups, int group, int channels, float epsilon) {
    i64 start = (i64)blockIdx.x * group;
    weight += blockIdx.x % (channels / group) * group;
    bool wide = aligned(x, dy, dx) && aligned(weight) && group % 8 == 0;
    Eight values[HELD], weighted[HELD];
    float2 sums = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        Piece piece = held(i, group);
        values[i] = load_eight(x + start + piece.first, piece.count, wide);
        Eight factors = load_eight(weight + piece.first, piece.count, wide);
        weighted[i] = product(load_eight(dy + start + piece.first, piece.count, wide), factors, 1.0f);
        sums.x += squares(values[i]);
        sums.y += dot(values[i], weighted[i]);
    }
    sums = block_sums(sums);
    float inverse = rsqrtf(sums.x / group + epsilon);
    float pull = sums.y * inverse * inverse * inverse / group;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        Piece piece = held(i, group);
        bf16* to = dx + start + piece.first;
        Eight before = load_eight(to, piece.count, wide);
        store_eight(to, gradient(before, weighted[i], values[i], inverse, pull), piece.count, wide);
    }
}

// A group of up to 256 values: one piece a lane, of a power of two of lanes that stand together in a warp.
struct Head {
    i64 place;
    int weight, count, lanes;
};

DEVICE Head head(int groups, int group, int channels) {
    int bits = 32 - __clz((group + 7) / 8 - 1);
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    u32 index = thread >> bits;
    int first = (thread & ((1 << bits) - 1)) * 8;
    int count = index < groups ? max(min(group - first, 8), 0) : 0;
    return {(i64)index * group + first, (int)(index % (channels / group)) * group + first, count, 1 << bits};
}

DEVICE float lanes_sum(float x, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += exchange(x, mask);
    return x;
}

KERNEL __launch_bounds__(256) rms_norm_heads(bf16* y, const bf16* x, const float* weight, int groups, int group,
                                             int channels, float epsilon) {
    Head at = head(groups, group, channels);
    bool wide = aligned(x, y, weight) && group % 8 == 0;
    Eight values = load_eight(x + at.place, at.count, wide);
    float inverse = rsqrtf(lanes_sum(squares(values), at.lanes) / group + epsilon);
    Eight factors = load_eight(weight + at.weight, at.count, wide);
    store_eight(y + at.place, product(values, factors, inverse), at.count, wide);
}

KERNEL __launch_bounds__(256) rms_norm_heads_backward(bf16* dx, const bf16* dy, const bf16* x, const float* weight,
                                                      int groups, int group, int channels, float epsilon) {
    Head at = head(groups, group, channels);
    bool wide = aligned(x, dy, dx) && aligned(weight) && group % 8 == 0;
    Eight values = load_eight(x + at.place, at.count, wide);
    Eight factors = load_eight(weight + at.weight, at.count, wide);
    Eight weighted = product(load_eight(dy + at.place, at.count, wide), factors, 1.0f);
    float inverse = rsqrtf(lanes_sum(squares(values), at.lanes) / group + epsilon);
    float pull = lanes_sum(dot(values, weighted), at.lanes) * inverse * inverse * inverse / group;
    Eight before = load_eight(dx + at.place, at.count, wide);
    store_eight(dx + at.place, gradient(before, weighted, values, inverse, pull), at.count, wide);
}
