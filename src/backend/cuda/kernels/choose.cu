// The token that comes next, out of the logits: `largest` takes the likeliest; `draw` behind it takes one
// at random. Where only the likeliest may come, three launches of `cut` between them find out which.
//
// A logit weighs exp((logit - the largest) / temperature), between 0 and 1. Weights are summed up as
// integers, so that no order of additions shows in what is chosen.
#include "common.cuh"

typedef unsigned long long u64;

#define THREADS 256
// Logits of a block.
#define SHARE 1024
#define BINS 2048

// A sum of weights, and how many others there are.
struct Part {
    u64 weight;
    unsigned count;
};

// What blocks and launches leave each other; bins, `best` and `arrivals` are zero between launches. Behind it
// stand a weight for each block, u64, and a count for each, u32. CudaChoice of footprint/cuda.rs takes as much.
struct Scratch {
    u64 weights[BINS];
    unsigned counts[BINS];
    u64 best;
    // The weight that the likeliest reach together, and their number, both without those that weigh more than `key`.
    u64 limit;
    unsigned rank;
    // The bits of the least weight among them, and how many of that weight are.
    unsigned key, ties;
    float largest;
    unsigned arrivals;
};
static_assert(sizeof(Scratch) == 24616, "footprint/cuda.rs says the same");

// What the threads before this one have together; `total` is what all have.
__device__ __forceinline__ Part before(Part mine, Part& total) {
    __shared__ u64 weights[THREADS];
    __shared__ unsigned counts[THREADS];
    int at = threadIdx.x;
    Part sum = mine;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
        weights[at] = sum.weight, counts[at] = sum.count;
        __syncthreads();
        if (at >= step) sum.weight += weights[at - step], sum.count += counts[at - step];
        __syncthreads();
    }
    weights[at] = sum.weight, counts[at] = sum.count;
    __syncthreads();
    total = {weights[THREADS - 1], counts[THREADS - 1]};
    return {sum.weight - mine.weight, sum.count - mine.count};
}

// The order of numbers as that of integers, zeros the same; all that are not finite come last.
__device__ __forceinline__ unsigned rank_of(float v) {
    unsigned bits = __float_as_uint(v + 0.0f);
    if ((bits & 0x7f800000u) == 0x7f800000u) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A weight as an integer; `count` of them sum up to less than 2^62.
__device__ __forceinline__ u64 units(float weight, int count) {
    return (u64)(weight * __uint_as_float((127u + 30u + __clz(count)) << 23));
}

__device__ __forceinline__ void mark(unsigned* seen, unsigned token) {
    if (seen) seen[token / 32] |= 1u << token % 32;
}

// chosen[0] = the index of the largest of `count` logits, the lowest one among equals; chosen[stride] = whether
// one is not finite, and then that is the one. Before that, in place, a logit l becomes
// softcap * tanh(l / softcap) if softcap is not 0, and where its bit in `seen` is set, it is divided by the
// penalty if it is positive, and multiplied by it if not. With `is_choice`, the bit of the chosen one is set.
// logits: f32 [count]. seen: u32 [count / 32, rounded up], or null. chosen: u32.
// Launch: a block of 256 threads for every 1024 logits, as all here.
KERNEL(THREADS) largest(float* logits, int count, float softcap, unsigned* seen, float penalty, int is_choice, Scratch* scratch, unsigned* chosen, int stride) {
    begin();
    __shared__ u64 warps[THREADS / 32];
    u64 best = 0;
    for (int i = 0; i < SHARE / THREADS; i++) {
        int at = blockIdx.x * SHARE + i * THREADS + threadIdx.x;
        if (at >= count) break;
        float logit = logits[at];
        bool is_finite = rank_of(logit) != 0xffffffffu;
        if (softcap != 0.0f) logit = softcap * tanhf(logit / softcap);
        if (seen && seen[at / 32] >> at % 32 & 1) logit = logit >= 0.0f ? logit / penalty : logit * penalty;
        if (softcap != 0.0f || seen) logits[at] = logit;
        best = max(best, (u64)(is_finite ? rank_of(logit) : 0xffffffffu) << 32 | (unsigned)~at);
    }
    for (int step = 16; step > 0; step >>= 1) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < THREADS / 32; i++) best = max(best, warps[i]);
        atomicMax(&scratch->best, best);
    }
    if (!is_last_block(&scratch->arrivals, gridDim.x) || threadIdx.x != 0) return;
    best = __ldcg(&scratch->best);
    scratch->best = 0;
    unsigned token = ~(unsigned)best;
    scratch->largest = __ldcg(&logits[token]);
    chosen[0] = token, chosen[stride] = best >> 32 == 0xffffffffu;
    if (is_choice) mark(seen, token);
}

// The likeliest: at most k, and no more than weigh the share `p` of all together. Leaves the bits of the least
// weight among them, `digit` by `digit`: 11 bits, 11, and 8; those weights that are 0 are left out.
// Nothing happens where chosen[stride] says that a logit is not finite.
KERNEL(THREADS) cut(const float* logits, int count, float per_temperature, int digit, unsigned k, float p, Scratch* scratch, const unsigned* chosen, int stride) {
    begin();
    __shared__ u64 weights[BINS];
    __shared__ unsigned counts[BINS];
    if (chosen[stride]) return;
    const int each = BINS / THREADS;
    int shift = digit == 0 ? 19 : digit == 1 ? 8 : 0, width = digit == 2 ? 8 : 11;
    unsigned above = digit == 0 ? 0 : scratch->key;
    for (int i = threadIdx.x; i < BINS; i += THREADS) weights[i] = 0, counts[i] = 0;
    __syncthreads();
    for (int i = 0; i < SHARE / THREADS; i++) {
        int at = blockIdx.x * SHARE + i * THREADS + threadIdx.x;
        if (at >= count) break;
        float weight = expf((logits[at] - scratch->largest) * per_temperature);
        unsigned key = __float_as_uint(weight) >> shift;
        u64 mine = units(weight, count);
        if (mine == 0 || key >> width != above) continue;
        int bin = key & ((1 << width) - 1);
        atomicAdd(&weights[bin], mine);
        atomicAdd(&counts[bin], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (counts[i] == 0) continue;
        atomicAdd(&scratch->weights[i], weights[i]);
        atomicAdd(&scratch->counts[i], counts[i]);
    }
    if (!is_last_block(&scratch->arrivals, gridDim.x)) return;

    Part bins[each], mine = {}, total;
    for (int i = 0; i < each; i++) {
        int bin = BINS - 1 - (threadIdx.x * each + i);
        bins[i] = {__ldcg(&scratch->weights[bin]), __ldcg(&scratch->counts[bin])};
        scratch->weights[bin] = 0, scratch->counts[bin] = 0;
        mine.weight += bins[i].weight, mine.count += bins[i].count;
    }
    u64 limit = scratch->limit;
    unsigned rank = digit == 0 ? k : scratch->rank;
    Part start = before(mine, total);
    if (digit == 0) limit = p < 1.0f ? min((u64)ceil((double)p * (double)total.weight), total.weight) : total.weight;
    // The first bin, from the largest weights on, that reaches a bound.
    for (int i = 0; i < each && start.count < rank && start.weight < limit; i++) {
        Part end = {start.weight + bins[i].weight, start.count + bins[i].count};
        if (end.count >= rank || end.weight >= limit) {
            scratch->key = above << width | (BINS - 1 - (threadIdx.x * each + i));
            scratch->rank = rank -= start.count;
            scratch->limit = limit -= start.weight;
            if (digit == 2) {
                u64 one = bins[i].weight / bins[i].count, needed = (limit + one - 1) / one;
                scratch->ties = (unsigned)min(needed, (u64)min(rank, bins[i].count));
            }
        }
        start = end;
    }
}

// Where a number of units falls among parts: in which, how many of its units come before, and how many ties before it.
struct Place {
    int part;
    u64 units;
    unsigned ties;
};

// `part(i)` says what part i of `parts` weighs beside its ties; the first `keep` ties of all parts weigh `one` each.
// `place` counts from the first of these parts; with `uniform`, it becomes that share of 2^32 of their weight.
template <class Parts>
__device__ __forceinline__ Place find(int parts, Parts part, u64 one, unsigned keep, Place place, const unsigned* uniform) {
    __shared__ Place found;
    int each = (parts + THREADS - 1) / THREADS, first = min(parts, (int)threadIdx.x * each), end = min(parts, first + each);
    Part mine = {}, total;
    for (int i = first; i < end; i++) {
        Part next = part(i);
        mine.weight += next.weight, mine.count += next.count;
    }
    unsigned ties = place.ties + before(mine, total).count;
    mine.weight += (min(ties + mine.count, keep) - min(ties, keep)) * one;
    u64 start = before(mine, total).weight;
    if (uniform) place.units = (total.weight >> 32) * *uniform + ((total.weight & 0xffffffffu) * *uniform >> 32);
    if (start <= place.units && place.units < start + mine.weight) {
        for (int i = first; i < end; i++) {
            Part next = part(i);
            u64 weight = next.weight + (min(ties + next.count, keep) - min(ties, keep)) * one;
            if (place.units < start + weight) {
                found = {i, place.units - start, ties};
                break;
            }
            start += weight, ties += next.count;
        }
    }
    __syncthreads();
    return found;
}

// chosen[0] = the index of the logit at which the weights up to it pass the share chosen[2 * stride] / 2^32 of all. Weights
// below `least` count for nothing; with `is_cut`, neither do those that `cut` has left out. Sets the bit of the chosen one.
// Nothing happens where chosen[stride] says that a logit is not finite.
KERNEL(THREADS) draw(const float* logits, int count, float per_temperature, int is_cut, float least, unsigned* seen, Scratch* scratch, unsigned* chosen, int stride) {
    begin();
    if (chosen[stride]) return;
    u64* weights = (u64*)(scratch + 1);
    unsigned* ties = (unsigned*)(weights + gridDim.x);
    unsigned key = is_cut ? scratch->key : 0, keep = is_cut ? scratch->ties : 0;
    float largest = scratch->largest;
    auto logit = [&](int at) -> Part {
        float weight = at < count ? expf((logits[at] - largest) * per_temperature) : 0.0f;
        unsigned bits = __float_as_uint(weight);
        if (weight < least || bits < key) return {0, 0};
        return bits > key ? Part{units(weight, count), 0} : Part{0, 1};
    };
    Part mine = {}, total;
    for (int i = 0; i < SHARE / THREADS; i++) {
        Part next = logit(blockIdx.x * SHARE + i * THREADS + threadIdx.x);
        mine.weight += next.weight, mine.count += next.count;
    }
    before(mine, total);
    if (threadIdx.x == 0) weights[blockIdx.x] = total.weight, ties[blockIdx.x] = total.count;
    if (!is_last_block(&scratch->arrivals, gridDim.x)) return;
    u64 one = units(__uint_as_float(key), count);
    auto block = [&](int i) -> Part { return {__ldcg(&weights[i]), __ldcg(&ties[i])}; };
    Place place = find(gridDim.x, block, one, keep, {0, 0, 0}, chosen + 2 * stride);
    int first = place.part * SHARE;
    place = find(SHARE, [&](int i) { return logit(first + i); }, one, keep, place, nullptr);
    if (threadIdx.x != 0) return;
    chosen[0] = first + place.part;
    mark(seen, chosen[0]);
}
