// What attention.cu and attention_mma.cu share: attention over the KV cache.
//
//   out = softmax(cap(scale * q.k)) . v over the keys up to the query's own position, the last `window` of
//   them if window is not 0; cap(s) = softcap * tanh(s / softcap) if softcap is not 0
//
// query, key, value, out: f16 [tokens][heads or kv_heads][head_dim]. Query head h reads key-value head
// h * kv_heads / heads. keys, values: the cache of a block, [kv_heads][context][head_dim] of kv_dtype, one of
// bf16, f16, f32 and int8; key_scales, value_scales: f32 [kv_heads][context] for int8, where an element is its
// code times its vector's scale, else not used. Token t of the call stands at *position + t; it is in the
// GPU's memory, so that launches can be repeated for the next token.
//
// The keys may be shared out to `splits` blocks, or as many of them as there are keys for. Each leaves its
// sums, its largest score and its total in `parts`, f32 [tokens][heads][splits][head_dim + 2], and the last to
// finish, by the count in `arrivals`, u32 for each group of such blocks, adds them up; it leaves the count at
// zero, as it has to be.
#pragma once
#include "common.cuh"

// CudaAttention of plan/memory.rs makes no more.
#define MAX_SPLITS 1024
// Below all scores.
#define LEAST __uint_as_float(0xff800000u)

struct Attention {
    const __half* query;
    const byte* keys;
    const float* key_scales;
    const byte* values;
    const float* value_scales;
    int kv_dtype;
    __half* out;
    float* parts;
    unsigned* arrivals;
    int splits, heads, kv_heads, head_dim, context, position, window;
    float scale, softcap;
};

__device__ __forceinline__ float load_kv(const byte* cache, int dtype, size_t i) {
    return dtype == INT8 ? (float)((const signed char*)cache)[i] : load(cache, dtype, i);
}

// Columns d to d + 7 of a vector of the cache; zero from `head_dim` on.
__device__ __forceinline__ void load8_kv(const byte* cache, int dtype, size_t start, int d, int head_dim, float* out) {
    if (head_dim % 8 != 0) {
        for (int i = 0; i < 8; i++) out[i] = d + i < head_dim ? load_kv(cache, dtype, start + d + i) : 0.0f;
    } else if (dtype == INT8) {
        uint2 raw = *(const uint2*)(cache + start + d);
        for (int i = 0; i < 8; i++) out[i] = (float)((const signed char*)&raw)[i];
    } else if (dtype == F32) {
        for (int i = 0; i < 8; i += 4) *(float4*)(out + i) = *(const float4*)((const float*)cache + start + d + i);
    } else {
        uint4 raw = *(const uint4*)((const unsigned short*)cache + start + d);
        for (int i = 0; i < 8; i++) out[i] = load16(&raw, dtype, i);
    }
}

// Whether this block is the last of those that count at `at`. All its threads ask, after they have left their part.
__device__ __forceinline__ bool is_last_part(const Attention& a, size_t at, int splits) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&a.arrivals[at], 1u) == (unsigned)splits - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    if (threadIdx.x == 0) a.arrivals[at] = 0;
    return true;
}

// What the first `splits` parts of a row, a head of a token, come to.
__device__ __forceinline__ void add_parts(const Attention& a, size_t row, int splits) {
    __shared__ float shares[MAX_SPLITS], scratch[4];
    int width = a.head_dim + 2;
    const float* all = a.parts + row * a.splits * width;
    float most = LEAST, total = 0.0f;
    for (int i = threadIdx.x; i < splits; i += blockDim.x) most = fmaxf(most, __ldcg(all + i * width + a.head_dim));
    most = block_max(most, scratch);
    for (int i = threadIdx.x; i < splits; i += blockDim.x) {
        shares[i] = expf(__ldcg(all + i * width + a.head_dim) - most);
        total = fmaf(shares[i], __ldcg(all + i * width + a.head_dim + 1), total);
    }
    total = block_sum(total, scratch);
    for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < splits; i++) sum = fmaf(shares[i], __ldcg(all + i * width + d), sum);
        a.out[row * a.head_dim + d] = to_half(sum / total);
    }
}
