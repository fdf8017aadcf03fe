// What fibers.cpp and engine.cpp share: the threads of a block and the OS thread that runs them.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <atomic>

#include "engine.h"

namespace fk {

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
    AsyncCopies async[kMaxThreads];
    unsigned warp_waiting[32];  // per warp: lanes inside a collective
    unsigned warp_exist[32];    // per warp: lanes the block has
    unsigned warp_done[32];     // per warp: lanes that returned
    unsigned nthreads, next_start, ndone, nbarrier;
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

// fk_switch(save, to): push the callee-saved registers, store the stack pointer in *save, continue
// on stack `to`. fk_land: the second half alone, entered by the fault handler with rsp already set.
extern "C" void fk_switch(void** save, void* to) __attribute__((visibility("hidden")));
extern "C" void fk_land() __attribute__((visibility("hidden")));

// The context to run next: a ready fiber, a fresh one, or the scheduler (done or deadlocked).
void* choose(Worker* w);

}  // namespace fk
