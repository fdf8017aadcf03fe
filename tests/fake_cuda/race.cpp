// Finds accesses that nothing orders.
//
// A block has a clock, which moves on at every barrier, fence and collective. An access is stamped with it.
// Within a block an earlier access is ordered before this one if it is the thread's own, if a bar.sync came between,
// or, for the same warp, a bar.warp.sync; a shfl, mma or ldmatrix only makes the warp meet: reported apart.
// Between blocks of a launch: through a fence, an atomic, an atomic on the same word, a fence.
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "exec.h"

namespace fk {

static u32 g_launch;
struct GlobalAcc : Acc { u32 launch = 0, block = 0; };
struct GlobalCell { GlobalAcc w, w2, r1, r2, r3, r4; };  // w2: the last writer of another block than w's
constexpr u32 kPageWords = 256;
struct Page { GlobalCell cells[kPageWords]; };
static auto& g_pages = *new std::unordered_map<u64, std::unique_ptr<Page>>;
static u64 g_last_page_at = ~0ull;
static Page* g_last_page;
static auto& g_released = *new std::unordered_map<u64, std::shared_ptr<Clocks>>;  // of the words that atomics go to

struct Found { u64 count = 0; std::string example; bool is_told = false; };
using FoundKey = std::tuple<const Kernel*, const char*, u32, u32>;
static auto& g_found = *new std::map<FoundKey, Found>;
static auto& g_found_mu = *new std::mutex;

void finding(const Block& b, const char* kind, u32 line, u32 other, const Example* e) {
    std::lock_guard<std::mutex> l(g_found_mu);
    Found& f = g_found[{b.k, kind, line, other}];
    if (f.count++ || !e) return;
    char text[200];
    snprintf(text, sizeof text, "; first: thread %u of block %u, then thread %u of block %u, at %#lx", e->thread, e->block, e->then_thread, e->then_block, (unsigned long)e->address);
    f.example = text;
}
static std::string text_of(const FoundKey& key, const Found& f) {
    auto& [kernel, kind, line, other] = key;
    return kernel->name + ": " + kind + ", PTX line " + std::to_string(line) + (other ? " with line " + std::to_string(other) : "") + ": " + std::to_string(f.count) + " times" + f.example;
}
static bool is_note(const FoundKey& key) { return !strncmp(std::get<1>(key), "note:", 5); }
// What was found since the last call, and is not a note.
std::string new_findings() {
    std::lock_guard<std::mutex> l(g_found_mu);
    std::string out;
    for (auto& [key, f] : g_found) if (!is_note(key) && !std::exchange(f.is_told, true)) out += text_of(key, f) + "\n";
    return out;
}
void report_findings() {
    std::lock_guard<std::mutex> l(g_found_mu);
    FILE* f = g_engine.log.empty() ? stderr : fopen(g_engine.log.c_str(), "a");
    if (!f) return;
    for (auto& [key, found] : g_found) if (f != stderr || !is_note(key)) fprintf(f, "fake_cuda: %s\n", text_of(key, found).c_str());
    if (f != stderr) fclose(f);
}
void begin_launch(u32 launch) { g_launch = launch; g_released.clear(); if (g_pages.size() > 10000) g_pages.clear(), g_last_page_at = ~0ull; }
void reset_shadow(Block& b) { static u32 runs = 0; b.run_number = ++runs; b.shadow.resize((b.shared.size() + 3) / 4); }

// 0: not ordered; 1: by the warp's meeting alone; 2: ordered. For accesses of one block.
static inline int ordered_in_block(const Warp& w, u32 tid, const Acc& a) {
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
        Acc now{b.clock, line, (u16)tid, mask, access};
        auto tell = [&](const char* kind, u32 other, u32 first) {
            Example e{b.id, first, b.id, tid, at};
            finding(b, kind, line, other, &e);
        };
        auto conflict = [&](const Acc& a, const char* kind, const char* meeting) {
            if (!(a.mask & mask)) return;
            int order = ordered_in_block(w, tid, a);
            if (__builtin_expect(order == 2 || (a.flags & access & ATOMIC), 1)) return;
            const bool same = (access & WRITE) && (a.flags & WRITE) && written && !memcmp(b.shared.data() + at + lo, (const char*)written + (at + lo - addr), hi - lo);
            tell(same ? "two threads write the same value to shared memory" : order ? meeting : kind, a.line, a.tid);
        };
        if ((c.pending & mask) && !(access & ASYNC_DONE)) tell(access & WRITE ? "write to shared memory that cp.async still fills" : "read of shared memory that cp.async still fills", c.pending_line, c.w.tid);
        if (access & WRITE) {
            conflict(c.w, "shared race, write after write", "shared write after write relies on convergence");
            for (const Acc* r : {&c.r1, &c.r2, &c.r3}) conflict(*r, "shared race, write after read", "shared write after read relies on convergence");
            c.w = now, c.init |= mask;
            if (access & ASYNC_ISSUE) c.pending |= mask, c.pending_line = line;
            if (access & ASYNC_DONE) c.pending &= ~mask;
        }
        if (!(access & WRITE) || (access & ATOMIC)) {
            if ((c.init & mask) != mask) tell("note: read of shared memory that was never written", 0, tid);
            if (!(access & ATOMIC)) conflict(c.w, "shared race, read after write", "shared read after write relies on convergence");
        }
        if (!(access & WRITE)) { if (c.r1.clock && c.r1.tid != tid) (c.r1.tid / 32 != w.index ? c.r2 : c.r3) = c.r1; c.r1 = now; }
    }
}

static bool covered(const Released& e, const GlobalAcc& a) { return a.clock <= e.cover || a.clock <= (*e.fences)[a.tid]; }
// Whether thread `tid` has seen what the block of `a` released after it.
static bool ordered_between(const Block& b, u32 tid, const GlobalAcc& a, u64 word) {
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

static GlobalCell& cell_at(u64 addr) {
    u64 at = addr / (4 * kPageWords);
    if (at != g_last_page_at) { auto& page = g_pages[at]; if (!page) page = std::make_unique<Page>(); g_last_page = page.get(), g_last_page_at = at; }
    return g_last_page->cells[addr / 4 % kPageWords];
}
void race_global(Warp& w, int lane, u64 addr, u32 size, u8 access, const void* written) {
    Block& b = *w.b;
    u32 tid = w.first_thread + lane, line = w.now->line;
    const bool waits = b.l->early && !(w.waited >> lane & 1), early = waits && b.l->previous;
    if (waits) finding(b, access & WRITE ? "note: a write before griddepcontrol.wait" : "note: a read before griddepcontrol.wait", line);
    for (u64 at = addr & ~3ull; at < addr + size; at += 4) {
        u32 lo = (u32)(std::max(at, addr) - at), hi = (u32)(std::min(at + 4, addr + size) - at);
        u8 mask = (u8)((1u << hi) - (1u << lo));
        GlobalCell& c = cell_at(at);
        GlobalAcc now{{b.clock, line, (u16)tid, mask, access}, g_launch, b.id};
        auto tell = [&](const char* kind, const GlobalAcc& a) {
            Example e{a.block, a.tid, b.id, tid, at};
            finding(b, kind, line, a.line, &e);
        };
        if (early) {
            if (c.w.launch == b.l->previous && (c.w.mask & mask)) tell(access & WRITE ? "before griddepcontrol.wait: writes what the kernel before has written" : "before griddepcontrol.wait: reads what the kernel before has written", c.w);
            if (access & WRITE) for (const GlobalAcc* r : {&c.r1, &c.r2, &c.r3, &c.r4}) if (r->launch == b.l->previous && (r->mask & mask)) { tell("before griddepcontrol.wait: writes what the kernel before reads", *r); break; }
            if (access & WRITE) finding(b, "before griddepcontrol.wait: a write", line);
        }
        auto conflict = [&](const GlobalAcc& a, const char* kind, const char* meeting, const char* between) {
            if (a.launch != g_launch || !(a.mask & mask) || (a.flags & access & ATOMIC)) return;
            auto same_value = [&] { return (access & WRITE) && (a.flags & WRITE) && written && !memcmp((const char*)at + lo, (const char*)written + (at + lo - addr), hi - lo); };
            if (a.block == b.id) {
                int order = ordered_in_block(w, tid, a);
                if (order != 2) tell(same_value() ? "two threads of a block write the same value to global memory" : order ? meeting : kind, a);
            } else if (!ordered_between(b, tid, a, at / 4)) tell(same_value() ? "two blocks write the same value" : between, a);
        };
        if (access & WRITE) {
            for (const GlobalAcc* v : {&c.w, &c.w2}) conflict(*v, "global race in a block, write after write", "global write after write relies on convergence", "race between blocks, write after write");
            for (const GlobalAcc* r : {&c.r1, &c.r2, &c.r3, &c.r4}) {
                conflict(*r, "global race in a block, write after read", "global write after read relies on convergence", "race between blocks, write after read");
                if (r->launch == g_launch && (r->mask & mask) && (r->flags & NC_READ)) tell("writes what the same launch reads by ld.global.nc", *r);
            }
        }
        if (!(access & WRITE) || (access & ATOMIC)) {
            for (const GlobalAcc* v : {&c.w, &c.w2}) conflict(*v, "global race in a block, read after write", "global read after write relies on convergence", "race between blocks, read after write");
            if ((access & NC_READ) && c.w.launch == g_launch && (c.w.mask & mask)) tell("ld.global.nc of what the same launch has written", c.w);
        }
        if (access & WRITE) {
            if (c.w.launch == g_launch && c.w.tid == now.tid && c.w.block == now.block) now.mask |= c.w.mask;  // a thread's neighbouring bytes
            if (c.w.launch != g_launch) c.w2 = {};
            else if (c.w.block != b.id) c.w2 = c.w;
            c.w = now;
        } else {
            if (c.r1.launch != g_launch) c.r2 = c.r3 = c.r4 = {};
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
    b.has_fenced = true;
    for (u32 t = mask; t; t &= t - 1) { u32 tid = w.first_thread + __builtin_ctz(t); b.fence[tid] = b.clock, b.fence_covers[tid] = b.last_bar; }
}
void race_atom(Warp& w, int lane, u64 addr, bool acquires) {
    Block& b = *w.b;
    u32 tid = w.first_thread + lane;
    // Before its first fence a block has nothing to release.
    if (b.acquired.empty() && !b.has_fenced && !(acquires && g_released.count(addr))) return;
    auto& word = g_released[addr];
    auto seen = word;
    // What this thread may release: what was fenced by its thread before the last barrier, and its own.
    Released e{b.fence_covers[tid], std::make_shared<std::vector<u32>>(b.fence)};
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
    if (seen && acquires) b.acquired.push_back({addr, tid, b.clock, seen});
}

}  // namespace fk
