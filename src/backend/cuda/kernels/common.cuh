// What the kernels share: dtypes, ways to write a result, sums over a block.
//
// NVRTC compiles them to PTX (build_ptx.py). Products are never contracted: where a fused multiply-add is
// wanted, it is written out.
#pragma once

#include <cuda_fp16.h>

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// So many of its blocks run on a multiprocessor at once.
#define KERNEL_AT_ONCE(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

// The numbers that launch.rs gives dtypes and storages.
enum { BF16 = 0, F16 = 1, F32 = 2, INT8 = 3, INT4 = 4, NL4 = 5 };
// Where a result goes: to an f16 or an f32 buffer, or onto what an f32 buffer holds.
enum { STORE_F16 = 0, STORE_F32 = 1, ADD_F32 = 2 };

typedef unsigned char byte;

// The first call of a kernel: what was launched before has ended behind it, and what is launched next may
// begin. Ahead of it a kernel reads nothing but weights. Where GPUs begin a kernel while the one before it
// runs, from compute capability 9.0 on, modules.rs takes away the mark that makes it a comment.
__device__ __forceinline__ void begin() {
    asm volatile("//sm_90 griddepcontrol.wait;" ::: "memory");
    asm volatile("//sm_90 griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ float bf16_to_float(unsigned bits) { return __uint_as_float(bits << 16); }

// Of bf16 or f16.
__device__ __forceinline__ float load16(const void* x, int dtype, size_t i) {
    return dtype == BF16 ? bf16_to_float(((const unsigned short*)x)[i]) : __half2float(((const __half*)x)[i]);
}

__device__ __forceinline__ float load(const void* x, int dtype, size_t i) { return dtype == F32 ? ((const float*)x)[i] : load16(x, dtype, i); }

#define NO_NUMBER __uint_as_float(0x7fffffffu)
#define INFINITE __uint_as_float(0x7f800000u)

// NaN beyond the range of f16, and NaN stays. An infinity could be lost: as a score that weighs nothing, under a
// soft cap, in an activation. NaN goes through all of these to the logits, where it is noticed.
__device__ __forceinline__ __half to_half(float v) { return __float2half_rn(fabsf(v) < 65520.0f ? v : NO_NUMBER); }

// To the nearest bf16, ties to even; NaN stays.
__device__ __forceinline__ unsigned short to_bf16(float v) {
    unsigned bits = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ void store(void* y, int output, size_t i, float v) {
    if (output == STORE_F16) ((__half*)y)[i] = to_half(v);
    else if (output == STORE_F32) ((float*)y)[i] = v;
    else ((float*)y)[i] += v;
}

// Eight elements of a row of `count` that starts at element `start`, from the i-th on, a multiple of
// eight; zero from `count` on.
__device__ __forceinline__ void load8(const void* x, int dtype, size_t start, int i, int count, float* out) {
    if (dtype == F32) {
        const float* from = (const float*)x + start + i;
        float4 raw[2] = {};
        if (count % 8 == 0 && i < count) raw[0] = ((const float4*)from)[0], raw[1] = ((const float4*)from)[1];
        for (int j = 0; j < 8; j++) out[j] = ((const float*)raw)[j];
        for (int j = 0; count % 8 != 0 && j < 8; j++) out[j] = i + j < count ? from[j] : 0.0f;
    } else {
        const unsigned short* from = (const unsigned short*)x + start + i;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (count % 8 == 0 && i < count) raw = *(const uint4*)from;
        for (int j = 0; count % 8 != 0 && j < 8; j++) ((unsigned short*)&raw)[j] = i + j < count ? from[j] : (unsigned short)0;
        for (int j = 0; j < 8; j++) out[j] = load16(&raw, dtype, j);
    }
}

// The levels of nl4 for the four codes in the low 16 bits, a byte each: sixteenths (NL4_LEVELS of
// quant/nl4.rs) plus 128.
__device__ __forceinline__ unsigned nl4_levels(unsigned codes) {
    unsigned low = __byte_perm(0x402f1b03, 0x766a5d50, codes & 0x7777), high = __byte_perm(0xa7998d81, 0xf3dcc8b6, codes & 0x7777);
    return __byte_perm(low, high, (codes & 0x8888) >> 1 | 0x3210);
}
#define NL4_ZERO 128
#define NL4_UNIT 0.0625f

enum { NO_ACTIVATION = -1, SILU = 0, GELU_TANH = 1, GELU = 2, QUICK_GELU = 3, RELU = 4 };

//   SILU: x / (1 + exp(-x))   GELU: x * (1 + erf(x / sqrt(2))) / 2
//   GELU_TANH: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
//   QUICK_GELU: x / (1 + exp(-1.702 x))   RELU: x, or 0 where it is less
__device__ __forceinline__ float activated(int kind, float x) {
    if (kind == SILU) return x / (1.0f + expf(-x));
    if (kind == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    if (kind == QUICK_GELU) return x / (1.0f + expf(-1.702f * x));
    if (kind == RELU) return x <= 0.0f ? 0.0f : x;
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int step = 16; step > 0; step >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}

// Over a block of whole warps, for every thread; `scratch` has room for a float a warp.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.0f;
    for (int i = 0; i < (int)blockDim.x / 32; i++) v += scratch[i];
    return v;
}

__device__ __forceinline__ float block_max(float v, float* scratch) {
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = scratch[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) v = fmaxf(v, scratch[i]);
    return v;
}

// Whether this block is the last of `count` that share a result. All its threads ask, after they have left
// their part; what the others have left can then be read by __ldcg. `arrivals` is zero before and after.
__device__ __forceinline__ bool is_last_block(unsigned* arrivals, unsigned count) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrivals, 1u) == count - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrivals = 0;
    return true;
}
