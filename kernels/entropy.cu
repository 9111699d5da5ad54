// Cross-entropy over logits as the head gives them (rows,V) f32, and its gradient.
//
//   cross_entropy         grid rows, block 512: nll (rows) f32, and dlogits (rows,V) bf16 where it is wanted
//   cross_entropy_strided the same with rows of logits and dlogits `ld` values apart
//   map_logits            grid ceil(n/1024), block 256: logits (n) f32 in place
//   No dynamic shared memory. Rows on 16 bytes (ld a multiple of 4) go four values at a time, others one by one;
//   both use whole sectors. With ld a multiple of 8 the products around it read aligned rows whatever the
//   vocabulary: an odd one without it costs gemm_nn its fast copies.
//
// Logits are mapped first: softcap * tanh(scale * x / softcap), or scale * x where softcap is 0. Bound by memory:
// 4 bytes a logit for nll, 4 in and 2 out more for the gradient (a row of 128,256 logits is 0.5 MB: it does not
// stay in L1).
//   v1  two readings: the largest and the sum in one, the sum brought along as the largest grows; 39 instructions
//       of PTX a logit with its gradient
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

// Values `at`.. of a row, N at once.
template <int N> DEVICE void load(float (&x)[N], const float* logits, int at) {
    if (N == 4) {
        float4 four = *(const float4*)(logits + at);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
        x[0] = logits[at];
    }
}

struct Row {
    const float* logits;
    bf16* dlogits;
    int target;
    Map map;
    float factor;

    template <int N> DEVICE void read(Softmax& softmax, int at) const {
        float x[N];
        load(x, logits, at);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = map(x[i]);
        softmax.take(x);
    }

    // dlogits = factor * (softmax - hit) * slope
    template <int N> DEVICE void gradient(float logsumexp, int at) const {
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

    // A thread takes every 512th N of the first values, and one of the others.
    template <int N> DEVICE void run(float* nll, int vocabulary) const {
        __shared__ float scratch[THREADS / WARP];
        int whole = vocabulary / N * N, other = whole + threadIdx.x;
        Softmax softmax{__int_as_float(0xff800000), 0.0f};
#pragma unroll 2
        for (int at = threadIdx.x * N; at < whole; at += THREADS * N) read<N>(softmax, at);
        if (other < vocabulary) read<1>(softmax, other);
        float largest = block_max(softmax.largest, scratch);
        float sum = block_sum(softmax.sum * __expf(softmax.largest - largest), scratch);
        float logsumexp = largest + logf(sum);
        if (threadIdx.x == 0) *nll = logsumexp - map(logits[target]);
        if (!dlogits) return;
#pragma unroll 2
        for (int at = threadIdx.x * N; at < whole; at += THREADS * N) gradient<N>(logsumexp, at);
        if (other < vocabulary) gradient<1>(logsumexp, other);
    }
};

DEVICE void entropy(float* nll, bf16* dlogits, const float* logits, const int* targets, int vocabulary, int ld,
                    const Map& map, float factor) {
    i64 first = (i64)blockIdx.x * ld;
    Row row{logits + first, dlogits ? dlogits + first : nullptr, targets[blockIdx.x], map, factor};
    if (ld % 4 == 0 && (u64)logits % 16 == 0 && (u64)dlogits % 8 == 0) row.run<4>(nll + blockIdx.x, vocabulary);
    else row.run<1>(nll + blockIdx.x, vocabulary);
}

// nll (rows); dlogits = gradient_scale * d nll / d logit of what the head gave, or null. targets (rows) in 0..V.
KERNEL __launch_bounds__(THREADS) cross_entropy(float* nll, bf16* dlogits, const float* logits, const int* targets,
                                                int vocabulary, float logit_scale, float softcap,
                                                float gradient_scale) {
    entropy(nll, dlogits, logits, targets, vocabulary, vocabulary, Map{logit_scale, softcap}, gradient_scale);
}

KERNEL __launch_bounds__(THREADS)
    cross_entropy_strided(float* nll, bf16* dlogits, const float* logits, const int* targets, int vocabulary,
                          int ld, float logit_scale, float softcap, float gradient_scale) {
    entropy(nll, dlogits, logits, targets, vocabulary, ld, Map{logit_scale, softcap}, gradient_scale);
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
