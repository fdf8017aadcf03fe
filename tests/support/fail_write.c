// Preloaded into a process: its Nth write, sync or rename of a file fails as on a full disk.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/types.h>

static atomic_long calls;

static int fails(int fd) {
    const char *at = getenv("FAIL_WRITE_AT");
    if (fd <= 2 || !at || atomic_fetch_add(&calls, 1) + 1 != atol(at)) return 0;
    errno = ENOSPC;
    return 1;
}

#define REAL(name, type, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *bytes, size_t count) {
    return fails(fd) ? -1 : REAL(write, ssize_t, int, const void *, size_t)(fd, bytes, count);
}
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    return fails(fd) ? -1 : REAL(pwrite64, ssize_t, int, const void *, size_t, off64_t)(fd, bytes, count, at);
}
int fsync(int fd) { return fails(fd) ? -1 : REAL(fsync, int, int)(fd); }
int rename(const char *from, const char *to) {
    return fails(3) ? -1 : REAL(rename, int, const char *, const char *)(from, to);
}
