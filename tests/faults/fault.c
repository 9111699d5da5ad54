/* A disk that fails: preloaded into the binary, it lets the FAULT_AT-th change below FAULT_BELOW fail with the
 * error FAULT_ERRNO, and with FAULT_ON=1 every later one too. With FAULT_COUNT=FILE it writes there at the
 * end how many changes there were. Reads never fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long changes;

static int fails(const char *path) {
    const char *below = getenv("FAULT_BELOW"), *at = getenv("FAULT_AT");
    if (!below || !strstr(path, below)) return 0;
    long now = atomic_fetch_add(&changes, 1) + 1;
    if (!at || atol(at) == 0) return 0;
    int hit = getenv("FAULT_ON") ? now >= atol(at) : now == atol(at);
    if (hit) errno = atoi(getenv("FAULT_ERRNO"));
    return hit;
}

static int file_fails(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *bytes, size_t count) {
    return file_fails(file) ? -1 : NEXT(write)(file, bytes, count);
}
ssize_t pwrite(int file, const void *bytes, size_t count, off_t offset) {
    return file_fails(file) ? -1 : NEXT(pwrite)(file, bytes, count, offset);
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t offset) {
    return file_fails(file) ? -1 : NEXT(pwrite64)(file, bytes, count, offset);
}
ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t count, unsigned flags) {
    return file_fails(to) ? -1 : NEXT(copy_file_range)(from, in, to, out, count, flags);
}
int fsync(int file) { return file_fails(file) ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return file_fails(file) ? -1 : NEXT(fdatasync)(file); }
int ftruncate64(int file, off64_t size) { return file_fails(file) ? -1 : NEXT(ftruncate64)(file, size); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : NEXT(mkdir)(path, mode); }
int link(const char *from, const char *to) { return fails(to) ? -1 : NEXT(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return fails(to) ? -1 : NEXT(linkat)(a, from, b, to, flags);
}
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return (flags & O_CREAT) && fails(path) ? -1 : NEXT(open64)(path, flags, mode);
}

__attribute__((destructor)) static void count(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld\n", (long)changes);
    fclose(file);
}
