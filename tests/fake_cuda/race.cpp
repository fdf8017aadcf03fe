// Finds accesses that nothing orders.
//
// A block has a clock, which moves on at every barrier, fence and collective. An access is stamped with it.
// Within a block an earlier access is ordered before this one if it is the thread's own, if a bar.sync came between,
// or, for the same warp, a bar.warp.sync; a shfl, mma or ldmatrix only makes the warp meet: reported apart.
// Between blocks of a launch: through a fence, an atomic, an atomic on the same word, a fence.
#include <mutex>
#include <unordered_map>

#include "exec.h"

namespace fk {

static u32 g_launch;
static const LaunchDesc* g_desc;
struct GlobalCell { Acc w, w2, r1, r2, r3, r4; };  // w2: the last writer of another block than w's
struct Page { GlobalCell cells[1024]; };
static auto& g_pages = *new std::unordered_map<u64, std::unique_ptr<Page>>;
static auto& g_released = *new std::unordered_map<u64, std::shared_ptr<Clocks>>;  // of the words that atomics go to

struct Found { u64 count = 0; std::string example; };
static auto& g_found = *new std::map<std::string, Found>;
static auto& g_found_mu = *new std::mutex;

void finding(const Block& b, const char* kind, u32 line, u32 other, const std::string& example) {
    std::lock_guard<std::mutex> l(g_found_mu);
    std::string key = b.k->name + ": " + kind + ", PTX line " + std::to_string(line) + (other ? " with line " + std::to_string(other) : "");
    Found& f = g_found[key];
    if (!f.count++) f.example = example;
}
void report_findings() {
    std::lock_guard<std::mutex> l(g_found_mu);
    if (g_found.empty() && g_engine.log.empty()) return;
    FILE* f = g_engine.log.empty() ? stderr : fopen(g_engine.log.c_str(), "a");
    if (!f) return;
    for (auto& [key, found] : g_found) fprintf(f, "fake_cuda: %s: %lu times%s%s\n", key.c_str(), (unsigned long)found.count, found.example.empty() ? "" : "; first: ", found.example.c_str());
    if (f != stderr) fclose(f);
    g_found.clear();
}
void begin_launch(const LaunchDesc& l, u32 launch) {
    g_launch = launch, g_desc = &l;
    g_released.clear();
    if (g_pages.size() > 20000) g_pages.clear();
}
void reset_shadow(Block& b) {
    static u64 runs = 0;
    b.run_number = ++runs;
    b.shadow.resize((b.shared.size() + 3) / 4);
}

static std::string say_two(const Warp& w, int lane, const Acc& a, u64 addr, bool shared) {
    char t[200];
    snprintf(t, sizeof t, "thread %u of block %u, then thread %u of block %u, at %s%#lx", a.tid, a.block, w.first_thread + lane, w.b->id, shared ? "shared " : "", (unsigned long)addr);
    return t;
}
// 0: not ordered; 1: by the warp's meeting alone; 2: ordered. For accesses of one block.
static int ordered_in_block(const Warp& w, u32 tid, const Acc& a) {
    if (a.tid == tid || a.clock <= w.b->last_bar) return 2;
    if (a.tid / 32 != w.index) return 0;
    return a.clock <= w.last_sync ? 2 : a.clock <= w.last_collective ? 1 : 0;
}

void race_shared(Warp& w, int lane, u32 addr, u32 size, u8 access, const void* written) {
    Block& b = *w.b;
    u32 tid = w.first_thread + lane, line = w.now->line;
    for (u32 at = addr & ~3u; at < addr + size; at += 4) {
        u32 lo = std::max(at, addr) - at, hi = std::min(at + 4, addr + size) - at;
        u8 mask = (u8)((1u << hi) - (1u << lo));
        SharedCell& c = b.shadow[at / 4];
        if (c.run != b.run_number) c = SharedCell{}, c.run = b.run_number;
        Acc now{g_launch, b.id, b.clock, (u16)tid, mask, access, line};
        auto conflict = [&](const Acc& a, const char* kind, const char* meeting) {
            if (!a.launch || !(a.mask & mask) || (a.flags & access & ATOMIC)) return;
            int o = ordered_in_block(w, tid, a);
            if (o == 2) return;
            if ((access & WRITE) && (a.flags & WRITE) && written && !memcmp(b.shared.data() + at + lo, (const char*)written + (at + lo - addr), hi - lo))
                return finding(b, "two threads write the same value to shared memory", line, a.line, say_two(w, lane, a, at, true));
            finding(b, o ? meeting : kind, line, a.line, say_two(w, lane, a, at, true));
        };
        if ((c.pending & mask) && !(access & ASYNC_DONE)) finding(b, access & WRITE ? "write to shared memory that cp.async still fills" : "read of shared memory that cp.async still fills", line, c.pending_line, say_two(w, lane, c.w, at, true));
        if (access & WRITE) {
            conflict(c.w, "shared race, write after write", "shared write after write relies on convergence");
            conflict(c.r1, "shared race, write after read", "shared write after read relies on convergence");
            conflict(c.r2, "shared race, write after read", "shared write after read relies on convergence");
            conflict(c.r3, "shared race, write after read", "shared write after read relies on convergence");
            c.w = now, c.init |= mask;
            if (access & ASYNC_ISSUE) c.pending |= mask, c.pending_line = line;
            if (access & ASYNC_DONE) c.pending &= ~mask;
        }
        if (!(access & WRITE) || (access & ATOMIC)) {
            if ((c.init & mask) != mask) finding(b, "read of shared memory that was never written", line, 0, say_two(w, lane, now, at, true));
            if (!(access & ATOMIC)) conflict(c.w, "shared race, read after write", "shared read after write relies on convergence");
        }
        if (!(access & WRITE)) {
            if (c.r1.launch && c.r1.tid != tid) {
                if (c.r1.tid / 32 != w.index) c.r2 = c.r1;
                else c.r3 = c.r1;
            }
            c.r1 = now;
        }
    }
}

static bool covered(const Entry_& e, const Acc& a) { return a.clock <= e.cover || a.clock <= (*e.fences)[a.tid]; }
// Whether thread `tid` has seen what the block of `a` released after it.
static bool ordered_between(const Block& b, u32 tid, const Acc& a, u64 word) {
    for (const Acquired& q : b.acquired) {
        auto e = q.clocks->find(a.block);
        if (e == q.clocks->end()) continue;
        if (q.address / 4 == word && (a.flags & ATOMIC)) return true;
        // by a fence of this thread after the atomic of it, or of another before a barrier; or by a fence of that one
        bool mine = b.fence[tid] >= q.clock && (q.thread == tid || b.fence_covers[tid] >= q.clock);
        bool others = b.fence[q.thread] >= q.clock && b.fence[q.thread] <= b.last_bar;
        if ((mine || others) && covered(e->second, a)) return true;
    }
    return false;
}

void race_global(Warp& w, int lane, u64 addr, u32 size, u8 access, const void* written) {
    Block& b = *w.b;
    u32 tid = w.first_thread + lane, line = w.now->line;
    bool early = b.l->early && b.l->previous && !(w.waited >> lane & 1);
    for (u64 at = addr & ~3ull; at < addr + size; at += 4) {
        u32 lo = (u32)(std::max(at, addr) - at), hi = (u32)(std::min(at + 4, addr + size) - at);
        u8 mask = (u8)((1u << hi) - (1u << lo));
        auto& page = g_pages[at >> 12];
        if (!page) page = std::make_unique<Page>();
        GlobalCell& c = page->cells[at >> 2 & 1023];
        Acc now{g_launch, b.id, b.clock, (u16)tid, mask, access, line};
        if (early) {
            if (c.w.launch == b.l->previous && (c.w.mask & mask)) finding(b, access & WRITE ? "before griddepcontrol.wait: writes what the kernel before has written" : "before griddepcontrol.wait: reads what the kernel before has written", line, c.w.line, say_two(w, lane, c.w, at, false));
            if (access & WRITE) for (const Acc* r : {&c.r1, &c.r2, &c.r3, &c.r4}) if (r->launch == b.l->previous && (r->mask & mask)) { finding(b, "before griddepcontrol.wait: writes what the kernel before reads", line, r->line, say_two(w, lane, *r, at, false)); break; }
            if (access & WRITE) finding(b, "before griddepcontrol.wait: a write", line, 0, "");
        }
        if (b.l->early && !(w.waited >> lane & 1)) finding(b, access & WRITE ? "note: a write before griddepcontrol.wait" : "note: a read before griddepcontrol.wait", line, 0, "");
        auto conflict = [&](const Acc& a, const char* kind, const char* meeting, const char* between) {
            if (a.launch != g_launch || !(a.mask & mask) || (a.flags & access & ATOMIC)) return;
            bool same_value = (access & WRITE) && (a.flags & WRITE) && written && !memcmp((const char*)at + lo, (const char*)written + (at + lo - addr), hi - lo);
            if (a.block == b.id) {
                int o = ordered_in_block(w, tid, a);
                if (o == 2) return;
                finding(b, same_value ? "two threads of a block write the same value to global memory" : o ? meeting : kind, line, a.line, say_two(w, lane, a, at, false));
            } else if (!ordered_between(b, tid, a, at / 4))
                finding(b, same_value ? "two blocks write the same value" : between, line, a.line, say_two(w, lane, a, at, false));
        };
        if (access & WRITE) {
            for (const Acc* v : {&c.w, &c.w2}) conflict(*v, "global race in a block, write after write", "global write after write relies on convergence", "race between blocks, write after write");
            for (const Acc* r : {&c.r1, &c.r2, &c.r3, &c.r4}) {
                conflict(*r, "global race in a block, write after read", "global write after read relies on convergence", "race between blocks, write after read");
                if (r->launch == g_launch && (r->mask & mask) && (r->flags & NC_READ)) finding(b, "writes what the same launch reads by ld.global.nc", line, r->line, say_two(w, lane, *r, at, false));
            }
        }
        if ((!(access & WRITE)) || (access & ATOMIC)) {
            conflict(c.w, "global race in a block, read after write", "global read after write relies on convergence", "race between blocks, read after write");
            conflict(c.w2, "global race in a block, read after write", "global read after write relies on convergence", "race between blocks, read after write");
            if ((access & NC_READ) && c.w.launch == g_launch && (c.w.mask & mask)) finding(b, "ld.global.nc of what the same launch has written", line, c.w.line, say_two(w, lane, c.w, at, false));
        }
        if (access & WRITE) {
            if (c.w.launch == g_launch && c.w.tid == now.tid && c.w.block == now.block) now.mask |= c.w.mask;  // a thread's neighbouring bytes
            if (c.w.launch != g_launch) c.w2 = Acc{};
            else if (c.w.block != b.id) c.w2 = c.w;
            c.w = now;
        } else {
            if (c.r1.launch != g_launch) c.r2 = c.r3 = c.r4 = Acc{};
            else if (c.r1.block != b.id) c.r2 = c.r1;
            else if (c.r1.tid != tid) (c.r1.tid / 32 != w.index ? c.r3 : c.r4) = c.r1;
            if (c.r1.launch == g_launch && c.r1.tid == now.tid && c.r1.block == now.block) now.mask |= c.r1.mask;
            now.flags |= c.r1.launch == g_launch ? c.r1.flags & NC_READ : 0;
            c.r1 = now;
        }
    }
}

void race_fence(Warp& w, u32 mask) {
    Block& b = *w.b;
    for (u32 t = mask; t; t &= t - 1) {
        u32 tid = w.first_thread + __builtin_ctz(t);
        b.fence[tid] = b.clock, b.fence_covers[tid] = b.last_bar;
    }
}
void race_atom(Warp& w, int lane, u64 addr) {
    Block& b = *w.b;
    u32 tid = w.first_thread + lane;
    auto& word = g_released[addr];
    auto seen = word;
    // What this thread may release: what was fenced by its thread before the last barrier, and its own.
    Entry_ e{b.fence_covers[tid], std::make_shared<std::vector<u32>>(b.fence)};
    for (u32 i = 0; i < b.fence.size(); i++) {
        if (i == tid) continue;
        if (b.fence[i] <= b.last_bar) e.cover = std::max(e.cover, b.fence_covers[i]);
        else (*e.fences)[i] = 0;
    }
    auto next = std::make_shared<Clocks>();
    if (seen) *next = *seen;
    for (const Acquired& q : b.acquired) for (auto& [block, entry] : *q.clocks) { auto it = next->find(block); if (it == next->end() || it->second.cover < entry.cover) (*next)[block] = entry; }
    (*next)[b.id] = e;
    word = next;
    if (seen) b.acquired.push_back({addr, tid, b.clock, seen});
}

}  // namespace fk
