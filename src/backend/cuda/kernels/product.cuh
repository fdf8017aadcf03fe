// What the matrix products of matmul.cu, mma_few.cu and mma_many.cu share: their arguments, and what becomes of a sum.
//
//   y[t][n] = factor * z[t][n], z[t][n] = scale * sum_k x[t][k] * w[n][k] + bias[n], accumulated in f32
//
// for up to three matrices with the same x in one launch, whose blocks stand side by side in the grid; or,
// with an activation, factor * activation(z) of one matrix, or factor * activation(z of the first) * (z of the second).
//
// w: a matrix in the canonical packing of quant/layout.rs, [rows][cols], of the storage in the kernel's
// name; null for none. x: f16 [tokens][cols]. bias: [rows] of bias_dtype, or null. y: [tokens][rows],
// written as `output` says. sub_scales and scales are null where the storage has none.
// Gate and up have as many rows and share a block: its slots for rows are half the one's, half the other's.
#pragma once
#include "common.cuh"

struct Matrix {
    const void* codes;
    const signed char* sub_scales;
    const void* scales;
    int rows;
    const void* bias;
    int bias_dtype;
    void* y;
};

struct Product {
    // Those of the two halves of the slots; the same where there is no gate.
    Matrix first, second;
    bool is_gated;
    // The block's first row.
    int row;
    int cols;
    const __half* x;
    int tokens, output;
    float scale, factor;
    int activation;
};

__device__ __forceinline__ bool is_gated(const Matrix& second, int activation) { return activation != NO_ACTIVATION && second.codes; }

// The part of the launch that block `block` with `slots` slots has.
__device__ __forceinline__ Product part_of(int block, const Matrix& a, const Matrix& b, const Matrix& c, int slots, int cols, const __half* x, int tokens, int output,
                                           float scale, float factor, int activation) {
    int blocks = (a.rows + slots - 1) / slots;
    if (is_gated(b, activation)) return {a, b, true, block * (slots / 2), cols, x, tokens, output, scale, factor, activation};
    if (block < blocks) return {a, a, false, block * slots, cols, x, tokens, output, scale, factor, activation};
    block -= blocks, blocks = (b.rows + slots - 1) / slots;
    if (block < blocks) return {b, b, false, block * slots, cols, x, tokens, output, scale, factor, activation};
    return {c, c, false, (block - blocks) * slots, cols, x, tokens, output, scale, factor, activation};
}

// Slots are gate's and up's in turn, HALF of each. The row of a slot:
template <int HALF>
__device__ __forceinline__ int row_of(const Product& p, int slot) {
    return p.row + (p.is_gated ? slot / (2 * HALF) * HALF + slot % HALF : slot);
}

// How many rows `slots` slots give.
__device__ __forceinline__ int results(const Product& p, int slots) { return p.is_gated ? slots / 2 : slots; }

// What a row's sums are multiplied by, and its bias.
struct Ending {
    float scale, shift;
};

template <class Storage>
__device__ __forceinline__ Ending ending_of(const Matrix& m, int row) {
    return {Storage::scale(m, row), m.bias ? load(m.bias, m.bias_dtype, row) : 0.0f};
}

// Writes what a row gives for a token, from its sum and, where there is a gate, up's.
__device__ __forceinline__ void write(const Product& p, int row, int token, Ending ending, float sum, Ending ending_of_up, float up) {
    float y = fmaf(p.scale * sum, ending.scale, ending.shift);
    if (p.activation != NO_ACTIVATION) y = activated(p.activation, y);
    if (p.is_gated) y *= fmaf(p.scale * up, ending_of_up.scale, ending_of_up.shift);
    store(p.first.y, p.output, (size_t)token * p.first.rows + row, p.factor * y);
}

// The same for the result `at` of a block's.
template <class Storage>
__device__ __forceinline__ void write(const Product& p, int at, int token, float sum, float up) {
    int row = p.row + at;
    if (row >= p.first.rows) return;
    Ending ending = ending_of<Storage>(p.first, row);
    write(p, row, token, ending, sum, p.is_gated ? ending_of<Storage>(p.second, row) : ending, up);
}

// The same from the sums of the block's slots.
template <class Storage, int HALF>
__device__ __forceinline__ void finish(const Product& p, int at, int token, const float* sums) {
    int slot = p.is_gated ? at / HALF * 2 * HALF + at % HALF : at;
    write<Storage>(p, at, token, sums[slot], p.is_gated ? sums[slot + HALF] : 0.0f);
}

#define MATRIX(i) const void *codes##i, const signed char *sub_scales##i, const void *scales##i, int rows##i, const void *bias##i, int bias_dtype##i, void *y##i
#define GIVEN(i) {codes##i, sub_scales##i, scales##i, rows##i, bias##i, bias_dtype##i, y##i}
// Where the grid has tiles of tokens, those of the same rows run one after the other.
#define PRODUCT(declared, slots, name, kernel)                                                                                              \
    declared name(MATRIX(0), MATRIX(1), MATRIX(2), int cols, const __half* x, int tokens, int output, float scale, float factor, int activation) { \
        begin();                                                                                                                            \
        unsigned at = blockIdx.y * gridDim.x + blockIdx.x;                                                                                  \
        kernel(part_of(at / gridDim.y, GIVEN(0), GIVEN(1), GIVEN(2), slots, cols, x, tokens, output, scale, factor, activation), at % gridDim.y); \
    }
