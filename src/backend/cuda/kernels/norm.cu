// Norms of rows: y = factor * (normalized(x) * (weight + offset) + bias).
//
//   RMS:   normalized(x) = x / sqrt(mean(x^2) + epsilon)
//   LAYER: normalized(x) = (x - mean(x)) / sqrt(variance(x) + epsilon)
//   NONE:  y = factor * x; weight, offset and bias are not used
//
// x: [rows][width] of x_dtype. weight, bias: [width] of their dtypes; bias may be null. y: [rows][width],
// written as `output` says (ADD_F32 is a norm with residual); it may be x itself where
// both are of one dtype.
// Launch: 256 threads, a block for each row.
#include "common.cuh"

enum { RMS = 0, LAYER = 1, NONE = 2 };

KERNEL(256) normalize(const void* x, int x_dtype, const void* weight, int weight_dtype, const void* bias, int bias_dtype, float offset, void* y, int output,
                 int width, int kind, float epsilon, float factor) {
    __shared__ float scratch[8];
    size_t start = (size_t)blockIdx.x * width;
    float mean = 0.0f, inverse = 1.0f;
    if (kind == LAYER) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += load(x, x_dtype, start + i);
        mean = block_sum(sum, scratch) / (float)width;
    }
    if (kind != NONE) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float v = load(x, x_dtype, start + i) - mean;
            squares = fmaf(v, v, squares);
        }
        inverse = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + epsilon);
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = load(x, x_dtype, start + i);
        if (kind != NONE) {
            float shift = bias ? load(bias, bias_dtype, i) : 0.0f;
            v = fmaf((v - mean) * inverse, load(weight, weight_dtype, i) + offset, shift);
        }
        store(y, output, start + i, factor * v);
    }
}
