// The token that comes next, out of the logits.
#include "common.cuh"

typedef unsigned long long u64;

// What the blocks of a launch share; all of it is zero between launches.
struct Scratch {
    u64 best;
    unsigned arrivals;
};

// For the last block of a launch to come here, after what all of them have written.
__device__ __forceinline__ bool is_last_block(unsigned* arrivals) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0;
    return true;
}

// The order of numbers as that of integers, zeros the same; all that are not finite come last.
__device__ __forceinline__ unsigned rank_of(float v) {
    unsigned bits = __float_as_uint(v + 0.0f);
    if ((bits & 0x7f800000u) == 0x7f800000u) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// chosen[0] = the index of the largest of `count` logits, the lowest one among equals; chosen[1] = whether
// one is not finite, and then that is the one. chosen: u32 [2].
// Launch: 256 threads, a block for every 1024 logits.
KERNEL(256) largest(const float* logits, int count, Scratch* scratch, unsigned* chosen) {
    __shared__ u64 warps[8];
    u64 best = 0;
    for (int i = 0; i < 4; i++) {
        int at = blockIdx.x * 1024 + i * 256 + threadIdx.x;
        if (at < count) best = max(best, (u64)rank_of(logits[at]) << 32 | (unsigned)~at);
    }
    for (int step = 16; step > 0; step >>= 1) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; i++) best = max(best, warps[i]);
        atomicMax(&scratch->best, best);
    }
    if (!is_last_block(&scratch->arrivals) || threadIdx.x != 0) return;
    best = __ldcg(&scratch->best);
    scratch->best = 0;
    chosen[0] = ~(unsigned)best, chosen[1] = best >> 32 == 0xffffffffu;
}
