// Initialization, settings, devices and contexts of the fake driver; see README.md.
#include "driver.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <thread>

namespace fk {

struct ErrorText { int code; const char *name, *text; };
static const ErrorText kErrors[] = {
#define X(name, code, text) {code, #name, text},
    FK_ERRORS(X)
#undef X
};
constexpr uintptr_t kVaBase = 1ull << 45;

Handles<Context>& g_contexts = *new Handles<Context>;
Handles<Stream>& g_streams = *new Handles<Stream>;
Handles<Event>& g_events = *new Handles<Event>;
Handles<Module>& g_modules = *new Handles<Module>;
Handles<Function>& g_functions = *new Handles<Function>;
Handles<Graph>& g_graphs = *new Handles<Graph>;
Config& g_cfg = *new Config;
Countdown &g_fail_alloc = *new Countdown, &g_fail_launch = *new Countdown;
std::vector<Device*>& g_devices = *new std::vector<Device*>;
std::mutex& g_mu = *new std::mutex;
std::recursive_mutex& g_lazy_mu = *new std::recursive_mutex;
std::atomic<uint64_t> g_host_bytes{0};
std::atomic<bool> g_initialised{false};
static std::string& g_last_error = *new std::string;
static std::string& g_device_list = *new std::string("8GiB");

void Countdown::set(const char* s, int default_code) {
    char* end;
    left = strtol(s, &end, 10);
    forever = *end == '+';
    const char* colon = strchr(s, ':');
    code = colon ? atoi(colon + 1) : default_code;
}
bool Countdown::hit() {
    if (left <= 0) return false;
    if (left == 1) {
        if (!forever) left = 0;
        return true;
    }
    return --left, false;
}

static size_t parse_size(const char* s) {
    char* end;
    double v = strtod(s, &end);
    size_t unit = *end == 'K' ? 1 << 10 : *end == 'M' ? 1 << 20 : *end == 'G' ? 1 << 30 : *end == 'T' ? (size_t)1 << 40 : 1;
    return unit == 1 ? strtoull(s, nullptr, 10) : (size_t)(v * (double)unit);
}
static std::vector<std::string> split(const std::string& s) {
    std::vector<std::string> out;
    for (size_t i = 0; i <= s.size();) {
        size_t j = std::min(s.find(',', i), s.size());
        if (j > i) out.push_back(s.substr(i, j - i));
        i = j + 1;
    }
    return out;
}

void say(const char* format, ...) {
    char buf[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(buf, sizeof buf, format, ap);
    va_end(ap);
    { std::lock_guard<std::mutex> l(g_mu); g_last_error = buf; }
    if (!g_cfg.quiet) fprintf(stderr, "fake_cuda: %s\n", buf);
}

static bool apply(const std::string& key, const char* v) {
    auto on = [&] { return *v && strcmp(v, "0") != 0; };
    if (key == "FAIL_ALLOC") g_fail_alloc.set(v, CUDA_ERROR_OUT_OF_MEMORY);
    else if (key == "FAIL_LAUNCH") g_fail_launch.set(v, CUDA_ERROR_LAUNCH_FAILED);
    else if (key == "STREAMS") g_cfg.lazy = !strcmp(v, "lazy");
    else if (key == "GRAPHS") g_cfg.graphs = on();
    else if (key == "QUIET") g_cfg.quiet = on();
    else if (key == "CC") g_cfg.cc = (int)(atof(v) * 10 + 0.5);
    else if (key == "SMS") g_cfg.multiprocessors = std::max(1, atoi(v));
    else if (key == "DRIVER") g_cfg.driver = atoi(v);
    else if (key == "CONTEXT_BYTES") g_cfg.context_bytes = parse_size(v);
    else if (key == "POISON") g_cfg.poison = parse_size(v);
    else if (key == "REPORT") g_cfg.report = v;
    else if (key == "THREADS") g_engine.threads = std::max(1, atoi(v));
    else if (key == "SCHED") g_engine.reverse = !strcmp(v, "reverse");
    else if (key == "TIMEOUT_MS") g_engine.timeout_ms = atoi(v);
    else if (key == "DEVICES") g_device_list = v;
    else if (key == "USED") {
        auto list = split(v);
        for (size_t i = 0; i < g_devices.size(); i++) g_devices[i]->used_by_others = i < list.size() ? parse_size(list[i].c_str()) : 0;
    } else return false;
    return true;
}

static void init_devices() {
    g_engine.threads = std::min(4u, std::max(1u, std::thread::hardware_concurrency()));
    if (const char* spec = getenv("FAKE_CUDA_DEVICES")) g_device_list = spec;
    auto list = split(g_device_list);
    for (size_t i = 0; i < list.size(); i++) {
        Device* d = new Device;
        d->ordinal = (int)i;
        d->total = parse_size(list[i].c_str());
        // A fixed, recognisable range per device; the kernel may refuse the address, never the size.
        void* p = mmap((void*)(kVaBase + i * kDeviceVa), kDeviceVa, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (p == MAP_FAILED) p = mmap(nullptr, kDeviceVa, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        d->va = d->bump = (uintptr_t)p;
        g_devices.push_back(d);
    }
    for (const char* key : {"FAIL_ALLOC", "FAIL_LAUNCH", "STREAMS", "QUIET", "CC", "SMS", "DRIVER", "CONTEXT_BYTES", "POISON", "REPORT", "THREADS", "SCHED",
                            "TIMEOUT_MS", "USED", "GRAPHS"})
        if (const char* v = getenv(("FAKE_CUDA_" + std::string(key)).c_str())) apply(key, v);
}

using CtxStack = std::vector<Context*>;
static CtxStack& ctx_stack() {
    static pthread_key_t key = [] {
        pthread_key_t k;
        pthread_key_create(&k, [](void* p) { delete (CtxStack*)p; });
        return k;
    }();
    auto* s = (CtxStack*)pthread_getspecific(key);
    if (!s) pthread_setspecific(key, s = new CtxStack);
    return *s;
}
Context* current() {
    auto& s = ctx_stack();
    return s.empty() || s.back()->destroyed ? nullptr : s.back();
}

static Context* new_context(Device* d) {
    Context* c = new Context;
    c->dev = d;
    c->null_stream.ctx = c;
    std::lock_guard<std::mutex> l(d->mu);
    d->charged += g_cfg.context_bytes;
    return g_contexts.add(c);
}
static void destroy_context(Context* c) {  // the real driver frees everything the context owns
    drain_ctx(c);
    std::vector<uintptr_t> owned;
    {
        std::lock_guard<std::mutex> l(c->dev->mu);
        for (auto& [p, a] : c->dev->live) if (a.ctx == c) owned.push_back(p), c->dev->stats.leaked_bytes += a.size;
        c->dev->charged -= g_cfg.context_bytes;
    }
    for (uintptr_t p : owned) device_free(p);
    free_host_of(c);
    for (Stream* s : c->streams) g_streams.remove(s);
    c->streams.clear();
    c->destroyed = true;  // the object stays, so that a stale handle can be told from garbage
    g_contexts.remove(c);
}

static void report() {
    if (!g_initialised || g_cfg.report.empty()) return;
    std::string out = "{\"devices\":[";
    for (Device* d : g_devices) {
        out += (d->ordinal ? ",{" : "{") + std::string("\"ordinal\":") + std::to_string(d->ordinal);
        for (auto& [name, v] : d->stats.all()) out += ",\"" + std::string(name) + "\":" + std::to_string(*v);
        out += "}";
    }
    out += "],\"host_bytes\":" + std::to_string(g_host_bytes) + ",\"streams\":" + std::to_string(g_streams.size()) + ",\"events\":" + std::to_string(g_events.size()) +
           ",\"contexts\":" + std::to_string(g_contexts.size()) + "}\n";
    if (FILE* f = g_cfg.report == "stderr" ? stderr : fopen(g_cfg.report.c_str(), "w")) fputs(out.c_str(), f), fflush(f);
}
__attribute__((destructor)) static void at_exit() { report(); }

}  // namespace fk

using namespace fk;

// ---- test control (not part of CUDA; tests find these with dlsym) --------------------------------
#define EXPORT extern "C" __attribute__((visibility("default")))
API cuInit(unsigned flags);
// Changes a setting: key and value as in the environment, without the FAKE_CUDA_ prefix. DEVICES
// and QUIET have an effect before the first call only, USED and the rest at any time.
EXPORT int fake_cuda_control(const char* key, const char* value) {
    if (strcmp(key, "DEVICES")) cuInit(0);
    return apply(key, value) ? 0 : 1;
}
// Reads a counter; ~0 for an unknown name. `device` is ignored for the process-wide ones.
EXPORT uint64_t fake_cuda_stat(const char* name, int device) {
    cuInit(0);
    std::string n = name;
    if (n == "host_bytes") return g_host_bytes;
    if (n == "contexts") return g_contexts.size();
    if (n == "streams") return g_streams.size();
    if (n == "events") return g_events.size();
    if (n == "modules") return g_modules.size();
    if (n == "graphs") return g_graphs.size();
    if (bad_device(device)) return ~0ull;
    Device* d = g_devices[device];
    if (n == "charged_bytes") { std::lock_guard<std::mutex> l(d->mu); return d->charged; }
    if (n == "reset_peak") return d->stats.peak_bytes = d->stats.live_bytes.load();
    for (auto& [key, v] : d->stats.all()) if (n == key) return *v;
    return ~0ull;
}
EXPORT void fake_cuda_last_error(char* out, size_t n) {
    std::lock_guard<std::mutex> l(g_mu);
    snprintf(out, n, "%s", g_last_error.c_str());
}

// ---- initialisation, devices -------------------------------------------------------------------
API cuInit(unsigned flags) {
    NEED(!flags);
    static std::once_flag once;
    std::call_once(once, [] { init_devices(); g_initialised = true; });
    return g_devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}
API cuDriverGetVersion(int* v) { cuInit(0); *v = g_cfg.driver; return CUDA_SUCCESS; }
API cuGetErrorName(CUresult e, const char** s) {
    for (auto& t : kErrors) if (t.code == e) return *s = t.name, CUDA_SUCCESS;
    return *s = nullptr, CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(CUresult e, const char** s) {
    for (auto& t : kErrors) if (t.code == e) return *s = t.text, CUDA_SUCCESS;
    return *s = nullptr, CUDA_ERROR_INVALID_VALUE;
}
API cuDeviceGetCount(int* n) { NEED_INIT(); *n = (int)g_devices.size(); return CUDA_SUCCESS; }
API cuDeviceGet(CUdevice* d, int i) { NEED_INIT(); if (bad_device(i)) return CUDA_ERROR_INVALID_DEVICE; *d = i; return CUDA_SUCCESS; }
API cuDeviceGetName(char* out, int n, CUdevice d) { NEED_INIT(); if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE; snprintf(out, n, "Fake GPU %d", d); return CUDA_SUCCESS; }
static CUresult uuid(void* out, CUdevice d) {
    NEED_INIT();
    if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    memset(out, 0xfa, 16);
    ((unsigned char*)out)[15] = (unsigned char)d;
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid(void* out, CUdevice d) { return uuid(out, d); }
API cuDeviceGetUuid_v2(void* out, CUdevice d) { return uuid(out, d); }
API cuDeviceGetAttribute(int* v, int attr, CUdevice d) {
    NEED_INIT();
    if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    switch (attr) {
        case 16: *v = g_cfg.multiprocessors; break;
        case 75: *v = g_cfg.cc / 10; break;
        case 76: *v = g_cfg.cc % 10; break;
        default: *v = 0;
    }
    return CUDA_SUCCESS;
}

// ---- contexts ----------------------------------------------------------------------------------
API cuDevicePrimaryCtxRetain(Context** out, CUdevice d) {
    NEED_INIT();
    if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    std::lock_guard<std::mutex> l(g_mu);
    Device* dev = g_devices[d];
    if (!dev->primary) dev->primary = new_context(dev);
    dev->primary_refs++;
    *out = dev->primary;
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(CUdevice d) {
    NEED_INIT();
    if (bad_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    Context* dead = nullptr;
    {
        std::lock_guard<std::mutex> l(g_mu);
        Device* dev = g_devices[d];
        if (!dev->primary) return CUDA_ERROR_INVALID_CONTEXT;
        if (--dev->primary_refs == 0) std::swap(dead, dev->primary);
    }
    if (dead) destroy_context(dead);
    return CUDA_SUCCESS;
}
API cuCtxSetCurrent(Context* c) {
    NEED_INIT();
    if (c && !g_contexts.has(c)) return CUDA_ERROR_INVALID_CONTEXT;
    auto& s = ctx_stack();
    if (!s.empty()) s.pop_back();
    if (c) s.push_back(c);
    return CUDA_SUCCESS;
}
API cuCtxGetCurrent(Context** c) { NEED_INIT(); *c = current(); return CUDA_SUCCESS; }
API cuCtxSynchronize() { NEED_CTX(c); drain_ctx(c); return c->sticky; }
