// Embedding rows, activations, and the tokens of an expert.
#include "common.cuh"

// hidden[t] = scale * row tokens[t] of the embedding, or hidden[t] += the same if `add`; the embedding is
// a matrix of `rows` rows of any storage in the canonical packing of quant/layout.rs. tokens: u32 [tokens];
// one that names no row gives NaN. hidden: f32 [tokens][cols].
// Launch: 256 threads, a block for each token.
KERNEL(256) embed(const unsigned* tokens, const void* codes, const signed char* sub_scales, const void* scales, int storage, int rows, int cols, float scale,
                  int add, float* hidden) {
    begin();
    size_t row = tokens[blockIdx.x];
    int groups = (cols + 31) / 32;
    float* out = hidden + (size_t)blockIdx.x * cols;
    for (int k = threadIdx.x; k < cols; k += blockDim.x) {
        float v;
        if (row >= (unsigned)rows) {
            v = NO_NUMBER;
        } else if (storage == INT8) {
            v = ((const float*)scales)[row] * (float)((const signed char*)codes)[row * groups * 32 + k];
        } else if (storage == INT4 || storage == NL4) {
            size_t group = row * groups + k / 32;
            int code = ((const byte*)codes)[group * 16 + k % 16] >> (k % 32 < 16 ? 0 : 4) & 15;
            float level = storage == INT4 ? (float)(code - 8) : (float)((int)(nl4_levels(code) & 255) - NL4_ZERO) * NL4_UNIT;
            v = __half2float(((const __half*)scales)[row]) * (float)sub_scales[group] * level;
        } else {
            v = load(codes, storage, row * cols + k);
        }
        out[k] = add ? out[k] + v * scale : v * scale;
    }
}

// gate = activation(gate) * up, f16 [count]; up may be null, which multiplies by nothing.
// Launch: 256 threads, a block for every 256 elements.
KERNEL(256) activate(__half* gate, const __half* up, int count, int kind) {
    begin();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = activated(kind, __half2float(gate[i]));
    gate[i] = to_half(up ? x * __half2float(up[i]) : x);
}

// out[i] = x[tokens[i]], rows of f16; NaN where x, [rows][width], has no such row.
// Launch: 256 threads, a block for each token of the expert.
KERNEL(256) gather(const __half* x, const unsigned* tokens, int rows, int width, __half* out) {
    begin();
    unsigned row = tokens[blockIdx.x];
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[(size_t)blockIdx.x * width + i] = row < (unsigned)rows ? x[(size_t)row * width + i] : to_half(NO_NUMBER);
}

// out[tokens[i]] += weights[i] * x[i], rows of f32, where out, [rows][width], has such a row; no token occurs
// twice. Launch: as gather.
KERNEL(256) scatter_add(const float* x, const unsigned* tokens, const float* weights, int rows, int width, float* out) {
    begin();
    unsigned to = tokens[blockIdx.x];
    if (to >= (unsigned)rows) return;
    float* row = out + (size_t)to * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = fmaf(weights[blockIdx.x], x[(size_t)blockIdx.x * width + i], row[i]);
}
