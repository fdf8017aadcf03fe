// Modules, functions, launches. PTX is read for what the driver API exposes; kernels run on the CPU.
#include "driver.h"

#include <cctype>
#include <cstdlib>

namespace fk {

// ---- PTX ---------------------------------------------------------------------------------------
// Reads what the driver API exposes: entries, their parameter sizes, static shared memory, launch
// bounds, target and version. The instructions are not interpreted.
struct Tokens {
    const char* p;
    std::string next() {
        for (;;) {
            while (*p && isspace((unsigned char)*p)) p++;
            if (p[0] == '/' && p[1] == '/') { while (*p && *p != '\n') p++; }
            else if (p[0] == '/' && p[1] == '*') { p += 2; while (*p && !(p[0] == '*' && p[1] == '/')) p++; if (*p) p += 2; }
            else if (p[0] == '"') { p++; while (*p && *p != '"') p++; if (*p) p++; }
            else break;
        }
        const char* s = p;
        auto word = [](char c) { return isalnum((unsigned char)c) || strchr("_.$%@", c); };
        while (*p && word(*p)) p++;
        if (p == s && *p) p++;
        return std::string(s, p);
    }
};
static unsigned type_size(const std::string& t) {
    if (t.size() < 3 || t[0] != '.' || !strchr("usfb", t[1]) || !isdigit((unsigned char)t[2])) return 0;
    unsigned bits = atoi(t.c_str() + 2);
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? bits / 8 : 0;
}
static CUresult parse_ptx(const char* text, Module& m) {
    Tokens t{text};
    bool version = false, target = false;
    // `.shared/.param [.align n] .type name[count]` up to , ; or ) -> size and alignment
    auto declaration = [&](ParamInfo& info) {
        info = {0, 0, false};
        std::string w;
        unsigned elem = 0, count = 1, align = 0;
        while (!(w = t.next()).empty() && w != "," && w != ";" && w != ")") {
            if (w == ".align") align = atoi(t.next().c_str());
            else if (w == ".ptr") info.pointer = true;
            else if (w == "[") count = std::max(0, atoi(t.next().c_str()));
            else if (unsigned s = type_size(w)) { if (!elem) elem = s; }
        }
        info.size = elem * count, info.align = info.pointer || !align ? elem : align;
        return w;
    };
    for (std::string w; !(w = t.next()).empty();) {
        if (w == ".version") {
            int major = 0, minor = 0;
            sscanf(t.next().c_str(), "%d.%d", &major, &minor);
            static const struct { int ptx, cuda; } table[] = {{80, 12000}, {81, 12010}, {82, 12020}, {83, 12030}, {84, 12040}, {85, 12050}, {86, 12070}, {87, 12080}, {88, 12090}, {90, 13000}, {91, 13010}};
            int v = major * 10 + minor, need = v < 80 ? 0 : 99999;
            for (auto& e : table) if (e.ptx == v) need = e.cuda;
            if (need > g_cfg.driver) return say("PTX version %d.%d is newer than the driver (%d)", major, minor, g_cfg.driver), CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
            version = true;
        } else if (w == ".target") {
            std::string a = t.next();
            m.target = a.size() > 3 ? atoi(a.c_str() + 3) : 0;
            bool exact = !a.empty() && a.back() == 'a';
            if (exact ? m.target != g_cfg.cc : m.target > g_cfg.cc) return say("PTX target %s does not run on compute capability %d.%d", a.c_str(), g_cfg.cc / 10, g_cfg.cc % 10), CUDA_ERROR_NO_BINARY_FOR_GPU;
            target = true;
        } else if (w == ".entry") {
            std::string name = t.next();
            Entry e;
            w = t.next();
            if (w == "(") {
                for (w = t.next(); w == ".param";) {
                    ParamInfo p;
                    std::string end = declaration(p);
                    e.params.push_back(p);
                    w = end == "," ? t.next() : end;
                }
                if (w != ")") return CUDA_ERROR_INVALID_PTX;
                w = t.next();
            }
            for (; !w.empty() && w != "{" && w != ";"; w = t.next())
                if (w == ".maxntid" || w == ".reqntid") {
                    e.max_threads = std::max(1, atoi(t.next().c_str()));
                    const char* back = t.p;
                    while (t.next() == ",") e.max_threads *= std::max(1, atoi(t.next().c_str())), back = t.p;
                    t.p = back;
                }
            for (int depth = w == "{"; depth;) {
                w = t.next();
                if (w.empty()) return CUDA_ERROR_INVALID_PTX;
                if (w == "{") depth++;
                else if (w == "}") depth--;
                else if (w == ".shared") {
                    ParamInfo p;
                    declaration(p);
                    if (p.align) e.shared = (e.shared + p.align - 1) / p.align * p.align + p.size;
                }
            }
            if (e.shared > kStaticSharedMax) return say("%s: %zu bytes of static shared memory, at most 48 KiB allowed", name.c_str(), e.shared), CUDA_ERROR_INVALID_PTX;
            m.entries[name] = e;
        }
    }
    return version && target ? CUDA_SUCCESS : CUDA_ERROR_INVALID_PTX;
}

struct Launch {
    Function* f;
    Context* ctx;
    uint3 grid, block;
    std::vector<char> buf;
    std::vector<void*> args;
};
// A pointer that a kernel on context c may be given: null, or its own device's memory.
static CUresult check_pointer(Context* c, const char* kernel, unsigned param, uintptr_t p) {
    Device* d = device_of(p);
    if (!p || d == c->dev) return CUDA_SUCCESS;
    if (d) return say("%s: parameter %u points to memory of device %d, but the kernel runs on device %d", kernel, param, d->ordinal, c->dev->ordinal), CUDA_ERROR_ILLEGAL_ADDRESS;
    return say("%s: parameter %u (%#lx) is not a device pointer", kernel, param, (unsigned long)p), CUDA_ERROR_ILLEGAL_ADDRESS;
}
static CUresult run_launch(const Launch& l) {
    const Kernel* k = l.f->kernel;
    l.ctx->dev->stats.launches++;
    auto each_pointer = [&](auto fn) -> CUresult {
        for (unsigned i = 0; i < k->nparams; i++)
            if (k->params[i].pointer)
                if (CUresult r = fn(i, *(uintptr_t*)l.args[i])) return r;
        return CUDA_SUCCESS;
    };
    if (CUresult r = each_pointer([&](unsigned i, uintptr_t p) { return check_pointer(l.ctx, k->name, i, p); })) return r;
    RunResult r = run_grid({k, l.args.data(), l.grid, l.block});
    if (r.code) {
        say("%s: %s%s", k->name, r.message.c_str(), r.fault_addr ? locate(r.fault_addr).c_str() : "");
        return r.code;
    }
    return each_pointer([&](unsigned, uintptr_t p) -> CUresult {
        Device* d = device_of(p);
        CUresult e = d ? check_canary(d, p) : CUDA_SUCCESS;
        if (e) say("%s wrote outside the buffer it was given", k->name);
        return e;
    });
}
static CUresult launch(Function* f, uint3 grid, uint3 block, unsigned smem, void* hstream, void** params) {
    if (!g_functions.has(f)) return CUDA_ERROR_INVALID_HANDLE;
    Context* c = current();
    if (!c) return CUDA_ERROR_INVALID_CONTEXT;
    Stream* s = resolve(hstream);
    if (!s || s->ctx != f->mod->ctx) return CUDA_ERROR_INVALID_HANDLE;
    if (s->ctx->sticky) return s->ctx->sticky;
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || !threads || block.x > 1024 || block.y > 1024 ||
        block.z > 64 || threads > 1024)
        return say("%s: bad launch geometry (%u,%u,%u)x(%u,%u,%u)", f->name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z), CUDA_ERROR_INVALID_VALUE;
    if (threads > f->entry->max_threads)
        return say("%s: %lu threads per block, __launch_bounds__ allows %u", f->name.c_str(), (unsigned long)threads, f->entry->max_threads), CUDA_ERROR_INVALID_VALUE;
    if (smem || !params) return say("%s: dynamic shared memory is not emulated", f->name.c_str()), CUDA_ERROR_NOT_SUPPORTED;
    if (g_fail_launch.hit()) {
        int code = g_fail_launch.code;
        say("%s: failed on request", f->name.c_str());
        if (code < 700 || code == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES) return code;  // refused by the launch call itself
        return submit(s, {[code] { return code; }});
    }
    auto l = std::make_shared<Launch>();
    *l = {f, s->ctx, grid, block, {}, {}};
    l->buf.resize(16 * (f->kernel->nparams + 1));
    char* at = (char*)(((uintptr_t)l->buf.data() + 15) & ~15ull);
    for (unsigned i = 0; i < f->kernel->nparams; i++, at += 16) {
        memcpy(at, params[i], f->kernel->params[i].size);
        l->args.push_back(at);
    }
    return submit(s, {[l] { return run_launch(*l); }});
}

}  // namespace fk

using namespace fk;

API cuModuleLoadData(Module** out, const void* image) {
    NEED_CTX(c);
    NEED(out && image);
    if (!memcmp(image, "\x7f" "ELF", 4)) return say("cubin images cannot be run; pass PTX"), CUDA_ERROR_INVALID_IMAGE;
    auto m = std::make_unique<Module>();
    m->ctx = c;
    if (CUresult r = parse_ptx((const char*)image, *m)) return r;
    *out = g_modules.add(m.release());
    return CUDA_SUCCESS;
}
API cuModuleUnload(Module* m) {
    NEED_INIT();
    if (!g_modules.remove(m)) return CUDA_ERROR_INVALID_HANDLE;
    for (auto& [name, f] : m->functions) g_functions.remove(f.get());
    return CUDA_SUCCESS;  // the object is leaked: queued launches may still name it
}
API cuModuleGetFunction(Function** out, Module* m, const char* name) {
    NEED_CTX(c);
    if (!g_modules.has(m)) return CUDA_ERROR_INVALID_HANDLE;
    auto e = m->entries.find(name);
    if (e == m->entries.end()) return CUDA_ERROR_NOT_FOUND;
    auto& slot = m->functions[name];
    if (!slot) {
        const Kernel* k = find_kernel(name);
        if (!k) return say("kernel `%s` is in the PTX but has no FAKE_CUDA_KERNEL line", name), m->functions.erase(name), CUDA_ERROR_NOT_FOUND;
        // The two compilations must agree on the parameters; if not, one of them is stale.
        bool same = e->second.params.size() == k->nparams;
        for (unsigned i = 0; same && i < k->nparams; i++) same = e->second.params[i].size == k->params[i].size;
        if (!same) return say("kernel `%s`: parameters in the PTX and in the host build differ (stale PTX?)", name), m->functions.erase(name), CUDA_ERROR_INVALID_IMAGE;
        slot.reset(new Function{m, name, k, &e->second});
        g_functions.add(slot.get());
    }
    *out = slot.get();
    return CUDA_SUCCESS;
}
struct LaunchConfig {
    unsigned gx, gy, gz, bx, by, bz, smem;
    void* stream;
    const void* attributes;
    unsigned count;
};
// Attributes are not looked at: a kernel begins when the one before it has ended.
API cuLaunchKernelEx(const LaunchConfig* c, Function* f, void** params, void**) {
    NEED_INIT();
    NEED(c && (c->attributes || !c->count));
    return launch(f, {c->gx, c->gy, c->gz}, {c->bx, c->by, c->bz}, c->smem, c->stream, params);
}
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t, unsigned) {
    NEED_INIT();
    if (!g_functions.has(f)) return CUDA_ERROR_INVALID_HANDLE;
    NEED(blocks && threads > 0);
    *blocks = 2;
    return CUDA_SUCCESS;
}
