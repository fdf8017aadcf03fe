// Modules, functions, launches; the kernels' PTX is interpreted.
#include "driver.h"

#include <algorithm>
#include <cstdlib>

namespace fk {

// `wrong`: what the compiler says of the text.
static CUresult parse(const char* text, Module& m, std::string& wrong) {
    int version = 0;
    std::string target;
    wrong = load_ptx(text, m.kernels, version, target);
    if (!wrong.empty()) return say("%s", wrong.c_str()), CUDA_ERROR_INVALID_PTX;
    static const struct { int ptx, cuda; } table[] = {{80, 12000}, {81, 12010}, {82, 12020}, {83, 12030}, {84, 12040}, {85, 12050}, {86, 12070}, {87, 12080}, {88, 12090}, {90, 13000}, {91, 13010}};
    int need = version < 80 ? 0 : 99999;
    for (auto& e : table) if (e.ptx == version) need = e.cuda;
    if (need > g_cfg.driver) return say("PTX version %d.%d is newer than the driver (%d)", version / 10, version % 10, g_cfg.driver), CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    m.target = target.size() > 3 ? atoi(target.c_str() + 3) : 0;
    if (target.back() == 'a' ? m.target != g_cfg.cc : m.target > g_cfg.cc)
        return say("PTX target %s does not run on compute capability %d.%d", target.c_str(), g_cfg.cc / 10, g_cfg.cc % 10), CUDA_ERROR_NO_BINARY_FOR_GPU;
    for (auto& [name, k] : m.kernels)
        if (k->shared_bytes > kStaticSharedMax) return say("%s: %zu bytes of static shared memory, at most 48 KiB allowed", name.c_str(), k->shared_bytes), CUDA_ERROR_INVALID_PTX;
    return CUDA_SUCCESS;
}

struct Launch {
    Function* f;
    Context* ctx;
    uint3 grid, block;
    std::vector<char> params;
    bool early;
};
static CUresult run_launch(const Launch& l) {
    const char* name = l.f->name.c_str();
    Device* dev = l.ctx->dev;
    dev->stats.launches++;
    LaunchDesc d{l.f->kernel.get(), l.params.data(), l.grid, l.block, {}, l.early && g_cfg.early, dev->previous_launch, (unsigned)g_cfg.multiprocessors};
    { std::lock_guard<std::mutex> lock(dev->mu); for (auto& [base, a] : dev->live) d.memory.push_back({base, a.size}); }
    for (auto& g : l.f->kernel->globals) d.memory.push_back({(uintptr_t)g->data(), g->size()});
    std::sort(d.memory.begin(), d.memory.end(), [](const Range& a, const Range& b) { return a.base < b.base; });
    auto& params = l.f->kernel->params;
    for (size_t i = 0; i < params.size(); i++) {
        Device* other = params[i].size == 8 ? device_of(*(uintptr_t*)(l.params.data() + params[i].offset)) : nullptr;
        if (other && other != dev)
            return say("%s: parameter %zu points to memory of device %d, but the kernel runs on device %d", name, i, other->ordinal, dev->ordinal), CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    RunResult r = run_grid(d);
    dev->this_launch = r.launch;
    if (r.code) { say("%s: %s%s", name, r.message.c_str(), r.fault_addr ? locate(r.fault_addr).c_str() : ""); return r.code; }
    return CUDA_SUCCESS;
}
static CUresult launch(Function* f, uint3 grid, uint3 block, unsigned smem, void* hstream, void** params, bool early) {
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
    if (threads > f->kernel->max_threads)
        return say("%s: %lu threads per block, __launch_bounds__ allows %u", f->name.c_str(), (unsigned long)threads, f->kernel->max_threads), CUDA_ERROR_INVALID_VALUE;
    if (smem || !params) return say("%s: dynamic shared memory is not emulated", f->name.c_str()), CUDA_ERROR_NOT_SUPPORTED;
    if (g_fail_launch.hit()) {
        int code = g_fail_launch.code;
        say("%s: failed on request", f->name.c_str());
        if (code < 700 || code == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES) return code;  // refused by the launch call itself
        return submit(s, {[code] { return code; }});
    }
    auto l = std::make_shared<Launch>();
    *l = {f, s->ctx, grid, block, {}, early};
    size_t bytes = 8;
    for (auto& p : f->kernel->params) bytes = std::max<size_t>(bytes, p.offset + p.size);
    l->params.resize(bytes);
    for (size_t i = 0; i < f->kernel->params.size(); i++) memcpy(l->params.data() + f->kernel->params[i].offset, params[i], f->kernel->params[i].size);
    return submit(s, {[l] { return run_launch(*l); }, true});
}

}  // namespace fk

using namespace fk;

// What the linker gives in place of a GPU's code: the PTX behind this.
static const char kLinked[] = "linked\n";

static CUresult load(Module** out, const void* image, std::string& wrong) {
    NEED_CTX(c);
    NEED(out && image);
    if (!strncmp((const char*)image, kLinked, strlen(kLinked))) image = (const char*)image + strlen(kLinked);
    if (!memcmp(image, "\x7f" "ELF", 4)) return say("cubin images cannot be run; pass PTX"), CUDA_ERROR_INVALID_IMAGE;
    if (g_fail_module.hit()) return g_fail_module.code;
    auto m = std::make_unique<Module>();
    m->ctx = c, m->charged = g_cfg.module_bytes;
    if (CUresult r = parse((const char*)image, *m, wrong)) return r;
    if (CUresult r = charge(c, m->charged)) return r;
    *out = g_modules.add(m.release());
    return CUDA_SUCCESS;
}
API cuModuleLoadData(Module** out, const void* image) { std::string wrong; return load(out, image, wrong); }
struct Linking {
    std::string image;
    char* log;
    size_t room;
};
API cuLinkCreate_v2(unsigned n, const int* options, void** values, Linking** out) {
    NEED_CTX(c);
    NEED(out);
    *out = new Linking{kLinked, nullptr, 0};
    for (unsigned i = 0; i < n; i++) {
        if (options[i] == 5) (*out)->log = (char*)values[i];
        if (options[i] == 6) (*out)->room = (uintptr_t)values[i];
    }
    return CUDA_SUCCESS;
}
API cuLinkAddData_v2(Linking* l, int type, const void* data, size_t size, const char*, unsigned, const int*, void**) {
    NEED_CTX(c);
    NEED(l && type == 1 && data && size && !((const char*)data)[size - 1]);
    g_links++;
    if (g_fail_link.hit()) return snprintf(l->log, l->room, "ptxas fatal"), g_fail_link.code.load();
    Module m;
    std::string wrong;
    CUresult r = parse((const char*)data, m, wrong);
    if (r && l->log) snprintf(l->log, l->room, "ptxas %s", wrong.c_str());
    l->image += (const char*)data;
    return r;
}
API cuLinkComplete(Linking* l, void** image, size_t* size) {
    NEED_CTX(c);
    NEED(l && image && size);
    *image = l->image.data(), *size = l->image.size() + 1;
    return CUDA_SUCCESS;
}
API cuLinkDestroy(Linking* l) {
    delete l;
    return CUDA_SUCCESS;
}
API cuModuleUnload(Module* m) {
    NEED_INIT();
    if (!g_modules.remove(m)) return CUDA_ERROR_INVALID_HANDLE;
    for (auto& [name, f] : m->functions) g_functions.remove(f.get());
    uncharge(m->ctx, m->charged);
    return CUDA_SUCCESS;  // the object is leaked: queued launches may still name it
}
API cuModuleGetFunction(Function** out, Module* m, const char* name) {
    NEED_CTX(c);
    if (!g_modules.has(m)) return CUDA_ERROR_INVALID_HANDLE;
    auto e = m->kernels.find(name);
    if (e == m->kernels.end()) return CUDA_ERROR_NOT_FOUND;
    auto& slot = m->functions[name];
    if (!slot) { slot.reset(new Function{m, name, e->second}); g_functions.add(slot.get()); }
    *out = slot.get();
    return CUDA_SUCCESS;
}
API cuFuncLoad(Function* f) { NEED_CTX(c); return g_functions.has(f) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
struct LaunchConfig {
    unsigned gx, gy, gz, bx, by, bz, smem;
    void* stream;
    const void* attributes;
    unsigned count;
};
struct LaunchAttribute { unsigned id, pad; int value, rest[15]; };  // CUlaunchAttribute; 6: programmatic stream serialization
API cuLaunchKernelEx(const LaunchConfig* c, Function* f, void** params, void**) {
    NEED_INIT();
    NEED(c && (c->attributes || !c->count));
    bool early = false;
    for (unsigned i = 0; i < c->count; i++) {
        auto& a = ((const LaunchAttribute*)c->attributes)[i];
        if (a.id != 6) return say("launch attribute %u is not emulated", a.id), CUDA_ERROR_NOT_SUPPORTED;
        if (g_cfg.cc < 90) return say("programmatic launches need compute capability 9.0"), CUDA_ERROR_NOT_SUPPORTED;
        early |= a.value != 0;
    }
    return launch(f, {c->gx, c->gy, c->gz}, {c->bx, c->by, c->bz}, c->smem, c->stream, params, early);
}
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t, unsigned) {
    NEED_INIT();
    if (!g_functions.has(f)) return CUDA_ERROR_INVALID_HANDLE;
    NEED(blocks && threads > 0);
    *blocks = 2;
    return CUDA_SUCCESS;
}
