// Cross-entropy over logits as the head gives them (rows,V) f32, and its gradient.
//
//   cross_entropy  grid rows, block 512: nll (rows) f32, and dlogits (rows,V) bf16 where it is wanted
//   map_logits     grid ceil(n/1024), block 256: logits (n) f32 in place
//   No dynamic shared memory. Rows on 16 bytes (V a multiple of 4) go four values at a time, others one by one; both use
//   whole sectors.
//
// Logits are mapped first: softcap * tanh(scale * x / softcap), or scale * x where softcap is 0. Bound by memory: 4 bytes
// a logit for nll, 4 in and 2 out more for the gradient (a row of 128,256 logits is 0.5 MB: it does not stay in L1).
//   v1  largest, sum, gradient: three readings
//   v2  largest and sum in one reading, the sum brought along as the largest grows: two readings
#include "common.cuh"

constexpr int THREADS = 512;

// The map from what the head gives to a logit.
struct Map {
    float scale;
    float softcap;      // 0: none

    DEVICE float operator()(float x, float& slope) const {
        slope = scale;
        if (softcap == 0.0f) return scale * x;
        float bent = tanhf(scale * x / softcap);
        slope = scale * (1.0f - bent * bent);
        return softcap * bent;
    }
    DEVICE float operator()(float x) const {
        float slope;
        return (*this)(x, slope);
    }
};

// sum of exp(logit - largest), as far as one thread has read.
struct Softmax {
    float largest;
    float sum;

    // One of `N` values is finite.
    template <int N> DEVICE void take(const float (&logits)[N]) {
        float most = largest;
#pragma unroll
        for (int i = 0; i < N; i++) most = fmaxf(most, logits[i]);
        sum *= __expf(largest - most);
#pragma unroll
        for (int i = 0; i < N; i++) sum += __expf(logits[i] - most);
        largest = most;
    }
};

// What each of the block's threads does to the values of a row, N at a time.
template <int N> struct Row {
    static DEVICE void load(float (&x)[N], const float* logits, int at) {
        if (N == 4) {
            float4 four = *(const float4*)(logits + at);
            x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        } else {
            x[0] = logits[at];
        }
    }

    static DEVICE Softmax read(const float* logits, int vocabulary, const Map& map) {
        Softmax softmax{__int_as_float(0xff800000), 0.0f};
#pragma unroll 2
        for (int at = threadIdx.x * N; at < vocabulary; at += THREADS * N) {
            float x[N];
            load(x, logits, at);
#pragma unroll
            for (int i = 0; i < N; i++) x[i] = map(x[i]);
            softmax.take(x);
        }
        return softmax;
    }

    // dlogits = factor * (softmax - hit) * slope
    static DEVICE void gradient(bf16* dlogits, const float* logits, int vocabulary, const Map& map, float logsumexp,
                                int target, float factor) {
#pragma unroll 2
        for (int at = threadIdx.x * N; at < vocabulary; at += THREADS * N) {
            float x[N];
            load(x, logits, at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                float slope, logit = map(x[i], slope);
                x[i] = factor * slope * (__expf(logit - logsumexp) - (at + i == target ? 1.0f : 0.0f));
            }
            if (N == 4) *(uint2*)(dlogits + at) = make_uint2(to_bf16x2(x[0], x[1]), to_bf16x2(x[N - 2], x[N - 1]));
            else dlogits[at] = to_bf16(x[0]);
        }
    }
};

template <int N>
DEVICE void entropy_of_row(float* nll, bf16* dlogits, const float* logits, int target, int vocabulary, const Map& map,
                           float factor) {
    __shared__ float scratch[THREADS / WARP];
    Softmax softmax = Row<N>::read(logits, vocabulary, map);
    float largest = block_max(softmax.largest, scratch);
    float sum = block_sum(softmax.sum * __expf(softmax.largest - largest), scratch);
    float logsumexp = largest + logf(sum);
    if (threadIdx.x == 0) *nll = logsumexp - map(logits[target]);
    if (dlogits) Row<N>::gradient(dlogits, logits, vocabulary, map, logsumexp, target, factor);
}

// nll (rows); dlogits = gradient_scale * d nll / d logit of what the head gave, or null. targets (rows) in 0..V.
KERNEL __launch_bounds__(THREADS) cross_entropy(float* nll, bf16* dlogits, const float* logits, const int* targets,
                                                int vocabulary, float logit_scale, float softcap,
                                                float gradient_scale) {
    i64 first = (i64)blockIdx.x * vocabulary;
    int target = targets[blockIdx.x];
    Map map{logit_scale, softcap};
    bf16* dlogits_row = dlogits ? dlogits + first : nullptr;
    bool in_fours = vocabulary % 4 == 0 && (u64)logits % 16 == 0 && (u64)dlogits % 8 == 0;
    if (in_fours) entropy_of_row<4>(nll + blockIdx.x, dlogits_row, logits + first, target, vocabulary, map, gradient_scale);
    else entropy_of_row<1>(nll + blockIdx.x, dlogits_row, logits + first, target, vocabulary, map, gradient_scale);
}

KERNEL map_logits(float* logits, i64 n, float scale, float softcap) {
    Map map{scale, softcap};
    i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at + 4 <= n && (u64)logits % 16 == 0) {
        float4 x = *(const float4*)(logits + at);
        *(float4*)(logits + at) = make_float4(map(x.x), map(x.y), map(x.z), map(x.w));
    } else {
        for (i64 i = at; i < at + 4 && i < n; i++) logits[i] = map(logits[i]);
    }
}
