// fake_engine.cpp -- runs CUDA thread blocks on the CPU.
//
// Every CUDA thread is a fiber (own stack, hand-written switch). A fiber runs until it meets a
// block barrier or a warp collective that is not complete yet; then the next runnable fiber is
// entered directly. A kernel that never synchronises therefore costs one function call per thread:
// a finished fiber hands its stack to the next one.
//
// A block belongs to one OS thread ("Worker") from start to end; several workers may run blocks of
// one launch side by side. Faults (SIGSEGV, SIGBUS, SIGFPE, SIGILL), a deadlocked block, __trap,
// assert and the watchdog all end the same way: the worker's scheduler context is resumed with an
// error code, and the block's fibers are abandoned.
#include "engine.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the fiber switch and the fault handler are written for x86-64 Linux only"
#endif

namespace fk {

EngineConfig g_engine;

// ---- registries (filled by static constructors, so they must be zero-initialised pointers) ------
static Kernel* g_kernels;
void register_kernel(Kernel* k) { k->next = g_kernels, g_kernels = k; }
const Kernel* find_kernel(const std::string& name) {
    for (Kernel* k = g_kernels; k; k = k->next)
        if (name == k->name) return k;
    return nullptr;
}

// ---- fibers ------------------------------------------------------------------------------------
// fk_switch(save, to): push the callee-saved registers, store the stack pointer in *save, continue
// on stack `to`. fk_land: the second half alone, entered by the fault handler with rsp already set.
extern "C" void fk_switch(void** save, void* to) __attribute__((visibility("hidden")));
extern "C" void fk_land() __attribute__((visibility("hidden")));
asm(R"(
    .text
    .p2align 4
    .hidden fk_switch
    .globl fk_switch
    .type fk_switch,@function
fk_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    .hidden fk_land
    .globl fk_land
fk_land:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fk_switch,.-fk_switch
)");

constexpr unsigned kMaxThreads = 1024;
enum State : uint8_t { Unstarted, Ready, Running, InWarpOp, InBarrier, Done };

struct Worker;
struct Fiber : ThreadCtx {
    Worker* w;
    void* sp;
    char* slot;   // lowest address of the stack slot
    Fiber* next;  // ready list
    State state;
    unsigned mask;  // of the pending warp collective
    Complete complete;
    void* arg;
};

struct Worker {
    BlockCtx blk;
    Fiber fibers[kMaxThreads];
    unsigned warp_waiting[32];  // per warp: lanes inside a collective
    unsigned warp_exist[32];    // per warp: lanes the block has
    unsigned warp_done[32];     // per warp: lanes that returned
    unsigned nthreads, next_start, ndone, nbarrier;
    int bar_all, bar_any, bar_count;
    BarrierResult bar_result;
    Fiber *ready_head, *ready_tail;
    const LaunchDesc* launch;
    void* sched_sp;
    // stacks
    char* stacks = nullptr;
    unsigned slots_ready = 0;
    std::vector<char*> free_slots;
    // outcome of the running block
    volatile sig_atomic_t in_kernel = 0;
    int status;
    int sig, sig_code;
    uintptr_t fault_addr;
    std::string trap_msg;
    // watchdog
    pthread_t os_thread;
    std::atomic<uint64_t> started_ms{0};
};

static uint64_t now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static char* take_slot(Worker* w) {
    if (w->free_slots.empty()) {
        if (!w->stacks) {
            w->free_slots.reserve(kMaxThreads + 1);  // no malloc on a fiber: the watchdog may cut in
            size_t bytes = (kMaxThreads + 1) * kStackSize;
            char* p = (char*)mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED) abort();
            w->stacks = (char*)(((uintptr_t)p + kStackSize - 1) & ~(kStackSize - 1));
        }
        char* s = w->stacks + (size_t)w->slots_ready++ * kStackSize;
        if (mprotect(s + 4096, kStackSize - 4096, PROT_READ | PROT_WRITE)) abort();  // lowest page stays a guard
        return s;
    }
    char* s = w->free_slots.back();
    w->free_slots.pop_back();
    return s;
}
static void bind_slot(Fiber* f, char* slot) {
    f->slot = slot;
    *(const ThreadCtx**)(slot + kStackSize - 16) = f;
}

static void push_ready(Worker* w, Fiber* f) {
    f->state = Ready, f->next = nullptr;
    (w->ready_head ? w->ready_tail->next : w->ready_head) = f;
    w->ready_tail = f;
}

static void fiber_main();
static void release_barrier(Worker* w);
static void try_complete(Worker* w, unsigned warp, unsigned group, Fiber* self_fiber);

static Fiber* pop_ready(Worker* w) {
    Fiber* f = w->ready_head;
    if (f) w->ready_head = f->next;
    return f;
}
static Fiber* next_unstarted(Worker* w) {
    if (w->next_start == w->nthreads) return nullptr;
    unsigned i = w->next_start++;
    return &w->fibers[g_engine.reverse ? w->nthreads - 1 - i : i];
}
// Gives an unstarted fiber a stack whose first switch enters fiber_main. The start is staggered so
// that the hot part of the stacks of a block does not fall into the same cache sets.
static void prepare(Worker* w, Fiber* f) {
    bind_slot(f, take_slot(w));
    unsigned colour = ((f->slot - w->stacks) / kStackSize % 32) * 256;
    void** top = (void**)(f->slot + kStackSize - 64 - colour);
    *--top = nullptr;              // fiber_main's fake return address (keeps the ABI alignment)
    *--top = (void*)&fiber_main;   // popped by `ret`
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f->sp = top;
}
// The context to run next: a ready fiber, a fresh one, or the scheduler (done or deadlocked).
static void* choose(Worker* w) {
    Fiber* f = pop_ready(w);
    if (!f && (f = next_unstarted(w))) prepare(w, f);
    if (!f) return w->sched_sp;
    f->state = Running;
    return f->sp;
}
static void block_here(Fiber* f) {
    void* to = choose(f->w);
    if (to != f->sp) fk_switch(&f->sp, to);
}

static void fiber_main() {
    for (;;) {
        Fiber* f = (Fiber*)const_cast<ThreadCtx*>(self());
        Worker* w = f->w;
        const LaunchDesc* l = w->launch;
        l->kernel->invoke(l->kernel->fn, l->args);
        f->state = Done;
        w->ndone++;
        w->warp_done[f->warp] |= 1u << f->lane;
        void* unused;
        if (w->ready_head) {
            w->free_slots.push_back(f->slot);  // nobody reuses it before the switch below
            fk_switch(&unused, choose(w));
        }
        Fiber* n = next_unstarted(w);
        if (!n) {
            w->free_slots.push_back(f->slot);
            fk_switch(&unused, w->sched_sp);
        }
        n->state = Running;
        bind_slot(n, f->slot);  // the next thread runs on this very stack
        asm volatile("" ::: "memory");
    }
}

static void release_barrier(Worker* w) {
    w->bar_result = {w->bar_all, w->bar_any, w->bar_count};
    w->bar_all = 1, w->bar_any = 0, w->bar_count = 0, w->nbarrier = 0;
    for (unsigned i = 0; i < w->nthreads; i++)
        if (w->fibers[i].state == InBarrier) push_ready(w, &w->fibers[i]);
}

__attribute__((noinline)) BarrierResult block_barrier(int pred) {
    Fiber* f = (Fiber*)const_cast<ThreadCtx*>(self());
    Worker* w = f->w;
    w->bar_all &= pred != 0, w->bar_any |= pred != 0, w->bar_count += pred != 0;
    f->state = InBarrier;
    if (++w->nbarrier == w->nthreads) {
        f->state = Running;  // the last one does not wait
        release_barrier(w);
        return w->bar_result;
    }
    block_here(f);
    // bar_result stays valid: the next barrier needs this thread, too.
    return w->bar_result;
}

// Completes the collective `group` of a warp if all its lanes have arrived for the same operation.
static void try_complete(Worker* w, unsigned warp, unsigned group, Fiber* self_fiber) {
    unsigned want = group & w->warp_exist[warp];
    if (!want || (w->warp_waiting[warp] & want) != want) return;
    Fiber* base = &w->fibers[warp * 32];
    Fiber* first = &base[__builtin_ctz(want)];
    void* args[32];
    for (unsigned m = want; m; m &= m - 1) {
        Fiber* o = &base[__builtin_ctz(m)];
        if (o->mask != group || o->complete != first->complete) return;
        args[o->lane] = o->arg;
    }
    // A block whose last warp is partial may still use mma with a full mask on real hardware only
    // if all 32 lanes exist, so `complete` gets the lanes that are really there.
    first->complete(args, want);
    w->warp_waiting[warp] &= ~want;
    for (unsigned m = want; m; m &= m - 1) {
        Fiber* o = &base[__builtin_ctz(m)];
        if (o == self_fiber) o->state = Running;
        else push_ready(w, o);
    }
}

__attribute__((noinline)) void warp_collective(unsigned mask, Complete complete, void* arg) {
    Fiber* f = (Fiber*)const_cast<ThreadCtx*>(self());
    Worker* w = f->w;
    if (!(mask >> f->lane & 1)) trap(719, "warp collective called by a lane that is not in its mask");
    f->mask = mask, f->complete = complete, f->arg = arg, f->state = InWarpOp;
    w->warp_waiting[f->warp] |= 1u << f->lane;
    try_complete(w, f->warp, mask, f);
    if (f->state == InWarpOp) block_here(f);
}

unsigned active_mask() {  // lanes that could still take part; the hardware's answer is as vague
    const Fiber* f = (const Fiber*)self();
    return f->w->warp_exist[f->warp] & ~f->w->warp_done[f->warp];
}

void trap(int code, const char* what, const char* file, int line) {
    Fiber* f = (Fiber*)const_cast<ThreadCtx*>(self());
    Worker* w = f->w;
    char buf[512];
    snprintf(buf, sizeof buf, "%s%s%s%s by thread (%u,%u,%u) of block (%u,%u,%u)", what, file ? " at " : "", file ? file : "",
             file ? (":" + std::to_string(line)).c_str() : "", f->tid.x, f->tid.y, f->tid.z, w->blk.bid.x, w->blk.bid.y, w->blk.bid.z);
    w->trap_msg = buf;
    w->status = code;
    void* unused;
    fk_switch(&unused, w->sched_sp);
    __builtin_unreachable();
}

// ---- per OS thread state -----------------------------------------------------------------------
// Kept behind a pthread key rather than thread_local, because this library's thread-local segment
// is exactly the kernels' shared memory (and gets poisoned as a whole at the start of a block).
struct OsThread {
    Worker* worker = nullptr;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    bool scanned = false;
};
static pthread_key_t g_os_key;
static OsThread* os_thread() { return (OsThread*)pthread_getspecific(g_os_key); }

// The shared memory of this thread is the library's TLS segment.
static void scan_tls(OsThread* t) {
    t->scanned = true;
    struct Find { OsThread* t; } find{t};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* arg) -> int {
            OsThread* t = ((Find*)arg)->t;
            size_t tls_bytes = 0;
            bool ours = false;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& ph = info->dlpi_phdr[i];
                uintptr_t lo = info->dlpi_addr + ph.p_vaddr;
                if (ph.p_type == PT_LOAD && (uintptr_t)&scan_tls - lo < ph.p_memsz) ours = true;
                if (ph.p_type == PT_TLS) tls_bytes = ph.p_memsz;
            }
            if (ours && info->dlpi_tls_data) t->shared = (char*)info->dlpi_tls_data, t->shared_bytes = tls_bytes;
            return ours;
        },
        &find);
}

// ---- faults ------------------------------------------------------------------------------------
static const int kFaultSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction g_old_actions[65];
static int g_watchdog_signal;

static void on_signal(int sig, siginfo_t* si, void* context) {
    ucontext_t* uc = (ucontext_t*)context;
    OsThread* t = os_thread();
    Worker* w = t ? t->worker : nullptr;
    char* sp = (char*)uc->uc_mcontext.gregs[REG_RSP];
    bool on_fiber = w && w->in_kernel && w->stacks && sp >= w->stacks && sp < w->stacks + kMaxThreads * kStackSize;
    if (on_fiber) {
        w->in_kernel = 0;
        w->status = -1;
        w->sig = sig, w->sig_code = si->si_code, w->fault_addr = (uintptr_t)si->si_addr;
        // Continue in the scheduler, as if the fiber had switched to it.
        uc->uc_mcontext.gregs[REG_RIP] = (greg_t)&fk_land;
        uc->uc_mcontext.gregs[REG_RSP] = (greg_t)w->sched_sp;
        return;
    }
    if (sig == g_watchdog_signal) return;
    struct sigaction& old = g_old_actions[sig];  // not ours: hand it to whoever was there before
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(sig, si, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(sig);
    signal(sig, SIG_DFL);  // returns into the faulting instruction and dies there
}

static std::mutex& g_workers_mu = *new std::mutex;  // globals are leaked: no destruction order at exit
static std::vector<Worker*>&g_free_workers = *new std::vector<Worker*>, &g_all_workers = *new std::vector<Worker*>;

static void watchdog() {
    for (;;) {
        usleep(50 * 1000);
        std::lock_guard<std::mutex> lock(g_workers_mu);
        uint64_t now = now_ms();
        for (Worker* w : g_all_workers) {
            uint64_t s = w->started_ms.load();
            if (s && now > s + g_engine.timeout_ms && w->in_kernel) pthread_kill(w->os_thread, g_watchdog_signal);
        }
    }
}

static void init_once() {
    pthread_key_create(&g_os_key, [](void* p) { delete (OsThread*)p; });
    struct sigaction sa {};
    sa.sa_sigaction = on_signal;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
    sigemptyset(&sa.sa_mask);
    for (int s : kFaultSignals) sigaction(s, &sa, &g_old_actions[s]);
    g_watchdog_signal = SIGRTMIN + 7;
    sigaction(g_watchdog_signal, &sa, nullptr);
    std::thread(watchdog).detach();
}

// ---- running blocks ----------------------------------------------------------------------------
struct Job {
    LaunchDesc l;
    uint64_t blocks;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mu;
    RunResult result;
    unsigned helpers = 0;  // guarded by g_pool_mu
};

static void setup_launch(Worker* w, const LaunchDesc& l) {
    w->launch = &l;
    w->blk.bdim = l.block, w->blk.gdim = l.grid;
    w->nthreads = l.block.x * l.block.y * l.block.z;
    memset(w->warp_exist, 0, sizeof w->warp_exist);
    uint3 t{0, 0, 0};
    for (unsigned i = 0; i < w->nthreads; i++) {
        Fiber& f = w->fibers[i];
        f.tid = t, f.lane = i & 31, f.warp = i >> 5, f.blk = &w->blk, f.w = w;
        w->warp_exist[f.warp] |= 1u << f.lane;
        if (++t.x == l.block.x) {
            t.x = 0;
            if (++t.y == l.block.y) t.y = 0, t.z++;
        }
    }
}

static std::string describe_stuck(Worker* w) {
    unsigned bar = 0, warp = 0, done = 0;
    char lane_info[160] = "";
    for (unsigned i = 0; i < w->nthreads; i++) {
        Fiber& f = w->fibers[i];
        if (f.state == InBarrier) bar++;
        if (f.state == Done) done++;
        if (f.state == InWarpOp && !warp++)
            snprintf(lane_info, sizeof lane_info, "; first: warp %u lane %u waits for mask %08x, arrived %08x, exited %08x", f.warp, f.lane, f.mask,
                     w->warp_waiting[f.warp], w->warp_done[f.warp]);
    }
    char buf[400];
    snprintf(buf, sizeof buf, "deadlock in block (%u,%u,%u): %u threads at __syncthreads, %u in a warp collective, %u returned%s", w->blk.bid.x,
             w->blk.bid.y, w->blk.bid.z, bar, warp, done, lane_info);
    return buf;
}

static RunResult run_block(Worker* w, OsThread* t, const LaunchDesc& l, uint64_t index, bool first) {
    if (g_engine.reverse) index = (uint64_t)l.grid.x * l.grid.y * l.grid.z - 1 - index;
    w->blk.bid = {unsigned(index % l.grid.x), unsigned(index / l.grid.x % l.grid.y), unsigned(index / l.grid.x / l.grid.y)};
    for (unsigned i = 0; i < w->nthreads; i++) w->fibers[i].state = Unstarted;
    memset(w->warp_waiting, 0, sizeof w->warp_waiting);
    memset(w->warp_done, 0, sizeof w->warp_done);
    w->next_start = w->ndone = w->nbarrier = 0;
    w->bar_all = 1, w->bar_any = w->bar_count = 0;
    w->ready_head = nullptr;
    w->status = 0;

    // Shared memory starts undefined: fill it with NaNs.
    if (first || t->shared_bytes <= 64 * 1024) memset(t->shared, 0xff, t->shared_bytes);

    void* entry = choose(w);
    w->in_kernel = 1;
    fk_switch(&w->sched_sp, entry);
    asm volatile("" ::: "memory");
    w->in_kernel = 0;

    RunResult r;
    if (w->status || w->ndone != w->nthreads) {  // abandon the fibers: every stack slot is free again
        w->free_slots.clear();
        for (unsigned i = 0; i < w->slots_ready; i++) w->free_slots.push_back(w->stacks + (size_t)i * kStackSize);
        char where[96];
        snprintf(where, sizeof where, " in block (%u,%u,%u)", w->blk.bid.x, w->blk.bid.y, w->blk.bid.z);
        if (w->status > 0) {
            r = {w->status, w->trap_msg, 0};
        } else if (w->status == 0) {
            r = {719, describe_stuck(w), 0};
        } else if (w->sig == g_watchdog_signal) {
            r = {702, "kernel ran longer than FAKE_CUDA_TIMEOUT_MS (a spin loop?)" + std::string(where), 0};
        } else if (w->sig == SIGFPE) {
            r = {719, "integer division by zero (undefined on the GPU)" + std::string(where), 0};
        } else if (w->sig == SIGILL) {  // -fsanitize=alignment traps with ud2
            r = {716, "misaligned access" + std::string(where), 0};
        } else if (w->sig == SIGSEGV && w->sig_code == SI_KERNEL) {  // aligned SSE/AVX access, or a wild non-canonical pointer
            r = {716, "misaligned vector access or non-canonical address" + std::string(where), 0};
        } else if (w->fault_addr - (uintptr_t)w->stacks < kMaxThreads * kStackSize) {
            r = {719, "CUDA thread overflowed its emulated stack" + std::string(where), 0};
        } else {
            char a[64];
            snprintf(a, sizeof a, "illegal access to %#lx", (unsigned long)w->fault_addr);
            r = {700, a + std::string(where), w->fault_addr};
        }
        return r;
    }
    return r;
}

static void work_on(Job& job) {
    OsThread* t = os_thread();
    if (!t) pthread_setspecific(g_os_key, t = new OsThread);
    if (!t->scanned) scan_tls(t);
    stack_t ss{};
    if (!sigaltstack(nullptr, &ss) && (ss.ss_flags & SS_DISABLE)) {  // faults cannot be handled on a fiber's stack
        ss.ss_size = 64 * 1024, ss.ss_sp = malloc(ss.ss_size), ss.ss_flags = 0;
        sigaltstack(&ss, nullptr);
    }
    Worker* w;
    {
        std::lock_guard<std::mutex> lock(g_workers_mu);
        if (g_free_workers.empty()) g_all_workers.push_back(w = new Worker);
        else w = g_free_workers.back(), g_free_workers.pop_back();
    }
    Worker* outer = t->worker;
    t->worker = w;
    w->os_thread = pthread_self();
    w->started_ms = now_ms();
    setup_launch(w, job.l);
    bool first = true;
    for (uint64_t i; !job.failed && (i = job.next++) < job.blocks; first = false) {
        RunResult r = run_block(w, t, job.l, i, first);
        if (r.code) {
            std::lock_guard<std::mutex> lock(job.mu);
            if (!job.failed.exchange(true)) job.result = r;
        }
    }
    w->started_ms = 0;
    t->worker = outer;
    std::lock_guard<std::mutex> lock(g_workers_mu);
    g_free_workers.push_back(w);
}

// Helper threads, started on demand, wait here for launches with blocks left.
static std::mutex& g_pool_mu = *new std::mutex;
static std::condition_variable& g_pool_cv = *new std::condition_variable;  // new job
static std::condition_variable& g_done_cv = *new std::condition_variable;  // a helper left a job
static std::deque<Job*>& g_jobs = *new std::deque<Job*>;
static unsigned g_helpers;

static void helper() {
    std::unique_lock<std::mutex> lock(g_pool_mu);
    for (;;) {
        Job* job = nullptr;
        for (Job* j : g_jobs)
            if (j->next < j->blocks && !j->failed) { job = j; break; }
        if (!job) {
            g_pool_cv.wait(lock);
            continue;
        }
        job->helpers++;
        lock.unlock();
        work_on(*job);
        lock.lock();
        if (--job->helpers == 0) g_done_cv.notify_all();
    }
}

RunResult run_grid(const LaunchDesc& launch) {
    static std::once_flag once;
    std::call_once(once, init_once);
    Job job;
    job.l = launch;
    job.blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    bool parallel = g_engine.threads > 1 && job.blocks > 1 && job.blocks * launch.block.x * launch.block.y * launch.block.z >= 512;
    if (!parallel) {
        work_on(job);
        return job.result;
    }
    {
        std::lock_guard<std::mutex> lock(g_pool_mu);
        for (; g_helpers + 1 < g_engine.threads; g_helpers++) std::thread(helper).detach();
        g_jobs.push_back(&job);
    }
    g_pool_cv.notify_all();
    work_on(job);
    std::unique_lock<std::mutex> lock(g_pool_mu);
    for (auto it = g_jobs.begin(); it != g_jobs.end(); ++it)
        if (*it == &job) { g_jobs.erase(it); break; }
    g_done_cv.wait(lock, [&] { return job.helpers == 0; });
    return job.result;
}

}  // namespace fk
