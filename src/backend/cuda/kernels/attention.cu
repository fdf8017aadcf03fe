// Rotary positions, the KV cache, and attention over it.
//
// query, key, value, out: f16 [tokens][heads or kv_heads][head_dim]. keys, values: the cache of a block,
// [kv_heads][context][head_dim] of kv_dtype, one of bf16, f16, f32 and int8; key_scales, value_scales: f32
// [kv_heads][context] for int8, where an element is its code times its vector's scale, else not used.
// Token t of the call stands at `position` + t. head_dim: at most 512.
#include "common.cuh"

#define MAX_HEAD 512
#define SPAN 128

__device__ __forceinline__ float load_kv(const byte* cache, int dtype, size_t i) {
    return dtype == INT8 ? (float)((const signed char*)cache)[i] : load(cache, dtype, i);
}

// Rotates the pairs (i, i + rotary/2) of every head of the query, in place, and of the key by the
// angle position * frequencies[i], times `factor`; the rest of a head stays. Stores key and value in
// the cache; in int8 with the scale absmax / 127.
// frequencies: f32 [rotary / 2]; rotary: even, at most head_dim; 0 rotates nothing.
// Launch: 128 threads, grid (tokens, heads + 2 * kv_heads).
KERNEL(128) rotate_and_store(__half* query, const __half* key, const __half* value, byte* keys, float* key_scales, byte* values, float* value_scales,
                             int kv_dtype, const float* frequencies, int heads, int kv_heads, int head_dim, int rotary, int context, int position, float factor) {
    __shared__ float vector[MAX_HEAD], scratch[4];
    int token = blockIdx.x, head = blockIdx.y, half_width = rotary / 2, at = position + token;
    bool is_query = head < heads, is_key = !is_query && head < heads + kv_heads;
    if (!is_query) head = (head - heads) % kv_heads;
    const __half* from = is_query ? query + ((size_t)token * heads + head) * head_dim
                                  : (is_key ? key : value) + ((size_t)token * kv_heads + head) * head_dim;
    float largest = 0.0f;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float v = __half2float(from[d]);
        if ((is_query || is_key) && d < rotary) {
            int pair = d < half_width ? d : d - half_width;
            float sine, cosine, other = __half2float(from[d < half_width ? d + half_width : d - half_width]);
            sincosf((float)at * frequencies[pair], &sine, &cosine);
            v = d < half_width ? v * (cosine * factor) - other * (sine * factor) : v * (cosine * factor) + other * (sine * factor);
        }
        vector[d] = v;
        largest = fmaxf(largest, fabsf(v));
    }
    largest = block_max(largest, scratch);
    if (is_query) {
        for (int d = threadIdx.x; d < head_dim; d += blockDim.x) query[((size_t)token * heads + head) * head_dim + d] = to_half(vector[d]);
        return;
    }
    size_t slot = (size_t)head * context + at;
    byte* cache = is_key ? keys : values;
    float scale = largest > 0.0f ? largest / 127.0f : 1.0f;
    if (kv_dtype == INT8 && threadIdx.x == 0) (is_key ? key_scales : value_scales)[slot] = scale;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        size_t i = slot * head_dim + d;
        if (kv_dtype == F16) ((__half*)cache)[i] = to_half(vector[d]);
        else if (kv_dtype == BF16) ((unsigned short*)cache)[i] = to_bf16(vector[d]);
        else if (kv_dtype == F32) ((float*)cache)[i] = vector[d];
        else ((signed char*)cache)[i] = (signed char)roundf(vector[d] / scale);
    }
}

// out = softmax(cap(scale * q.k)) . v over the keys up to the query's own position, the last `window`
// of them if window is not 0; cap(s) = softcap * tanh(s / softcap) if softcap is not 0. Query head h
// reads key-value head h * kv_heads / heads. The softmax runs along with the keys, 128 at a time, in f32.
// Launch: 128 threads, grid (tokens, heads).
KERNEL(128) attend(const __half* query, const byte* keys, const float* key_scales, const byte* values, const float* value_scales, int kv_dtype, __half* out,
                   int heads, int kv_heads, int head_dim, int context, int position, int window, float scale, float softcap) {
    __shared__ float q[MAX_HEAD], weights[SPAN], scratch[4];
    int token = blockIdx.x, head = blockIdx.y, at = position + token;
    size_t row = ((size_t)token * heads + head) * head_dim;
    size_t first_slot = (size_t)(head * kv_heads / heads) * context;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) q[d] = __half2float(query[row + d]) * scale;
    float sums[MAX_HEAD / SPAN] = {};
    float largest = __uint_as_float(0xff800000u), total = 0.0f;
    int first = window && at + 1 > window ? at + 1 - window : 0;
    __syncthreads();
    for (int start = first; start <= at; start += SPAN) {
        int count = min(SPAN, at + 1 - start);
        size_t slot = first_slot + start + threadIdx.x;
        float score = __uint_as_float(0xff800000u);
        if ((int)threadIdx.x < count) {
            score = 0.0f;
            if (kv_dtype == F16) {
                float piece[8];
                for (int d = 0; d < head_dim; d += 8) {
                    load8_half((const __half*)keys + slot * head_dim, d, head_dim, piece);
                    for (int i = 0; i < 8 && d + i < head_dim; i++) score = fmaf(q[d + i], piece[i], score);
                }
            } else {
                for (int d = 0; d < head_dim; d++) score = fmaf(q[d], load_kv(keys, kv_dtype, slot * head_dim + d), score);
            }
            if (kv_dtype == INT8) score *= key_scales[slot];
            if (softcap != 0.0f) score = softcap * tanhf(score / softcap);
        }
        float before = largest;
        largest = fmaxf(largest, block_max(score, scratch));
        float rescale = expf(before - largest), weight = expf(score - largest);
        total = total * rescale + block_sum(weight, scratch);
        weights[threadIdx.x] = kv_dtype == INT8 && (int)threadIdx.x < count ? weight * value_scales[slot] : weight;
        __syncthreads();
#pragma unroll
        for (int part = 0; part < MAX_HEAD / SPAN; part++) {
            int d = part * SPAN + threadIdx.x;
            if (d >= head_dim) break;
            float sum = sums[part] * rescale;
            for (int i = 0; i < count; i++) sum = fmaf(weights[i], load_kv(values, kv_dtype, (first_slot + start + i) * head_dim + d), sum);
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
