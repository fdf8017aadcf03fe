// Matrix products of any number of tokens by tensor cores; see mma.cuh. Also with bf16 and f16 weights.
//
// mma_many_<storage>_<slots>: a block takes so many slots for rows and 64 tokens, and 64 columns in a step, whose
// activations come in while the steps before are multiplied. Each of its four warps takes a quarter of the slots,
// TILES times 16: it dequantizes a weight once for all tokens, and reads an activation once for all its rows.
// Weights are read a chunk ahead.
//   Launch: 128 threads, grid (rows / slots, tokens / 64), rounded up.
#include "mma.cuh"

#define MANY_TOKENS 64
#define STEP_UNITS 2
#define STAGES 3
#define STAGE (STEP_UNITS * MANY_TOKENS * 4)
// Sums of a token, and a few more, so that a warp writes to different banks.
#define SUMS (SLOTS + 4)

// Columns k to k + 7 of a token, where they cannot be copied as they are: zero from column `cols` on.
__device__ __forceinline__ uint4 unaligned_unit(const Product& p, int token, int k) {
    uint4 unit;
    __half* values = (__half*)&unit;
    for (int i = 0; i < 8; i++) values[i] = token < p.tokens && k + i < p.cols ? p.x[(size_t)token * p.cols + k + i] : __ushort_as_half(0);
    return unit;
}

// Queues the copies of a step's activations: to [unit of a lane][token][c], but that tokens 2i and 2i + 1 are exchanged
// in the second unit, so that what eight threads copy of a token goes to different banks.
template <class Storage>
__device__ __forceinline__ void stage(const Product& p, int first_token, int step, uint4* to) {
    const int steps = Storage::UNITS / STEP_UNITS;
    int c = threadIdx.x % 4, unit = threadIdx.x / 4 % STEP_UNITS, in_tile = threadIdx.x / 8, token = first_token + in_tile;
    int k = step / steps * Storage::CHUNK + c * Storage::COLS + (step % steps * STEP_UNITS + unit) * 8;
    to += (unit * MANY_TOKENS + (in_tile ^ unit)) * 4 + c;
    const __half* from = p.x + (size_t)token * p.cols + k;
    int there = k < p.cols ? p.tokens - token : 0;
    if (p.cols % 8 == 0) {
#pragma unroll
        for (int i = 0; i < MANY_TOKENS; i += 16, from += (size_t)16 * p.cols) cp_async_16(to + i * 4, from, i < there);
    } else {
#pragma unroll 1
        for (int i = 0; i < MANY_TOKENS; i += 16) to[i * 4] = unaligned_unit(p, token + i, k);
    }
}

struct PlainPiece {
    uint4 elements[2];
};

// bf16 or f16, 16 columns a lane as of int8.
template <int DTYPE>
struct MmaPlain {
    typedef PlainPiece Piece;
    enum { COLS = 16, UNITS = COLS / 8, CHUNK = 4 * COLS, PARTS = 1 };
    static __device__ __forceinline__ Piece load(const Matrix& w, int cols, int row, int k) {
        Piece piece = {};
        if (row >= w.rows) return piece;
        const unsigned short* from = (const unsigned short*)w.codes + (size_t)row * cols + k;
        if (cols % 8 == 0) {
            if (k < cols) piece.elements[0] = __ldg((const uint4*)from);
            if (k + 8 < cols) piece.elements[1] = __ldg((const uint4*)from + 1);
        } else {
#pragma unroll
            for (int i = 0; i < COLS; i++)
                if (k + i < cols) ((unsigned short*)piece.elements)[i] = from[i];
        }
        return piece;
    }
    static __device__ __forceinline__ void dequantize(const Piece& piece, int, int unit, int step, unsigned& low, unsigned& high) {
        low = word(piece.elements[unit], 2 * step), high = word(piece.elements[unit], 2 * step + 1);
    }
    static __device__ __forceinline__ float scale(const Matrix&, int) { return 1.0f; }
};

// sums += weights · activations.
template <class Storage>
struct Multiply {
    static __device__ __forceinline__ void add(float* sums, const unsigned* weights, unsigned x0, unsigned x1) { mma_m16n8k16(sums, weights, x0, x1); }
};

// No 16 bits hold both what a bf16 and what an f16 can be; tf32 does. Of the two columns in a word, the first is
// in slot c and the second in slot c + 4.
template <>
struct Multiply<MmaPlain<BF16>> {
    static __device__ __forceinline__ void add(float* sums, const unsigned* weights, unsigned x0, unsigned x1) {
        half(sums, weights, x0), half(sums, weights + 2, x1);
    }
    static __device__ __forceinline__ void half(float* sums, const unsigned* weights, unsigned x) {
        unsigned both[4] = {weights[0] << 16, weights[1] << 16, weights[0] & 0xffff0000, weights[1] & 0xffff0000};
        float2 values = __half22float2(*(const __half2*)&x);
        mma_m16n8k8(sums, both, values.x, values.y);
    }
};

// The pieces of a lane: of slot `slot`, and of the one 8 behind it.
template <class Storage>
__device__ __forceinline__ void load_pieces(const Product& p, int slot, int k, typename Storage::Piece* pieces) {
    pieces[0] = Storage::load(p.first, p.cols, row_of<8>(p, slot), k);
    pieces[1] = Storage::load(p.second, p.cols, row_of<8>(p, slot + 8), k);
}

template <class Storage, int TILES>
__device__ __forceinline__ void mma_many(const Product& p, int tile_of_tokens) {
    const int steps_of_chunk = Storage::UNITS / STEP_UNITS, parts = TILES * Storage::PARTS;
    __shared__ uint4 shared[STAGES][STAGE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_token = tile_of_tokens * MANY_TOKENS;
    int slot = warp * TILES * SLOTS + lane / 4, my_cols = lane % 4 * Storage::COLS;
    int steps = (p.cols + Storage::CHUNK - 1) / Storage::CHUNK * steps_of_chunk;
    float sums[TILES][MANY_TOKENS / 8][4] = {};
    typename Storage::Piece next[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) load_pieces<Storage>(p, slot + tile * SLOTS, my_cols, next[tile]);
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) stage<Storage>(p, first_token, step, shared[step]);
        cp_async_commit();
    }
    int current = 0;
    for (int start = 0; start < steps; start += steps_of_chunk) {
        typename Storage::Piece pieces[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            pieces[tile][0] = next[tile][0], pieces[tile][1] = next[tile][1];
            load_pieces<Storage>(p, slot + tile * SLOTS, (start / steps_of_chunk + 1) * Storage::CHUNK + my_cols, next[tile]);
        }
#pragma unroll
        for (int i = 0; i < steps_of_chunk; i++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            // The stage of the step before this one is free.
            if (start + i + STAGES - 1 < steps) stage<Storage>(p, first_token, start + i + STAGES - 1, shared[current == 0 ? STAGES - 1 : current - 1]);
            cp_async_commit();
#pragma unroll
            for (int unit = 0; unit < STEP_UNITS; unit++) {
                unsigned weights[parts][2][4];
#pragma unroll
                for (int at = 0; at < parts; at++) weights_of<Storage>(pieces[at % TILES], at / TILES, i * STEP_UNITS + unit, weights[at]);
                const uint4* x = shared[current] + unit * MANY_TOKENS * 4 + (lane ^ unit * 4);
#pragma unroll
                for (int t = 0; t < MANY_TOKENS / 8; t++) {
                    uint4 values = x[t * 32];
#pragma unroll
                    for (int at = 0; at < parts; at++) {
                        Multiply<Storage>::add(sums[at % TILES][t], weights[at][0], values.x, values.y);
                        Multiply<Storage>::add(sums[at % TILES][t], weights[at][1], values.z, values.w);
                    }
                }
            }
            current = current == STAGES - 1 ? 0 : current + 1;
        }
    }
    // Through shared memory, so that neighbouring threads write neighbouring rows.
    cp_async_wait<0>();
    __syncthreads();
    float* mine = (float*)shared + warp * MANY_TOKENS * SUMS;
    int width = results(p, SLOTS), at = lane % width;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        __syncwarp();
#pragma unroll
        for (int t = 0; t < MANY_TOKENS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) mine[(t * 8 + lane % 4 * 2 + i % 2) * SUMS + lane / 4 + i / 2 * 8] = sums[tile][t][i];
        __syncwarp();
        int row = p.row + (warp * TILES + tile) * width + at;
        if (row >= p.first.rows) continue;
        Ending first = ending_of<Storage>(p.first, row), second = p.is_gated ? ending_of<Storage>(p.second, row) : first;
#pragma unroll 1
        for (int t = lane / width; t < MANY_TOKENS && first_token + t < p.tokens; t += 32 / width)
            write(p, row, first_token + t, first, mine[t * SUMS + at], second, mine[t * SUMS + (at + 8) % SLOTS]);
    }
}

#define MMA_MANY(name, storage)                                                              \
    PRODUCT(KERNEL_AT_ONCE(128, 3), 64, mma_many_##name##_64, (mma_many<storage, 1>))         \
    PRODUCT(KERNEL_AT_ONCE(128, 2), 128, mma_many_##name##_128, (mma_many<storage, 2>))
MMA_MANY(int8, MmaInt8)
MMA_MANY(int4, MmaInt4<false>)
MMA_MANY(nl4, MmaNl4)
MMA_MANY(bf16, MmaPlain<BF16>)
MMA_MANY(f16, MmaPlain<F16>)
