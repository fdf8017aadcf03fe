// Matrix products by tensor cores, for int8, int4 and nl4 weights: Yᵀ = W · Xᵀ; see product.cuh. For
// compute capability 8.0 and higher.
//
// An mma multiplies 16 rows by 8 tokens over 16 columns. Which column stands in which of the 16 slots
// is free as long as weights and activations agree, so that weights are read as they are packed: lane
// (r, c) = (lane / 4, lane % 4) loads the c-th 16 bytes of rows r and r + 8 of a chunk, whose four
// times 16 bytes are 64 columns of int8 or 128 of the others, and holds of each mma four columns that stand
// side by side in its bytes. Its activations are those columns of token r. Codes become f16 exactly,
// int4 times its sub-scale too (an integer of at most 1024); the row's scale comes after the sum. A level
// of nl4 times its sub-scale is too long for an f16, and goes into two products: times the multiple of 16
// that is next to the sub-scale, and times what is left of that.
//
// Activations are in shared memory in units of eight columns, in the order [chunk][unit of a lane]
// [token][c], so that a warp reads 512 neighbouring bytes.
//
// mma_few_<storage>: 1 to 8 tokens. The warps of a block share out the columns of 16 rows.
//   Launch: 256 threads, a block for every 16 rows.
// mma_many_<storage>: any number of tokens. A block takes 64 rows and 64 tokens in steps of 128
//   columns, a warp 16 of the rows: it dequantizes a weight once for all tokens.
//   Launch: 128 threads, grid (rows / 64, tokens / 64), rounded up.
#include "product.cuh"

#define WARPS 8
#define SLOTS 16
#define AHEAD 2
#define SLICE_UNITS 2048
#define MANY_SLOTS 64
#define TOKENS 64
#define STEP_COLS 128

#if defined(__CUDACC__)
// d += a · b, the fragments as in PTX.
__device__ __forceinline__ void mma_m16n8k16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void cp_async_16(void* to, const void* from) {
    unsigned shared = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last `N`.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif

// What a lane loads of one row.
struct Piece {
    uint4 codes;
    int sub_scale;
};

__device__ __forceinline__ unsigned word(const uint4& codes, int i) { return i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w; }

// Two f16 in one word.
__device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
    __half2 difference = __hsub2(*(const __half2*)&a, *(const __half2*)&b);
    return *(const unsigned*)&difference;
}

// A storage loads the columns from k on of a row, nothing beyond the matrix, and dequantizes four of
// them: those of half `step` of a unit, to two words. Weights are the sum of PARTS of such words.
struct MmaInt8 {
    enum { COLS = 16, UNITS = COLS / 8, CHUNK = 4 * COLS, PARTS = 1 };
    static __device__ __forceinline__ Piece load(const Matrix& w, int cols, int row, int k) {
        int padded = (cols + 31) / 32 * 32;
        if (row >= w.rows || k >= padded) return {{0, 0, 0, 0}, 0};
        return {__ldg((const uint4*)((const signed char*)w.codes + (size_t)row * padded + k)), 0};
    }
    static __device__ __forceinline__ void dequantize(const Piece& piece, int, int unit, int step, unsigned& low, unsigned& high) {
        unsigned codes = word(piece.codes, 2 * unit + step) ^ 0x80808080;
        // 1024 + 128 + code, in the lowest bits of an f16.
        low = subtract(__byte_perm(codes, 0x64646464, 0x4140), 0x64806480);
        high = subtract(__byte_perm(codes, 0x64646464, 0x4342), 0x64806480);
    }
    static __device__ __forceinline__ float scale(const Matrix& w, int row) { return ((const float*)w.scales)[row]; }
};

struct MmaInt4 {
    enum { COLS = 32, UNITS = COLS / 8, CHUNK = 4 * COLS, PARTS = 1 };
    static __device__ __forceinline__ Piece load(const Matrix& w, int cols, int row, int k) {
        int groups = (cols + 31) / 32, group = k / 32;
        if (row >= w.rows || group >= groups) return {{0, 0, 0, 0}, 0};
        size_t at = (size_t)row * groups + group;
        return {__ldg((const uint4*)w.codes + at), __ldg(w.sub_scales + at)};
    }
    static __device__ __forceinline__ void dequantize(const Piece& piece, int, int unit, int step, unsigned& low, unsigned& high) {
        // Bytes 0 and 1, then 2 and 3, stand 16 bits apart.
        unsigned codes = __byte_perm(word(piece.codes, (2 * unit + step) % 4), 0, 0x3120) >> (unit < 2 ? 0 : 4);
        __half2 sub_scale = __half2half2(__float2half_rn((float)piece.sub_scale));
        low = scaled(codes, sub_scale), high = scaled(codes >> 8, sub_scale);
    }
    static __device__ __forceinline__ unsigned scaled(unsigned codes, __half2 sub_scale) {
        // 1024 + 8 + level, in the lowest bits of an f16.
        unsigned levels = subtract((codes & 0x000f000f) | 0x64006400, 0x64086408);
        __half2 weights = __hmul2(*(const __half2*)&levels, sub_scale);
        return *(const unsigned*)&weights;
    }
    static __device__ __forceinline__ float scale(const Matrix& w, int row) { return __half2float(((const __half*)w.scales)[row]); }
};

struct MmaNl4 : MmaInt4 {
    enum { PARTS = 2 };
    static __device__ __forceinline__ void dequantize(const Piece& piece, int part, int unit, int step, unsigned& low, unsigned& high) {
        unsigned codes = word(piece.codes, (2 * unit + step) % 4), select = unit < 2 ? 0x4240 : 0x4341;
        int near = piece.sub_scale + 8 & ~15;
        __half2 sub_scale = __half2half2(__float2half_rn((float)(part == 0 ? near : piece.sub_scale - near)));
        low = scaled(nl4_levels(codes), select, sub_scale), high = scaled(nl4_levels(codes >> 16), select, sub_scale);
    }
    static __device__ __forceinline__ unsigned scaled(unsigned levels, unsigned select, __half2 sub_scale) {
        // 1024 + 128 + level, in the lowest bits of an f16.
        unsigned there = subtract(__byte_perm(levels, 0x64646464, select), 0x64806480);
        __half2 weights = __hmul2(*(const __half2*)&there, sub_scale);
        return *(const unsigned*)&weights;
    }
    static __device__ __forceinline__ float scale(const Matrix& w, int row) { return MmaInt4::scale(w, row) * NL4_UNIT; }
};

// A chunk of 16 rows by eight tokens a tile; a lane's units are `stride` apart in `x`. Sums as PTX
// has them: row r, tokens 2c and 2c + 1, then row r + 8.
template <class Storage, int TILES>
__device__ __forceinline__ void multiply(const Piece* pieces, const uint4* x, int stride, bool there, float (*sums)[4]) {
#pragma unroll
    for (int at = 0; at < Storage::UNITS * Storage::PARTS; at++) {
        int unit = at / Storage::PARTS, part = at % Storage::PARTS;
        unsigned weights[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) Storage::dequantize(pieces[i % 2], part, unit, i / 2, weights[i / 2][i % 2], weights[i / 2][i % 2 + 2]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint4 values = there ? x[unit * stride + tile * 32] : make_uint4(0, 0, 0, 0);
            mma_m16n8k16(sums[tile], weights[0], values.x, values.y);
            mma_m16n8k16(sums[tile], weights[1], values.z, values.w);
        }
    }
}

// Columns k to k + 7 of a token, where they cannot be copied as they are: zero from column `cols` on.
__device__ __forceinline__ uint4 unaligned_unit(const Product& p, int token, int k) {
    uint4 unit;
    __half* values = (__half*)&unit;
    for (int i = 0; i < 8; i++) values[i] = token < p.tokens && k + i < p.cols ? p.x[(size_t)token * p.cols + k + i] : __ushort_as_half(0);
    return unit;
}

__device__ __forceinline__ bool is_aligned(const Product& p, int token, int k) { return p.cols % 8 == 0 && token < p.tokens && k < p.cols; }

// The next pieces of a lane: of slot `slot`, and of the one 8 behind it.
template <class Storage>
__device__ __forceinline__ void load_pieces(const Product& p, int slot, int k, Piece* pieces) {
    pieces[0] = Storage::load(p.first, p.cols, row_of<8>(p, slot), k);
    pieces[1] = Storage::load(p.second, p.cols, row_of<8>(p, slot + 8), k);
}

template <class Storage>
__device__ __forceinline__ void mma_few(const Product& p) {
    const int chunk = Storage::CHUNK, units = Storage::UNITS;
    __shared__ __align__(16) uint4 shared[SLICE_UNITS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, my_cols = lane % 4 * Storage::COLS;
    int slice = SLICE_UNITS * 8 / p.tokens / (WARPS * chunk) * (WARPS * chunk);
    float sums[1][4] = {};
    Piece ahead[AHEAD][2];
    int k = warp * chunk;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_pieces<Storage>(p, lane / 4, k + i * WARPS * chunk + my_cols, ahead[i]);
    for (int start = 0; start < p.cols; start += slice) {
        int in_row = min(slice, (p.cols - start + chunk - 1) / chunk * chunk) / 8;
        for (int at = threadIdx.x; at < in_row * p.tokens; at += WARPS * 32) {
            int token = at / in_row, unit = at % in_row, column = start + unit * 8;
            uint4* to = &shared[((unit / (4 * units) * units + unit % units) * p.tokens + token) * 4 + unit / units % 4];
            *to = is_aligned(p, token, column) ? *(const uint4*)(p.x + (size_t)token * p.cols + column) : unaligned_unit(p, token, column);
        }
        __syncthreads();
        for (; k < min(start + slice, p.cols); k += WARPS * chunk) {
            Piece pieces[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                pieces[half] = ahead[0][half];
                for (int i = 1; i < AHEAD; i++) ahead[i - 1][half] = ahead[i][half];
            }
            load_pieces<Storage>(p, lane / 4, k + AHEAD * WARPS * chunk + my_cols, ahead[AHEAD - 1]);
            const uint4* values = shared + (k - start) / chunk * units * p.tokens * 4 + lane;
            multiply<Storage, 1>(pieces, values, p.tokens * 4, lane < p.tokens * 4, sums);
        }
        __syncthreads();
    }
    float* partial = (float*)shared;
#pragma unroll
    for (int i = 0; i < 4; i++) partial[warp * 128 + (lane % 4 * 2 + i % 2) * SLOTS + lane / 4 + i / 2 * 8] = sums[0][i];
    __syncthreads();
    int at = threadIdx.x % SLOTS, token = threadIdx.x / SLOTS;
    if (token < p.tokens)
        for (int i = 1; i < WARPS; i++) partial[threadIdx.x] += partial[i * 128 + threadIdx.x];
    __syncthreads();
    if (token < p.tokens && at < results(p, SLOTS)) finish<Storage, 8>(p, at, token, partial + token * SLOTS);
}

// Queues the copies of a step's activations.
template <class Storage>
__device__ __forceinline__ void stage(const Product& p, int first_token, int start, uint4* shared) {
    const int units = Storage::UNITS, together = 8 / units, groups = TOKENS / together;
#pragma unroll 2
    for (int at = threadIdx.x; at < STEP_COLS / 8 * TOKENS; at += 128) {
        // A warp reads all the units of a chunk of `together` tokens, and writes to all banks alike.
        int c = at % 4, unit = at % 32 / (4 * together), group = at / 32 % groups, chunk = at / 32 / groups;
        int in_tile = group * together + at / 4 % together, token = first_token + in_tile;
        int k = start + chunk * Storage::CHUNK + c * Storage::COLS + unit * 8;
        uint4* to = &shared[((chunk * units + unit) * TOKENS + in_tile) * 4 + c];
        if (is_aligned(p, token, k)) cp_async_16(to, p.x + (size_t)token * p.cols + k);
        else *to = unaligned_unit(p, token, k);
    }
    cp_async_commit();
}

template <class Storage>
__device__ __forceinline__ void mma_many(const Product& p) {
    const int chunk = Storage::CHUNK, padded = TOKENS + 4;
    __shared__ __align__(16) uint4 shared[2][STEP_COLS / 8 * TOKENS];
    int lane = threadIdx.x % 32, slot = threadIdx.x / 32 * SLOTS + lane / 4, first_token = blockIdx.y * TOKENS;
    int my_cols = lane % 4 * Storage::COLS;
    float sums[TOKENS / 8][4] = {};
    Piece next[2];
    load_pieces<Storage>(p, slot, my_cols, next);
    stage<Storage>(p, first_token, 0, shared[0]);
    for (int start = 0; start < p.cols; start += STEP_COLS) {
        int current = start / STEP_COLS % 2;
        if (start + STEP_COLS < p.cols) {
            stage<Storage>(p, first_token, start + STEP_COLS, shared[1 - current]);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEP_COLS / chunk; i++) {
            Piece pieces[2] = {next[0], next[1]};
            load_pieces<Storage>(p, slot, start + (i + 1) * chunk + my_cols, next);
            multiply<Storage, TOKENS / 8>(pieces, shared[current] + i * Storage::UNITS * TOKENS * 4 + lane, TOKENS * 4, true, sums);
        }
        __syncthreads();
    }
    // Through shared memory, so that neighbouring threads write neighbouring rows.
    float* tile = (float*)shared;
#pragma unroll
    for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) tile[(t * 8 + lane % 4 * 2 + i % 2) * padded + slot + i / 2 * 8] = sums[t][i];
    __syncthreads();
    int width = results(p, MANY_SLOTS), at = threadIdx.x % width;
#pragma unroll 1
    for (int t = threadIdx.x / width; t < TOKENS && first_token + t < p.tokens; t += 128 / width) finish<Storage, 8>(p, at, first_token + t, tile + t * padded);
}

PRODUCT(256, SLOTS, mma_few_int8, mma_few<MmaInt8>)
PRODUCT(256, SLOTS, mma_few_int4, mma_few<MmaInt4>)
PRODUCT(256, SLOTS, mma_few_nl4, mma_few<MmaNl4>)
PRODUCT(128, MANY_SLOTS, mma_many_int8, mma_many<MmaInt8>)
PRODUCT(128, MANY_SLOTS, mma_many_int4, mma_many<MmaInt4>)
PRODUCT(128, MANY_SLOTS, mma_many_nl4, mma_many<MmaNl4>)
