// normalize: y = factor * norm(x), see norm.cuh.
//
// x: [rows][width] of x_dtype. y: [rows][width], written as `output` says (ADD_F32 is a norm with
// residual); it may be x itself where both are of one dtype.
// Launch: 256 threads, a block for each row.
#include "norm.cuh"

KERNEL(256) normalize(const void* x, int x_dtype, int kind, const void* weight, int weight_dtype, const void* bias, int bias_dtype, float offset,
                      float epsilon, void* y, int output, int width, float factor) {
    __shared__ float scratch[8];
    begin();
    Norm norm = {kind, weight, weight_dtype, bias, bias_dtype, offset, epsilon};
    size_t start = (size_t)blockIdx.x * width;
    Moments of = moments(norm, x, x_dtype, start, width, scratch);
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        float v[8];
        load8(x, x_dtype, start, i, width, v);
        normalize8(norm, of, i, width, v);
        for (int j = 0; j < 8 && i + j < width; j++) store(y, output, start + i + j, factor * v[j]);
    }
}
