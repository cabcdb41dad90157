// A library to LD_PRELOAD: lets the n-th call that changes a directory tree kill, fail or fall short, or logs them all.
//
// Calls count where their path, or the path of their descriptor, lies under the root. fault_arm() (or the variables
// FAULT_ROOT, FAULT_POINT, FAULT_MODE at start) says which and how; fault_log() sends a record of every call that
// succeeded to a descriptor, in the one order in which all processes with that descriptor did them.
//
// cc -O2 -shared -fPIC -o shim.so shim.c -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NEVER, BEFORE, AFTER, HALF, FAIL_EIO, FAIL_ENOSPC, SHORT, FULL, GONE };
// BEFORE, AFTER: SIGKILL there. HALF: half of a write, then SIGKILL. SHORT: half of a write, said truly; EINTR where
// a call may be interrupted. FULL: from the n-th call on nothing that takes space works. GONE: nothing at all works.

enum { OPEN = 'o', WRITE = 'w', SYNC = 's', RENAME = 'r', EXCHANGE = 'x', LINK = 'l', UNLINK = 'u', MKDIR = 'm',
       RMDIR = 'd', SIZE = 't', SYMLINK = 'y', NOTE = 'n' };

static char root[PATH_MAX];
static size_t root_length;
static long point, counted;
static int mode, log_fd = -1;
static char kinds[1 << 16];  // of each call counted; a capital where its path has `apart` in it
static const char* const apart = "/.fastckpt-meeting";
static pthread_mutex_t logging = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

#define REAL(name) ((__typeof__(&name))real(#name))
static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

void fault_arm(const char* directory, long nth, int how) {
    if (realpath(directory, root) == NULL) strncpy(root, directory, sizeof root - 1);
    root_length = strlen(root);
    point = nth;
    mode = how;
    __atomic_store_n(&counted, 0, __ATOMIC_SEQ_CST);
}

// Append to this file from now on; each process opens it for itself, so that its lock is one a process.
int fault_log(const char* path) {
    inside = 1;
    log_fd = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    inside = 0;
    return log_fd < 0 ? -1 : 0;
}

// How many calls were counted; `out` gets the kind of each.
long fault_kinds(char* out, long room) {
    long n = __atomic_load_n(&counted, __ATOMIC_SEQ_CST);
    memcpy(out, kinds + 1, n < room ? n : room);
    return n;
}

__attribute__((constructor)) static void from_environment(void) {
    const char *directory = getenv("FAULT_ROOT"), *nth = getenv("FAULT_POINT"), *how = getenv("FAULT_MODE");
    if (directory && nth && how) fault_arm(directory, atol(nth), atoi(how));
}

// The absolute path of what a call names, or "" where it is not under the root.
static const char* place(char* out, int directory, const char* path) {
    char link[64];
    out[0] = 0;
    if (root_length == 0 || inside) return out;
    if (path != NULL && path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else if (path == NULL || directory != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t n = readlink(link, out, PATH_MAX - 1);
        out[n > 0 ? n : 0] = 0;
        if (n > 0 && path != NULL) snprintf(out + n, PATH_MAX - n, "/%s", path);
    }
    if (strncmp(out, root, root_length) != 0 || (out[root_length] != '/' && out[root_length] != 0)) out[0] = 0;
    return out;
}

// Count a call. 0: do it. Otherwise the errno to fail with; -1: half of it, -2: half of it and die, -3: die after it.
static int fate(char kind, const char* at) {
    long n = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (n < (long)sizeof kinds) kinds[n] = strstr(at, apart) ? kind - 'a' + 'A' : kind;
    if (mode == FULL && point && n >= point) return strchr("owtmyl", kind) ? ENOSPC : 0;
    if (mode == GONE && point && n >= point) return EIO;
    if (n != point) return 0;
    switch (mode) {
        case HALF:
            if (kind == WRITE) return -2;
            __attribute__((fallthrough));
        case BEFORE: kill(getpid(), SIGKILL); pause(); return 0;
        case AFTER: return -3;
        case FAIL_EIO: return EIO;
        case FAIL_ENOSPC: return ENOSPC;
        case SHORT: return kind == WRITE ? -1 : strchr("ost", kind) ? EINTR : 0;
    }
    return 0;
}

static void end(int what) {
    if (what == -3 || what == -2) { kill(getpid(), SIGKILL); pause(); }
}

// One order for all processes, so that the log is the order of the calls: the log's descriptor is locked around each.
static int begin_logged(void) {
    if (log_fd < 0) return 0;
    pthread_mutex_lock(&logging);
    while (flock(log_fd, LOCK_EX) != 0 && errno == EINTR) {}
    return 1;
}

static void end_logged(int logged, char what, const char* a, const char* b, int64_t number, const void* data,
                       size_t n) {
    if (!logged) return;
    int kept = errno;
    inside = 1;
    if (what) {
        uint32_t sizes[3] = {(uint32_t)strlen(a), (uint32_t)strlen(b), (uint32_t)n};
        struct iovec parts[6] = {{&what, 1}, {sizes, sizeof sizes}, {&number, sizeof number},
                                 {(void*)a, sizes[0]}, {(void*)b, sizes[1]}, {(void*)data, n}};
        if (REAL(writev)(log_fd, parts, 6) < 0) abort();
    }
    inside = 0;
    flock(log_fd, LOCK_UN);
    pthread_mutex_unlock(&logging);
    errno = kept;
}

// A word of the program's own, between the calls before and after it.
void fault_note(const char* word) {
    int logged = begin_logged();
    end_logged(logged, NOTE, word, "", 0, "", 0);
}

// ---- the calls ----

#define FAIL(what) do { if ((what) > 0) { errno = (what); return -1; } } while (0)

static int opened(int directory, const char* path, int flags, mode_t bits, int (*call)(int, const char*, int, mode_t)) {
    char at[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !*place(at, directory, path)) return call(directory, path, flags, bits);
    int what = fate(OPEN, at);
    FAIL(what);
    int logged = begin_logged();
    int fd = call(directory, path, flags, bits);
    end_logged(logged, fd >= 0 ? OPEN : 0, at, "", flags & O_TRUNC ? 1 : 0, "", 0);
    end(what);
    return fd;
}

static int call_openat(int directory, const char* path, int flags, mode_t bits) {
    return REAL(openat)(directory, path, flags, bits);
}

#define OPENS(name, first, pass)                                        \
    int name(first const char* path, int flags, ...) {                  \
        mode_t bits = 0;                                                \
        if (flags & (O_CREAT | O_TMPFILE)) {                            \
            va_list rest;                                               \
            va_start(rest, flags);                                      \
            bits = va_arg(rest, mode_t);                                \
            va_end(rest);                                               \
        }                                                               \
        return opened(pass, path, flags, bits, call_openat);            \
    }
#define NONE
#define DIRECTORY int directory,
OPENS(open, NONE, AT_FDCWD)
OPENS(open64, NONE, AT_FDCWD)
OPENS(openat, DIRECTORY, directory)
OPENS(openat64, DIRECTORY, directory)

static ssize_t call_write(int fd, const void* data, size_t n, off64_t offset) {
    return offset < 0 ? REAL(write)(fd, data, n) : REAL(pwrite64)(fd, data, n, offset);
}

static ssize_t wrote(int fd, const void* data, size_t n, off64_t offset) {
    char at[PATH_MAX];
    if (n == 0 || !*place(at, fd, NULL)) return call_write(fd, data, n, offset);
    int what = fate(WRITE, at);
    FAIL(what);
    size_t size = what == -1 || what == -2 ? (n + 1) / 2 : n;
    if (what == -2 && n == 1) size = 0;
    int logged = begin_logged();
    off64_t where = offset < 0 ? lseek64(fd, 0, SEEK_CUR) : offset;
    ssize_t done = call_write(fd, data, size, offset);
    end_logged(logged, done > 0 ? WRITE : 0, at, "", where, data, done > 0 ? done : 0);
    end(what);
    return done;
}

ssize_t write(int fd, const void* data, size_t n) { return wrote(fd, data, n, -1); }
ssize_t pwrite(int fd, const void* data, size_t n, off_t offset) { return wrote(fd, data, n, offset); }
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t offset) { return wrote(fd, data, n, offset); }

ssize_t writev(int fd, const struct iovec* parts, int count) {
    char at[PATH_MAX];
    if (count == 0 || !*place(at, fd, NULL)) return REAL(writev)(fd, parts, count);
    return wrote(fd, parts[0].iov_base, parts[0].iov_len, -1);  // a short write is allowed
}

// A call of no data, with one or two paths.
#define PLAIN(kind, a, b, number, call)                                      \
    do {                                                                     \
        int what = fate(kind, a);                                               \
        FAIL(what);                                                          \
        int logged = begin_logged();                                         \
        int result = call;                                                   \
        end_logged(logged, result == 0 ? (kind) : 0, a, b, number, "", 0);   \
        end(what);                                                           \
        return result;                                                       \
    } while (0)

int fsync(int fd) {
    char at[PATH_MAX];
    if (!*place(at, fd, NULL)) return REAL(fsync)(fd);
    PLAIN(SYNC, at, "", 0, log_fd < 0 ? REAL(fsync)(fd) : 0);
}

int fdatasync(int fd) {
    char at[PATH_MAX];
    if (!*place(at, fd, NULL)) return REAL(fdatasync)(fd);
    PLAIN(SYNC, at, "", 0, log_fd < 0 ? REAL(fdatasync)(fd) : 0);
}

static int resized(int fd, off64_t n) {
    char at[PATH_MAX];
    if (!*place(at, fd, NULL)) return REAL(ftruncate64)(fd, n);
    PLAIN(SIZE, at, "", n, REAL(ftruncate64)(fd, n));
}

int ftruncate(int fd, off_t n) { return resized(fd, n); }
int ftruncate64(int fd, off64_t n) { return resized(fd, n); }

static int allocated(int fd, int how, off64_t offset, off64_t n) {
    char at[PATH_MAX];
    if (!*place(at, fd, NULL)) return REAL(fallocate64)(fd, how, offset, n);
    PLAIN(SIZE, at, "", offset + n, REAL(fallocate64)(fd, how, offset, n));
}

int fallocate(int fd, int how, off_t offset, off_t n) { return allocated(fd, how, offset, n); }
int fallocate64(int fd, int how, off64_t offset, off64_t n) { return allocated(fd, how, offset, n); }

static int moved(int from, const char* old, int to, const char* new, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    if (!*place(a, from, old) || !*place(b, to, new)) return REAL(renameat2)(from, old, to, new, flags);
    PLAIN(flags & RENAME_EXCHANGE ? EXCHANGE : RENAME, a, b, 0, REAL(renameat2)(from, old, to, new, flags));
}

int rename(const char* old, const char* new) { return moved(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char* old, int to, const char* new) { return moved(from, old, to, new, 0); }
int renameat2(int from, const char* old, int to, const char* new, unsigned flags) {
    return moved(from, old, to, new, flags);
}

static int removed(int directory, const char* path, int flags) {
    char at[PATH_MAX];
    if (!*place(at, directory, path)) return REAL(unlinkat)(directory, path, flags);
    PLAIN(flags & AT_REMOVEDIR ? RMDIR : UNLINK, at, "", 0, REAL(unlinkat)(directory, path, flags));
}

int unlink(const char* path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int directory, const char* path, int flags) { return removed(directory, path, flags); }
int rmdir(const char* path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

static int made(int directory, const char* path, mode_t bits) {
    char at[PATH_MAX];
    if (!*place(at, directory, path)) return REAL(mkdirat)(directory, path, bits);
    PLAIN(MKDIR, at, "", 0, REAL(mkdirat)(directory, path, bits));
}

int mkdir(const char* path, mode_t bits) { return made(AT_FDCWD, path, bits); }
int mkdirat(int directory, const char* path, mode_t bits) { return made(directory, path, bits); }

int symlinkat(const char* target, int directory, const char* path) {
    char at[PATH_MAX];
    if (!*place(at, directory, path)) return REAL(symlinkat)(target, directory, path);
    PLAIN(SYMLINK, at, target, 0, REAL(symlinkat)(target, directory, path));
}

int symlink(const char* target, const char* path) { return symlinkat(target, AT_FDCWD, path); }

int linkat(int from, const char* old, int to, const char* new, int flags) {
    char a[PATH_MAX], b[PATH_MAX];
    if (!*place(a, from, old) || !*place(b, to, new)) return REAL(linkat)(from, old, to, new, flags);
    PLAIN(LINK, a, b, 0, REAL(linkat)(from, old, to, new, flags));
}

int link(const char* old, const char* new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
