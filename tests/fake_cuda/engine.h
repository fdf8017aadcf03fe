// What the driver needs of the engine that runs kernels, and a kernel as the interpreter wants it.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace fk {

struct uint3 { unsigned x, y, z; };
struct ParamInfo { unsigned size, align, offset; };

struct EngineConfig {
    unsigned threads = 1;      // OS threads that run blocks of one launch; with race or chaos there is one
    unsigned timeout_ms = 120000;
    bool race = false;         // the race detector
    bool chaos = false;        // warps and diverged lanes are interleaved at random
    unsigned resident = 0;     // blocks that are interleaved; 0: multiprocessors * 2 with chaos, else 1
    unsigned seed = 1;
    bool mma_truncates = false;  // sums of mma as tensor cores make them: aligned to the largest term, 25 bits kept, towards zero
    unsigned jitter = 0;       // ulps by which approximations are off, at random
    std::string coverage;      // a file to which it is appended what has run
    std::string log;           // where findings are appended, else stderr
};
extern EngineConfig& g_engine;

struct Kernel;
struct Range { uintptr_t base; size_t size; };
struct LaunchDesc {
    const Kernel* kernel;
    const char* params;        // laid out as ParamInfo says
    uint3 grid, block;
    std::vector<Range> memory; // what the kernel may access, by address
    bool early = false;        // with the attribute for programmatic launches
    uint32_t previous = 0;     // the launch before in the stream, if nothing stands between
    unsigned multiprocessors = 8;
};
struct RunResult {
    int code = 0;              // a CUresult
    std::string message;
    uintptr_t fault_addr = 0;  // meaningful when code is CUDA_ERROR_ILLEGAL_ADDRESS
    uint32_t launch = 0;       // its number
};
RunResult run_grid(const LaunchDesc& launch);
std::string new_findings();
// Writes what was found, and what has run.
void report_findings();
void report_coverage(const char* path);

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;

struct Warp;
struct Ins;
// Executes an instruction for the lanes in `mask`.
using Fn = void (*)(Warp& w, const Ins& i, u32 mask);

enum Kind : u8 { ALU, MEM, BRA, RET, BAR, WARPSYNC, SHFL, MMA, LDMATRIX, FENCE, NOP, GDC_WAIT, GDC_LAUNCH };
enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL };

constexpr unsigned kMaxOps = 14;
constexpr u32 kConst = 0x80000000u;  // an operand in the kernel's constants, not in the warp's registers
constexpr u64 kLocalWindow = 1ull << 60, kSharedWindow = 1ull << 61, kWindow = 1ull << 32;

struct Ins {
    Fn fn;
    Kind kind;
    bool negated = false, wide_address = true;
    u8 nops = 0;
    s32 pred = -1;      // offset of the guard, or -1
    s32 target = -1;
    u32 line = 0;
    s64 imm = 0;        // offset of an address; anything else
    u32 op[kMaxOps];    // offsets of 32 lanes each
};

struct Kernel {
    std::string name;
    std::vector<ParamInfo> params;
    std::map<std::string, u32> param_offsets;
    u32 param_bytes = 0;
    unsigned max_threads = 1024;
    size_t shared_bytes = 0, local_bytes = 0;
    std::vector<Ins> code;
    std::vector<char> constants;
    size_t reg_bytes = 0;
    mutable std::vector<u8> hits;  // which instructions have run, where that is asked for
    u32 special[16];    // offsets of tid, ntid, ctaid, nctaid (x, y, z each), laneid
    std::vector<std::shared_ptr<std::vector<char>>> globals;  // the module's variables that it names
};

using KernelMap = std::map<std::string, std::shared_ptr<Kernel>>;
// Parses and decodes; an empty string, or what is wrong.
std::string load_ptx(const char* text, KernelMap& kernels, int& version, std::string& target);

struct OpInfo {
    const char* name;
    Fn fn;
    Kind kind;
    u8 nops;            // operands, vectors flattened
    u8 size[kMaxOps];   // of each, in bytes; 0: a predicate
    u8 defs;            // the first of them are written
    s8 address = -1;    // which one is an address in brackets
};
const OpInfo* find_op(const std::string& name);

}  // namespace fk
