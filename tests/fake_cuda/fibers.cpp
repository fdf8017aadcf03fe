// The threads of a CUDA block, as fibers.
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
#include "fibers.h"

#include <sys/mman.h>

#include <cstdlib>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the fiber switch and the fault handler are written for x86-64 Linux only"
#endif

namespace fk {

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
void* choose(Worker* w) {
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
    w->nbarrier = 0;
    for (unsigned i = 0; i < w->nthreads; i++)
        if (w->fibers[i].state == InBarrier) push_ready(w, &w->fibers[i]);
}

__attribute__((noinline)) void block_barrier() {
    Fiber* f = (Fiber*)const_cast<ThreadCtx*>(self());
    Worker* w = f->w;
    f->state = InBarrier;
    if (++w->nbarrier == w->nthreads) {
        f->state = Running;  // the last one does not wait
        release_barrier(w);
        return;
    }
    block_here(f);
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

}  // namespace fk
