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
// Activations are in shared memory in units of eight columns, in the order [chunk][unit of a lane]
// [token][c], so that a warp reads 512 neighbouring bytes.
#pragma once
#include "product.cuh"
#include "tensor_cores.cuh"

#define SLOTS 16

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
