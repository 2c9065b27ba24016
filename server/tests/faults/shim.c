/* Preloaded into members: what their disk and their clock do to them. A file that the test writes into says it, and says it anew at any time.
 *
 * In C, because what the loader puts in front of the C library has to be called as that library's functions are. */
#define _GNU_SOURCE
#include "orders.h"
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const struct orders honest;
const struct orders *orders = &honest;

__attribute__((constructor)) static void begin(int count, char **words, char **environment) {
    (void)count, (void)words;
    const char *path = getenv("MOOR_ORDERS");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *page = mmap(NULL, sizeof *orders, PROT_READ, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED)
        orders = page;
    close(fd);
    if (getenv("MOOR_GO"))
        begin_go(environment);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && clock == CLOCK_REALTIME)
        time->tv_sec += orders->clock;
    return result;
}

/* Databases that are in memory, by their files in memory. */
static struct lie {
    ino_t memory;
    char path[4096];
} lies[8];

/* When one of them was written to its place last. One time for all, so that what is there afterwards is of about one moment, as it is on a disk:
 * the log and its journal would not fit together otherwise, and the member would find that out by itself. */
static int64_t written;

static int64_t now(void) {
    struct timespec time;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static int copy(int from, int to) {
    static _Thread_local char buffer[1 << 16];
    off_t at = 0;
    for (;;) {
        ssize_t count = pread(from, buffer, sizeof buffer, at);
        if (count <= 0)
            return (int)count;
        if (pwrite(to, buffer, (size_t)count, at) != count)
            return -1;
        at += count;
    }
}

static int is_database(const char *path, size_t length) {
    return (length > 5 && !strcmp(path + length - 5, ".redb")) || (length > 8 && !strcmp(path + length - 8, ".journal"));
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0;
    va_end(more);
    int fd = openat(AT_FDCWD, path, flags, mode);
    size_t length = strlen(path);
    if (fd < 0 || orders->lies <= 0 || length >= sizeof lies[0].path - 4 || !is_database(path, length))
        return fd;
    int memory = memfd_create(path + length - 5, MFD_CLOEXEC);
    struct stat is;
    if (memory < 0 || copy(fd, memory) < 0 || fstat(memory, &is) < 0)
        abort();
    close(fd);
    for (size_t at = 0; at < sizeof lies / sizeof *lies; at++) {
        if (!lies[at].memory) {
            strcpy(lies[at].path, path);
            lies[at].memory = is.st_ino;
            return memory;
        }
    }
    abort();
}

/* 1: the file is one of those, and was written or not. */
static int lied(int fd) {
    struct stat is;
    if (orders->lies <= 0 || fstat(fd, &is) < 0)
        return 0;
    for (size_t at = 0; at < sizeof lies / sizeof *lies && lies[at].memory; at++) {
        struct lie *lie = &lies[at];
        if (lie->memory != is.st_ino)
            continue;
        if (now() - written >= orders->lies - 1) {
            char beside[sizeof lie->path];
            snprintf(beside, sizeof beside, "%.*s.new", (int)sizeof beside - 5, lie->path);
            int to = openat(AT_FDCWD, beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
            if (to < 0 || copy(fd, to) < 0 || close(to) < 0 || rename(beside, lie->path) < 0)
                abort();
            written = now();
        }
        return 1;
    }
    return 0;
}

static int sync_by(long call, int fd) {
    if (orders->slow > 0)
        usleep((useconds_t)orders->slow * 1000);
    return lied(fd) ? 0 : (int)syscall(call, fd);
}

int fdatasync(int fd) {
    return sync_by(SYS_fdatasync, fd);
}

int fsync(int fd) {
    return sync_by(SYS_fsync, fd);
}
