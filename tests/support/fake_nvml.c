// A stand-in for NVIDIA's management library, beside that for the driver: two GPUs with the UUIDs of tests/fake_cuda.
// FAKE_NVML_PROCESSES is `pid:bytes,pid:bytes`, the processes of the first; FAKE_NVML_FREE what is free of each.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INSUFFICIENT_SIZE = 7, NOT_FOUND = 6 };
typedef struct { unsigned pid; unsigned long long used; unsigned gpu, compute; } Process;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;

int nvmlInit_v2(void) { return OK; }
int nvmlShutdown(void) { return OK; }
int nvmlSystemGetDriverVersion(char *text, unsigned len) {
    snprintf(text, len, "550.54.15");
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    const char *known = "GPU-fafafafa-fafa-fafa-fafa-fafafafafa0";
    if (strncmp(uuid, known, strlen(known))) return NOT_FOUND;
    *device = (void *)(size_t)(uuid[strlen(known)] - '0' + 1);
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, Memory *memory) {
    const char *free = getenv("FAKE_NVML_FREE");
    if (!free) return NOT_FOUND;
    memory->free = strtoull(free, NULL, 10);
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *processes) {
    const char *at = device == (void *)1 ? getenv("FAKE_NVML_PROCESSES") : NULL;
    unsigned found = 0, room = *count;
    for (; at && *at; at += strcspn(at, ","), at += *at == ',') {
        Process process = {0};
        sscanf(at, "%u:%llu", &process.pid, &process.used);
        if (found < room && processes) processes[found] = process;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, Process *processes) {
    *count = 0;
    return OK;
}
