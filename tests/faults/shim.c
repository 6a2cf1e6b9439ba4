/* File operations that fail on request: loaded in front of libc, it counts every operation that changes something below
 * one directory, and lets the Nth one kill the process or fail. Whatever library makes the call, Python's or one in
 * Rust, passes through here.
 *
 * fault_arm(under, kind, at, stay): count from 0 below `under`; kind: an errno, 0 to count only, -1 for SIGKILL in front
 * of the operation, -2 for a write of half its bytes; stay: the fault does not pass, as on a full disk. fault_letters():
 * what the operations so far were, a letter each (the enum below). Which fault is tried at which letter, proof.py says;
 * here a fault that an operation cannot meet passes it by.
 *
 * Not seen: what libc itself writes for fopen, what is written through mmap, and close, which reports nothing that fsync
 * has not. */
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
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[PATH_MAX];
static size_t under_length;
static int kind, at, stays;
enum { CREATE = 'c', OPEN = 'o', WRITE = 'w', SYNC = 's', RENAME = 'r', REMOVE = 'u', MAKE = 'm', GROW = 'g', CUT = 't', MODE = 'p' };
static char letters[1 << 16];
static int seen;

void fault_arm(const char *directory, int what, int operation, int stay) {
    strncpy(under, directory, sizeof under - 1);
    under_length = strlen(under);
    kind = what; at = operation; stays = stay; seen = 0;
    memset(letters, 0, sizeof letters);
}
const char *fault_letters(void) { return letters; }

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
 * only a rename or a link can cross file systems. */
static int due(int operation) {
    int now = __sync_add_and_fetch(&seen, 1);
    if (now < (int)sizeof letters) letters[now - 1] = operation;
    if (!kind || !(now == at || (stays && now > at))) return 0;
    if (kind == -1) raise(SIGKILL);
    if (kind == -2) return operation == WRITE ? -2 : 0;
    if (kind == EXDEV && operation != RENAME) return 0;
    if (kind == ENOSPC && !strchr("cwsmg", operation)) return 0;
    return kind;
}
#define REAL(name, type) static type real; if (!real) real = (type)dlsym(RTLD_NEXT, name)
#define FAIL(operation) do { int e = due(operation); if (e > 0) { errno = e; return -1; } } while (0)
#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
static int opened(int folder, const char *path, int flags) {
    return (flags & O_CREAT) && faccessat(folder, path, F_OK, 0) ? CREATE : OPEN;
}

typedef int (*open_t)(const char *, int, ...);
typedef int (*openat_t)(int, const char *, int, ...);
#define OPEN_AS(name) int name(const char *path, int flags, ...) { \
    REAL(#name, open_t); va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    if ((flags & CHANGES) && ours(AT_FDCWD, path)) FAIL(opened(AT_FDCWD, path, flags)); return real(path, flags, mode); }
#define OPENAT_AS(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(#name, openat_t); va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    if ((flags & CHANGES) && ours(folder, path)) FAIL(opened(folder, path, flags)); return real(folder, path, flags, mode); }
OPEN_AS(open) OPEN_AS(open64) OPENAT_AS(openat) OPENAT_AS(openat64)
#define CREAT_AS(name) int name(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
CREAT_AS(creat) CREAT_AS(creat64)

/* A write of `handle` that may fail or be cut to half of its `count`. */
#define HALF(handle, count) do { if (our_handle(handle)) { \
    int e = due(WRITE); \
    if (e > 0) { errno = e; return -1; } \
    if (e == -2 && count > 1) count /= 2; } } while (0)
ssize_t write(int handle, const void *bytes, size_t count) {
    typedef ssize_t (*f)(int, const void *, size_t); REAL("write", f);
    HALF(handle, count); return real(handle, bytes, count);
}
#define PWRITE(name) ssize_t name(int handle, const void *bytes, size_t count, off_t place) { \
    typedef ssize_t (*f)(int, const void *, size_t, off_t); REAL(#name, f); \
    HALF(handle, count); return real(handle, bytes, count, place); }
PWRITE(pwrite) PWRITE(pwrite64)
ssize_t writev(int handle, const struct iovec *parts, int count) {
    typedef ssize_t (*f)(int, const struct iovec *, int); REAL("writev", f);
    HALF(handle, count); return real(handle, parts, count);
}
#define PWRITEV(name) ssize_t name(int handle, const struct iovec *parts, int count, off_t place) { \
    typedef ssize_t (*f)(int, const struct iovec *, int, off_t); REAL(#name, f); \
    HALF(handle, count); return real(handle, parts, count, place); }
PWRITEV(pwritev) PWRITEV(pwritev64)
#define SENDFILE(name) ssize_t name(int to, int from, off_t *place, size_t count) { \
    typedef ssize_t (*f)(int, int, off_t *, size_t); REAL(#name, f); \
    HALF(to, count); return real(to, from, place, count); }
SENDFILE(sendfile) SENDFILE(sendfile64)
ssize_t copy_file_range(int from, off_t *start, int to, off_t *place, size_t count, unsigned flags) {
    typedef ssize_t (*f)(int, off_t *, int, off_t *, size_t, unsigned); REAL("copy_file_range", f);
    HALF(to, count); return real(from, start, to, place, count, flags);
}

#define SYNC_AS(name) int name(int handle) { typedef int (*f)(int); REAL(#name, f); if (our_handle(handle)) FAIL(SYNC); return real(handle); }
SYNC_AS(fsync) SYNC_AS(fdatasync)
#define CUT_AS(name) int name(int handle, off_t size) { typedef int (*f)(int, off_t); REAL(#name, f); \
    struct stat now; if (our_handle(handle)) FAIL(!fstat(handle, &now) && size > now.st_size ? GROW : CUT); return real(handle, size); }
CUT_AS(ftruncate) CUT_AS(ftruncate64)
#define CUT_PATH(name) int name(const char *path, off_t size) { typedef int (*f)(const char *, off_t); REAL(#name, f); \
    struct stat now; if (ours(AT_FDCWD, path)) FAIL(!stat(path, &now) && size > now.st_size ? GROW : CUT); return real(path, size); }
CUT_PATH(truncate) CUT_PATH(truncate64)
#define ALLOCATE(name) int name(int handle, off_t from, off_t size) { typedef int (*f)(int, off_t, off_t); REAL(#name, f); \
    if (our_handle(handle)) { int e = due(GROW); if (e > 0) return e; } return real(handle, from, size); }
ALLOCATE(posix_fallocate) ALLOCATE(posix_fallocate64)
#define FALLOCATE(name) int name(int handle, int mode, off_t from, off_t size) { typedef int (*f)(int, int, off_t, off_t); REAL(#name, f); \
    if (our_handle(handle)) FAIL(GROW); return real(handle, mode, from, size); }
FALLOCATE(fallocate) FALLOCATE(fallocate64)

/* What changes names: NAME where one path says whether it is ours, TWO where it is the path that is made. */
#define NAME(name, letter, rest, values) int name(const char *path rest) { typedef int (*f)(const char *path rest); \
    REAL(#name, f); if (ours(AT_FDCWD, path)) FAIL(letter); return real(path values); }
#define NAMEAT(name, letter, rest, values) int name(int folder, const char *path rest) { typedef int (*f)(int folder, const char *path rest); \
    REAL(#name, f); if (ours(folder, path)) FAIL(letter); return real(folder, path values); }
#define _ ,
NAME(mkdir, MAKE, _ mode_t mode, _ mode) NAMEAT(mkdirat, MAKE, _ mode_t mode, _ mode)
NAME(chmod, MODE, _ mode_t mode, _ mode) NAMEAT(fchmodat, MODE, _ mode_t mode _ int flags, _ mode _ flags)
NAMEAT(utimensat, MODE, _ const struct timespec times[2] _ int flags, _ times _ flags)
NAME(unlink, REMOVE, , ) NAME(rmdir, REMOVE, , ) NAMEAT(unlinkat, REMOVE, _ int flags, _ flags)
#undef _
int fchmod(int handle, mode_t mode) {
    typedef int (*f)(int, mode_t); REAL("fchmod", f); if (our_handle(handle)) FAIL(MODE); return real(handle, mode);
}
#define TWO(name, letter) int name(const char *old, const char *new) { typedef int (*f)(const char *, const char *); \
    REAL(#name, f); if (ours(AT_FDCWD, new)) FAIL(letter); return real(old, new); }
TWO(rename, RENAME) TWO(link, RENAME) TWO(symlink, MAKE)
int renameat(int from, const char *old, int to, const char *new) {
    typedef int (*f)(int, const char *, int, const char *); REAL("renameat", f);
    if (ours(to, new)) FAIL(RENAME);
    return real(from, old, to, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    typedef int (*f)(int, const char *, int, const char *, unsigned); REAL("renameat2", f);
    if (ours(to, new)) FAIL(RENAME);
    return real(from, old, to, new, flags);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
    typedef int (*f)(int, const char *, int, const char *, int); REAL("linkat", f);
    if (ours(to, new)) FAIL(RENAME);
    return real(from, old, to, new, flags);
}
int symlinkat(const char *old, int to, const char *new) {
    typedef int (*f)(const char *, int, const char *); REAL("symlinkat", f);
    if (ours(to, new)) FAIL(MAKE);
    return real(old, to, new);
}
