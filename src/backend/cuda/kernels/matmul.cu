// Matrix products without tensor cores; see product.cuh.
//
// few_<storage>: 1 to 8 tokens. A warp takes a row: each weight is read once for all tokens.
//   Launch: 256 threads, a block for every 8 rows.
// many_<storage>: any number of tokens. A block takes 64 rows and 64 tokens in steps of 32 columns
//   through shared memory; a thread sums 4 by 4.
//   Launch: 256 threads, grid (rows / 64, tokens / 64), rounded up.
#include "product.cuh"

#define FEW 8
#define FEW_SLOTS 8
#define TILE 64
#define STEP 32

// A storage reads eight columns of a row from column k on, a multiple of eight (zero from column
// `cols` on), and gives the row's scale.
struct Int8 {
    static __device__ __forceinline__ void load8(const Matrix& w, int cols, size_t row, int k, float* out) {
        int padded = (cols + 31) / 32 * 32;
        if (k >= padded) {
            for (int i = 0; i < 8; i++) out[i] = 0.0f;
            return;
        }
        uint2 raw = *(const uint2*)((const signed char*)w.codes + row * padded + k);
        const signed char* codes = (const signed char*)&raw;
        for (int i = 0; i < 8; i++) out[i] = (float)codes[i];
    }
    static __device__ __forceinline__ float scale(const Matrix& w, size_t row) { return ((const float*)w.scales)[row]; }
};

struct Int4 {
    static __device__ __forceinline__ void load8(const Matrix& w, int cols, size_t row, int k, float* out) {
        int groups = (cols + 31) / 32, group = k / 32;
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
    static __device__ __forceinline__ float scale(const Matrix& w, size_t row) { return __half2float(((const __half*)w.scales)[row]); }
};

struct Nl4 {
    static __device__ __forceinline__ void load8(const Matrix& w, int cols, size_t row, int k, float* out) {
        int groups = (cols + 31) / 32, group = k / 32;
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
    static __device__ __forceinline__ float scale(const Matrix& w, size_t row) { return __half2float(((const __half*)w.scales)[row]) * NL4_UNIT; }
};

template <int DTYPE>
struct Plain {
    static __device__ __forceinline__ void load8(const Matrix& w, int cols, size_t row, int k, float* out) {
        ::load8(w.codes, DTYPE, row * cols, k, cols, out);
    }
    static __device__ __forceinline__ float scale(const Matrix&, size_t) { return 1.0f; }
};

template <class Storage>
__device__ __forceinline__ void few(const Product& p, int) {
    __shared__ float shared[FEW][FEW_SLOTS];
    int lane = threadIdx.x % 32, slot = threadIdx.x / 32, row = row_of<FEW_SLOTS / 2>(p, slot);
    Matrix w = p.first;
    if (slot >= FEW_SLOTS / 2) w = p.second;
    float sums[FEW] = {};
    for (int k = lane * 8; row < w.rows && k < p.cols; k += 32 * 8) {
        float weights[8], values[8];
        Storage::load8(w, p.cols, row, k, weights);
#pragma unroll
        for (int t = 0; t < FEW; t++) {
            if (t >= p.tokens) break;
            load8(p.x, F16, (size_t)t * p.cols, k, p.cols, values);
            for (int i = 0; i < 8; i++) sums[t] = fmaf(weights[i], values[i], sums[t]);
        }
    }
#pragma unroll
    for (int t = 0; t < FEW; t++) {
        if (t >= p.tokens) break;
        float sum = warp_sum(sums[t]);
        if (lane == t) shared[t][slot] = sum;
    }
    __syncthreads();
    int at = threadIdx.x % FEW_SLOTS, token = threadIdx.x / FEW_SLOTS;
    if (at < results(p, FEW_SLOTS) && token < p.tokens) finish<Storage, FEW_SLOTS / 2>(p, at, token, shared[token]);
}

template <class Storage>
__device__ __forceinline__ void many(const Product& p, int tile_of_tokens) {
    __shared__ __align__(16) float shared[2][STEP][TILE + 4];
    auto weights = shared[0], values = shared[1];
    int first_token = tile_of_tokens * TILE;
    int loaded = threadIdx.x / 4, part = threadIdx.x % 4 * 8, row = row_of<TILE / 2>(p, loaded);
    Matrix w = p.first;
    if (loaded >= TILE / 2) w = p.second;
    int my_row = threadIdx.x % 16 * 4, my_token = threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    for (int k = 0; k < p.cols; k += STEP) {
        float piece[8] = {};
        if (row < w.rows) Storage::load8(w, p.cols, row, k + part, piece);
        for (int i = 0; i < 8; i++) weights[part + i][loaded] = piece[i];
        for (int i = 0; i < 8; i++) piece[i] = 0.0f;
        if (first_token + loaded < p.tokens) load8(p.x, F16, (size_t)(first_token + loaded) * p.cols, k + part, p.cols, piece);
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
    int width = results(p, TILE), at = threadIdx.x % width;
#pragma unroll 1
    for (int t = threadIdx.x / width; t < TILE && first_token + t < p.tokens; t += 256 / width) finish<Storage, TILE / 2>(p, at, first_token + t, tile + t * TILE);
}

#define MATMUL(name, storage)                              \
    PRODUCT(KERNEL(256), FEW_SLOTS, few_##name, few<storage>) \
    PRODUCT(KERNEL(256), TILE, many_##name, many<storage>)
MATMUL(bf16, Plain<BF16>)
MATMUL(f16, Plain<F16>)
MATMUL(f32, Plain<F32>)
MATMUL(int8, Int8)
MATMUL(int4, Int4)
MATMUL(nl4, Nl4)
