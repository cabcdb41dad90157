/* Preloaded: one call of the C library on a file below FAULT_ROOT fails, the one that `fault_arm` names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1, TRUNCATE = -2 }; /* else an errno */

static const char *armed = "";
static int action;
static atomic_int left;

/* The `point`-th call named `name` from now on fails with `what`; name: a literal that stays. */
void fault_arm(const char *name, int point, int what) {
    armed = name;
    action = what;
    left = point;
}

/* Whether it has come to that call. */
int fault_hit(void) { return left <= 0; }

static int fails(const char *name, const char *path) {
    const char *root = getenv("FAULT_ROOT");
    return root && !strcmp(name, armed) && !strncmp(path, root, strlen(root)) && atomic_fetch_sub(&left, 1) == 1;
}

static int fd_fails(const char *name, int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && fails(name, path);
}

static void halve(int fd) {
    char path[64];
    struct stat s;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &s) || truncate(path, s.st_size / 2)) abort();
}

/* The mappings of files below the root, for what is called with an address. */
static atomic_uintptr_t begins[64], ends[64];

static int mapped(void *at) {
    for (int i = 0; i < 64; ++i)
        if ((uintptr_t)at >= begins[i] && (uintptr_t)at < ends[i]) return 1;
    return 0;
}

void *mmap64(void *hint, size_t size, int protection, int flags, int fd, off64_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "mmap64");
    const int failing = fd >= 0 && fd_fails("mmap", fd);
    if (failing && action > 0) return errno = action, MAP_FAILED;
    void *at = real(hint, size, protection, flags, fd, offset);
    if (fd >= 0 && at != MAP_FAILED)
        for (int i = 0; i < 64; ++i) {
            uintptr_t none = 0;
            if (!atomic_compare_exchange_strong(&begins[i], &none, (uintptr_t)at)) continue;
            ends[i] = (uintptr_t)at + size;
            break;
        }
    if (failing) halve(fd);
    return at;
}

void *mmap(void *hint, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap64(hint, size, protection, flags, fd, offset);
}

int munmap(void *at, size_t size) {
    static int (*real)(void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "munmap");
    if (mapped(at) && fails("munmap", getenv("FAULT_ROOT"))) return errno = action, -1;
    for (int i = 0; i < 64; ++i)
        if (begins[i] == (uintptr_t)at) {
            ends[i] = 0;
            begins[i] = 0;
        }
    return real(at, size);
}

int madvise(void *at, size_t size, int advice) {
    static int (*real)(void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "madvise");
    if (mapped(at) && fails("madvise", getenv("FAULT_ROOT"))) return errno = action, -1;
    return real(at, size, advice);
}

int open64(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "open64");
    va_list more;
    va_start(more, flags);
    const int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0;
    va_end(more);
    if ((flags & O_ACCMODE) == O_RDONLY && fails("open", path)) return errno = action, -1;
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "preadv64v2");
    struct iovec one = parts[0];
    if (!fd_fails("preadv", fd)) return real(fd, parts, count, offset, flags);
    if (action > 0) return errno = action, -1;
    if (action == TRUNCATE) return halve(fd), real(fd, parts, count, offset, flags);
    one.iov_len = 1;
    return real(fd, &one, 1, offset, flags);
}
