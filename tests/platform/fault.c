/* Fails, or kills the process at, the nth call of one kind that touches a path below a folder; loaded by LD_PRELOAD.
   cc -shared -fPIC -o fault.so fault.c -ldl   See test_syscalls.py, which sets it by fault_set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char call[32], under[4096];
static long nth, seen;
static int how; /* an errno, or 0 to kill */

void fault_set(const char *of, const char *below, long n, int error) {
    strncpy(call, of, sizeof call - 1);
    strncpy(under, below, sizeof under - 1);
    nth = n, seen = 0, how = error;
}

long fault_seen(void) { return seen; }

static int strikes(const char *name, const char *path) {
    if (strcmp(call, name) || !path || !strstr(path, under) || ++seen != nth) return 0;
    if (!how) kill(getpid(), SIGKILL);
    errno = how;
    return 1;
}

static int strikes_at(const char *name, int file) {
    char link[64], path[4096];
    if (strcmp(call, name)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return strikes(name, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t n) { return strikes_at("write", file) ? -1 : REAL(write)(file, data, n); }
ssize_t pwrite(int file, const void *data, size_t n, off_t at) {
    return strikes_at("write", file) ? -1 : REAL(pwrite)(file, data, n, at);
}
ssize_t pwrite64(int file, const void *data, size_t n, off64_t at) {
    return strikes_at("write", file) ? -1 : REAL(pwrite64)(file, data, n, at);
}
int fsync(int file) { return strikes_at("fsync", file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return strikes_at("fsync", file) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) { return strikes("rename", to) ? -1 : REAL(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned int flags) {
    return strikes("rename", to) ? -1 : REAL(renameat2)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { return strikes("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return strikes("unlink", path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { return strikes("unlink", path) ? -1 : REAL(unlinkat)(at, path, flags); }
int open64(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & O_CREAT) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
    if (flags & (O_WRONLY | O_RDWR) && strikes("open", path)) return -1;
    return REAL(open64)(path, flags, mode);
}
