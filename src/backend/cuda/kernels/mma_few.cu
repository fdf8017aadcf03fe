// Matrix products of 1 to 8 tokens by tensor cores; see mma.cuh.
//
// mma_few_<storage>: the input is f16, or an f32 hidden state, which is normalized on the way.
//   The work is cut into units: 16 slots, and of their columns a chunk for each of the block's warps.
//   Blocks have equal runs of them, one behind the other, whatever there is of rows and columns, and stay
//   until theirs is done: a block stages the input once, and always has the weights of its next units on
//   their way. Where slots' columns are shared by several blocks, each leaves its sums in `partials`,
//   f32 [blocks][2][128], and the last to finish, by the count of the first of them in `arrivals`, u32
//   [blocks], adds them up in order; it leaves the count at zero, as it has to be.
//   Launch: 256 threads, at most a block for every unit.
#include "mma.cuh"
#include "norm.cuh"

#define WARPS 8
#define SLICE_UNITS 2048
#define FEW_TOKENS 8
#define FEW_SUMS (SLOTS * FEW_TOKENS)

// What is read once, and makes no room in the caches; zeros where nothing is `there`.
__device__ __forceinline__ uint4 load_once(const uint4* from, bool there) {
    uint4 v;
    asm volatile(
        "{ .reg .pred there; .reg .b64 policy; setp.ne.b32 there, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        " @there ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], policy; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(from), "r"((int)there));
    return v;
}

// A row has pieces of 16 bytes of codes. AHEAD: units whose weights are on their way, as many as
// registers hold.
struct FewInt8 : MmaInt8 {
    enum { AHEAD = 4, SWAPPED = false, HAS_SUB_SCALES = false };
    static __device__ __forceinline__ int pieces(int cols) { return (cols + 31) / 32 * 2; }
};

struct FewInt4 : MmaInt4<true> {
    enum { AHEAD = 4, SWAPPED = true, HAS_SUB_SCALES = true };
    static __device__ __forceinline__ int pieces(int cols) { return (cols + 31) / 32; }
};

struct FewNl4 : MmaNl4 {
    enum { AHEAD = 3, SWAPPED = false, HAS_SUB_SCALES = true };
    static __device__ __forceinline__ int pieces(int cols) { return (cols + 31) / 32; }
};

// The products of a launch.
struct Few {
    Matrix a, b, c;
    int cols;
    const void* x;
    int x_dtype, tokens, output;
    float scale, factor;
    int activation;
    Norm norm;
    float* partials;
    unsigned* arrivals;
};

__device__ __forceinline__ Product part_of(const Few& few, int row_block) {
    return part_of(row_block, few.a, few.b, few.c, SLOTS, few.cols, nullptr, few.tokens, few.output, few.scale, few.factor, few.activation);
}

__device__ __forceinline__ int row_blocks(const Few& few) {
    if (is_gated(few.b, few.activation)) return (few.a.rows + SLOTS / 2 - 1) / (SLOTS / 2);
    return (few.a.rows + SLOTS - 1) / SLOTS + (few.b.rows + SLOTS - 1) / SLOTS + (few.c.rows + SLOTS - 1) / SLOTS;
}

// The units of blocks: the first `longer` have one more than the others.
struct Shares {
    int each, longer;

    __device__ __forceinline__ Shares(int units, int blocks) : each(units / blocks), longer(units % blocks) {}
    __device__ __forceinline__ int first(int block) const { return block * each + min(block, longer); }
    __device__ __forceinline__ int owner(int unit) const {
        int of_longer = longer * (each + 1);
        return unit < of_longer ? unit / (each + 1) : longer + (unit - of_longer) / each;
    }
};

// The rows of a row block that a lane reads, of slot lane / 4 and of the one 8 behind it: the matrices, and
// where in them the rows' pieces start; before them where there is no such row.
template <class Storage>
struct Rows {
    const uint4* codes[2];
    const signed char* sub_scales[2];
    long long start[2];

    __device__ __forceinline__ Rows(const Few& few, int row_block, int lane) {
        Product p = part_of(few, row_block);
        at<0>(p.first, row_of<8>(p, lane / 4), few.cols), at<1>(p.second, row_of<8>(p, lane / 4 + 8), few.cols);
    }
    template <int HALF>
    __device__ __forceinline__ void at(const Matrix& m, int row, int cols) {
        codes[HALF] = (const uint4*)m.codes, sub_scales[HALF] = m.sub_scales;
        start[HALF] = row < m.rows ? (long long)row * Storage::pieces(cols) : -1;
    }
    __device__ __forceinline__ void load(int piece, int pieces, typename Storage::Piece* to) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool there = start[half] >= 0 && piece < pieces;
            to[half].codes = load_once(codes[half] + (start[half] + piece), there);
            to[half].sub_scale = Storage::HAS_SUB_SCALES && there ? __ldg(sub_scales[half] + (start[half] + piece)) : 0;
        }
    }
};

// Columns k to k + 7 of a token, as f16; zero from column `cols` on.
template <class Storage>
__device__ __forceinline__ uint4 input_unit(const Few& few, int token, int k, Moments of) {
    float v[8];
    uint4 unit;
    __half* halves = (__half*)&unit;
    load8(few.x, few.x_dtype, (size_t)token * few.cols, k, few.cols, v);
    if (k < few.cols) normalize8(few.norm, of, k, few.cols, v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int slot = Storage::SWAPPED ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 : i;
        halves[slot] = to_half(k + i < few.cols ? v[i] : 0.0f);
    }
    return unit;
}

// A chunk of 16 rows by the tokens; a lane's units are `stride` apart in `x`.
template <class Storage>
__device__ __forceinline__ void multiply(const typename Storage::Piece* pieces, const uint4* x, int stride, float* sums) {
#pragma unroll
    for (int at = 0; at < Storage::UNITS * Storage::PARTS; at++) {
        unsigned weights[2][4];
        weights_of<Storage>(pieces, at % Storage::PARTS, at / Storage::PARTS, weights);
        uint4 values = x[at / Storage::PARTS * stride];
        mma_m16n8k16(sums, weights[0], values.x, values.y);
        mma_m16n8k16(sums, weights[1], values.z, values.w);
    }
}

template <class Storage>
__device__ __forceinline__ void mma_few(const Few& few) {
    const int chunk = Storage::CHUNK, units = Storage::UNITS, AHEAD = Storage::AHEAD;
    __shared__ __align__(16) uint4 x[SLICE_UNITS];
    __shared__ float sums_of_warps[2][WARPS][FEW_SUMS];
    __shared__ float scratch[WARPS];
    __shared__ Moments of_tokens[FEW_TOKENS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = few.tokens;
    int steps = (few.cols + WARPS * chunk - 1) / (WARPS * chunk), pieces = Storage::pieces(few.cols);
    // A token's sums are its own: lanes of tokens that are not there read the first one's.
    int mine = lane < tokens * 4 ? lane : lane % 4;
    // Steps whose columns of all tokens are staged at once.
    int slice = SLICE_UNITS * 8 / tokens / (WARPS * chunk);
    Shares shares(row_blocks(few) * steps, gridDim.x);
    int unit = shares.first(blockIdx.x), end = shares.first(blockIdx.x + 1);

    // The next unit whose weights are asked for.
    int row_block = unit / steps, first = unit % steps, next = unit, next_block = row_block, next_step = first;
    Rows<Storage> rows(few, next_block, lane);
    typename Storage::Piece ahead[AHEAD][2];
    auto load_next = [&](typename Storage::Piece* to) {
        if (next < end) {
            if (next_step == steps) next_step = 0, rows = Rows<Storage>(few, ++next_block, lane);
            rows.load((next_step * WARPS + warp) * 4 + lane % 4, pieces, to);
            next++, next_step++;
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_next(ahead[i]);
    begin();
    if (few.x_dtype == F32)
        for (int token = 0; token < tokens; token++) {
            Moments of = moments(few.norm, few.x, few.x_dtype, (size_t)token * few.cols, few.cols, scratch);
            if (threadIdx.x == 0) of_tokens[token] = of;
        }

    // The first step whose columns are staged.
    int staged = -slice, parity = 0;
    while (unit < end) {
        int last = min(steps, first + end - unit);
        float sums[4] = {};
#pragma unroll 1
        for (int step = first; step < last;) {
            if (step < staged || step >= staged + slice) {
                staged = step - step % slice;
                int start = staged * WARPS * chunk, in_row = min(slice * WARPS * chunk, (few.cols - start + chunk - 1) / chunk * chunk) / 8;
                __syncthreads();
#pragma unroll 1
                for (int token = 0; token < tokens; token++)
#pragma unroll 1
                    for (int at = threadIdx.x; at < in_row; at += WARPS * 32)
                        x[((at / (4 * units) * units + at % units) * tokens + token) * 4 + at / units % 4] = input_unit<Storage>(few, token, start + at * 8, of_tokens[token]);
                __syncthreads();
            }
            int stop = min(last, staged + slice), count = stop - step;
            const uint4* values = x + ((step - staged) * WARPS + warp) * units * tokens * 4 + mine;
            int k = (step * WARPS + warp) * chunk;
#pragma unroll 1
            for (; step < stop; step += AHEAD) {
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (step + i >= stop) break;
                    if (k < few.cols) multiply<Storage>(ahead[i], values, tokens * 4, sums);
                    values += WARPS * units * tokens * 4, k += WARPS * chunk;
                    load_next(ahead[i]);
                }
            }
            step = stop;
            // The oldest first again.
#pragma unroll 1
            for (int i = 0; i < count % AHEAD; i++) {
                typename Storage::Piece oldest[2] = {ahead[0][0], ahead[0][1]};
#pragma unroll
                for (int j = 1; j < AHEAD; j++) ahead[j - 1][0] = ahead[j][0], ahead[j - 1][1] = ahead[j][1];
                ahead[AHEAD - 1][0] = oldest[0], ahead[AHEAD - 1][1] = oldest[1];
            }
        }
        unit += last - first;

        // The sums of all warps; the other buffer is still read where the one before was long.
        float(*of_warps)[FEW_SUMS] = sums_of_warps[parity];
        parity ^= 1;
#pragma unroll
        for (int i = 0; i < 4; i++) of_warps[warp][(lane % 4 * 2 + i % 2) * SLOTS + lane / 4 + i / 2 * 8] = sums[i];
        __syncthreads();
        bool is_sum = (int)threadIdx.x < tokens * SLOTS;
        float sum = 0.0f;
        if (is_sum)
            for (int i = 0; i < WARPS; i++) sum += of_warps[i][threadIdx.x];
        bool is_shared = first > 0 || last < steps, is_first = first == 0;
        int finished = row_block;
        row_block++, first = 0;
        if (is_shared) {
            int owner = shares.owner(finished * steps), count = shares.owner(finished * steps + steps - 1) - owner + 1;
            if (is_sum) few.partials[(blockIdx.x * 2 + is_first) * FEW_SUMS + threadIdx.x] = sum;
            if (!is_last_block(&few.arrivals[owner], count)) continue;
            if (is_sum) {
                sum = __ldcg(&few.partials[(owner * 2 + 1) * FEW_SUMS + threadIdx.x]);
                for (int i = 1; i < count; i++) sum += __ldcg(&few.partials[(owner + i) * 2 * FEW_SUMS + threadIdx.x]);
            }
        }
        // Gate's slot for every row stands 8 before up's; both are in the same warp.
        Product p = part_of(few, finished);
        float up = __shfl_xor_sync(0xffffffffu, sum, 8);
        int at = threadIdx.x % SLOTS, token = threadIdx.x / SLOTS;
        if (is_sum && at < results(p, SLOTS)) write<Storage>(p, at, token, sum, up);
    }
}

#define MMA_FEW(name, storage)                                                                                                                            \
    KERNEL_AT_ONCE(256, 2) name(MATRIX(0), MATRIX(1), MATRIX(2), int cols, const void* x, int x_dtype, int tokens, int output, float scale, float factor,  \
                                int activation, int kind, const void* weight, int weight_dtype, const void* bias, int bias_dtype, float offset,          \
                                float epsilon, float* partials, unsigned* arrivals) {                                                                     \
        mma_few<storage>({GIVEN(0), GIVEN(1), GIVEN(2), cols, x, x_dtype, tokens, output, scale, factor, activation,                                      \
                          {kind, weight, weight_dtype, bias, bias_dtype, offset, epsilon}, partials, arrivals});                                          \
    }
MMA_FEW(mma_few_int8, FewInt8)
MMA_FEW(mma_few_int4, FewInt4)
MMA_FEW(mma_few_nl4, FewNl4)
