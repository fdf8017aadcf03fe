// Weights into the canonical packing of quant/layout.rs, bit for bit as quant/quantize.rs does it.
//
//   int8: scale = absmax / 127, q = round(w / scale)            codes i8 [rows][padded], scales f32 [rows]
//   int4: w = scale * sub_scale * (q - 8), groups of 32         codes u8 [rows][padded / 2],
//         sub-scales i8 [rows][padded / 32], scales f16 [rows]
//   nl4:  w = scale * sub_scale * level[q], else as int4
//
// weights: [rows][cols] of bf16, f16 or f32; padded: cols rounded up to 32; what lies between is zero.
// codes, sub_scales and scales point at the first row of the slab; codes at a multiple of 16 bytes.
// failed: set to 1 where a weight is not finite or a scale too large for f16; the host then finds out
// which. Launch: a block for each row; 256 threads for int8, 128 for the others (a thread takes whole groups).
//
// Every operation rounds as Rust's does: divisions and products are spelled out, sums run in the
// same eight lanes.
#include "common.cuh"

#define GROUP 32
#define LANES 8
#define NL4_STEPS 512

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }

// As f32::clamp: NaN stays.
__device__ __forceinline__ float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

__device__ __forceinline__ float nearest(float x) { return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f); }

__device__ __forceinline__ int round_i8(float x) { return (int)nearest(clamp(x, -127.0f, 127.0f)); }

// A set of sixteen levels: how many divisors of a group's extreme element the search tries, and which;
// the level nearest to x, and its code.
struct Int4Levels {
    enum { DIVISORS = 20 };
    static __device__ __forceinline__ float divisor(int candidate) {
        const float first = -10.47f, last = -6.2f;
        return __fadd_rn(first, __fdiv_rn(__fmul_rn(__fsub_rn(last, first), (float)candidate), (float)(DIVISORS - 1)));
    }
    __device__ __forceinline__ float level(float x) const { return nearest(clamp(x, -8.0f, 7.0f)); }
    __device__ __forceinline__ unsigned code(float x) const { return (unsigned)(level(x) + 8.0f); }
};

struct Nl4Levels {
    enum { DIVISORS = 24 };
    // The level of each step of half a sixteenth from -8 on.
    const float* levels;

    static __device__ __forceinline__ int sixteenths(unsigned code) { return (int)(nl4_levels(code) & 255) - NL4_ZERO; }
    static __device__ __forceinline__ float divisor(int candidate) {
        const float smallest = 6.25f, largest = 9.766f;
        float part = __fdiv_rn(__fmul_rn(__fsub_rn(largest, smallest), (float)(candidate / 2)), (float)(DIVISORS / 2 - 1));
        float size = __fadd_rn(smallest, part);
        return candidate % 2 == 0 ? -size : size;
    }
    static __device__ __forceinline__ int step(float x) {
        float at = __fadd_rn(__fmul_rn(x, 32.0f), (float)(NL4_STEPS / 2));
        return at >= 0.0f ? (int)fminf(at, (float)(NL4_STEPS - 1)) : 0;
    }
    static __device__ unsigned code_of(int step) {
        unsigned code = 0;
        while (code < 15 && step - NL4_STEPS / 2 >= sixteenths(code) + sixteenths(code + 1)) code++;
        return code;
    }
    __device__ __forceinline__ float level(float x) const { return levels[step(x)]; }
    __device__ __forceinline__ unsigned code(float x) const { return code_of(step(x)); }
};

__device__ __forceinline__ float lanes_sum(const float* sums) {
    float sum = sums[0];
    for (int i = 1; i < LANES; i++) sum = __fadd_rn(sum, sums[i]);
    return sum;
}

template <class Levels>
__device__ float squared_error(const Levels& levels, const float* group, float scale) {
    float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
    float sums[LANES] = {};
    for (int k = 0; k < GROUP; k += LANES)
        for (int i = 0; i < LANES; i++) {
            float level = levels.level(__fmul_rn(group[k + i], inverse));
            float difference = __fsub_rn(group[k + i], __fmul_rn(scale, level));
            sums[i] = __fadd_rn(sums[i], __fmul_rn(difference, difference));
        }
    return lanes_sum(sums);
}

template <class Levels>
__device__ float search_group(const Levels& levels, const float* group) {
    float extreme = 0.0f;
    for (int k = 0; k < GROUP; k++)
        if (fabsf(group[k]) > fabsf(extreme)) extreme = group[k];
    if (extreme == 0.0f) return 0.0f;
    float best = __fdiv_rn(extreme, -8.0f), least = __uint_as_float(0x7f800000u);
    for (int candidate = 0; candidate < Levels::DIVISORS; candidate++) {
        float inverse = __fdiv_rn(Levels::divisor(candidate), extreme);
        float dots[LANES] = {}, norms[LANES] = {};
        for (int k = 0; k < GROUP; k += LANES)
            for (int i = 0; i < LANES; i++) {
                float level = levels.level(__fmul_rn(group[k + i], inverse));
                dots[i] = __fadd_rn(dots[i], __fmul_rn(group[k + i], level));
                norms[i] = __fadd_rn(norms[i], __fmul_rn(level, level));
            }
        float scale = __fdiv_rn(lanes_sum(dots), fmaxf(lanes_sum(norms), 1e-9f));
        if (scale == 0.0f || !is_finite(scale)) continue;
        float error = squared_error(levels, group, scale);
        if (error < least) best = scale, least = error;
    }
    return best;
}

__device__ __forceinline__ bool load_group(const void* weights, int dtype, size_t row, int cols, int group, float* out) {
    bool finite = true;
    for (int i = 0; i < GROUP; i++) {
        int k = group * GROUP + i;
        out[i] = k < cols ? load(weights, dtype, row * cols + k) : 0.0f;
        finite = finite && is_finite(out[i]);
    }
    return finite;
}

KERNEL(256) quantize_int8(const void* weights, int dtype, int cols, int padded, signed char* codes, float* scales, unsigned* failed) {
    begin();
    __shared__ float scratch[8];
    size_t row = blockIdx.x;
    float absmax = 0.0f;
    for (int k = threadIdx.x; k < cols; k += blockDim.x) {
        float v = load(weights, dtype, row * cols + k);
        if (!is_finite(v)) *failed = 1;
        absmax = fmaxf(absmax, fabsf(v));
    }
    absmax = block_max(absmax, scratch);
    float scale = __fdiv_rn(absmax, 127.0f);
    if (!(scale >= 1.17549435e-38f)) scale = 1.0f;
    for (int k = threadIdx.x; k < padded; k += blockDim.x) {
        float v = k < cols ? load(weights, dtype, row * cols + k) : 0.0f;
        codes[row * padded + k] = (signed char)round_i8(__fdiv_rn(v, scale));
    }
    if (threadIdx.x == 0) scales[row] = scale;
}

template <class Levels>
__device__ __forceinline__ void quantize_groups(const Levels& levels, const void* weights, int dtype, int cols, int padded, byte* codes, signed char* sub_scales,
                                                __half* scales, unsigned* failed) {
    __shared__ float scratch[4];
    size_t row = blockIdx.x;
    int groups = padded / GROUP;
    float group[GROUP];
    float largest = 0.0f;
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
        if (!load_group(weights, dtype, row, cols, g, group)) *failed = 1;
        float scale = search_group(levels, group);
        // The place of the group's codes keeps its scale until the row's is known.
        *(float*)(codes + (row * groups + g) * (GROUP / 2)) = scale;
        largest = fmaxf(largest, fabsf(scale));
    }
    largest = block_max(largest, scratch);
    __half half_scale = __float2half_rn(__fdiv_rn(largest, 127.0f));
    if (largest == 0.0f) half_scale = __float2half_rn(1.0f);
    else if (__half_as_ushort(half_scale) == 0) half_scale = __ushort_as_half(1);
    float row_scale = __half2float(half_scale);
    if (threadIdx.x == 0) {
        scales[row] = half_scale;
        if (!is_finite(row_scale)) *failed = 1;
    }
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
        byte* out = codes + (row * groups + g) * (GROUP / 2);
        load_group(weights, dtype, row, cols, g, group);
        int rounded = round_i8(__fdiv_rn(*(const float*)out, row_scale));
        const int candidates[3] = {rounded, rounded > -127 ? rounded - 1 : -127, rounded < 127 ? rounded + 1 : 127};
        int code = rounded;
        float least = squared_error(levels, group, __fmul_rn(row_scale, (float)rounded));
        for (int i = 1; i < 3; i++) {
            float error = squared_error(levels, group, __fmul_rn(row_scale, (float)candidates[i]));
            if (error < least) code = candidates[i], least = error;
        }
        sub_scales[row * groups + g] = (signed char)code;
        float scale = __fmul_rn(row_scale, (float)code);
        for (int j = 0; j < GROUP / 2; j++) {
            float low = scale == 0.0f ? 0.0f : __fdiv_rn(group[j], scale);
            float high = scale == 0.0f ? 0.0f : __fdiv_rn(group[j + GROUP / 2], scale);
            out[j] = (byte)(levels.code(low) | levels.code(high) << 4);
        }
    }
}

KERNEL(128) quantize_int4(const void* weights, int dtype, int cols, int padded, byte* codes, signed char* sub_scales, __half* scales, unsigned* failed) {
    begin();
    quantize_groups(Int4Levels{}, weights, dtype, cols, padded, codes, sub_scales, scales, failed);
}

KERNEL(128) quantize_nl4(const void* weights, int dtype, int cols, int padded, byte* codes, signed char* sub_scales, __half* scales, unsigned* failed) {
    begin();
    __shared__ float levels[NL4_STEPS];
    for (int step = threadIdx.x; step < NL4_STEPS; step += blockDim.x) levels[step] = (float)Nl4Levels::sixteenths(Nl4Levels::code_of(step)) * NL4_UNIT;
    __syncthreads();
    quantize_groups(Nl4Levels{levels}, weights, dtype, cols, padded, codes, sub_scales, scales, failed);
}
