// What the compiler makes of the language: functions of the mathematical library with their slow paths, local arrays,
// switches, calls, integers of every width. Each thread computes one value of each kernel.
#include "common.cuh"

KERNEL mathematics(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    float* to = y + i * 16;
    to[0] = expf(v), to[1] = logf(fabsf(v) + 0.5f), to[2] = sinf(v), to[3] = cosf(v * 1e6f);
    to[4] = tanhf(v), to[5] = erff(v), to[6] = powf(fabsf(v) + 0.1f, 1.7f), to[7] = log1pf(fabsf(v));
    to[8] = 1.0f / v, to[9] = sqrtf(fabsf(v)), to[10] = rsqrtf(fabsf(v)), to[11] = fmodf(v, 0.37f);
    to[12] = __expf(v), to[13] = floorf(v), to[14] = rintf(v), to[15] = expm1f(v);
}

KERNEL doubles(double* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double v = x[i];
    y[i * 4] = exp(v), y[i * 4 + 1] = 1.0 / v, y[i * 4 + 2] = sqrt(fabs(v)), y[i * 4 + 3] = log(fabs(v) + 0.25);
}

__device__ __noinline__ int collatz(int n) {
    int steps = 0;
    while (n != 1) {
        n = n % 2 ? 3 * n + 1 : n / 2;
        steps++;
    }
    return steps;
}

KERNEL control(int* y, const int* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int digits[10] = {};
    int v = x[i];
    for (int rest = v; rest > 0; rest /= 10) digits[rest % 10]++;
    int chosen;
    switch (v % 7) {
        case 0: chosen = digits[0] * 3; break;
        case 1: chosen = v / 3; break;
        case 2: chosen = -v; break;
        case 3: chosen = v ^ 0x55; break;
        case 4: chosen = __popc(v) * 100; break;
        case 5: chosen = v << 2; break;
        default: chosen = digits[v % 10];
    }
    y[i * 4] = chosen, y[i * 4 + 1] = collatz(v), y[i * 4 + 2] = digits[1] * 10 + digits[9];
    y[i * 4 + 3] = __clz(v) + 100 * __ffs(v) + __brev(v) % 100;
}

KERNEL integers(u64* y, const u64* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u64 v = x[i];
    u64* to = y + i * 8;
    i64 s = (i64)v;
    to[0] = v / 12345, to[1] = v % 1000003, to[2] = s / -77, to[3] = s >> 13;
    to[4] = __umul64hi(v, 0x9e3779b97f4a7c15ull), to[5] = (u64)(short)v, to[6] = (u64)(unsigned char)(v >> 5);
    to[7] = (v << 17 | v >> 47) ^ (u64)(int)(float)(v & 0xffff);
}
