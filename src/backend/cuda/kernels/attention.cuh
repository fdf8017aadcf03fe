// What attention.cu and attention_mma.cu share: attention over the KV cache.
//
//   out = softmax(cap(scale * q.k)) . v over the last `window` keys up to the query's own position;
//   cap(s) = softcap * tanh(s / softcap) if softcap is not 0
//
// query, key, value, out: f16 [tokens][heads or kv_heads][head_dim]. Query head h reads key-value head
// h * kv_heads / heads. keys, values: the cache of a block, [pages][kv_heads][PAGE][head_dim] of kv_dtype, one of
// bf16, f16, f32 and int8; key_scales, value_scales: f32 [pages][kv_heads][PAGE] for int8, where an element is its
// code times its vector's scale, else not used.
//
// Token t of the call stands at positions[t] of the sequence sequences[t]; both are in the GPU's memory, so that
// launches can be repeated for the next tokens. At -1 it is none: nothing of it is stored, and its attention is zero.
// A sequence has slots / PAGE pages: the numbers of those of sequence s are u32 in `tables` from s * slots / PAGE on,
// or where that is null, they begin with that number and follow on each other. The token at position p has slot
// p % slots of these; window: at most slots.
//
// The keys may be shared out to `splits` blocks, or as many of them as there are keys for. Each leaves its
// sums, its largest score and its total in `parts`, f32 [tokens][heads][splits][head_dim + 2], and the last to
// finish, by the count in `arrivals`, u32 for each group of such blocks, adds them up; it leaves the count at
// zero, as it has to be.
#pragma once
#include "common.cuh"

// CudaAttention of footprint/cuda.rs makes no more.
#define MAX_SPLITS 1024
// Below all scores.
#define LEAST __uint_as_float(0xff800000u)
// PAGE of footprint/mod.rs.
#define PAGE 64u

// Where a head's vectors of a sequence stand.
struct Pages {
    const unsigned* tables;
    unsigned first, kv_heads, kv_head;

    // That of a slot, in vectors.
    __device__ __forceinline__ unsigned vector(unsigned slot) const {
        unsigned page = first + slot / PAGE;
        if (tables) page = tables[page];
        return (page * kv_heads + kv_head) * PAGE + slot % PAGE;
    }
};

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
    int splits, heads, kv_heads, head_dim;
    const unsigned* tables;
    unsigned slots;
    const int *positions, *sequences;
    int window;
    float scale, softcap;

    __device__ __forceinline__ Pages pages(int token, int kv_head) const {
        return {tables, sequences[token] * (slots / PAGE), (unsigned)kv_heads, (unsigned)kv_head};
    }
    // The slot that follows on `keys` others, no more than there are.
    __device__ __forceinline__ unsigned behind(unsigned slot, unsigned keys) const { return slot + keys < slots ? slot + keys : slot + keys - slots; }
};

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
