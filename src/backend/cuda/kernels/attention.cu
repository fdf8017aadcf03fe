// Rotary positions, the KV cache, and attention over it; see attention.cuh.
#include "attention.cuh"
#include "norm.cuh"

#define MAX_HEAD 512
#define SPAN 128

// Normalizes every head of the query, in place, and of the key; see norm.cuh. Rotates their pairs
// (i, i + rotary/2) by the angle position * frequencies[i], times `factor`; the rest of a head stays.
// Stores key and value in the cache; in int8 with the scale absmax / 127.
// frequencies: f32 [rotary / 2]; rotary: even, at most head_dim; 0 rotates nothing.
// Launch: 128 threads, grid (tokens, heads + 2 * kv_heads).
#define NORM(of) int of##_kind, const void *of##_weight, int of##_weight_dtype, const void *of##_bias, int of##_bias_dtype, float of##_offset, float of##_epsilon
#define GIVEN_NORM(of) {of##_kind, of##_weight, of##_weight_dtype, of##_bias, of##_bias_dtype, of##_offset, of##_epsilon}
KERNEL(128) rotate_and_store(__half* query, const __half* key, const __half* value, NORM(query), NORM(key), byte* keys, float* key_scales, byte* values,
                             float* value_scales, int kv_dtype, const float* frequencies, int heads, int kv_heads, int head_dim, int rotary, int context,
                             const int* position, float factor) {
    begin();
    __shared__ float head_in[MAX_HEAD], vector[MAX_HEAD], scratch[4];
    int token = blockIdx.x, head = blockIdx.y, half_width = rotary / 2, at = *position + token;
    bool is_query = head < heads, is_key = !is_query && head < heads + kv_heads;
    if (!is_query) head = (head - heads) % kv_heads;
    const __half* from = is_query ? query + ((size_t)token * heads + head) * head_dim
                                  : (is_key ? key : value) + ((size_t)token * kv_heads + head) * head_dim;
    Norm norm = {NONE, nullptr, 0, nullptr, 0, 0.0f, 0.0f};
    if (is_query) norm = GIVEN_NORM(query);
    else if (is_key) norm = GIVEN_NORM(key);
    Moments of = moments(norm, from, F16, 0, head_dim, scratch);
    for (int d = threadIdx.x * 8; d < head_dim; d += blockDim.x * 8) {
        float v[8];
        load8(from, F16, 0, d, head_dim, v);
        normalize8(norm, of, d, head_dim, v);
        for (int i = 0; i < 8 && d + i < head_dim; i++) head_in[d + i] = __half2float(to_half(v[i]));
    }
    __syncthreads();
    float largest = 0.0f;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float v = head_in[d];
        if ((is_query || is_key) && d < rotary) {
            int pair = d < half_width ? d : d - half_width;
            float sine, cosine, other = head_in[d < half_width ? d + half_width : d - half_width];
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

// A block takes HEADS query heads of one key-value head, which share what it reads of the cache, and one of
// `splits` parts of the keys; its softmax runs along with them, 128 at a time, in f32. head_dim: at most 512.
// `arrivals`: [tokens][blocks of heads].
// Launch: 128 threads, grid (tokens * splits, blocks of heads: kv_heads * (heads / kv_heads / HEADS, rounded up)).
template <int HEADS>
__device__ __forceinline__ void attend(const Attention& a) {
    __shared__ __align__(16) float q[HEADS][MAX_HEAD];
    __shared__ float weights[HEADS][SPAN], scratch[HEADS][SPAN / 32];
    int head_dim = a.head_dim, kv_dtype = a.kv_dtype, sharing = a.heads / a.kv_heads, blocks = (sharing + HEADS - 1) / HEADS;
    int token = blockIdx.x / a.splits, split = blockIdx.x % a.splits, kv_head = blockIdx.y / blocks;
    int first_head = blockIdx.y % blocks * HEADS, count = min(HEADS, sharing - first_head);
    size_t first_row = (size_t)token * a.heads + kv_head * sharing + first_head, first_slot = (size_t)kv_head * a.context;
    for (int d = threadIdx.x; d < MAX_HEAD; d += blockDim.x)
        for (int h = 0; h < HEADS; h++) q[h][d] = h < count && d < head_dim ? __half2float(a.query[(first_row + h) * head_dim + d]) * a.scale : 0.0f;
    float sums[HEADS][MAX_HEAD / SPAN] = {}, largest[HEADS], total[HEADS] = {};
    for (int h = 0; h < HEADS; h++) largest[h] = LEAST;
    int behind = a.position + token + 1, first = a.window && behind > a.window ? behind - a.window : 0;
    int length = ((behind - first + a.splits - 1) / a.splits + SPAN - 1) / SPAN * SPAN;
    int start = first + split * length, end = min(behind, start + length);
    __syncthreads();
    for (; start < end; start += SPAN) {
        int keys = min(SPAN, end - start);
        bool is_mine = (int)threadIdx.x < keys;
        size_t slot = first_slot + start + threadIdx.x;
        float scores[HEADS] = {};
        if (is_mine)
            for (int d = 0; d < head_dim; d += 8) {
                float piece[8];
                load8_kv(a.keys, kv_dtype, slot * head_dim, d, head_dim, piece);
#pragma unroll
                for (int h = 0; h < HEADS; h++)
                    for (int i = 0; i < 8; i++) scores[h] = fmaf(q[h][d + i], piece[i], scores[h]);
            }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (kv_dtype == INT8 && is_mine) scores[h] *= a.key_scales[slot];
            if (a.softcap != 0.0f) scores[h] = a.softcap * tanhf(scores[h] / a.softcap);
            if (!is_mine) scores[h] = LEAST;
            float most = warp_max(scores[h]);
            if (threadIdx.x % 32 == 0) scratch[h][threadIdx.x / 32] = most;
        }
        __syncthreads();
        float value_scale = kv_dtype == INT8 && is_mine ? a.value_scales[slot] : 1.0f;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float before = largest[h];
            for (int i = 0; i < SPAN / 32; i++) largest[h] = fmaxf(largest[h], scratch[h][i]);
            float rescale = expf(before - largest[h]), weight = expf(scores[h] - largest[h]);
            total[h] = total[h] * rescale + weight;
            weights[h][threadIdx.x] = weight * value_scale;
            for (int part = 0; part < MAX_HEAD / SPAN; part++) sums[h][part] *= rescale;
        }
        __syncthreads();
#pragma unroll
        for (int part = 0; part < MAX_HEAD / SPAN; part++) {
            int d = part * SPAN + threadIdx.x;
            if (d >= head_dim) break;
#pragma unroll 4
            for (int i = 0; i < keys; i++) {
                float value = load_kv(a.values, kv_dtype, (first_slot + start + i) * head_dim + d);
#pragma unroll
                for (int h = 0; h < HEADS; h++) sums[h][part] = fmaf(weights[h][i], value, sums[h][part]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) total[h] = block_sum(total[h], scratch[0]);
    if (a.splits > 1) {
        int width = head_dim + 2;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= count) break;
            float* mine = a.parts + ((first_row + h) * a.splits + split) * width;
#pragma unroll
            for (int part = 0; part < MAX_HEAD / SPAN; part++)
                if (part * SPAN + (int)threadIdx.x < head_dim) mine[part * SPAN + threadIdx.x] = sums[h][part];
            if (threadIdx.x == 0) mine[head_dim] = largest[h], mine[head_dim + 1] = total[h];
        }
        if (is_last_part(a, token * gridDim.y + blockIdx.y))
            for (int h = 0; h < count; h++) add_parts(a, first_row + h);
        return;
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= count) break;
#pragma unroll
        for (int part = 0; part < MAX_HEAD / SPAN; part++) {
            int d = part * SPAN + threadIdx.x;
            if (d < head_dim) a.out[(first_row + h) * head_dim + d] = to_half(sums[h][part] / total[h]);
        }
    }
}

#define ATTEND(heads_of_a_block)                                                                                                                        \
    KERNEL(128) attend_##heads_of_a_block(const __half* query, const byte* keys, const float* key_scales, const byte* values, const float* value_scales, \
                                          int kv_dtype, __half* out, float* parts, unsigned* arrivals, int splits, int heads, int kv_heads,             \
                                          int head_dim, int context, const int* position, int window, float scale, float softcap) {                      \
        begin();                                                                                                                                        \
        attend<heads_of_a_block>({query, keys, key_scales, values, value_scales, kv_dtype, out, parts, arrivals, splits, heads, kv_heads, head_dim,     \
                                  context, *position, window, scale, softcap});                                                                         \
    }
ATTEND(1)
ATTEND(4)
