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
Countdown &g_fail_alloc = *new Countdown, &g_fail_launch = *new Countdown, &g_fail_pinned = *new Countdown, &g_fail_module = *new Countdown, &g_fail_link = *new Countdown,
          &g_fail_instantiate = *new Countdown, &g_fail_upload = *new Countdown, &g_fail_graph_launch = *new Countdown;
std::vector<Device*>& g_devices = *new std::vector<Device*>;
std::mutex& g_mu = *new std::mutex;
std::recursive_mutex& g_lazy_mu = *new std::recursive_mutex;
std::atomic<uint64_t> g_host_bytes{0}, g_links{0};
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
    if (left == 1) { if (!forever) left = 0; return true; }
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
    for (size_t i = 0; i <= s.size();) { size_t j = std::min(s.find(',', i), s.size()); if (j > i) out.push_back(s.substr(i, j - i)); i = j + 1; }
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

// "INDEX:CODE[,INDEX:CODE]"
static std::map<int, int> codes(const char* s) {
    std::map<int, int> out;
    for (auto& one : split(s)) if (size_t colon = one.find(':'); colon != std::string::npos) out[atoi(one.c_str())] = atoi(one.c_str() + colon + 1);
    return out;
}

using Setter = std::function<void(const char*)>;
static const std::map<std::string, Setter>& settings() {
    auto flag = [](bool& b) { return [&b](const char* v) { b = *v && strcmp(v, "0"); }; };
    auto number = [](auto& n) { return [&n](const char* v) { n = atoi(v); }; };
    auto bytes = [](size_t& n) { return [&n](const char* v) { n = parse_size(v); }; };
    auto text = [](std::string& s) { return [&s](const char* v) { s = v; }; };
    auto fail = [](Countdown& c, int code = CUDA_ERROR_OUT_OF_MEMORY) { return [&c, code](const char* v) { c.set(v, code); }; };
    auto by_device = [](std::map<int, int>& m) { return [&m](const char* v) { m = codes(v); }; };
    auto used = [](const char* v) {
        auto list = split(v);
        for (size_t i = 0; i < g_devices.size(); i++) g_devices[i]->used_by_others = i < list.size() ? parse_size(list[i].c_str()) : 0;
    };
    static const auto& all = *new std::map<std::string, Setter>{
        {"FAIL_ALLOC", fail(g_fail_alloc)}, {"FAIL_PINNED", fail(g_fail_pinned)}, {"FAIL_MODULE", fail(g_fail_module)}, {"FAIL_LINK", fail(g_fail_link)},
        {"FAIL_INSTANTIATE", fail(g_fail_instantiate)}, {"FAIL_UPLOAD", fail(g_fail_upload)}, {"FAIL_GRAPH_LAUNCH", fail(g_fail_graph_launch)},
        {"FAIL_LAUNCH", fail(g_fail_launch, CUDA_ERROR_LAUNCH_FAILED)}, {"FAIL_INIT", number(g_cfg.init_code)},
        {"FAIL_CONTEXT", by_device(g_cfg.context_codes)}, {"FAIL_MEMINFO", by_device(g_cfg.meminfo_codes)},
        {"CONTEXT_BYTES", bytes(g_cfg.context_bytes)}, {"MODULE_BYTES", bytes(g_cfg.module_bytes)}, {"GRAPH_BYTES", bytes(g_cfg.graph_bytes)},
        {"DEVICES", text(g_device_list)}, {"USED", used}, {"SHARED", [](const char* v) { if (!share(v)) say("cannot share `%s`", v); }},
        {"NAME", [](const char* v) { g_cfg.names = split(v); }}, {"INTEGRATED", flag(g_cfg.integrated)}, {"MIG", flag(g_cfg.mig)},
        {"CLOCK_KHZ", number(g_cfg.clock_khz)}, {"BUS_BITS", number(g_cfg.bus_bits)}, {"COMPUTE_MODE", number(g_cfg.compute_mode)},
        {"CC", [](const char* v) {
            const char* forced = getenv("FAKE_CUDA_FORCE_CC");
            g_cfg.cc = (int)(atof(forced && !strcmp(v, "8.6") ? forced : v) * 10 + 0.5);
        }},
        {"SMS", number(g_cfg.multiprocessors)}, {"DRIVER", number(g_cfg.driver)}, {"STREAMS", [](const char* v) { g_cfg.lazy = !strcmp(v, "lazy"); }},
        {"GRAPHS", flag(g_cfg.graphs)}, {"BREAK_PEER", flag(g_cfg.break_peer)}, {"PDL", flag(g_cfg.early)}, {"POISON", bytes(g_cfg.poison)}, {"THREADS", number(g_engine.threads)},
        {"TIMEOUT_MS", number(g_engine.timeout_ms)}, {"RACE", flag(g_engine.race)}, {"CHAOS", flag(g_engine.chaos)}, {"SEED", number(g_engine.seed)},
        {"RESIDENT", number(g_engine.resident)}, {"JITTER", number(g_engine.jitter)}, {"MMA", [](const char* v) { g_engine.mma_truncates = !strcmp(v, "truncate"); }},
        {"COVERAGE", text(g_engine.coverage)}, {"LOG", text(g_engine.log)}, {"REPORT", text(g_cfg.report)}, {"QUIET", flag(g_cfg.quiet)},
    };
    return all;
}

static void init_devices() {
    g_engine.threads = std::min(4u, std::max(1u, std::thread::hardware_concurrency()));
    if (const char* list = getenv("FAKE_CUDA_DEVICES")) g_device_list = list;
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
    for (auto& [key, set] : settings())
        if (const char* v = getenv(("FAKE_CUDA_" + key).c_str())) set(v);
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
Context* current() { auto& s = ctx_stack(); return s.empty() || s.back()->destroyed ? nullptr : s.back(); }

static Context* new_context(Device* d) {  // null: it does not fit
    auto c = std::make_unique<Context>();
    c->dev = d;
    c->null_stream.ctx = c.get();
    return charge(c.get(), g_cfg.context_bytes) ? nullptr : g_contexts.add(c.release());
}
static void destroy_context(Context* c) {  // the real driver frees everything the context owns
    drain_ctx(c);
    std::vector<uintptr_t> owned;
    { std::lock_guard<std::mutex> l(c->dev->mu); for (auto& [p, a] : c->dev->live) if (a.ctx == c) owned.push_back(p), c->dev->stats.leaked_bytes += a.size; }
    uncharge(c, c->charged);
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
__attribute__((destructor)) static void at_exit() { report(); report_findings(); if (!g_engine.coverage.empty()) report_coverage(g_engine.coverage.c_str()); }

}  // namespace fk

using namespace fk;

// ---- test control (not part of CUDA; tests find these with dlsym) --------------------------------
#define EXPORT extern "C" __attribute__((visibility("default")))
API cuInit(unsigned flags);
// Changes a setting: key and value as in the environment, without the FAKE_CUDA_ prefix. DEVICES
// and QUIET have an effect before the first call only, USED and the rest at any time.
EXPORT int fake_cuda_control(const char* key, const char* value) {
    if (strcmp(key, "DEVICES")) cuInit(0);
    auto setting = settings().find(key);
    return setting == settings().end() ? 1 : (setting->second(value), 0);
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
    if (n == "links") return g_links;
    if (bad_device(device)) return ~0ull;
    Device* d = g_devices[device];
    if (n == "charged_bytes") { std::lock_guard<std::mutex> l(d->mu); return d->charged; }
    if (n == "reset_peak") return d->stats.peak_bytes = d->stats.live_bytes.load();
    for (auto& [key, v] : d->stats.all()) if (n == key) return *v;
    return ~0ull;
}
EXPORT void fake_cuda_last_error(char* out, size_t n) { std::lock_guard<std::mutex> l(g_mu); snprintf(out, n, "%s", g_last_error.c_str()); }

// What was found since the last call, a line each, as much as there is room for; all of it is written at exit.
EXPORT void fake_cuda_findings(char* out, size_t n) { snprintf(out, n, "%s", new_findings().c_str()); }

// ---- initialisation, devices -------------------------------------------------------------------
API cuInit(unsigned flags) {
    NEED(!flags);
    static std::once_flag once;
    std::call_once(once, [] { init_devices(); g_initialised = true; });
    return g_cfg.init_code ? g_cfg.init_code : g_devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
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
API cuDeviceGetName(char* out, int n, CUdevice d) {
    NEED_DEVICE(d);
    if (g_cfg.names.empty()) snprintf(out, n, "Fake GPU %d", d);
    else snprintf(out, n, "%s", g_cfg.names[std::min<size_t>(d, g_cfg.names.size() - 1)].c_str());
    return CUDA_SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, CUdevice d) { NEED_DEVICE(d); *bytes = g_devices[d]->total; return CUDA_SUCCESS; }
// Every GPU has a PCI domain, bus and device of its own.
static int pci_domain(CUdevice d) { return d; }
static int pci_bus(CUdevice d) { return 0x1a + 0x21 * d; }
static int pci_device(CUdevice d) { return d % 32; }
API cuDeviceGetPCIBusId(char* out, int n, CUdevice d) {
    NEED_DEVICE(d);
    snprintf(out, n, "%04X:%02X:%02X.0", pci_domain(d), pci_bus(d), pci_device(d));
    return CUDA_SUCCESS;
}
static CUresult uuid(void* out, CUdevice d, int byte) {
    NEED_DEVICE(d);
    memset(out, byte, 16);
    ((unsigned char*)out)[15] = (unsigned char)d;
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid(void* out, CUdevice d) { return uuid(out, d, 0xfa); }
API cuDeviceGetUuid_v2(void* out, CUdevice d) { return uuid(out, d, g_cfg.mig ? 0x3f : 0xfa); }  // of the MIG instance
API cuDeviceGetAttribute(int* v, int attr, CUdevice d) {
    NEED_DEVICE(d);
    switch (attr) {
        case 16: *v = g_cfg.multiprocessors; break;
        case 18: *v = g_cfg.integrated; break;
        case 20: *v = g_cfg.compute_mode; break;
        case 33: *v = pci_bus(d); break;
        case 34: *v = pci_device(d); break;
        case 36: *v = g_cfg.clock_khz; break;
        case 37: *v = g_cfg.bus_bits; break;
        case 50: *v = pci_domain(d); break;
        case 75: *v = g_cfg.cc / 10; break;
        case 76: *v = g_cfg.cc % 10; break;
        default: *v = 0;
    }
    return CUDA_SUCCESS;
}

// ---- contexts ----------------------------------------------------------------------------------
API cuDevicePrimaryCtxRetain(Context** out, CUdevice d) {
    NEED_DEVICE(d);
    if (auto code = g_cfg.context_codes.find(d); code != g_cfg.context_codes.end()) return code->second;
    std::lock_guard<std::mutex> l(g_mu);
    Device* dev = g_devices[d];
    if (!dev->primary && !(dev->primary = new_context(dev))) return CUDA_ERROR_OUT_OF_MEMORY;
    dev->primary_refs++;
    *out = dev->primary;
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(CUdevice d) {
    NEED_DEVICE(d);
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
