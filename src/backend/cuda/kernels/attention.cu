// Rotary positions, the KV cache, and attention over it; see attention.cuh.
#include "attention.cuh"
#include "norm.cuh"

#define MAX_HEAD 512
#define SPAN 128

// Normalizes every head of the query, in place, and of the key; see norm.cuh. Rotates their pairs
// (i, i + rotary/2) by the angle position * frequencies[i], times `factor`; the rest of a head stays.
// Stores key and value in the cache; in int8 with the scale absmax / 127, which makes NaN of all if one is that.
// frequencies: f32 [rotary / 2] for each sequence, every `stride`; rotary: even, at most head_dim; 0 rotates nothing.
// Launch: 128 threads, grid (tokens, heads + 2 * kv_heads).
#define NORM(of) int of##_kind, const void *of##_weight, int of##_weight_dtype, const void *of##_bias, int of##_bias_dtype, float of##_offset, float of##_epsilon
#define GIVEN_NORM(of) {of##_kind, of##_weight, of##_weight_dtype, of##_bias, of##_bias_dtype, of##_offset, of##_epsilon}
KERNEL(128) rotate_and_store(__half* query, const __half* key, const __half* value, NORM(query), NORM(key), byte* keys, float* key_scales, byte* values,
                             float* value_scales, int kv_dtype, const float* frequencies, int stride, int heads, int kv_heads, int head_dim, int rotary,
                             const unsigned* tables, unsigned slots, const int* positions, const int* sequences, float factor) {
    begin();
    __shared__ float head_in[MAX_HEAD], vector[MAX_HEAD], scratch[4];
    int token = blockIdx.x, head = blockIdx.y, half_width = rotary / 2, at = positions[token], sequence = sequences[token];
    if (at < 0) return;
    frequencies += (size_t)sequence * stride;
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
        largest = fmaxf(largest, v == v ? fabsf(v) : INFINITE);
    }
    largest = block_max(largest, scratch);
    if (is_query) {
        for (int d = threadIdx.x; d < head_dim; d += blockDim.x) query[((size_t)token * heads + head) * head_dim + d] = to_half(vector[d]);
        return;
    }
    Pages pages = {tables, sequence * (slots / PAGE), (unsigned)kv_heads, (unsigned)head};
    size_t slot = pages.vector((unsigned)at % slots);
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

__device__ __forceinline__ float load_kv(const byte* cache, int dtype, size_t i) {
    return dtype == INT8 ? (float)((const signed char*)cache)[i] : load(cache, dtype, i);
}

// A dtype that only the launch knows, or vectors that are no multiple of eight.
enum { ANY = -1 };

// Eight elements of a vector of the cache, as they are stored.
template <int DTYPE>
struct Stored8 {
    uint4 raw;

    __device__ __forceinline__ void load(const Attention&, const byte* cache, size_t start, int d) {
        if (DTYPE == INT8) *(uint2*)&raw = *(const uint2*)(cache + start + d);
        else raw = *(const uint4*)((const unsigned short*)cache + start + d);
    }
    __device__ __forceinline__ float get(int i) const { return DTYPE == INT8 ? (float)((const signed char*)&raw)[i] : load16(&raw, DTYPE, i); }
};

// Zero from `head_dim` on.
template <>
struct Stored8<ANY> {
    float elements[8];

    __device__ __forceinline__ void load(const Attention& a, const byte* cache, size_t start, int d) {
        for (int i = 0; i < 8; i++) elements[i] = d + i < a.head_dim ? load_kv(cache, a.kv_dtype, start + d + i) : 0.0f;
    }
    __device__ __forceinline__ float get(int i) const { return elements[i]; }
};

template <int HEADS>
struct AttendShared {
    __align__(16) float q[HEADS][MAX_HEAD];
    __align__(16) float weights[SPAN][HEADS];
    __align__(16) float sums[HEADS][SPAN * 8];
    // Where the vectors of keys stand, in vectors: of those at hand, and of the next ones.
    unsigned vectors[2][SPAN];
    float scratch[HEADS][SPAN / 32], largest[HEADS], total[HEADS];
};

// What a thread has of some keys: of the values eight columns, of every `groups`-th of them.
template <int HEADS>
struct OverKeys {
    Pages pages;
    // The slot where they begin, and how many there are.
    unsigned at;
    int count, groups, group, column;
    float sums[HEADS][8], largest[HEADS], total[HEADS];
};

template <int DTYPE, int HEADS>
__device__ __forceinline__ void attend_over(OverKeys<HEADS>& p, const Attention& a, AttendShared<HEADS>& s) {
    const int BATCH = DTYPE == ANY ? 1 : 8;
    int head_dim = a.head_dim;
    bool is_scaled = a.kv_dtype == INT8;
    unsigned at = p.at;
    for (int left = p.count, turn = 0; left > 0; left -= SPAN, turn ^= 1) {
        int keys = min(SPAN, left);
        bool is_mine = (int)threadIdx.x < keys;
        const unsigned* vectors = s.vectors[turn];
        size_t slot = vectors[threadIdx.x];
        Stored8<DTYPE> values[BATCH];
        auto load_values = [&](int first) {
#pragma unroll
            for (int j = 0; j < BATCH; j++) values[j].load(a, a.values, (size_t)vectors[min(first + j * p.groups, SPAN - 1)] * head_dim, p.column);
        };
        load_values(p.group);
        if (left > SPAN) {
            at = a.behind(at, SPAN);
            s.vectors[turn ^ 1][threadIdx.x] = p.pages.vector(a.behind(at, min((int)threadIdx.x, left - SPAN - 1)));
        }
        float scores[HEADS] = {};
        for (int d = 0; d < head_dim; d += BATCH * 8) {
            Stored8<DTYPE> pieces[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (d + j * 8 < head_dim) pieces[j].load(a, a.keys, slot * head_dim, d + j * 8);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                if (d + j * 8 >= head_dim) break;
#pragma unroll
                for (int h = 0; h < HEADS; h++)
#pragma unroll
                    for (int i = 0; i < 8; i++) scores[h] = fmaf(s.q[h][d + j * 8 + i], pieces[j].get(i), scores[h]);
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (is_scaled) scores[h] *= a.key_scales[slot];
            if (a.softcap != 0.0f) scores[h] = a.softcap * tanhf(scores[h] / a.softcap);
            if (!is_mine) scores[h] = LEAST;
            float most = warp_max(scores[h]);
            if (threadIdx.x % 32 == 0) s.scratch[h][threadIdx.x / 32] = most;
        }
        __syncthreads();
        float value_scale = is_scaled ? a.value_scales[slot] : 1.0f;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float before = p.largest[h];
            for (int i = 0; i < SPAN / 32; i++) p.largest[h] = fmaxf(p.largest[h], s.scratch[h][i]);
            float rescale = expf(before - p.largest[h]), weight = expf(scores[h] - p.largest[h]);
            p.total[h] = p.total[h] * rescale + weight;
            s.weights[threadIdx.x][h] = weight * value_scale;
            for (int i = 0; i < 8; i++) p.sums[h][i] *= rescale;
        }
        __syncthreads();
        for (int first = p.group; first < keys;) {
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int key = first + j * p.groups;
                if (key >= keys) break;
#pragma unroll
                for (int h = 0; h < HEADS; h++)
#pragma unroll
                    for (int i = 0; i < 8; i++) p.sums[h][i] = fmaf(s.weights[key][h], values[j].get(i), p.sums[h][i]);
            }
            first += BATCH * p.groups;
            if (first < keys) load_values(first);
        }
        __syncthreads();
    }
}

// A block takes HEADS query heads of one key-value head, which share what it reads of the cache, and one of
// `splits` parts of the keys; its softmax runs along with them, 128 at a time, in f32. A thread takes a key
// for the scores, and for the sums eight columns of some of the values; several of its loads are on their
// way. head_dim: at most 512. `arrivals`: [tokens][blocks of heads].
// Launch: 128 threads, grid (tokens * splits, blocks of heads: kv_heads * (heads / kv_heads / HEADS, rounded up)).
template <int HEADS>
__device__ __forceinline__ void attend(const Attention& a) {
    __shared__ AttendShared<HEADS> s;
    int head_dim = a.head_dim, sharing = a.heads / a.kv_heads, blocks = (sharing + HEADS - 1) / HEADS;
    int token = blockIdx.x / a.splits, split = blockIdx.x % a.splits, kv_head = blockIdx.y / blocks;
    int first_head = blockIdx.y % blocks * HEADS, count = min(HEADS, sharing - first_head);
    size_t first_row = (size_t)token * a.heads + kv_head * sharing + first_head;
    int position = a.positions[token], behind = position + 1, first = max(0, behind - a.window);
    if (position < 0) {
#pragma unroll 1
        for (int i = threadIdx.x; split == 0 && i < count * head_dim; i += SPAN) a.out[first_row * head_dim + i] = to_half(0.0f);
        return;
    }
    int length = ((behind - first + a.splits - 1) / a.splits + SPAN - 1) / SPAN * SPAN, splits = (behind - first + length - 1) / length;
    int units = (head_dim + 7) / 8, start = first + split * length;
    if (start >= behind) return;
    OverKeys<HEADS> p = {a.pages(token, kv_head), (unsigned)start % a.slots, min(length, behind - start),
                         SPAN / units, (int)threadIdx.x / units, (int)threadIdx.x % units * 8};
    s.vectors[0][threadIdx.x] = p.pages.vector(a.behind(p.at, min((int)threadIdx.x, p.count - 1)));
    for (int h = 0; h < HEADS; h++) p.largest[h] = LEAST;
#pragma unroll 1
    for (int d = threadIdx.x; d < MAX_HEAD; d += SPAN)
        for (int h = 0; h < HEADS; h++) s.q[h][d] = h < count && d < head_dim ? __half2float(a.query[(first_row + h) * head_dim + d]) * a.scale : 0.0f;
    __syncthreads();
    if (head_dim % 8 != 0 || a.kv_dtype == F32) attend_over<ANY>(p, a, s);
    else if (a.kv_dtype == F16) attend_over<F16>(p, a, s);
    else if (a.kv_dtype == BF16) attend_over<BF16>(p, a, s);
    else attend_over<INT8>(p, a, s);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float total = block_sum(p.total[h], s.scratch[0]);
        if (threadIdx.x == 0) s.total[h] = total, s.largest[h] = p.largest[h];
        if (p.group < p.groups)
            for (int i = 0; i < 8; i++) s.sums[h][p.group * units * 8 + p.column + i] = p.sums[h][i];
    }
    __syncthreads();
#pragma unroll 1
    for (int h = 0; h < count; h++) {
        size_t row = first_row + h;
        float* part = a.parts + (row * a.splits + split) * (head_dim + 2);
#pragma unroll 1
        for (int d = threadIdx.x; d < head_dim; d += SPAN) {
            float sum = 0.0f;
            for (int i = 0; i < p.groups; i++) sum += s.sums[h][i * units * 8 + d];
            if (splits > 1) part[d] = sum;
            else a.out[row * head_dim + d] = to_half(sum / s.total[h]);
        }
        if (splits > 1 && threadIdx.x == 0) part[head_dim] = s.largest[h], part[head_dim + 1] = s.total[h];
    }
    if (splits > 1 && is_last_block(&a.arrivals[token * gridDim.y + blockIdx.y], splits))
#pragma unroll 1
        for (int h = 0; h < count; h++) add_parts(a, first_row + h, splits);
}

#define ATTEND(heads_of_a_block)                                                                                                                        \
    KERNEL(128) attend_##heads_of_a_block(const __half* query, const byte* keys, const float* key_scales, const byte* values, const float* value_scales, \
                                          int kv_dtype, __half* out, float* parts, unsigned* arrivals, int splits, int heads, int kv_heads,             \
                                          int head_dim, const unsigned* tables, unsigned slots, const int* positions, const int* sequences,             \
                                          int window, float scale, float softcap) {                                                                    \
        begin();                                                                                                                                        \
        attend<heads_of_a_block>({query, keys, key_scales, values, value_scales, kv_dtype, out, parts, arrivals, splits, heads, kv_heads, head_dim,     \
                                  tables, slots, positions, sequences, window, scale, softcap});                                                       \
    }
ATTEND(1)
ATTEND(4)
