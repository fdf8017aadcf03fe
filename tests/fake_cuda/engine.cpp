// Runs the blocks of a launch on OS threads, and handles what goes wrong in them.
#include "fibers.h"

#include <dlfcn.h>
#include <link.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

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

static uint64_t now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
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
        f.tid = t, f.lane = i & 31, f.warp = i >> 5, f.blk = &w->blk, f.w = w, f.copies = f.groups = 0, f.async = &w->async[i];
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
