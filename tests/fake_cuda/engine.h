// What the driver needs from the engine that runs kernels.
#pragma once
#include <string>
#include <vector>

#include "cuda_host.h"

namespace fk {

struct EngineConfig {
    unsigned threads = 2;      // OS threads that run blocks of one launch (caller included)
    bool reverse = false;      // start threads and blocks in descending order (finds missing barriers)
    unsigned timeout_ms = 60000;
};
extern EngineConfig g_engine;

struct LaunchDesc {
    const Kernel* kernel;
    void* const* args;
    uint3 grid, block;
};
struct RunResult {
    int code = 0;              // a CUresult
    std::string message;
    uintptr_t fault_addr = 0;  // meaningful when code is CUDA_ERROR_ILLEGAL_ADDRESS
};

const Kernel* find_kernel(const std::string& name);

// Runs the whole grid and returns. Installs the fault handlers on first use.
RunResult run_grid(const LaunchDesc& launch);

}  // namespace fk
