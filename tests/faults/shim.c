/* File operations that fail on request: loaded in front of libc, it counts every operation that changes something below
 * one directory, and lets the Nth one kill the process or fail. Whatever library makes the call, Python's or one in
 * Rust, passes through here.
 *
 * fault_arm(under, kind, at): count from 0 below `under`; kind: an errno, 0 to count only, -1 for SIGKILL in front of
 * the operation, -2 for a write of half its bytes. fault_count(): operations so far. fault_stay(): the fault does not
 * pass, as on a full disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[PATH_MAX];
static size_t under_length;
static int kind, at, stays;
static int seen;

void fault_arm(const char *directory, int what, int operation, int stay) {
    strncpy(under, directory, sizeof under - 1);
    under_length = strlen(under);
    kind = what; at = operation; stays = stay; seen = 0;
}
int fault_count(void) { return seen; }

static int ours(int folder, const char *path) {
    char whole[PATH_MAX], link[64];
    if (!under_length || !path) return 0;
    if (path[0] == '/') return strncmp(path, under, under_length) == 0;
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, sizeof whole)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, whole, sizeof whole - 1);
        if (n < 0) return 0;
        whole[n] = 0;
    }
    size_t n = strlen(whole);
    snprintf(whole + n, sizeof whole - n, "/%s", path);
    return strncmp(whole, under, under_length) == 0;
}
static int our_handle(int handle) {
    char link[64], whole[PATH_MAX];
    if (!under_length || handle < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t n = readlink(link, whole, sizeof whole - 1);
    if (n < 0) return 0;
    whole[n] = 0;
    return strncmp(whole, under, under_length) == 0;
}
/* 0: go on; otherwise the errno to fail with, or -2 for half a write. A full disk lets go of files all the same, and
 * only a rename can cross file systems. */
enum { OTHER, RENAME, WRITE, REMOVE };
static int due(int operation) {
    int now = ++seen;
    if (!kind || !(now == at || (stays && now > at))) return 0;
    if (kind == -1) raise(SIGKILL);
    if (kind == -2) return operation == WRITE ? -2 : 0;
    if (kind == EXDEV && operation != RENAME) return 0;
    if (kind == ENOSPC && (operation == REMOVE || operation == RENAME)) return 0;
    return kind;
}
#define REAL(name, type) static type real; if (!real) real = (type)dlsym(RTLD_NEXT, name)
#define FAIL(operation) do { int e = due(operation); if (e > 0) { errno = e; return -1; } } while (0)
#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

typedef int (*open_t)(const char *, int, ...);
typedef int (*openat_t)(int, const char *, int, ...);
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(#name, open_t); va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    if ((flags & CHANGES) && ours(AT_FDCWD, path)) FAIL(OTHER); return real(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(#name, openat_t); va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    if ((flags & CHANGES) && ours(folder, path)) FAIL(OTHER); return real(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

typedef ssize_t (*write_t)(int, const void *, size_t);
ssize_t write(int handle, const void *bytes, size_t count) {
    REAL("write", write_t);
    if (our_handle(handle)) {
        int e = due(WRITE);
        if (e > 0) { errno = e; return -1; }
        if (e == -2 && count > 1) count /= 2;
    }
    return real(handle, bytes, count);
}
typedef ssize_t (*pwrite_t)(int, const void *, size_t, off_t);
#define PWRITE(name) ssize_t name(int handle, const void *bytes, size_t count, off_t place) { \
    REAL(#name, pwrite_t); \
    if (our_handle(handle)) { int e = due(WRITE); if (e > 0) { errno = e; return -1; } if (e == -2 && count > 1) count /= 2; } \
    return real(handle, bytes, count, place); }
PWRITE(pwrite) PWRITE(pwrite64)
typedef ssize_t (*writev_t)(int, const struct iovec *, int);
ssize_t writev(int handle, const struct iovec *parts, int count) {
    REAL("writev", writev_t); if (our_handle(handle)) FAIL(OTHER); return real(handle, parts, count);
}
#define HANDLE(name) int name(int handle) { typedef int (*f)(int); REAL(#name, f); if (our_handle(handle)) FAIL(OTHER); return real(handle); }
HANDLE(fsync) HANDLE(fdatasync)
#define CUT(name) int name(int handle, off_t size) { typedef int (*f)(int, off_t); REAL(#name, f); if (our_handle(handle)) FAIL(OTHER); return real(handle, size); }
CUT(ftruncate) CUT(ftruncate64)
int rename(const char *old, const char *new) {
    typedef int (*f)(const char *, const char *); REAL("rename", f);
    if (ours(AT_FDCWD, new)) FAIL(RENAME);
    return real(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    typedef int (*f)(int, const char *, int, const char *); REAL("renameat", f);
    if (ours(to, new)) FAIL(RENAME);
    return real(from, old, to, new);
}
int mkdir(const char *path, mode_t mode) {
    typedef int (*f)(const char *, mode_t); REAL("mkdir", f); if (ours(AT_FDCWD, path)) FAIL(OTHER); return real(path, mode);
}
int chmod(const char *path, mode_t mode) {
    typedef int (*f)(const char *, mode_t); REAL("chmod", f); if (ours(AT_FDCWD, path)) FAIL(OTHER); return real(path, mode);
}
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    typedef int (*f)(int, const char *, mode_t, int); REAL("fchmodat", f);
    if (ours(folder, path)) FAIL(OTHER);
    return real(folder, path, mode, flags);
}
int unlink(const char *path) {
    typedef int (*f)(const char *); REAL("unlink", f); if (ours(AT_FDCWD, path)) FAIL(REMOVE); return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    typedef int (*f)(int, const char *, int); REAL("unlinkat", f); if (ours(folder, path)) FAIL(REMOVE); return real(folder, path, flags);
}
int rmdir(const char *path) {
    typedef int (*f)(const char *); REAL("rmdir", f); if (ours(AT_FDCWD, path)) FAIL(REMOVE); return real(path);
}
