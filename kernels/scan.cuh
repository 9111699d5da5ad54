// What the scans share.
#pragma once

#include "common.cuh"

// log(1 + exp(x))
DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

// A Mamba2 row's dt, clamped after its softplus; what is no number stays none.
DEVICE float time_step(float raw, float low, float high) {
    float soft = softplus(raw);
    return soft < low ? low : soft > high ? high : soft;
}
