// Runs the blocks of a launch: warps whose lanes may go apart, barriers, collectives.
#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "exec.h"

namespace fk {

EngineConfig& g_engine = *new EngineConfig;  // leaked: findings are reported at exit
u32 g_rng_state = 1;

static u64 now_us() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000ull + t.tv_nsec / 1000; }

struct Running {
    const LaunchDesc* l;
    std::vector<u32> order;
    std::atomic<u32> next{0};
    std::atomic<bool> failed{false};
    std::mutex mu;
    RunResult result;
    u64 deadline;
};

static bool same(uint3 a, uint3 b) { return a.x == b.x && a.y == b.y && a.z == b.z; }
static void start_block(Block& b, Running& run, u32 id) {
    const LaunchDesc& l = *run.l;
    u32 threads = l.block.x * l.block.y * l.block.z, warps = (threads + 31) / 32;
    const bool is_new = b.k != l.kernel || !same(b.grid, l.grid) || !same(b.block, l.block);
    b.l = &l, b.run = &run, b.k = l.kernel, b.id = id, b.done = b.has_fenced = false, b.grid = l.grid, b.block = l.block;
    b.at = {id % l.grid.x, id / l.grid.x % l.grid.y, id / l.grid.x / l.grid.y};
    b.shared.assign(l.kernel->shared_bytes, (char)0xff);
    b.local.assign(l.kernel->local_bytes * threads, (char)0xff);
    b.copies.clear();
    b.clock = 1, b.last_bar = 0;
    if (g_engine.race) { b.fence.assign(threads, 0), b.fence_covers.assign(threads, 0), b.acquired.clear(); reset_shadow(b); }
    b.warps.resize(warps);
    for (u32 i = 0; i < warps; i++) {
        Warp& w = b.warps[i];
        w.b = &b, w.index = i, w.first_thread = 32 * i;
        w.exist = threads - 32 * i >= 32 ? ~0u : (1u << (threads - 32 * i)) - 1;
        w.alive = w.exist, w.blocked = w.at_barrier = w.waited = 0, w.last_sync = w.last_collective = 0, w.now = nullptr;
        memset(w.pc, 0, sizeof w.pc);
        if (w.regs.size() < l.kernel->reg_bytes + 64) w.regs.resize(l.kernel->reg_bytes + 64);
        w.base[0] = (char*)(((uintptr_t)w.regs.data() + 63) & ~63ull), w.base[1] = (char*)l.kernel->constants.data();
        if (g_engine.race) memset(w.base[0], 0xff, l.kernel->reg_bytes);
        auto special = [&](int s) { return (u32*)w.p(l.kernel->special[s]); };
        const u32 of_block[3] = {b.at.x, b.at.y, b.at.z}, of_launch[6] = {l.block.x, l.block.y, l.block.z, l.grid.x, l.grid.y, l.grid.z};
        for (int s = 0; s < 3; s++) std::fill_n(special(6 + s), 32, of_block[s]);
        if (!is_new && !g_engine.race) continue;
        for (int s = 0; s < 3; s++) std::fill_n(special(3 + s), 32, of_launch[s]), std::fill_n(special(9 + s), 32, of_launch[3 + s]);
        for (u32 lane = 0; lane < 32; lane++) {
            u32 t = 32 * i + lane;
            special(0)[lane] = t % l.block.x, special(1)[lane] = t / l.block.x % l.block.y, special(2)[lane] = t / l.block.x / l.block.y, special(12)[lane] = lane;
        }
    }
}

static std::string where(const Warp& w, u32 mask) {
    std::string out;
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        out += " lane " + std::to_string(l) + " at line " + std::to_string(w.b->k->code[w.pc[l]].line);
        if (out.size() > 160) return out + " ...";
    }
    return out;
}

constexpr s32 kNowhere = 0x7fffffff;
static __m256i places(const Warp& w, int eight) { return _mm256_load_si256((const __m256i*)w.pc + eight); }
// The lowest place behind `after` where lanes of `mask` stand.
static s32 least(const Warp& w, u32 mask, s32 after) {
    const __m256i nowhere = _mm256_set1_epi32(kNowhere), bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i low = nowhere;
    for (int i = 0; i < 4; i++) {
        __m256i of_mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask >> 8 * i), bits), bits), pc = places(w, i);
        __m256i counts = _mm256_and_si256(of_mask, _mm256_cmpgt_epi32(pc, _mm256_set1_epi32(after)));
        low = _mm256_min_epi32(low, _mm256_blendv_epi8(nowhere, pc, counts));
    }
    alignas(32) s32 each[8];
    _mm256_store_si256((__m256i*)each, low);
    return *std::min_element(each, each + 8);
}
static u32 standing_at(const Warp& w, s32 pc) {
    u32 mask = 0;
    for (int i = 0; i < 4; i++) mask |= (u32)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(places(w, i), _mm256_set1_epi32(pc)))) << 8 * i;
    return mask;
}

// Lets a warp run for `budget` instructions; false when it cannot go on (barrier, or done).
static bool run_warp(Warp& w, u32 budget) {
    Block& b = *w.b;
    const Ins* code = b.k->code.data();
    u8* hits = g_engine.coverage.empty() ? nullptr : b.k->hits.data();
    while (budget) {
        u32 runnable = w.alive & ~w.blocked;
        if (!runnable) {
            if (!w.alive || w.at_barrier == w.alive) return false;
            throw Fault{FAULT_OTHER, "lanes of a warp wait for others that never come:" + where(w, w.blocked)};
        }
        // The lanes that are furthest behind, or, at random, any.
        s32 pc;
        if (g_engine.chaos && rng() % 4 == 0) {
            u32 n = rng() % __builtin_popcount(runnable), t = runnable;
            while (n--) t &= t - 1;
            pc = w.pc[__builtin_ctz(t)];
        } else pc = least(w, runnable, -1);
        u32 g = standing_at(w, pc) & runnable;
        const bool alone = g == runnable;
        const s32 limit = alone ? kNowhere : least(w, runnable, pc);  // where others stand
        auto leave = [&](s32 at) { for (u32 l = 0; l < 32; l++) w.pc[l] = g >> l & 1 ? at : w.pc[l]; };
        u32 quantum = g_engine.chaos && !alone ? std::min(budget, 1 + rng() % 32) : budget;
        u32 spent = 0;
        for (;;) {
            if (spent == quantum || pc >= limit) { leave(pc); break; }
            spent++;
            const Ins& i = code[pc];
            if (hits) hits[pc] = 1;
            u32 m = g;
            if (i.pred >= 0) { u32 v = *(u32*)(w.base[0] + i.pred); m &= i.negated ? ~v : v; }
            if (i.kind == ALU) { if (m) i.fn(w, i, m); pc++; continue; }
            w.now = &i;
            if (i.kind == MEM) { if (m) i.fn(w, i, m); pc++; continue; }
            if (i.kind == BRA) {
                if (m == g) { bool back = i.target <= pc; pc = i.target; if (back && !alone) { leave(pc); break; } continue; }
                if (!m) { pc++; continue; }
                leave(pc + 1);
                for (u32 t = m; t; t &= t - 1) w.pc[__builtin_ctz(t)] = i.target;
                break;
            }
            if (i.kind == RET) {
                for (u32 t = b.copies.empty() ? 0 : m; t; t &= t - 1) {
                    AsyncCopies& c = b.copies[w.first_thread + __builtin_ctz(t)];
                    for (auto& group : c.groups) if (!group.empty()) { finding(b, "a thread returns with cp.async under way", group[0].line); break; }
                    if (!c.open.empty()) finding(b, "a thread returns with cp.async that it never committed", c.open[0].line);
                    c = {};
                }
                w.alive &= ~m;
                w.blocked &= w.at_barrier;  // who waits at a collective looks again
                if (g & ~m) { g &= ~m; leave(pc + 1); }
                break;
            }
            if (i.kind == FENCE) { if (m) { if (g_engine.race) race_fence(w, m); b.clock++; } pc++; continue; }
            if (i.kind == NOP) { pc++; continue; }
            if (i.kind == GDC_WAIT) { w.waited |= m; pc++; continue; }
            if (i.kind == GDC_LAUNCH) {
                if (b.l->early && (m & ~w.waited)) finding(b, "griddepcontrol.launch_dependents before griddepcontrol.wait", i.line);
                pc++; continue;
            }
            // The rest waits for others.
            if (m != g) {
                if (!m) { pc++; continue; }
                finding(b, "a guard lets a part of the lanes through to a collective", i.line);
                leave(pc);
                for (u32 t = g & ~m; t; t &= t - 1) w.pc[__builtin_ctz(t)] = pc + 1;
                g = m;
            }
            if (i.kind == BAR) {
                leave(pc);  // until it is released
                w.blocked |= g, w.at_barrier |= g;
                // .aligned: all lanes of the warp take the same one
                for (u32 t = w.at_barrier; t; t &= t - 1)
                    if (w.pc[__builtin_ctz(t)] != pc) throw Fault{FAULT_OTHER, "lanes of a warp are at different bar.sync, which is .aligned:" + where(w, w.at_barrier)};
                break;
            }
            u32 want = ~0u;
            if (i.kind == SHFL || i.kind == WARPSYNC) {
                const u32* masks = (const u32*)w.p(i.op[i.kind == SHFL ? 5 : 0]);
                want = masks[__builtin_ctz(g)];
                for (u32 t = g; t; t &= t - 1) {
                    int l = __builtin_ctz(t);
                    if (masks[l] != want) throw Fault{FAULT_OTHER, "lanes give different masks to a collective, line " + std::to_string(i.line)};
                    if (!(want >> l & 1)) throw Fault{FAULT_OTHER, "a lane is not in its own mask, line " + std::to_string(i.line)};
                }
            }
            u32 arrived = g;
            for (u32 t = w.blocked & ~w.at_barrier; t; t &= t - 1) { int l = __builtin_ctz(t); if (w.pc[l] == pc) arrived |= 1u << l; }
            if (want & w.alive & ~arrived) { leave(pc); w.blocked |= g; break; }
            if ((i.kind == MMA || i.kind == LDMATRIX) && arrived != ~0u) throw Fault{FAULT_OTHER, "an .aligned instruction of a warp that is not whole, line " + std::to_string(i.line)};
            if (i.kind == SHFL && (want & w.exist & ~w.alive)) finding(b, "shfl.sync names lanes that have returned", i.line);
            w.blocked &= ~arrived;
            if (i.fn) i.fn(w, i, arrived);
            if (i.kind == WARPSYNC) w.last_sync = b.clock;
            w.last_collective = b.clock++;
            if (arrived == g) { pc++; continue; }
            g = arrived;
            leave(pc + 1);
            break;
        }
        budget -= std::min(budget, std::max(spent, 1u));
    }
    return true;
}

// Runs a part of a block; true when it is done.
static bool run_block(Block& b, u32 turns) {
    while (turns--) {
        Warp* ready[32];
        u32 alive = 0, count = 0;
        for (Warp& w : b.warps) { if (!w.alive) continue; alive++; if (w.at_barrier != w.alive) ready[count++] = &w; }
        if (!alive) return b.done = true;
        if (!count) {
            s32 pc = -1;
            bool ended = false;
            for (Warp& w : b.warps) {
                ended |= w.alive != w.exist;
                if (!w.alive) continue;
                s32 at = w.pc[__builtin_ctz(w.alive)];
                if (pc >= 0 && at != pc) finding(b, "warps of a block meet at different bar.sync", b.k->code[pc].line, b.k->code[at].line);
                pc = at;
            }
            if (ended) finding(b, "bar.sync after some threads of the block have returned", b.k->code[pc].line);
            for (Warp& w : b.warps) { for (u32 t = w.alive; t; t &= t - 1) w.pc[__builtin_ctz(t)]++; w.blocked = w.at_barrier = 0; }
            b.last_bar = b.clock++;
            continue;
        }
        Warp& w = *ready[g_engine.chaos ? rng() % count : 0];
        run_warp(w, g_engine.chaos ? 1 + rng() % 200 : 1u << 20);
        if (now_us() > b.run->deadline) throw Fault{FAULT_TIMEOUT, "the launch timed out"};
    }
    return false;
}

// Until all blocks of the launch are taken, or `most` are done.
static void work(Running& run, u64 most) {
    u32 window = g_engine.resident ? g_engine.resident : g_engine.chaos ? 2 * run.l->multiprocessors : 1;
    if (g_engine.threads > 1 && !g_engine.race) window = 1;
    std::vector<std::unique_ptr<Block>> blocks;
    static auto& pool = *new std::vector<std::unique_ptr<Block>>;  // under pool_mu
    static auto& pool_mu = *new std::mutex;
    u32 which = 0;
    Block* current = nullptr;
    try {
        for (;;) {
            while (blocks.size() < window) {
                u32 n = run.next++;
                if (n >= run.order.size()) break;
                std::unique_ptr<Block> b;
                { std::lock_guard<std::mutex> l(pool_mu); if (!pool.empty()) b = std::move(pool.back()), pool.pop_back(); }
                if (!b) b = std::make_unique<Block>();
                start_block(*b, run, run.order[n]);
                blocks.push_back(std::move(b));
            }
            if (blocks.empty() || run.failed) break;
            which = blocks.size() == 1 ? 0 : rng() % blocks.size();
            current = blocks[which].get();
            if (run_block(*current, blocks.size() == 1 && window == 1 ? ~0u : 1 + rng() % 8)) {
                { std::lock_guard<std::mutex> l(pool_mu); if (pool.size() < 32) pool.push_back(std::move(blocks[which])); }
                blocks.erase(blocks.begin() + which);
                if (--most == 0) return;
            }
        }
    } catch (const Fault& f) {
        std::lock_guard<std::mutex> l(run.mu);
        if (!run.failed.exchange(true)) run.result = {f.code, f.message + (current ? " (block " + std::to_string(current->id) + ")" : ""), f.addr};
    }
}

RunResult run_grid(const LaunchDesc& l) {
    static std::atomic<u32> launches{0};
    static auto& alone = *new std::mutex;  // the detector and the random schedule know one launch at a time
    std::unique_lock<std::mutex> turn(alone, std::defer_lock);
    if (g_engine.race || g_engine.chaos) turn.lock();
    Running run;
    run.l = &l;
    run.result.launch = ++launches;
    u64 n = (u64)l.grid.x * l.grid.y * l.grid.z;
    run.order.resize(n);
    for (u64 i = 0; i < n; i++) run.order[i] = (u32)i;
    if (g_engine.chaos) {
        g_rng_state = (g_engine.seed * 2654435761u) ^ (run.result.launch * 40503u) ^ 0x9e3779b9u;
        if (!g_rng_state) g_rng_state = 1;
        for (u64 i = n; i > 1; i--) std::swap(run.order[i - 1], run.order[rng() % i]);
    }
    run.deadline = now_us() + g_engine.timeout_ms * 1000ull;
    if (g_engine.race) begin_launch(run.result.launch);
    u32 number = run.result.launch;
    std::vector<std::thread> threads;
    if (!g_engine.race && !g_engine.chaos && g_engine.threads > 1) {
        u64 begin = now_us();
        work(run, 1);
        u64 rest = (now_us() - begin) * (n - 1);
        for (unsigned i = 1; i < std::min<u64>(g_engine.threads, n - 1) && rest > 500; i++) threads.emplace_back([&] { work(run, ~0ull); });
    }
    work(run, ~0ull);
    for (auto& t : threads) t.join();
    run.result.launch = number;
    return run.result;
}

}  // namespace fk
