// Attention of many tokens by tensor cores; see attention.cuh. For compute capability 8.0 and higher.
//
// The tokens follow on each other in one sequence. The rows of a key-value head are those of its query heads for each
// token in turn. A block takes 64 of them, a warp 16, over all keys that they see or one of `splits` parts of these, KEYS
// at a time, all of one page, which pass through shared memory as f16: while the block multiplies keys, the values come in, and the next keys after
// that. The softmax runs along in f32; its weights, relative to the largest score so far, become f16.
//
// Keys and values are in shared memory in units of eight columns. Which column of queries and keys stands in
// which slot of an mma is free: lane (r, c) = (lane / 4, lane % 4) takes the c-th unit of every four.
//
// kv_dtype: all but f32. head_dim: a multiple of 8, at most WIDTH.
// `arrivals`: [blocks of rows][kv_heads].
// Launch: 128 threads, grid (tokens * heads / kv_heads / 64, rounded up, * splits, kv_heads).
#include "attention.cuh"
#include "tensor_cores.cuh"

#define ROWS 64
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f

// Units of a key stand in an order of its own, `unit ^ turn(key)`, so that the same unit of eight keys, and four
// neighbouring units of two, are in different banks.
__device__ __forceinline__ unsigned turn(unsigned key) { return key % 2 * 4 + key / 2 % 4; }

// The units of a tile of keys or of values that a thread copies: one of every `STEP`th key.
template <int WIDTH, int KEYS>
struct Tile {
    enum { UNITS = WIDTH / 8, STEP = 128 / UNITS };
    uint4* to;
    const byte* cache;
    const float* scales;

    __device__ __forceinline__ uint4* place(unsigned i) const {
        unsigned first = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
        return &to[(first + i) * UNITS + (unit ^ turn(first + i % 8))];
    }
    // Queues `keys` vectors from the one at `vector` on, as they are; zero behind them.
    __device__ __forceinline__ void stage(const Attention& a, unsigned vector, int keys, float* scale) const {
        unsigned first = threadIdx.x / UNITS, d = threadIdx.x % UNITS * 8, there = d < a.head_dim ? keys : 0;
        size_t at = (size_t)(vector + first) * a.head_dim + d;
        if (a.kv_dtype == INT8) {
            const byte* from = cache + at;
#pragma unroll
            for (unsigned i = 0; i < KEYS; i += STEP, from += STEP * a.head_dim) {
                cp_async_8(place(i), from, first + i < there);
                scale[i / STEP] = first + i < there ? scales[vector + first + i] : 0.0f;
            }
        } else {
            const unsigned short* from = (const unsigned short*)cache + at;
#pragma unroll
            for (unsigned i = 0; i < KEYS; i += STEP, from += STEP * a.head_dim) cp_async_16(place(i), from, first + i < there);
        }
        cp_async_commit();
    }
    // Makes f16 of what this thread has copied.
    __device__ __forceinline__ void arrive(int dtype, const float* scale) const {
        cp_async_wait<0>();
        if (dtype == F16) return;
#pragma unroll
        for (unsigned i = 0; i < KEYS; i += STEP) {
            uint4 raw = *place(i), unit;
            for (int j = 0; j < 8; j++)
                ((__half*)&unit)[j] = to_half(dtype == INT8 ? (float)((const signed char*)&raw)[j] * scale[i / STEP] : load16(&raw, BF16, j));
            *place(i) = unit;
        }
    }
};

__device__ __forceinline__ unsigned halves(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *(const unsigned*)&both;
}

template <int WIDTH, int KEYS>
__device__ __forceinline__ void attend_many(const Attention& a, int tokens) {
    const int units = WIDTH / 8, groups = WIDTH / 32;
    // A wider query is read anew for each tile; there are not enough registers.
    const bool is_held = WIDTH <= 128;
    __shared__ uint4 keys[KEYS * units], values[KEYS * units];
    Tile<WIDTH, KEYS> tile_of_keys = {keys, a.keys, a.key_scales}, tile_of_values = {values, a.values, a.value_scales};
    float scale[KEYS * units / 128];
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, sharing = a.heads / a.kv_heads, kv_head = blockIdx.y;
    int blocks = gridDim.x / a.splits, split = blockIdx.x % a.splits;
    // The last rows see the most keys and come first.
    int block = blocks - 1 - blockIdx.x / a.splits, last_row = min(block * ROWS + ROWS, tokens * sharing) - 1;
    int position = a.positions[0], first_position = position + block * ROWS / sharing, last_position = position + last_row / sharing;
    // Of rows r and r + 8 of the warp: where they stand in query and out, and the last key that each sees.
    int rows[2], positions[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows[h] = block * ROWS + threadIdx.x / 32 * 16 + h * 8 + r;
        positions[h] = position + min(rows[h], last_row) / sharing;
    }
    // Of a row in query and out.
    auto index = [&](int row) { return (size_t)(row / sharing) * a.heads + kv_head * sharing + row % sharing; };
    uint4 query[2][is_held ? groups : 1];
    auto load_query = [&](int h, int group) {
        int d = (group * 4 + c) * 8;
        return d < a.head_dim ? *(const uint4*)(a.query + index(min(rows[h], last_row)) * a.head_dim + d) : make_uint4(0, 0, 0, 0);
    };
    if (is_held)
#pragma unroll
        for (int group = 0; group < groups; group++) query[0][group] = load_query(0, group), query[1][group] = load_query(1, group);
    // What this lane reads of a tile.
    const uint4 *my_key = keys + r * units, *my_values[units / 2];
    unsigned key_unit = c ^ turn(r), value_unit = lane / 16 ^ turn(lane % 16);
    for (int tile = 0; tile < units; tile += 2) my_values[tile / 2] = values + lane % 16 * units + (tile ^ value_unit);
    float sums[WIDTH / 8][4] = {}, largest[2] = {LEAST, LEAST}, total[2] = {};

    int behind = last_position + 1, first = max(0, first_position + 1 - a.window);
    // Parts begin with a tile of a page.
    int tiles = first / KEYS * KEYS, length = ((behind - tiles + a.splits - 1) / a.splits + KEYS - 1) / KEYS * KEYS;
    int start = max(first, tiles + split * length), end = min(behind, tiles + split * length + length), keys_here = min(KEYS - start % KEYS, end - start);
    Pages pages = a.pages(0, kv_head);
    unsigned slot = (unsigned)start % a.slots, vector = start < end ? pages.vector(slot) : 0;
    float factor = (a.softcap != 0.0f ? a.softcap : a.scale) * LOG2_E, to_cap = a.scale / a.softcap;
    if (start < end) tile_of_keys.stage(a, vector, keys_here, scale);
    while (start < end) {
        tile_of_keys.arrive(a.kv_dtype, scale);
        __syncthreads();
        tile_of_values.stage(a, vector, keys_here, scale);
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int group = 0; group < groups; group++) {
            uint4 above = is_held ? query[0][group] : load_query(0, group), below = is_held ? query[1][group] : load_query(1, group);
            unsigned low[4] = {above.x, below.x, above.y, below.y}, high[4] = {above.z, below.z, above.w, below.w};
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; tile++) {
                uint4 key = my_key[tile * 8 * units + (group * 4 ^ key_unit)];
                mma_m16n8k16(scores[tile], low, key.x, key.y);
                mma_m16n8k16(scores[tile], high, key.z, key.w);
            }
        }
        tile_of_values.arrive(a.kv_dtype, scale);
        __syncthreads();
        int tile_start = start, tile_end = start + keys_here;
        start = tile_end, slot = a.behind(slot, keys_here), keys_here = min(KEYS, end - start);
        if (start < end) tile_of_keys.stage(a, vector = pages.vector(slot), keys_here, scale);

        // In bits: the exponents of two.
        if (a.softcap != 0.0f)
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) scores[i / 4][i % 4] = tanhf(scores[i / 4][i % 4] * to_cap);
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) scores[i / 4][i % 4] *= factor;
        if (tile_start + KEYS > min(first_position + 1, tile_end) || tile_start + a.window <= last_position)
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                int key = tile_start + i / 4 * 8 + c * 2 + i % 2, position = positions[i % 4 / 2];
                if (key > min(position, tile_end - 1) || key + a.window <= position) scores[i / 4][i % 4] = LEAST;
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = largest[h];
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; tile++) most = fmaxf(most, fmaxf(scores[tile][2 * h], scores[tile][2 * h + 1]));
            for (int step = 1; step < 4; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
            // A row may see none of the keys so far.
            float base = most == LEAST ? 0.0f : most, rescale = exp2_approximate(largest[h] - base);
            largest[h] = most;
            total[h] *= rescale;
#pragma unroll
            for (int tile = 0; tile < KEYS / 8; tile++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    scores[tile][i] = exp2_approximate(scores[tile][i] - base);
                    total[h] += scores[tile][i];
                }
#pragma unroll
            for (int tile = 0; tile < WIDTH / 8; tile++) sums[tile][2 * h] *= rescale, sums[tile][2 * h + 1] *= rescale;
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            const float *near = scores[2 * step], *far = scores[2 * step + 1];
            unsigned weights[4] = {halves(near[0], near[1]), halves(near[2], near[3]), halves(far[0], far[1]), halves(far[2], far[3])};
#pragma unroll
            for (int tile = 0; tile < WIDTH / 8; tile += 2) {
                unsigned value[4];
                ldmatrix_transposed(value, my_values[tile / 2] + step * 16 * units);
                mma_m16n8k16(sums[tile], weights, value[0], value[1]);
                mma_m16n8k16(sums[tile + 1], weights, value[2], value[3]);
            }
        }
    }
    int width = a.head_dim + 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        for (int step = 1; step < 4; step *= 2) total[h] += __shfl_xor_sync(0xffffffffu, total[h], step);
        if (rows[h] > last_row) continue;
        size_t row = index(rows[h]);
        float inverse = 1.0f / total[h], *part = a.parts + (row * a.splits + split) * width;
#pragma unroll
        for (int tile = 0; tile < WIDTH / 8; tile++) {
            int d = tile * 8 + c * 2;
            float left = sums[tile][2 * h], right = sums[tile][2 * h + 1];
            if (d >= a.head_dim) break;
            if (a.splits > 1) part[d] = left, part[d + 1] = right;
            else *(__half2*)(a.out + row * a.head_dim + d) = {to_half(left * inverse), to_half(right * inverse)};
        }
        if (a.splits > 1 && c == 0) part[a.head_dim] = largest[h] * LN_2, part[a.head_dim + 1] = total[h];
    }
    if (a.splits > 1 && is_last_block(&a.arrivals[(size_t)block * a.kv_heads + kv_head], a.splits))
        for (int row = block * ROWS; row <= last_row; row++) add_parts(a, index(row), a.splits);
}

#define ATTEND_MANY(width, keys_of_a_tile)                                                                                                          \
    KERNEL_AT_ONCE(128, 2) attend_many_##width(const __half* query, const byte* keys, const float* key_scales, const byte* values,                   \
                                               const float* value_scales, int kv_dtype, __half* out, float* parts, unsigned* arrivals, int splits,   \
                                               int heads, int kv_heads, int head_dim, const unsigned* tables, unsigned slots, const int* positions, \
                                               const int* sequences, int window, float scale, float softcap, int tokens) {                         \
        begin();                                                                                                                                     \
        attend_many<width, keys_of_a_tile>({query, keys, key_scales, values, value_scales, kv_dtype, out, parts, arrivals, splits, heads, kv_heads,  \
                                            head_dim, tables, slots, positions, sequences, window, scale, softcap}, tokens);                      \
    }
ATTEND_MANY(64, 64)
ATTEND_MANY(128, 64)
ATTEND_MANY(256, 32)
