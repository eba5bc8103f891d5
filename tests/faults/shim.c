/* Makes system calls fail on the way to one folder. Preloaded: LD_PRELOAD=shim.so SHIM="FOLDER:CALL:ERRNO:AFTER".
 * CALL is write, open, rename, unlink, mkdir, fsync, or all; the first AFTER calls succeed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], call[16];
static int error_number, after;
static const char *read_from;

static void setup(void) {
    const char *text = getenv("SHIM");
    /* a forked process has a variable of its own */
    if (text == read_from) return;
    read_from = text;
    if (!text || sscanf(text, "%4095[^:]:%15[^:]:%d:%d", folder, call, &error_number, &after) != 4) folder[0] = 0;
}

static int is_in(const char *path) {
    char full[PATH_MAX * 2];
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(full, sizeof full, "%s/%s", here, path);
        path = full;
    }
    return !strncmp(path, folder, strlen(folder));
}

static int fails_path(const char *name, const char *path) {
    setup();
    if (!folder[0] || (strcmp(call, name) && strcmp(call, "all")) || !path || !is_in(path)) return 0;
    if (__atomic_fetch_sub(&after, 1, __ATOMIC_SEQ_CST) > 0) return 0;
    errno = error_number;
    return 1;
}

static int fails_fd(const char *name, int fd) {
    char link[64], path[PATH_MAX];
    setup();
    if (!folder[0] || fd < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return fails_path(name, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) { return fails_fd("write", fd) ? -1 : REAL(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    return fails_fd("write", fd) ? -1 : REAL(pwrite)(fd, data, n, at);
}
ssize_t writev(int fd, const struct iovec *data, int n) {
    return fails_fd("write", fd) ? -1 : REAL(writev)(fd, data, n);
}
size_t fwrite(const void *data, size_t size, size_t n, FILE *f) {
    return fails_fd("write", fileno(f)) ? 0 : REAL(fwrite)(data, size, n, f);
}
int ftruncate(int fd, off_t n) { return fails_fd("write", fd) ? -1 : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off_t n) { return fails_fd("write", fd) ? -1 : REAL(ftruncate)(fd, n); }
int fallocate(int fd, int mode, off_t at, off_t n) {
    return fails_fd("write", fd) ? -1 : REAL(fallocate)(fd, mode, at, n);
}
int fsync(int fd) { return fails_fd("fsync", fd) ? -1 : REAL(fsync)(fd); }
int rename(const char *a, const char *b) { return fails_path("rename", b) ? -1 : REAL(rename)(a, b); }
int unlink(const char *path) { return fails_path("unlink", path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return fails_path("unlink", path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int at, const char *path, int flags) {
    return fails_fd("unlink", at) ? -1 : REAL(unlinkat)(at, path, flags);
}
int mkdir(const char *path, mode_t mode) { return fails_path("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }

static int fails_open(const char *path, int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails_path("open", path);
}
int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = va_arg(args, mode_t);
    va_end(args);
    return fails_open(path, flags) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = va_arg(args, mode_t);
    va_end(args);
    return fails_open(path, flags) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = va_arg(args, mode_t);
    va_end(args);
    return fails_open(path, flags) ? -1 : REAL(openat)(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    return fails_open(path, *mode == 'r' && !strchr(mode, '+') ? 0 : O_WRONLY) ? NULL : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return fails_open(path, *mode == 'r' && !strchr(mode, '+') ? 0 : O_WRONLY) ? NULL : REAL(fopen64)(path, mode);
}
