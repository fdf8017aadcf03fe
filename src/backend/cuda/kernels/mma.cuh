// What mma_few.cu and mma_many.cu share: matrix products by tensor cores, for int8, int4 and nl4
// weights: Yᵀ = W · Xᵀ; see product.cuh. For compute capability 8.0 and higher.
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
// Sums are as PTX has them: row r, tokens 2c and 2c + 1 of eight, then row r + 8. Activations are in shared
// memory in units of eight columns, so that a warp reads 512 neighbouring bytes.
#pragma once
#include "product.cuh"
#include "tensor_cores.cuh"

#define SLOTS 16

// What a lane loads of one row.
struct PackedPiece {
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
    typedef PackedPiece Piece;
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

// SWAPPED: of four columns side by side, the first and the third make a word, then the second and the fourth.
template <bool SWAPPED>
struct MmaInt4 {
    typedef PackedPiece Piece;
    enum { COLS = 32, UNITS = COLS / 8, CHUNK = 4 * COLS, PARTS = 1 };
    static __device__ __forceinline__ Piece load(const Matrix& w, int cols, int row, int k) {
        int groups = (cols + 31) / 32, group = k / 32;
        if (row >= w.rows || group >= groups) return {{0, 0, 0, 0}, 0};
        size_t at = (size_t)row * groups + group;
        return {__ldg((const uint4*)w.codes + at), __ldg(w.sub_scales + at)};
    }
    static __device__ __forceinline__ void dequantize(const Piece& piece, int, int unit, int step, unsigned& low, unsigned& high) {
        unsigned codes = word(piece.codes, (2 * unit + step) % 4);
        if (!SWAPPED) codes = __byte_perm(codes, 0, 0x3120);
        // (1024 + 16 * (level + 8)) / 16 - 72 = level: all of it exact, times the sub-scale too.
        float sub_scale = (float)piece.sub_scale;
        __half2 factor = __half2half2(__float2half_rn(sub_scale * 0.0625f)), shift = __half2half2(__float2half_rn(sub_scale * -72.0f));
        low = scaled(unit < 2 ? codes << 4 : codes, factor, shift), high = scaled(unit < 2 ? codes >> 4 : codes >> 8, factor, shift);
    }
    static __device__ __forceinline__ unsigned scaled(unsigned codes, __half2 factor, __half2 shift) {
        unsigned levels = and_or(codes, 0x00f000f0, 0x64006400);
        __half2 weights = __hfma2(*(const __half2*)&levels, factor, shift);
        return *(const unsigned*)&weights;
    }
    static __device__ __forceinline__ float scale(const Matrix& w, int row) { return __half2float(((const __half*)w.scales)[row]); }
};

struct MmaNl4 : MmaInt4<false> {
    enum { PARTS = 2 };
    static __device__ __forceinline__ void dequantize(const Piece& piece, int part, int unit, int step, unsigned& low, unsigned& high) {
        unsigned codes = word(piece.codes, (2 * unit + step) % 4), select = unit < 2 ? 0x4240 : 0x4341;
        int near = (piece.sub_scale + 8) & ~15;
        __half2 sub_scale = __half2half2(__float2half_rn((float)(part == 0 ? near : piece.sub_scale - near)));
        low = scaled(nl4_levels(codes), select, sub_scale), high = scaled(nl4_levels(codes >> 16), select, sub_scale);
    }
    static __device__ __forceinline__ unsigned scaled(unsigned levels, unsigned select, __half2 sub_scale) {
        // 1024 + 128 + level, in the lowest bits of an f16.
        unsigned there = subtract(__byte_perm(levels, 0x64646464, select), 0x64806480);
        __half2 weights = __hmul2(*(const __half2*)&there, sub_scale);
        return *(const unsigned*)&weights;
    }
    static __device__ __forceinline__ float scale(const Matrix& w, int row) { return MmaInt4<false>::scale(w, row) * NL4_UNIT; }
};

// The weights of a unit, for its two mma, of rows r and r + 8.
template <class Storage>
__device__ __forceinline__ void weights_of(const typename Storage::Piece* pieces, int part, int unit, unsigned (*weights)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) Storage::dequantize(pieces[i % 2], part, unit, i / 2, weights[i / 2][i % 2], weights[i / 2][i % 2 + 2]);
}
