// Matrix products of 1 to 8 tokens by tensor cores; see mma.cuh.
//
// mma_few_<storage>: the warps of a block share out the columns of 16 rows.
//   Launch: 256 threads, a block for every 16 rows.
#include "mma.cuh"

#define WARPS 8
#define AHEAD 2
#define SLICE_UNITS 2048

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

PRODUCT(256, SLOTS, mma_few_int8, mma_few<MmaInt8>)
PRODUCT(256, SLOTS, mma_few_int4, mma_few<MmaInt4>)
PRODUCT(256, SLOTS, mma_few_nl4, mma_few<MmaNl4>)
