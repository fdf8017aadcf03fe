// Rotary positions, the KV cache, and attention over it.
//
// query, key, value, out: f16 [tokens][heads or kv_heads][head_dim]. keys, values: the cache of a
// block, f16 [kv_heads][context][head_dim]; token t of the call stands at `position` + t.
#include "common.cuh"

#define MAX_HEAD 512
#define SPAN 128

// Rotates the pairs (i, i + rotary/2) of every head of the query, in place, and of the key by the
// angle position * frequencies[i], times `factor`; the rest of a head stays. The key and the value go
// into the cache.
// frequencies: f32 [rotary / 2]; rotary: even, at most head_dim; 0 rotates nothing.
// Launch: 128 threads, a block for each token.
KERNEL(128) rotate_and_append(__half* query, const __half* key, const __half* value, __half* keys, __half* values, const float* frequencies, int heads,
                              int kv_heads, int head_dim, int rotary, int context, int position, float factor) {
    int token = blockIdx.x, half_width = rotary / 2, at = position + token;
    __half* queries = query + (size_t)token * heads * head_dim;
    const __half* new_keys = key + (size_t)token * kv_heads * head_dim;
    const __half* new_values = value + (size_t)token * kv_heads * head_dim;
    for (int i = threadIdx.x; i < (heads + kv_heads) * half_width; i += blockDim.x) {
        int head = i / half_width, pair = i % half_width;
        float sine, cosine;
        sincosf((float)at * frequencies[pair], &sine, &cosine);
        sine *= factor, cosine *= factor;
        bool is_query = head < heads;
        const __half* from = is_query ? queries + head * head_dim : new_keys + (head - heads) * head_dim;
        __half* to = is_query ? queries + head * head_dim : keys + ((size_t)(head - heads) * context + at) * head_dim;
        float a = __half2float(from[pair]), b = __half2float(from[pair + half_width]);
        to[pair] = to_half(a * cosine - b * sine);
        to[pair + half_width] = to_half(b * cosine + a * sine);
    }
    for (int i = threadIdx.x; i < kv_heads * head_dim; i += blockDim.x) {
        int head = i / head_dim, d = i % head_dim;
        size_t to = ((size_t)head * context + at) * head_dim + d;
        if (d >= rotary) keys[to] = new_keys[i];
        values[to] = new_values[i];
    }
}

// out = softmax(cap(scale * q.k)) . v over the keys up to the query's own position, the last `window`
// of them if window is not 0; cap(s) = softcap * tanh(s / softcap) if softcap is not 0. Query head h
// reads key-value head h * kv_heads / heads. The softmax runs along with the keys, 128 at a time, in f32.
// head_dim: at most 512. Launch: 128 threads, grid (tokens, heads).
KERNEL(128) attend(const __half* query, const __half* keys, const __half* values, __half* out, int heads, int kv_heads, int head_dim, int context, int position,
                   int window, float scale, float softcap) {
    __shared__ float q[MAX_HEAD], weights[SPAN], scratch[4];
    int token = blockIdx.x, head = blockIdx.y, at = position + token;
    size_t row = ((size_t)token * heads + head) * head_dim;
    size_t cache = (size_t)(head * kv_heads / heads) * context * head_dim;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) q[d] = __half2float(query[row + d]) * scale;
    float sums[MAX_HEAD / SPAN] = {};
    float largest = __uint_as_float(0xff800000u), total = 0.0f;
    int first = window && at + 1 > window ? at + 1 - window : 0;
    __syncthreads();
    for (int start = first; start <= at; start += SPAN) {
        int count = min(SPAN, at + 1 - start);
        float score = __uint_as_float(0xff800000u);
        if ((int)threadIdx.x < count) {
            const __half* k = keys + cache + (size_t)(start + threadIdx.x) * head_dim;
            float piece[8];
            score = 0.0f;
            for (int d = 0; d < head_dim; d += 8) {
                load8_half(k, d, head_dim, piece);
                for (int i = 0; i < 8 && d + i < head_dim; i++) score = fmaf(q[d + i], piece[i], score);
            }
            if (softcap != 0.0f) score = softcap * tanhf(score / softcap);
        }
        float before = largest;
        largest = fmaxf(largest, block_max(score, scratch));
        float rescale = expf(before - largest), weight = expf(score - largest);
        weights[threadIdx.x] = weight;
        total = total * rescale + block_sum(weight, scratch);
#pragma unroll
        for (int part = 0; part < MAX_HEAD / SPAN; part++) {
            int d = part * SPAN + threadIdx.x;
            if (d >= head_dim) break;
            float sum = sums[part] * rescale;
            for (int i = 0; i < count; i++) sum = fmaf(weights[i], __half2float(values[cache + (size_t)(start + i) * head_dim + d]), sum);
            sums[part] = sum;
        }
        __syncthreads();
    }
#pragma unroll
    for (int part = 0; part < MAX_HEAD / SPAN; part++) {
        int d = part * SPAN + threadIdx.x;
        if (d < head_dim) out[row + d] = to_half(sums[part] / total);
    }
}
