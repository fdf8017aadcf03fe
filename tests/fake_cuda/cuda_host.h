// CUDA C++ for g++: the built-ins that the kernels use, emulated on the CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// ---- language keywords -------------------------------------------------------------------------
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // libstdc++ writes __attribute__((__noinline__)), so this must expand to nothing
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// Shared memory is per block, and a block runs on exactly one OS thread at a time, so it can live
// in thread-local storage. At block scope `thread_local` implies `static`.
#define __shared__ thread_local

// ---- vector types ------------------------------------------------------------------------------
#define FK_VEC(T, N, A2, A4)                                                              \
    struct N##1 { T x; };                                                                 \
    struct alignas(A2) N##2 { T x, y; };                                                  \
    struct N##3 { T x, y, z; };                                                           \
    struct alignas(A4) N##4 { T x, y, z, w; };                                            \
    static inline N##1 make_##N##1(T x) { return {x}; }                                   \
    static inline N##2 make_##N##2(T x, T y) { return {x, y}; }                           \
    static inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }                   \
    static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FK_VEC(signed char, char, 2, 4)
FK_VEC(unsigned char, uchar, 2, 4)
FK_VEC(short, short, 4, 8)
FK_VEC(unsigned short, ushort, 4, 8)
FK_VEC(int, int, 8, 16)
FK_VEC(unsigned, uint, 8, 16)
FK_VEC(long long, longlong, 16, 16)
FK_VEC(unsigned long long, ulonglong, 16, 16)
FK_VEC(float, float, 8, 16)
FK_VEC(double, double, 16, 16)
#undef FK_VEC
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- the engine's interface (fibers.cpp) -----------------------------------
namespace fk {
struct BlockCtx { uint3 bid, bdim, gdim; };
// The cp.async of a thread that it has not waited for, and where each of their groups ends.
struct AsyncCopies {
    static constexpr unsigned kMost = 256;
    struct { void* to; const void* from; unsigned size; bool is_there; } copies[kMost];
    unsigned ends[kMost];
};
struct ThreadCtx {           // what a CUDA thread can see about itself
    uint3 tid;
    unsigned lane, warp;
    const BlockCtx* blk;
    mutable unsigned copies, groups;  // of `async`
    AsyncCopies* async;
};
constexpr uintptr_t kStackSize = 64 * 1024;  // every fiber stack is one aligned slot of this size

// The current CUDA thread. Its address is stored in the last word of the fiber's stack slot, so it
// is found by masking the stack pointer: no thread-local lookup, and the compiler may cache it.
static inline const ThreadCtx* self() {
    uintptr_t sp;
    asm("mov %%rsp, %0" : "=r"(sp));
    return *(const ThreadCtx* const*)((sp | (kStackSize - 1)) + 1 - 16);
}
void block_barrier();
// Warp rendezvous: waits until every lane of `mask` has arrived with the same `complete`, then runs
// `complete` once over the lanes' arguments; all lanes continue after it.
using Complete = void (*)(void* const args[32], unsigned mask);
void warp_collective(unsigned mask, Complete complete, void* arg);
[[noreturn]] void trap(int cuda_error, const char* what, const char* file = nullptr, int line = 0);

// ---- registration ------------------------------------------------------------------------------
struct ParamInfo { unsigned size, align; bool pointer; };
struct Kernel {
    const char* name;
    void (*fn)();
    void (*invoke)(void (*fn)(), void* const* args);
    const ParamInfo* params;
    unsigned nparams;
    Kernel* next;
};
void register_kernel(Kernel*);

template <class... A, size_t... I>
inline void call_unpacked(void (*f)(A...), void* const* args, std::index_sequence<I...>) {
    f(*(std::remove_cv_t<std::remove_reference_t<A>>*)args[I]...);
}
template <class... A>
struct Registrar {
    Kernel k;
    static void invoke(void (*fn)(), void* const* args) {
        call_unpacked((void (*)(A...))fn, args, std::index_sequence_for<A...>{});
    }
    Registrar(const char* name, void (*fn)(A...)) {
        static const ParamInfo params[] = {{sizeof(A), alignof(A), std::is_pointer_v<A>}..., {0, 0, false}};
        k = {name, (void (*)())fn, &invoke, params, sizeof...(A), nullptr};
        register_kernel(&k);
    }
};
}  // namespace fk

// One line per kernel, in a host-only file that #includes the .cu:
#define FAKE_CUDA_KERNEL(fn) static fk::Registrar fk_reg_##fn(#fn, fn)
// ---- built-in variables ------------------------------------------------------------------------
#define threadIdx (fk::self()->tid)
#define blockIdx (fk::self()->blk->bid)
#define blockDim (fk::self()->blk->bdim)
#define gridDim (fk::self()->blk->gdim)
static constexpr int warpSize = 32;

// ---- synchronisation ---------------------------------------------------------------------------
static inline void __syncthreads() { fk::block_barrier(); }

// ---- warp collectives --------------------------------------------------------------------------
namespace fk {
inline void warp_noop(void* const*, unsigned) {}
template <class T>
struct Shfl {
    T in, out;
    int src;
    static void complete(void* const args[32], unsigned mask) {
        for (unsigned m = mask; m; m &= m - 1) {
            Shfl* s = (Shfl*)args[__builtin_ctz(m)];
            // Reading a lane outside the mask is undefined in CUDA; here the lane reads itself.
            s->out = (mask >> s->src & 1) ? ((Shfl*)args[s->src])->in : s->in;
        }
    }
};
template <class T>
static inline T shfl(unsigned mask, T v, int src) {
    Shfl<T> s{v, v, src};
    warp_collective(mask, &Shfl<T>::complete, &s);
    return s.out;
}
}  // namespace fk

static inline void __syncwarp(unsigned mask = 0xffffffffu) { fk::warp_collective(mask, &fk::warp_noop, nullptr); }
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int src, int width = 32) {
    int lane = fk::self()->lane;
    return fk::shfl(mask, v, (lane & ~(width - 1)) | (src & (width - 1)));
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int lanemask, int width = 32) {
    int lane = fk::self()->lane, src = lane ^ lanemask;
    return fk::shfl(mask, v, src > (lane | (width - 1)) ? lane : src);
}
// ---- atomics (blocks may run on several OS threads, so they are real atomics) ------------------
namespace fk {
template <class T, class F>
static inline T atomic_rmw(T* p, F f) {
    T old, val;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do val = f(old);
    while (!__atomic_compare_exchange(p, &old, &val, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old;
}
}  // namespace fk
template <class T, class U> static inline T atomicAdd(T* p, U v) { return fk::atomic_rmw(p, [=](T o) { return T(o + v); }); }
template <class T> static inline T atomicMax(T* p, T v) { return fk::atomic_rmw(p, [=](T o) { return o < v ? v : o; }); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- loads, bits, integers ---------------------------------------------------------------------
template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
namespace fk {
template <class To, class From>
static inline To bits(From f) {
    static_assert(sizeof(To) == sizeof(From), "");
    To t;
    memcpy(&t, &f, sizeof t);
    return t;
}
}  // namespace fk
static inline unsigned __float_as_uint(float f) { return fk::bits<unsigned>(f); }
static inline int __float_as_int(float f) { return fk::bits<int>(f); }
static inline float __uint_as_float(unsigned u) { return fk::bits<float>(u); }
static inline float __int_as_float(int i) { return fk::bits<float>(i); }

static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned sel) {
    unsigned long long v = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = sel >> (4 * i), byte = v >> (8 * (s & 7)) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // sign-replicate mode
        r |= byte << (8 * i);
    }
    return r;
}

// ---- float math --------------------------------------------------------------------------------
#define FK_MINMAX(T)                                          \
    static inline T min(T a, T b) { return b < a ? b : a; }   \
    static inline T max(T a, T b) { return a < b ? b : a; }
FK_MINMAX(int)
FK_MINMAX(unsigned)
FK_MINMAX(long)
FK_MINMAX(unsigned long)
FK_MINMAX(long long)
FK_MINMAX(unsigned long long)
#undef FK_MINMAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }

// ---- half -------------------------------------------------------------------------
namespace fk {
static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return bits<float>(sign | 0x7f800000u | m << 13);
    if (e == 0) return bits<float>(sign | bits<uint32_t>((float)m * 0x1p-24f));
    return bits<float>(sign | (e + 112) << 23 | m << 13);
#endif
}
static inline uint16_t float_to_half(float f) {  // round to nearest even
#if defined(__F16C__)
    return _cvtss_sh(f, 0);
#else
    uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7fff;
    if (u >= 0x477ff000) return sign | 0x7c00;  // overflows to infinity after rounding
    if (u < 0x38800000) return sign | (uint16_t)(bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3f000000);  // subnormal
    return sign | (uint16_t)((u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13);
#endif
}
// Default construction must stay trivial so that __shared__ arrays work.
struct Half { uint16_t x; };
}  // namespace fk
using __half = fk::Half;
static inline float __half2float(__half h) { return fk::half_to_float(h.x); }
static inline __half __float2half_rn(float f) { return {fk::float_to_half(f)}; }
static inline __half __ushort_as_half(unsigned short u) { return {u}; }
static inline unsigned short __half_as_ushort(__half h) { return h.x; }
struct alignas(4) __half2 { __half x, y; };
static inline __half2 __half2half2(__half h) { return {h, h}; }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
namespace fk {
// Element-wise, rounded once.
template <class F>
static inline __half2 map2(__half2 a, __half2 b, F f) {
    return {float_to_half(f(half_to_float(a.x.x), half_to_float(b.x.x))), float_to_half(f(half_to_float(a.y.x), half_to_float(b.y.x)))};
}
}  // namespace fk
static inline __half2 __hsub2(__half2 a, __half2 b) { return fk::map2(a, b, [](float x, float y) { return x - y; }); }
static inline __half2 __hmul2(__half2 a, __half2 b) { return fk::map2(a, b, [](float x, float y) { return x * y; }); }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    auto fma = [](__half x, __half y, __half z) { return __half{fk::float_to_half((float)((double)fk::half_to_float(x.x) * fk::half_to_float(y.x) + fk::half_to_float(z.x)))}; };
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}

// ---- tensor cores and asynchronous copies ------------------------------------------------------
namespace fk {
typedef float v8f __attribute__((vector_size(32)));
// The last lane to arrive gathers the 32 fragments into full tiles, multiplies, and scatters.
// Fragment layout (g = lane/4, t = lane%4), from the PTX manual:
//   a[0]: row g, k 2t..2t+1    a[1]: row g+8, same k    a[2], a[3]: the same with k + 8
//   b[0]: k 2t..2t+1, column g   b[1]: the same with k + 8
//   d[0..1]: row g, columns 2t..2t+1    d[2..3]: row g+8
struct Mma {
    float* d;
    const unsigned* a;
    unsigned b[2];
    static float cvt(unsigned v) { return half_to_float((uint16_t)v); }
    static void complete(void* const args[32], unsigned mask) {
        if (mask != 0xffffffffu) trap(719, "mma.sync executed by a partial warp");
        float A[16][16];
        union { float f[16][8]; v8f v[16]; } B, D;
        for (int l = 0; l < 32; l++) {
            const Mma* m = (const Mma*)args[l];
            int g = l >> 2, k = (l & 3) * 2;
            for (int h = 0; h < 2; h++) {
                A[g][k + h] = cvt(m->a[0] >> 16 * h);
                A[g + 8][k + h] = cvt(m->a[1] >> 16 * h);
                A[g][k + 8 + h] = cvt(m->a[2] >> 16 * h);
                A[g + 8][k + 8 + h] = cvt(m->a[3] >> 16 * h);
                B.f[k + h][g] = cvt(m->b[0] >> 16 * h);
                B.f[k + 8 + h][g] = cvt(m->b[1] >> 16 * h);
                D.f[g][k + h] = m->d[h];
                D.f[g + 8][k + h] = m->d[2 + h];
            }
        }
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++) D.v[i] += A[i][k] * B.v[k];
        for (int l = 0; l < 32; l++) {
            const Mma* m = (const Mma*)args[l];
            int g = l >> 2, n = (l & 3) * 2;
            m->d[0] = D.f[g][n], m->d[1] = D.f[g][n + 1], m->d[2] = D.f[g + 8][n], m->d[3] = D.f[g + 8][n + 1];
        }
    }
};
}  // namespace fk
static inline void mma_m16n8k16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    fk::Mma m{d, a, {b0, b1}};
    fk::warp_collective(0xffffffffu, &fk::Mma::complete, &m);
}
namespace fk {
// Row j of matrix i stands at the address of lane 8i + j.
struct LoadMatrix {
    unsigned* d;
    const void* row;
    static void complete(void* const args[32], unsigned mask) {
        if (mask != 0xffffffffu) trap(719, "ldmatrix executed by a partial warp");
        auto at = [&](int matrix, int row, int column) { return ((const uint16_t*)((LoadMatrix*)args[matrix * 8 + row])->row)[column]; };
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) ((LoadMatrix*)args[l])->d[i] = at(i, l % 4 * 2, l / 4) | (unsigned)at(i, l % 4 * 2 + 1, l / 4) << 16;
    }
};
}  // namespace fk
static inline void ldmatrix_transposed(unsigned* d, const void* row) {
    if ((uintptr_t)row & 15) fk::trap(716, "ldmatrix address not 16-byte aligned");
    fk::LoadMatrix load{d, row};
    fk::warp_collective(0xffffffffu, &fk::LoadMatrix::complete, &load);
}
static inline float exp2_approximate(float x) { return exp2f(x); }
// Copies happen when they are waited for; until then there is NaN.
namespace fk {
static inline void copy_async(void* to, const void* from, unsigned size, bool is_there) {
    if (((uintptr_t)to | (uintptr_t)from) % size) trap(716, "cp.async address not aligned");
    const ThreadCtx* t = self();
    if (t->copies == AsyncCopies::kMost) trap(719, "more cp.async on their way than are emulated");
    memset(to, 0xff, size);
    t->async->copies[t->copies++] = {to, from, size, is_there};
}
}  // namespace fk
static inline void cp_async_16(void* to, const void* from, bool is_there) { fk::copy_async(to, from, 16, is_there); }
static inline void cp_async_8(void* to, const void* from, bool is_there) { fk::copy_async(to, from, 8, is_there); }
static inline void cp_async_commit() {
    const fk::ThreadCtx* t = fk::self();
    if (t->groups == fk::AsyncCopies::kMost) fk::trap(719, "more cp.async on their way than are emulated");
    t->async->ends[t->groups++] = t->copies;
}
template <int N>
static inline void cp_async_wait() {
    const fk::ThreadCtx* t = fk::self();
    if (t->groups <= N) return;
    fk::AsyncCopies& async = *t->async;
    unsigned end = async.ends[t->groups - N - 1];
    for (unsigned i = 0; i < end; i++) {
        auto& copy = async.copies[i];
        if (copy.is_there) memcpy(copy.to, copy.from, copy.size);
        else memset(copy.to, 0, copy.size);
    }
    // What is left moves to the front.
    for (unsigned i = 0; i < N; i++) async.ends[i] = async.ends[t->groups - N + i] - end;
    memmove(async.copies, async.copies + end, (t->copies - end) * sizeof *async.copies);
    t->copies -= end, t->groups = N;
}
static inline uint4 load_once(const uint4* from, bool there) { return there ? *from : uint4{0, 0, 0, 0}; }
static inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
