// y[t][n] = factor * (sum_k x[t][k] * w[n][k] + bias[n]), accumulated in f32.
//
// w: a matrix in the canonical packing of quant/layout.rs, [rows][cols]; storage by the kernel's name.
// x: f16 [tokens][cols]. bias: [rows] of bias_dtype, or null. y: [tokens][rows], written as `output`
// says. sub_scales and scales are null where the storage has none.
//
// few_<storage>: 1 to 8 tokens. A warp takes a row: each weight is read once for all tokens.
//   Launch: 256 threads, a block for every 8 rows.
// many_<storage>: any number of tokens. A block takes 64 rows and 64 tokens in steps of 32 columns
//   through shared memory; a thread sums 4 by 4.
//   Launch: 256 threads, grid (rows / 64, tokens / 64), rounded up.
#include "common.cuh"

#define FEW 8
#define TILE 64
#define STEP 32

struct Weights {
    const void* codes;
    const signed char* sub_scales;
    const void* scales;
    int cols;
};

// A storage reads eight columns of a row from column k on, a multiple of eight (zero from column
// `cols` on), and gives the row's scale.
struct Int8 {
    static __device__ __forceinline__ void load8(const Weights& w, size_t row, int k, float* out) {
        int padded = (w.cols + 31) / 32 * 32;
        if (k >= padded) {
            for (int i = 0; i < 8; i++) out[i] = 0.0f;
            return;
        }
        uint2 raw = *(const uint2*)((const signed char*)w.codes + row * padded + k);
        const signed char* codes = (const signed char*)&raw;
        for (int i = 0; i < 8; i++) out[i] = (float)codes[i];
    }
    static __device__ __forceinline__ float scale(const Weights& w, size_t row) { return ((const float*)w.scales)[row]; }
};

struct Int4 {
    static __device__ __forceinline__ void load8(const Weights& w, size_t row, int k, float* out) {
        int groups = (w.cols + 31) / 32, group = k / 32;
        if (group >= groups) {
            for (int i = 0; i < 8; i++) out[i] = 0.0f;
            return;
        }
        uint2 raw = *(const uint2*)((const byte*)w.codes + (row * groups + group) * 16 + k % 16);
        const byte* bytes = (const byte*)&raw;
        float sub_scale = (float)w.sub_scales[row * groups + group];
        int shift = k % 32 < 16 ? 0 : 4;
        for (int i = 0; i < 8; i++) out[i] = sub_scale * (float)((int)(bytes[i] >> shift & 15) - 8);
    }
    static __device__ __forceinline__ float scale(const Weights& w, size_t row) { return __half2float(((const __half*)w.scales)[row]); }
};

struct Nl4 {
    static __device__ __forceinline__ void load8(const Weights& w, size_t row, int k, float* out) {
        int groups = (w.cols + 31) / 32, group = k / 32;
        if (group >= groups) {
            for (int i = 0; i < 8; i++) out[i] = 0.0f;
            return;
        }
        uint2 raw = *(const uint2*)((const byte*)w.codes + (row * groups + group) * 16 + k % 16);
        float sub_scale = (float)w.sub_scales[row * groups + group];
        int shift = k % 32 < 16 ? 0 : 8;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            unsigned levels = nl4_levels((i < 4 ? raw.x : raw.y) >> i % 4 * 8) >> shift;
            out[i] = sub_scale * (float)((int)(levels & 255) - NL4_ZERO);
            out[i + 1] = sub_scale * (float)((int)(levels >> 16 & 255) - NL4_ZERO);
        }
    }
    static __device__ __forceinline__ float scale(const Weights& w, size_t row) { return __half2float(((const __half*)w.scales)[row]) * NL4_UNIT; }
};

template <int DTYPE>
struct Plain {
    static __device__ __forceinline__ void load8(const Weights& w, size_t row, int k, float* out) {
        if (DTYPE != F32 && w.cols % 8 == 0 && k < w.cols) {
            uint4 raw = *(const uint4*)((const unsigned short*)w.codes + row * w.cols + k);
            for (int i = 0; i < 8; i++) out[i] = load(&raw, DTYPE, i);
        } else {
            for (int i = 0; i < 8; i++) out[i] = k + i < w.cols ? load(w.codes, DTYPE, row * w.cols + k + i) : 0.0f;
        }
    }
    static __device__ __forceinline__ float scale(const Weights&, size_t) { return 1.0f; }
};

template <class Storage>
__device__ __forceinline__ void few(const Weights& w, const __half* x, const void* bias, int bias_dtype, void* y, int output, float factor, int rows, int tokens) {
    int lane = threadIdx.x % 32;
    size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float sums[FEW] = {};
    for (int k = lane * 8; k < w.cols; k += 32 * 8) {
        float weights[8], values[8];
        Storage::load8(w, row, k, weights);
#pragma unroll
        for (int t = 0; t < FEW; t++) {
            if (t >= tokens) break;
            load8_half(x + (size_t)t * w.cols, k, w.cols, values);
            for (int i = 0; i < 8; i++) sums[t] = fmaf(weights[i], values[i], sums[t]);
        }
    }
    float mine = 0.0f;
#pragma unroll
    for (int t = 0; t < FEW; t++) {
        if (t >= tokens) break;
        float sum = warp_sum(sums[t]);
        if (lane == t) mine = sum;
    }
    if (lane >= tokens) return;
    float shift = bias ? load(bias, bias_dtype, row) : 0.0f;
    store(y, output, (size_t)lane * rows + row, factor * fmaf(mine, Storage::scale(w, row), shift));
}

template <class Storage>
__device__ __forceinline__ void many(const Weights& w, const __half* x, const void* bias, int bias_dtype, void* y, int output, float factor, int rows, int tokens) {
    __shared__ __align__(16) float shared[2][STEP][TILE + 4];
    auto weights = shared[0], values = shared[1];
    int first_row = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
    int loaded = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
    int my_row = threadIdx.x % 16 * 4, my_token = threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    for (int k = 0; k < w.cols; k += STEP) {
        float piece[8] = {};
        if (first_row + loaded < rows) Storage::load8(w, first_row + loaded, k + part, piece);
        for (int i = 0; i < 8; i++) weights[part + i][loaded] = piece[i];
        for (int i = 0; i < 8; i++) piece[i] = 0.0f;
        if (first_token + loaded < tokens) load8_half(x + (size_t)(first_token + loaded) * w.cols, k + part, w.cols, piece);
        for (int i = 0; i < 8; i++) values[part + i][loaded] = piece[i];
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < STEP; i++) {
            float4 a = *(const float4*)&weights[i][my_row], b = *(const float4*)&values[i][my_token];
            const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
                for (int r = 0; r < 4; r++) sums[t][r] = fmaf(as[r], bs[t], sums[t][r]);
        }
        __syncthreads();
    }
    // Through shared memory, so that neighbouring threads write neighbouring rows.
    float* tile = &shared[0][0][0];
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int r = 0; r < 4; r++) tile[(my_token + t) * TILE + my_row + r] = sums[t][r];
    __syncthreads();
    int row = first_row + threadIdx.x % TILE;
    if (row >= rows) return;
    float scale = Storage::scale(w, row), shift = bias ? load(bias, bias_dtype, row) : 0.0f;
#pragma unroll 1
    for (int t = threadIdx.x / TILE; t < TILE && first_token + t < tokens; t += 256 / TILE)
        store(y, output, (size_t)(first_token + t) * rows + row, factor * fmaf(tile[t * TILE + threadIdx.x % TILE], scale, shift));
}

#define MATMUL(name, storage)                                                                                              \
    KERNEL(256) few_##name(const void* codes, const signed char* sub_scales, const void* scales, int rows, int cols,        \
                           const __half* x, int tokens, const void* bias, int bias_dtype, void* y, int output, float factor) {           \
        few<storage>({codes, sub_scales, scales, cols}, x, bias, bias_dtype, y, output, factor, rows, tokens);                     \
    }                                                                                                                      \
    KERNEL(256) many_##name(const void* codes, const signed char* sub_scales, const void* scales, int rows, int cols,       \
                            const __half* x, int tokens, const void* bias, int bias_dtype, void* y, int output, float factor) {          \
        many<storage>({codes, sub_scales, scales, cols}, x, bias, bias_dtype, y, output, factor, rows, tokens);                    \
    }
MATMUL(bf16, Plain<BF16>)
MATMUL(f16, Plain<F16>)
MATMUL(f32, Plain<F32>)
MATMUL(int8, Int8)
MATMUL(int4, Int4)
MATMUL(nl4, Nl4)
