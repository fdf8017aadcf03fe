// What the parts of the fake driver share: error codes, settings, objects.
//
// No thread_local anywhere in the driver: this library's TLS segment is the kernels' shared memory.
#pragma once
#include <atomic>
#include <cstdarg>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "engine.h"

namespace fk {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

#define FK_ERRORS(X)                                                                                                                  \
    X(CUDA_SUCCESS, 0, "no error") X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument") X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory") \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error") X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")       \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal") X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")    \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                                                                      \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                                  \
    X(CUDA_ERROR_INVALID_PTX, 218, "a PTX JIT compilation failed")                                                                    \
    X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 222, "the provided PTX was compiled with an unsupported toolchain.")                        \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle") X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")               \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                                    \
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch")                                             \
    X(CUDA_ERROR_LAUNCH_TIMEOUT, 702, "the launch timed out and was terminated")                                                      \
    X(CUDA_ERROR_MISALIGNED_ADDRESS, 716, "misaligned address") X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")        \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")                                 \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")                          \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                                                                       \
    X(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, 803, "system has unsupported display driver / cuda driver combination")                      \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")
enum {
#define X(name, code, text) name = code,
    FK_ERRORS(X)
#undef X
};

constexpr size_t MiB = 1 << 20, kStaticSharedMax = 48 * 1024;
constexpr uintptr_t kDeviceVa = 1ull << 40;

struct Countdown {  // "N[+][:code]": the Nth event from now fails; with +, all later ones too
    std::atomic<long> left{0};
    std::atomic<bool> forever{false};
    std::atomic<int> code{0};
    void set(const char* s, int default_code);
    bool hit();
};
struct Config {
    bool lazy = false, quiet = false, graphs = true;
    int cc = 86, driver = 12080, multiprocessors = 8;
    size_t context_bytes = 0, poison = MiB;
    std::string report;
};

struct Context;
struct Stream;
struct Alloc {
    uintptr_t base, lo;   // user address; start of the mapped pages
    size_t size, mapped;  // requested bytes; mapped bytes from lo
    size_t small;         // bytes taken in `slab`, or 0 when charged in whole granules
    size_t slab;
    Context* ctx;
    uint64_t id;
};
struct Stats {
    std::atomic<uint64_t> live_bytes{0}, live_allocs{0}, leaked_bytes{0}, peak_bytes{0}, allocs{0}, launches{0}, h2d_bytes{0}, d2h_bytes{0}, p2p_bytes{0}, graph_launches{0};
    std::vector<std::pair<const char*, std::atomic<uint64_t>*>> all() {
        return {{"live_bytes", &live_bytes}, {"live_allocs", &live_allocs}, {"leaked_bytes", &leaked_bytes}, {"peak_bytes", &peak_bytes}, {"allocs", &allocs},
                {"launches", &launches}, {"h2d_bytes", &h2d_bytes}, {"d2h_bytes", &d2h_bytes}, {"p2p_bytes", &p2p_bytes}, {"graph_launches", &graph_launches}};
    }
};
struct Device {
    int ordinal;
    size_t total, used_by_others = 0;
    uintptr_t va, bump;
    std::mutex mu;                    // guards the allocation state below
    std::map<uintptr_t, Alloc> live;  // by base address
    std::vector<size_t> slabs;        // bytes used in each 2 MiB slab of small allocations
    size_t charged = 0;               // granules in use, in bytes
    std::recursive_mutex exec;        // one operation at a time
    Context* primary = nullptr;
    int primary_refs = 0;
    Stats stats;
    size_t free_bytes() const {
        size_t used = charged + used_by_others;
        return used < total ? total - used : 0;
    }
    bool in_range(uintptr_t p) const { return p - va < kDeviceVa; }
};
struct Op { std::function<CUresult()> run; };
struct Graph { std::vector<Op> ops; };
struct Stream {
    Context* ctx;
    std::deque<Op> queue;
    std::unique_ptr<Graph> capture;  // what is submitted meanwhile, if it is kept
    bool broken = false;             // something waited for the stream meanwhile
};
struct Recording { Stream* stream; bool done = false; };  // one cuEventRecord
struct Event {
    Context* ctx;
    std::shared_ptr<Recording> rec;  // the latest one; waits keep the one they saw
};
struct Entry { std::vector<ParamInfo> params; size_t shared = 0; unsigned max_threads = 1024; };
struct Function;
struct Module { Context* ctx; int target; std::map<std::string, Entry> entries; std::map<std::string, std::unique_ptr<Function>> functions; };
struct Function { Module* mod; std::string name; const Kernel* kernel; Entry* entry; };
struct Context {
    Device* dev;
    bool destroyed = false;
    std::atomic<int> sticky{0};
    Stream null_stream;
    std::set<Stream*> streams;  // created ones
};

template <class T>
struct Handles {  // the set of live handles of one kind, so that a stale handle is an error, not a crash
    std::mutex mu;
    std::set<T*> live;
    T* add(T* t) { std::lock_guard<std::mutex> l(mu); live.insert(t); return t; }
    bool has(T* t) { std::lock_guard<std::mutex> l(mu); return live.count(t); }
    bool remove(T* t) { std::lock_guard<std::mutex> l(mu); return live.erase(t); }
    size_t size() { std::lock_guard<std::mutex> l(mu); return live.size(); }
};
// All globals are leaked: the exit report and late threads outlive static destructors.
extern Handles<Context>& g_contexts;
extern Handles<Stream>& g_streams;
extern Handles<Event>& g_events;
extern Handles<Module>& g_modules;
extern Handles<Function>& g_functions;
extern Handles<Graph>& g_graphs;
extern Config& g_cfg;
extern Countdown &g_fail_alloc, &g_fail_launch;
extern std::vector<Device*>& g_devices;
extern std::mutex& g_mu;  // contexts, host allocations, the last message
extern std::recursive_mutex& g_lazy_mu;
extern std::atomic<uint64_t> g_host_bytes;
extern std::atomic<bool> g_initialised;

void say(const char* format, ...);
Context* current();
inline bool bad_device(int d) { return d < 0 || d >= (int)g_devices.size(); }

// memory.cpp
Device* device_of(uintptr_t p);
bool is_pinned(const void* p, size_t n);
std::string locate(uintptr_t p);
CUresult check_canary(Device* d, uintptr_t p);
CUresult device_free(uintptr_t p);
void free_host_of(Context* c);

// stream.cpp
Stream* resolve(void* handle);
CUresult submit(Stream* s, Op op);
void drain(Stream* s);
void drain_ctx(Context* c);

}  // namespace fk

#define API extern "C" __attribute__((visibility("default"))) fk::CUresult
#define NEED_INIT() do { if (!g_initialised) return CUDA_ERROR_NOT_INITIALIZED; } while (0)
#define NEED_CTX(c) NEED_INIT(); Context* c = current(); if (!c) return CUDA_ERROR_INVALID_CONTEXT; if (c->sticky) return c->sticky
#define NEED(cond) do { if (!(cond)) return CUDA_ERROR_INVALID_VALUE; } while (0)
