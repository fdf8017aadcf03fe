// Norms of rows: y = normalized(x) * (weight + offset) + bias.
//
//   RMS:   normalized(x) = x / sqrt(mean(x^2) + epsilon)
//   LAYER: normalized(x) = (x - mean(x)) / sqrt(variance(x) + epsilon)
//   NONE:  y = x; weight, offset and bias are not used
//
// weight, bias: [width] of their dtypes; bias may be null.
#pragma once
#include "common.cuh"

enum { RMS = 0, LAYER = 1, NONE = 2 };

struct Norm {
    int kind;
    const void* weight;
    int weight_dtype;
    const void* bias;
    int bias_dtype;
    float offset, epsilon;
};

// What a row's elements are taken less, and times.
struct Moments {
    float mean, inverse;
};

// Of a row, by a block of whole warps, for every thread; `scratch` has room for a float a warp.
__device__ __forceinline__ Moments moments(const Norm& norm, const void* x, int dtype, size_t start, int width, float* scratch) {
    Moments of = {0.0f, 1.0f};
    float v[8];
    if (norm.kind == LAYER) {
        float sum = 0.0f;
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            load8(x, dtype, start, i, width, v);
            for (int j = 0; j < 8; j++) sum += v[j];
        }
        of.mean = block_sum(sum, scratch) / (float)width;
    }
    if (norm.kind != NONE) {
        float squares = 0.0f;
#pragma unroll 2
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            load8(x, dtype, start, i, width, v);
            for (int j = 0; j < 8; j++) {
                float apart = i + j < width ? v[j] - of.mean : 0.0f;
                squares = fmaf(apart, apart, squares);
            }
        }
        of.inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + norm.epsilon);
    }
    return of;
}

// Normalizes the elements from i on, a multiple of eight, of a row of `width`.
__device__ __forceinline__ void normalize8(const Norm& norm, Moments of, int i, int width, float* v) {
    if (norm.kind == NONE) return;
    float weights[8], shifts[8] = {};
    load8(norm.weight, norm.weight_dtype, 0, i, width, weights);
    if (norm.bias) load8(norm.bias, norm.bias_dtype, 0, i, width, shifts);
    for (int j = 0; j < 8; j++) v[j] = fmaf((v[j] - of.mean) * of.inverse, weights[j] + norm.offset, shifts[j]);
}
