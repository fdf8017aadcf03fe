// What the driver needs from the engine that runs kernels: PTX is parsed, decoded and interpreted.
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

struct Kernel;  // see ptx.h
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

}  // namespace fk
