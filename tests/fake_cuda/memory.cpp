// Device memory with a budget and guard pages, page-locked host memory, copies.
#include <sys/mman.h>

#include <cstdlib>

#include "driver.h"

namespace fk {

constexpr size_t kGranule = 2 * MiB, kSmallMax = MiB, kSmallAlign = 512;
constexpr uintptr_t kAlign = 256, kPage = 4096;
struct HostRange { size_t size; Context* ctx; };
static std::map<uintptr_t, HostRange>& g_host = *new std::map<uintptr_t, HostRange>;  // page-locked ranges
static std::atomic<uint64_t> g_alloc_id{0};

Device* device_of(uintptr_t p) {
    for (Device* d : g_devices)
        if (d->in_range(p)) return d;
    return nullptr;
}
static const Alloc* find_alloc(Device* d, uintptr_t p, size_t n) {  // d->mu held
    auto it = d->live.upper_bound(p);
    if (it == d->live.begin()) return nullptr;
    const Alloc& a = (--it)->second;
    return p >= a.base && p - a.base <= a.size && n <= a.size - (p - a.base) ? &a : nullptr;
}
static bool range_ok(Device* d, uintptr_t p, size_t n) {
    std::lock_guard<std::mutex> l(d->mu);
    return find_alloc(d, p, n) != nullptr;
}
// Where an address lies relative to the allocations of its device, for error messages.
std::string locate(uintptr_t p) {
    Device* d = device_of(p);
    char buf[200];
    if (!d) return p < 65536 ? " (near null)" : " (not device memory)";
    std::lock_guard<std::mutex> l(d->mu);
    auto it = d->live.upper_bound(p);
    if (it != d->live.begin()) {
        const Alloc& a = std::prev(it)->second;
        if (p < a.lo + a.mapped + kPage) {
            bool inside = p < a.base + a.size;
            snprintf(buf, sizeof buf, " (device %d, %zu bytes %s allocation #%lu of %zu bytes)", d->ordinal, inside ? p - a.base : p - a.base - a.size,
                     inside ? "into" : "past the end of", (unsigned long)a.id, a.size);
            return buf;
        }
    }
    snprintf(buf, sizeof buf, " (device %d, not allocated: freed, or far out of bounds)", d->ordinal);
    return buf;
}

// The real driver hands out memory in 2 MiB granules and packs small requests together.
static bool charge(Device* d, size_t size, Alloc& a) {
    if (size > kSmallMax) {
        size_t need = (size + kGranule - 1) / kGranule * kGranule;
        if (need > d->free_bytes()) return false;
        d->charged += need, a.small = 0;
        return true;
    }
    a.small = (size + kSmallAlign - 1) / kSmallAlign * kSmallAlign;
    size_t i = 0;
    while (i < d->slabs.size() && (d->slabs[i] == 0 || d->slabs[i] + a.small > kGranule)) i++;  // a slab in use with room
    if (i == d->slabs.size()) {
        if (kGranule > d->free_bytes()) return false;
        for (i = 0; i < d->slabs.size() && d->slabs[i]; i++) {}
        if (i == d->slabs.size()) d->slabs.push_back(0);
        d->charged += kGranule;
    }
    d->slabs[i] += a.small, a.slab = i;
    return true;
}
static void uncharge(Device* d, const Alloc& a) {
    if (!a.small) d->charged -= (a.size + kGranule - 1) / kGranule * kGranule;
    else if ((d->slabs[a.slab] -= a.small) == 0) d->charged -= kGranule;
}

// Next free stretch of `need` bytes; addresses are reused as late as possible.
static uintptr_t place(Device* d, size_t need) {
    if (d->bump + need <= d->va + kDeviceVa) {
        uintptr_t at = d->bump;
        auto it = d->live.lower_bound(at);
        if (it == d->live.end() || it->second.lo >= at + need) return d->bump += need, at;
    }
    uintptr_t at = d->va;  // wrapped around: first fit
    for (auto& [base, a] : d->live) {
        if (a.lo >= at + need) break;
        at = a.lo + a.mapped;
    }
    if (at + need > d->va + kDeviceVa) return 0;
    d->bump = at + need;
    return at;
}

// Every allocation gets its own pages between inaccessible guard pages and ends as close to the
// upper guard as 256-byte alignment allows; the slack on both sides is filled with canaries.
static CUresult device_alloc(Context* c, size_t size, CUdeviceptr* out) {
    Device* d = c->dev;
    std::lock_guard<std::mutex> l(d->mu);
    Alloc a{};
    if (!charge(d, size, a)) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t body = (size + kAlign - 1) / kAlign * kAlign;
    a.mapped = (body + kPage - 1) / kPage * kPage, a.size = size, a.ctx = c, a.id = ++g_alloc_id;
    uintptr_t at = place(d, a.mapped + kPage);
    a.lo = at + kPage, a.base = a.lo + a.mapped - body;
    if (!at || mprotect((void*)a.lo, a.mapped, PROT_READ | PROT_WRITE)) {
        uncharge(d, a);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset((void*)a.lo, 0xa5, a.base - a.lo);
    memset((void*)(a.base + size), 0xa5, a.lo + a.mapped - a.base - size);
    if (size <= g_cfg.poison) memset((void*)a.base, 0xff, size);  // fresh device memory is NaN, not zero
    d->live[a.base] = a;
    d->stats.live_allocs++;
    uint64_t live = d->stats.live_bytes += size;
    if (live > d->stats.peak_bytes) d->stats.peak_bytes = live;
    *out = a.base;
    return CUDA_SUCCESS;
}
// The first overwritten byte outside the allocation, or null.
static const unsigned char* broken_canary(const Alloc& a) {
    auto scan = [](uintptr_t lo, uintptr_t hi) -> const unsigned char* {
        for (auto p = (const unsigned char*)lo; p < (const unsigned char*)hi; p++)
            if (*p != 0xa5) return p;
        return nullptr;
    };
    auto p = scan(a.lo, a.base);
    return p ? p : scan(a.base + a.size, a.lo + a.mapped);
}
CUresult check_canary(Device* d, uintptr_t p) {
    Alloc a;
    long offset;
    {
        std::lock_guard<std::mutex> l(d->mu);
        const Alloc* found = find_alloc(d, p, 0);
        const unsigned char* bad = found ? broken_canary(*found) : nullptr;
        if (!bad) return CUDA_SUCCESS;
        a = *found, offset = (long)((uintptr_t)bad - a.base);
        memset((void*)a.lo, 0xa5, a.base - a.lo);  // mend it: one report per overrun
        memset((void*)(a.base + a.size), 0xa5, a.lo + a.mapped - a.base - a.size);
    }
    say("write outside allocation #%lu of %zu bytes on device %d, at offset %ld", (unsigned long)a.id, a.size, d->ordinal, offset);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}
CUresult device_free(uintptr_t p) {
    if (!p) return CUDA_SUCCESS;
    Device* d = device_of(p);
    if (!d) return CUDA_ERROR_INVALID_VALUE;
    CUresult r = check_canary(d, p);
    std::lock_guard<std::mutex> l(d->mu);
    auto it = d->live.find(p);
    if (it == d->live.end()) return CUDA_ERROR_INVALID_VALUE;
    Alloc a = it->second;
    d->live.erase(it);
    // Back to untouched and inaccessible: later use through a stale pointer faults.
    mmap((void*)a.lo, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    uncharge(d, a);
    d->stats.live_allocs--, d->stats.live_bytes -= a.size;
    return r;
}
void free_host_of(Context* c) {
    std::lock_guard<std::mutex> l(g_mu);
    for (auto it = g_host.begin(); it != g_host.end();) {
        if (it->second.ctx != c) { ++it; continue; }
        g_host_bytes -= it->second.size;
        free((void*)it->first);
        it = g_host.erase(it);
    }
}
bool is_pinned(const void* p, size_t n) {
    std::lock_guard<std::mutex> l(g_mu);
    auto it = g_host.upper_bound((uintptr_t)p);
    if (it == g_host.begin()) return false;
    --it;
    return (uintptr_t)p - it->first + n <= it->second.size;
}

// In lazy mode freed memory may still sit in a stream's queue; the real allocator waits for it, too.
static CUresult allocate(Context* c, size_t size, CUdeviceptr* out) {
    c->dev->stats.allocs++;
    if (g_fail_alloc.hit()) return g_fail_alloc.code;
    CUresult r = device_alloc(c, size, out);
    if (r && g_cfg.lazy) drain_ctx(c), r = device_alloc(c, size, out);
    return r;
}

static CUresult copy_check(Context* c, uintptr_t p, size_t n, const char* what) {
    Device* d = device_of(p);
    if (!d) return say("%s: %#lx is not a device pointer", what, (unsigned long)p), CUDA_ERROR_INVALID_VALUE;
    if (!range_ok(d, p, n)) return say("%s: %zu bytes at %#lx are not inside one allocation%s", what, n, (unsigned long)p, locate(p).c_str()), CUDA_ERROR_INVALID_VALUE;
    if (c && d != c->dev) return say("%s: memory of device %d used from a context of device %d", what, d->ordinal, c->dev->ordinal), CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}
// At the time the operation runs (lazy stream) the memory may be gone.
static CUresult late_check(uintptr_t p, size_t n, const char* what) {
    return copy_check(nullptr, p, n, what) ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}
static CUresult copy(bool to_device, uintptr_t device, void* host, size_t n, Stream* s) {
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (s->ctx->sticky) return s->ctx->sticky;
    if (!n) return CUDA_SUCCESS;
    const char* what = to_device ? "host-to-device copy" : "device-to-host copy";
    if (CUresult r = copy_check(s->ctx, device, n, what)) return r;
    Stats& st = s->ctx->dev->stats;
    // Real pageable copies: host-to-device reads the source before returning, device-to-host has
    // finished when the call returns. Only page-locked memory is truly asynchronous.
    bool pinned = is_pinned(host, n);
    std::shared_ptr<std::vector<char>> staged;
    if (to_device && !pinned && g_cfg.lazy) staged = std::make_shared<std::vector<char>>((char*)host, (char*)host + n);
    CUresult r = submit(s, {[=, &st]() -> CUresult {
        if (CUresult r = late_check(device, n, what)) return r;
        if (to_device) memcpy((void*)device, staged ? staged->data() : host, n), st.h2d_bytes += n;
        else memcpy(host, (void*)device, n), st.d2h_bytes += n;
        return CUDA_SUCCESS;
    }});
    if (to_device || pinned) return r;
    drain(s);
    return r ? r : s->ctx->sticky.load();
}
// Zeroing gives whole pages back instead of touching them: a cleared 20 GiB cache costs no memory.
static void zero(uintptr_t p, size_t n) {
    uintptr_t lo = (p + kPage - 1) & ~(kPage - 1), hi = (p + n) & ~(kPage - 1);
    if (hi < lo + MiB || madvise((void*)lo, hi - lo, MADV_DONTNEED)) return (void)memset((void*)p, 0, n);
    memset((void*)p, 0, lo - p);
    memset((void*)hi, 0, p + n - hi);
}

}  // namespace fk

using namespace fk;

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    NEED_CTX(c);
    std::lock_guard<std::mutex> l(c->dev->mu);
    *free = c->dev->free_bytes(), *total = c->dev->total;
    return CUDA_SUCCESS;
}
API cuMemAlloc_v2(CUdeviceptr* p, size_t n) {
    NEED_CTX(c);
    NEED(p && n);
    return allocate(c, n, p);
}
API cuMemFree_v2(CUdeviceptr p) {
    NEED_CTX(c);
    drain_ctx(c);  // cuMemFree waits for the device
    return device_free(p);
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
    NEED_CTX(c);
    NEED(p && n);
    if (g_fail_alloc.hit()) return g_fail_alloc.code;
    if (posix_memalign(p, kPage, n)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (n <= g_cfg.poison) memset(*p, 0xff, n);
    std::lock_guard<std::mutex> l(g_mu);
    g_host[(uintptr_t)*p] = {n, c};
    g_host_bytes += n;
    return CUDA_SUCCESS;
}
API cuMemFreeHost(void* p) {
    NEED_CTX(c);
    drain_ctx(c);
    std::lock_guard<std::mutex> l(g_mu);
    auto it = g_host.find((uintptr_t)p);
    if (it == g_host.end()) return CUDA_ERROR_INVALID_VALUE;
    g_host_bytes -= it->second.size;
    g_host.erase(it);
    free(p);
    return CUDA_SUCCESS;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* s, size_t n, void* hs) { NEED_CTX(c); return copy(true, d, (void*)s, n, resolve(hs)); }
API cuMemcpyDtoHAsync_v2(void* d, CUdeviceptr s, size_t n, void* hs) { NEED_CTX(c); return copy(false, s, d, n, resolve(hs)); }
API cuMemcpyPeerAsync(CUdeviceptr dst, Context* dc, CUdeviceptr src, Context* sc, size_t n, void* hs) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!g_contexts.has(dc) || !g_contexts.has(sc)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (!n) return CUDA_SUCCESS;
    if (CUresult r = copy_check(sc, src, n, "peer copy (source)")) return r;
    if (CUresult r = copy_check(dc, dst, n, "peer copy (destination)")) return r;
    Stats& st = dc->dev->stats;
    return submit(s, {[=, &st]() -> CUresult {
        if (CUresult r = late_check(src, n, "peer copy")) return r;
        if (CUresult r = late_check(dst, n, "peer copy")) return r;
        memmove((void*)dst, (void*)src, n);
        st.p2p_bytes += n;
        return CUDA_SUCCESS;
    }});
}
API cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t n, void* hs) {
    NEED_CTX(c);
    Stream* s = resolve(hs);
    if (!s) return CUDA_ERROR_INVALID_HANDLE;
    if (!n) return CUDA_SUCCESS;
    if (CUresult r = copy_check(s->ctx, dst, n, "memset")) return r;
    return submit(s, {[=]() -> CUresult {
        if (CUresult r = late_check(dst, n, "memset")) return r;
        if (value) memset((void*)dst, value, n);
        else zero(dst, n);
        return CUDA_SUCCESS;
    }});
}
