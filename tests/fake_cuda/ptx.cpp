// Reads PTX into kernels: declarations, instructions with resolved operands and targets, and few registers.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "engine.h"

namespace fk {

namespace {

struct Error : std::runtime_error { using runtime_error::runtime_error; };

unsigned type_size(const std::string& t) {
    if (t == "pred") return 0;
    if (t.size() < 2 || !strchr("usfb", t[0]) || !isdigit((unsigned char)t[1])) throw Error("unknown type ." + t);
    return atoi(t.c_str() + 1) / 8;
}
u32 bytes_of(unsigned width) { return width ? width * 32 : 4; }

struct Symbol { Space space; u64 at; };

struct Parser {
    const char* p;
    u32 line = 1;
    KernelMap& kernels;
    int version = 0;
    std::string target;
    std::map<std::string, std::pair<unsigned, size_t>> module_shared;  // alignment, size

    std::map<std::string, std::shared_ptr<std::vector<char>>> module_global;

    explicit Parser(const char* text, KernelMap& k) : p(text), kernels(k) {}

    [[noreturn]] void fail(const std::string& what) { throw Error("PTX line " + std::to_string(line) + ": " + what); }
    void skip() {
        for (;;) {
            if (*p == '\n') line++, p++;
            else if (isspace((unsigned char)*p)) p++;
            else if (p[0] == '/' && p[1] == '/') while (*p && *p != '\n') p++;
            else if (p[0] == '/' && p[1] == '*') { while (*p && !(p[0] == '*' && p[1] == '/')) line += *p == '\n', p++; if (*p) p += 2; }
            else return;
        }
    }
    static bool word_char(char c) { return isalnum((unsigned char)c) || strchr("_.$%@!", c); }
    std::string word() {
        skip();
        const char* s = p;
        while (*p && word_char(*p)) p++;
        if (p == s && *p) p++;
        return std::string(s, p);
    }
    // Up to `end`, on one line of text, without comments.
    std::string until(char end) {
        std::string out;
        while (*p && *p != end) {
            if (p[0] == '/' && p[1] == '/') { while (*p && *p != '\n') p++; continue; }
            if (*p == '\n') line++;
            out += isspace((unsigned char)*p) ? ' ' : *p;
            p++;
        }
        if (!*p) fail("unexpected end");
        p++;
        return out;
    }
    static std::string trim(const std::string& s) {
        size_t a = s.find_first_not_of(' '), b = s.find_last_not_of(' ');
        return a == std::string::npos ? "" : s.substr(a, b - a + 1);
    }
    static std::vector<std::string> words(const std::string& s) {
        std::vector<std::string> out;
        std::string w;
        for (char c : s + " ") if (c == ' ') { if (!w.empty()) out.push_back(w); w.clear(); } else w += c;
        return out;
    }
    // `.align n .type name[count]`
    void variable(const std::string& s, std::string& name, unsigned& align, size_t& size) {
        unsigned elem = 0;
        align = 0;
        auto ws = words(s);
        for (size_t i = 0; i < ws.size(); i++) {
            if (ws[i] == ".align") align = atoi(ws[++i].c_str());
            else if (ws[i][0] == '.') elem = type_size(ws[i].substr(1));
            else name = ws[i];
        }
        size_t count = 1, at = name.find('[');
        if (at != std::string::npos) count = strtoul(name.c_str() + at + 1, nullptr, 10), name.resize(at);
        size = elem * count;
        if (!align) align = elem;
    }
    void module() {
        for (;;) {
            skip();
            if (!*p) return;
            std::string w = word();
            if (w == ".version") { double v = atof(word().c_str()); version = (int)(v * 10 + 0.5); }
            else if (w == ".target") target = word();
            else if (w == ".address_size") { if (word() != "64") fail("address size"); }
            else if (w == ".shared") { std::string n; unsigned a; size_t s; variable(until(';'), n, a, s); module_shared[n] = {a, s}; }
            else if (w == ".global") {
                std::string text = until(';'), n;
                unsigned a; size_t size, eq = text.find('=');
                variable(trim(text.substr(0, eq)), n, a, size);
                auto bytes = std::make_shared<std::vector<char>>(size);
                if (eq != std::string::npos) {
                    if (text.find(".b8") == std::string::npos) fail("an initialized .global that is not of bytes");
                    auto values = operands(text.substr(eq + 1));
                    for (size_t i = 0; i < values.size(); i++) (*bytes)[i] = (char)atoi(values[i].c_str());
                }
                module_global[n] = bytes;
            }
            else if (w == ".visible" || w == ".weak") continue;
            else if (w == ".entry") entry();
            else fail("unexpected `" + w + "`");
        }
    }

    // ---- one kernel ----
    struct Scope { std::map<std::string, int> names; };  // registers that a block in braces declares
    std::shared_ptr<Kernel> k;
    std::vector<unsigned> widths;                          // of virtual registers
    std::unordered_map<std::string, int> vregs;
    std::vector<std::pair<std::string, unsigned>> prefixes; // %r<...>
    std::vector<Scope> scopes;
    std::map<std::string, Symbol> symbols;
    std::map<std::string, s32> labels;
    std::vector<std::pair<size_t, std::string>> jumps;
    std::map<std::pair<unsigned, u64>, u32> constants;
    std::vector<u8> defs_of;                               // of each instruction
    std::vector<std::vector<u8>> is_vreg;

    u32 constant(unsigned width, u64 v) {
        if (width < 8) v &= (1ull << 8 * std::max(width, 1u)) - 1;
        auto it = constants.find({width, v});
        if (it != constants.end()) return it->second | kConst;
        u32 at = (u32)k->constants.size();
        if (width == 0) { u32 m = v ? ~0u : 0; k->constants.resize(at + 32); memcpy(&k->constants[at], &m, 4); }
        else { k->constants.resize(at + 32 * width); for (int l = 0; l < 32; l++) memcpy(&k->constants[at + l * width], &v, width); }
        constants[{width, v}] = at;
        return at | kConst;
    }
    int new_vreg(unsigned width) { widths.push_back(width); return (int)widths.size() - 1; }
    int vreg(const std::string& name) {
        for (size_t i = scopes.size(); i-- > 0;) { auto it = scopes[i].names.find(name); if (it != scopes[i].names.end()) return it->second; }
        auto it = vregs.find(name);
        if (it != vregs.end()) return it->second;
        size_t n = name.size();
        while (n && isdigit((unsigned char)name[n - 1])) n--;
        for (auto& [prefix, width] : prefixes) if (name.compare(0, n, prefix) == 0 && n < name.size()) return vregs[name] = new_vreg(width);
        return -1;
    }
    static bool number(const std::string& s, u64& v) {
        if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) return v = strtoull(s.c_str() + 2, nullptr, 16), true;
        if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) return v = strtoull(s.c_str() + 2, nullptr, 16), true;
        if (s.empty() || !(isdigit((unsigned char)s[0]) || (s[0] == '-' && s.size() > 1))) return false;
        char* end;
        if (s[0] == '-') v = (u64)strtoll(s.c_str(), &end, 0);
        else v = strtoull(s.c_str(), &end, 0);
        if (*end == '.') return true;  // 1.0 of createpolicy
        return !*end || *end == 'U';
    }

    void entry() {
        k = std::make_shared<Kernel>();
        k->name = word();
        widths.clear(), vregs.clear(), prefixes.clear(), scopes.clear(), symbols.clear(), labels.clear(), jumps.clear(), constants.clear(), defs_of.clear(), is_vreg.clear();
        skip();
        if (*p == '(') {
            p++;
            std::string list = until(')');
            for (size_t i = 0; i <= list.size();) {
                size_t j = std::min(list.find(',', i), list.size());
                std::string one = trim(list.substr(i, j - i));
                i = j + 1;
                if (one.empty()) continue;
                if (one.compare(0, 6, ".param")) fail("parameter `" + one + "`");
                std::string n; unsigned a; size_t s;
                variable(one.substr(6), n, a, s);
                u32 at = (k->param_bytes + a - 1) / a * a;
                k->params.push_back({(unsigned)s, a, at}), k->param_offsets[n] = at, k->param_bytes = at + (u32)s;
            }
        }
        for (std::string w = word(); w != "{"; w = word()) {
            if (w == ".maxntid") {
                unsigned n = 1;
                for (int i = 0; i < 3; i++) { n *= atoi(word().c_str()); if (i < 2 && word() != ",") fail(".maxntid"); }
                k->max_threads = n;
            } else if (w == ".minnctapersm") word();
            else fail("unexpected `" + w + "`");
        }
        static const char* names[] = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};
        for (int i = 0; i < 13; i++) vregs[names[i]] = new_vreg(4);
        scopes.emplace_back();
        while (!scopes.empty()) {
            skip();
            if (!*p) fail("unexpected end");
            if (*p == '{') { p++, scopes.emplace_back(); continue; }
            if (*p == '}') { p++, scopes.pop_back(); continue; }
            const char* s = p;
            while (word_char(*p)) p++;
            if (*p == ':' && p[1] != ':') { labels[std::string(s, p)] = (s32)k->code.size(); p++; continue; }
            p = s;
            u32 at = line;
            statement(trim(until(';')), at);
        }
        for (auto& [i, label] : jumps) { auto it = labels.find(label); if (it == labels.end()) fail("no label " + label); k->code[i].target = it->second; }
        if (k->code.empty() || k->code.back().kind != RET) { Ins i{}; i.kind = RET, i.line = line; k->code.push_back(i); defs_of.push_back(0); is_vreg.emplace_back(); }
        allocate();
        k->hits.assign(k->code.size(), 0);
        kernels[k->name] = k;
    }
    std::vector<std::string> operands(const std::string& s) {
        std::vector<std::string> out;
        std::string w;
        for (char c : s) {
            if (c == ' ') continue;
            if (c == ',' || c == '{' || c == '}' || c == '|') { if (!w.empty()) out.push_back(w); w.clear(); }
            else w += c;
        }
        if (!w.empty()) out.push_back(w);
        return out;
    }
    void statement(std::string s, u32 at_line) {
        if (s.empty()) return;
        if (s[0] == '.') {
            auto ws = words(s);
            if (ws[0] == ".reg") {
                unsigned width = type_size(ws[1].substr(1));
                for (auto& n : operands(s.substr(s.find(ws[1]) + ws[1].size()))) {
                    size_t a = n.find('<');
                    if (a != std::string::npos) prefixes.push_back({n.substr(0, a), width});
                    else scopes.back().names[n] = new_vreg(width);
                }
            } else if (ws[0] == ".shared" || ws[0] == ".local") {
                std::string n; unsigned a; size_t size;
                variable(s.substr(6), n, a, size);
                size_t& total = ws[0] == ".shared" ? k->shared_bytes : k->local_bytes;
                total = (total + a - 1) / a * a;
                symbols[n] = {ws[0] == ".shared" ? SHARED : LOCAL, total};
                total += size;
            } else if (ws[0] != ".pragma") fail("directive " + ws[0]);
            return;
        }
        Ins ins{};
        ins.line = at_line;
        std::vector<u8> vr;
        if (s[0] == '@') {
            size_t sp = s.find(' ');
            std::string g = s.substr(1, sp - 1);
            if (g[0] == '!') ins.negated = true, g = g.substr(1);
            int v = vreg(g);
            if (v < 0 || widths[v]) fail("guard " + g);
            ins.pred = v;
            s = trim(s.substr(sp));
        }
        size_t sp = s.find(' ');
        std::string name = s.substr(0, sp), rest = sp == std::string::npos ? "" : s.substr(sp);
        auto ops = operands(rest);
        if (name == "mov.b32" || name == "mov.b64") {
            size_t brace = rest.find('{'), comma = rest.find(',');
            if (brace != std::string::npos) name += brace < comma ? ".unpack" : ".pack";
        }
        // Bytes and words in wider registers have handlers of their own.
        if (name.compare(0, 3, "ld.") == 0 || name.compare(0, 3, "st.") == 0) {
            int v = vreg(ops[name[0] == 's']);
            if (v >= 0) { std::string wide = name + "/" + std::to_string(widths[v]); if (find_op(wide)) name = wide; }
        }
        // FAKE_CUDA_DROP=kernel:line leaves out what stands there.
        static const char* drop = getenv("FAKE_CUDA_DROP");
        if (drop && k->name + ":" + std::to_string(at_line) == drop) return;
        const OpInfo* o = find_op(name);
        if (!o) fail("unknown instruction `" + name + "`");
        ins.fn = o->fn, ins.kind = o->kind, ins.nops = o->nops;
        if (o->kind == BRA) { jumps.push_back({k->code.size(), ops.at(0)}); ops.clear(); }
        if (ops.size() != o->nops) fail("`" + s + "` has " + std::to_string(ops.size()) + " operands");
        for (u32 i = 0; i < o->nops; i++) {
            std::string w = ops[i];
            bool address = w[0] == '[';
            if (address) {
                w = w.substr(1, w.size() - 2);
                size_t plus = w.find('+');
                s64 offset = 0;
                if (plus != std::string::npos) offset = strtoll(w.c_str() + plus + 1, nullptr, 0), w.resize(plus);
                if (name.compare(0, 8, "ld.param") == 0) {
                    auto it = k->param_offsets.find(w);
                    if (it == k->param_offsets.end()) fail("no parameter " + w);
                    ins.imm = it->second + offset, ins.op[i] = constant(8, 0), vr.push_back(0);
                    continue;
                }
                if ((int)i != o->address && !(o->kind == MEM && o->address < 0)) fail("unexpected address in `" + s + "`");
                int v = vreg(w);
                if (v >= 0) {
                    if (widths[v] != 8 && widths[v] != 4) fail("address register " + w);
                    if ((int)i == o->address || i == 0) ins.imm = offset, ins.wide_address = widths[v] == 8;
                    else if (offset || widths[v] != 8) fail("second address in `" + s + "`");
                    ins.op[i] = v, vr.push_back(1);
                    continue;
                }
                auto sym = symbol(w);
                ins.imm = offset, ins.op[i] = constant(8, sym.at), vr.push_back(0);
                continue;
            }
            if (w[0] == '!') fail("inverted operand");
            int v = vreg(w);
            if (v >= 0) { if (widths[v] != o->size[i]) fail("width of " + w + " in `" + s + "`"); ins.op[i] = v, vr.push_back(1); continue; }
            u64 value;
            if (!number(w, value)) value = symbol(w).at;
            if (i < o->defs) fail("constant destination in `" + s + "`");
            ins.op[i] = constant(o->size[i], value), vr.push_back(0);
        }
        k->code.push_back(ins), defs_of.push_back(o->defs), is_vreg.push_back(vr);
    }
    Symbol symbol(const std::string& w) {
        auto it = symbols.find(w);
        if (it != symbols.end()) return it->second;
        auto global = module_global.find(w);
        if (global != module_global.end()) return k->globals.push_back(global->second), symbols[w] = {GLOBAL, (u64)global->second->data()};
        auto m = module_shared.find(w);
        if (m == module_shared.end()) fail("unknown operand `" + w + "`");
        size_t at = (k->shared_bytes + m->second.first - 1) / m->second.first * m->second.first;
        k->shared_bytes = at + m->second.second;
        return symbols[w] = {SHARED, at};
    }

    // Registers whose lives, from the first to the last instruction that names them, do not overlap share a place.
    void allocate() {
        auto& code = k->code;
        u32 n = (u32)code.size(), nv = (u32)widths.size();
        std::vector<u32> first(nv, ~0u), last(nv, 0);
        // Passing from one stretch without branches to another, or from one round of a loop to the next.
        std::vector<char> is_passed_on(nv, 0), begins(n + 1, 0);
        for (u32 i = 0; i < n; i++) if (code[i].target >= 0) begins[code[i].target] = begins[i + 1] = 1;
        u32 stretch = 0;
        auto touch = [&](u32 v, u32 at, bool reads) {
            if (first[v] == ~0u) first[v] = at, is_passed_on[v] = reads;
            is_passed_on[v] |= last[v] < stretch && first[v] < stretch;
            last[v] = at;
        };
        for (u32 i = 0; i < n; i++) {
            if (begins[i]) stretch = i;
            if (code[i].pred >= 0) touch(code[i].pred, i, true);
            for (u32 o = code[i].nops; o-- > 0;) if (is_vreg[i][o]) touch(code[i].op[o], i, o >= defs_of[i] || code[i].pred >= 0);
        }
        // What is alive beside its own stretch in a loop lives as long as the loop.
        for (bool changed = true; changed;) {
            changed = false;
            for (u32 end = 0; end < n; end++) {
                if (code[end].target < 0 || (u32)code[end].target > end) continue;
                u32 begin = code[end].target;
                for (u32 v = 0; v < nv; v++) {
                    if (first[v] > end || last[v] < begin || (first[v] >= begin && !is_passed_on[v])) continue;
                    if (last[v] < end) last[v] = end, changed = true;
                    if (first[v] > begin) first[v] = begin, changed = true;
                }
            }
        }
        for (int i = 0; i < 13; i++) first[i] = 0, last[i] = n;
        std::vector<u32> order, place(nv, 0);
        for (u32 v = 0; v < nv; v++) if (first[v] != ~0u) order.push_back(v);
        std::sort(order.begin(), order.end(), [&](u32 a, u32 b) { return first[a] < first[b]; });
        std::map<unsigned, std::vector<u32>> free;
        auto by_end = [&](u32 a, u32 b) { return last[a] > last[b]; };
        std::vector<u32> heap;
        u32 bytes = 0;
        for (u32 v : order) {
            while (!heap.empty() && last[heap.front()] <= first[v] && (last[heap.front()] < first[v] || first[heap.front()] < first[v])) {
                u32 dead = heap.front();
                std::pop_heap(heap.begin(), heap.end(), by_end), heap.pop_back();
                free[widths[dead]].push_back(place[dead]);
            }
            auto& f = free[widths[v]];
            if (f.empty()) { if (widths[v]) bytes = (bytes + 63) / 64 * 64; place[v] = bytes, bytes += bytes_of(widths[v]); }
            else place[v] = f.back(), f.pop_back();
            heap.push_back(v), std::push_heap(heap.begin(), heap.end(), by_end);
        }
        for (size_t i = 0; i < n; i++) {
            if (code[i].pred >= 0) code[i].pred = (s32)place[code[i].pred];
            for (u32 q = 0; q < code[i].nops; q++) if (is_vreg[i][q]) code[i].op[q] = place[code[i].op[q]];
        }
        for (int i = 0; i < 13; i++) k->special[i] = place[i];
        k->reg_bytes = bytes;
    }
};

}  // namespace

struct Loaded { KernelMap kernels; int version; std::string target; };
static std::unordered_map<std::string, Loaded>& cache() { static auto& all = *new std::unordered_map<std::string, Loaded>; return all; }
std::string load_ptx(const char* text, KernelMap& kernels, int& version, std::string& target) {
    static auto& mu = *new std::mutex;
    std::string key = text;
    {
        std::lock_guard<std::mutex> l(mu);
        auto it = cache().find(key);
        if (it != cache().end()) return kernels = it->second.kernels, version = it->second.version, target = it->second.target, "";
    }
    Parser parser(text, kernels);
    try { parser.module(); } catch (const std::exception& e) { return e.what(); }
    version = parser.version, target = parser.target;
    if (!version || target.empty()) return "no version or target";
    std::lock_guard<std::mutex> l(mu);
    cache()[key] = {kernels, version, target};
    return "";
}
// Of each kernel that has run: how many lines it has, and those that have not.
void report_coverage(const char* path) {
    FILE* f = fopen(path, "a");
    if (!f) return;
    for (auto& [text, loaded] : cache())
        for (auto& [name, k] : loaded.kernels) {
            std::map<u32, bool> lines;
            bool any = false;
            for (size_t i = 0; i < k->hits.size(); i++) any |= k->hits[i], lines[k->code[i].line] |= k->hits[i];
            if (!any) continue;
            fprintf(f, "coverage %s %zu:", name.c_str(), lines.size());
            for (auto& [line, hit] : lines) if (!hit) fprintf(f, " %u", line);
            fprintf(f, "\n");
        }
    fclose(f);
}

}  // namespace fk
