// Matrix products of any number of tokens by tensor cores; see mma.cuh.
//
// mma_many_<storage>: a block takes 64 rows and 64 tokens in steps of 128 columns, a warp 16 of the rows:
//   it dequantizes a weight once for all tokens.
//   Launch: 128 threads, grid (rows / 64, tokens / 64), rounded up.
#include "mma.cuh"

#define MANY_SLOTS 64
#define TOKENS 64
#define STEP_COLS 128

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
        if (is_aligned(p, token, k)) cp_async_16(to, p.x + (size_t)token * p.cols + k, true);
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

PRODUCT(128, MANY_SLOTS, mma_many_int8, mma_many<MmaInt8>)
PRODUCT(128, MANY_SLOTS, mma_many_int4, mma_many<MmaInt4>)
PRODUCT(128, MANY_SLOTS, mma_many_nl4, mma_many<MmaNl4>)
