// What the parts of the fake driver share: error codes, settings, objects.
#pragma once
#include <atomic>
#include <cstdarg>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "errors.h"
#include "engine.h"

namespace fk {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

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
    bool lazy = false, quiet = false, graphs = true, early = true, break_peer = false, integrated = false, mig = false;
    int cc = 86, driver = 12080, multiprocessors = 8, clock_khz = 0, bus_bits = 0, compute_mode = 0, init_code = 0;
    size_t context_bytes = 0, module_bytes = 0, graph_bytes = 0, poison = MiB;
    std::map<int, int> context_codes, meminfo_codes;  // of the devices that fail
    std::vector<std::string> names;
    std::string report;
};

struct Context;
struct Stream;
struct Alloc {
    uintptr_t base;
    size_t size, mapped;  // requested bytes; whole pages
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
    size_t charged = 0;               // bytes in use: granules, contexts, modules, graphs
    std::recursive_mutex exec;        // one operation at a time
    Context* primary = nullptr;
    int primary_refs = 0;
    uint32_t previous_launch = 0, this_launch = 0;  // of the operation that runs
    Stats stats;
    bool in_range(uintptr_t p) const { return p - va < kDeviceVa; }
};
struct Op { std::function<CUresult()> run; bool launch = false, event = false; };
struct Graph { std::vector<Op> ops; Context* ctx = nullptr; size_t charged = 0; };
struct Stream {
    Context* ctx;
    std::deque<Op> queue;
    std::unique_ptr<Graph> capture;  // what is submitted meanwhile, if it is kept
    bool broken = false;             // something waited for the stream meanwhile
    uint32_t last_launch = 0;        // the launch that was the last operation, if it was one
};
struct Recording { Stream* stream; bool done = false; };  // one cuEventRecord
struct Event {
    Context* ctx;
    std::shared_ptr<Recording> rec;  // the latest one; waits keep the one they saw
};
struct Function;
struct Module { Context* ctx; size_t charged; int target; KernelMap kernels; std::map<std::string, std::unique_ptr<Function>> functions; };
struct Function { Module* mod; std::string name; std::shared_ptr<Kernel> kernel; };
struct Context {
    Device* dev;
    bool destroyed = false;
    size_t charged = 0;  // beside its allocations
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
extern Countdown &g_fail_alloc, &g_fail_launch, &g_fail_pinned, &g_fail_module, &g_fail_link, &g_fail_instantiate, &g_fail_upload, &g_fail_graph_launch;
extern std::vector<Device*>& g_devices;
extern std::mutex& g_mu;  // contexts, host allocations, the last message
extern std::recursive_mutex& g_lazy_mu;
extern std::atomic<uint64_t> g_host_bytes, g_links;
extern std::atomic<bool> g_initialised;

void say(const char* format, ...);
Context* current();
inline bool bad_device(int d) { return d < 0 || d >= (int)g_devices.size(); }

// memory.cpp
size_t free_bytes(Device* d);                 // with d->mu held, as the next two
bool take_bytes(Device* d, size_t bytes);     // false: they are not there
void give_bytes(Device* d, size_t bytes);
CUresult charge(Context* c, size_t bytes);    // what the driver itself takes
void uncharge(Context* c, size_t bytes);
bool share(const char* file);
Device* device_of(uintptr_t p);
bool is_pinned(const void* p, size_t n);
std::string locate(uintptr_t p);
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
#define NEED_DEVICE(d) NEED_INIT(); if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE
#define NEED_CTX(c) NEED_INIT(); Context* c = current(); if (!c) return CUDA_ERROR_INVALID_CONTEXT; if (c->sticky) return c->sticky
#define NEED(cond) do { if (!(cond)) return CUDA_ERROR_INVALID_VALUE; } while (0)
