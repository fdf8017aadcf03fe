// Embedding rows, activations, the tokens of an expert, and the best of the logits.
#include "common.cuh"

// hidden[t] = scale * row tokens[t] of the embedding, or hidden[t] += the same if `add`; the embedding is
// a matrix of any storage in the canonical packing of quant/layout.rs. tokens: u32 [tokens], each below the number of rows. hidden: f32 [tokens][cols].
// Launch: 256 threads, a block for each token.
KERNEL(256) embed(const unsigned* tokens, const void* codes, const signed char* sub_scales, const void* scales, int storage, int cols, float scale, int add,
                  float* hidden) {
    begin();
    size_t row = tokens[blockIdx.x];
    int groups = (cols + 31) / 32;
    float* out = hidden + (size_t)blockIdx.x * cols;
    for (int k = threadIdx.x; k < cols; k += blockDim.x) {
        float v;
        if (storage == INT8) {
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

// out[i] = x[tokens[i]], rows of f16. Launch: 256 threads, a block for each token of the expert.
KERNEL(256) gather(const __half* x, const unsigned* tokens, int width, __half* out) {
    begin();
    const __half* row = x + (size_t)tokens[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[(size_t)blockIdx.x * width + i] = row[i];
}

// out[tokens[i]] += weights[i] * x[i], rows of f32; no token occurs twice. Launch: as gather.
KERNEL(256) scatter_add(const float* x, const unsigned* tokens, const float* weights, int width, float* out) {
    begin();
    float* row = out + (size_t)tokens[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = fmaf(weights[blockIdx.x], x[(size_t)blockIdx.x * width + i], row[i]);
}

// The k largest of `count` logits, best first, the lower index first among equals; k = 1 is argmax.
// What is not a number counts as infinity, so that it is found.
// logits: f32 [count]. indices: u32 [k]. k: at most count. Launch: 1 block of 256 threads.
KERNEL(256) top_k(const float* logits, int count, int k, unsigned* indices) {
    begin();
    __shared__ float values[256];
    __shared__ int places[256];
    float last = __uint_as_float(0x7f800000u);
    int last_place = -1;
    for (int rank = 0; rank < k; rank++) {
        float best = __uint_as_float(0xff800000u);
        int place = count;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            float v = logits[i] == logits[i] ? logits[i] : __uint_as_float(0x7f800000u);
            bool is_left = v < last || (v == last && i > last_place);
            if (is_left && (place == count || v > best)) best = v, place = i;
        }
        values[threadIdx.x] = best, places[threadIdx.x] = place;
        for (int half = blockDim.x / 2; half > 0; half /= 2) {
            __syncthreads();
            int other = threadIdx.x + half;
            if ((int)threadIdx.x < half && places[other] < count) {
                float a = values[threadIdx.x], b = values[other];
                if (places[threadIdx.x] == count || b > a || (b == a && places[other] < places[threadIdx.x]))
                    values[threadIdx.x] = b, places[threadIdx.x] = places[other];
            }
        }
        __syncthreads();
        last = values[0], last_place = places[0];
        if (threadIdx.x == 0) indices[rank] = last_place;
        __syncthreads();
    }
}
