/* Faults at chosen system calls of a real process; see __init__.py, which builds and preloads this.

   FERRY_FAULT=<call>,<glob>,<nth>,<what>
     call  read, write, sync, rename, remove, or any: the kind of call
     glob  fnmatch pattern of the absolute path of the file; of a rename's new name
     nth   which of the matching calls, counted from 1
     what  stop: SIGSTOP before that call.  term: SIGTERM before that call.
           eio, enospc: that call and all matching ones after it fail so.
   FERRY_FAULT_LOG=<file> notes every call but reads and writes: a line `<call> <path>`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char kind[16], pattern[PATH_MAX], what[16];
static long nth;
static atomic_long seen;
static int log_fd = -1;

__attribute__((constructor)) static void begin(void) {
    const char *fault = getenv("FERRY_FAULT"), *log = getenv("FERRY_FAULT_LOG");
    if (fault && sscanf(fault, "%15[^,],%4095[^,],%ld,%15s", kind, pattern, &nth, what) != 4) {
        dprintf(2, "FERRY_FAULT is malformed: %s\n", fault);
        _exit(99);
    }
    if (log)
        log_fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

/* Whether the call is to fail, with errno set. */
static int fails(const char *call, const char *path) {
    if (log_fd >= 0 && strcmp(call, "read") && strcmp(call, "write")) {
        char line[PATH_MAX + 32];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        syscall(SYS_write, log_fd, line, (size_t)length);
    }
    if (!nth || (strcmp(kind, "any") && strcmp(kind, call)) || fnmatch(pattern, path, 0))
        return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number == nth && !strcmp(what, "stop"))
        raise(SIGSTOP); /* to this thread: it does not get as far as the call */
    if (number == nth && !strcmp(what, "term"))
        kill(getpid(), SIGTERM);
    if (number >= nth && (!strcmp(what, "eio") || !strcmp(what, "enospc"))) {
        errno = strcmp(what, "eio") ? ENOSPC : EIO;
        return 1;
    }
    return 0;
}

static int fails_at(const char *call, int directory, const char *name) {
    char path[2 * PATH_MAX] = "", link[64];
    if (name[0] != '/') {
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        path[length < 0 ? 0 : length] = 0;
        if (name[0])
            strcat(path, "/");
    }
    strncat(path, name, PATH_MAX - 1);
    return fails(call, path);
}

static int watched(const char *call) { return nth && (!strcmp(kind, call) || !strcmp(kind, "any")); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(result, name, signature, arguments, failing)                                                              \
    result name signature {                                                                                            \
        static __typeof__(&name) real;                                                                                 \
        if (!real)                                                                                                     \
            real = REAL(name);                                                                                         \
        return (failing) ? -1 : real arguments;                                                                        \
    }

#define READS(fd) (watched("read") && fails_at("read", fd, ""))
#define WRITES(fd) (watched("write") && fails_at("write", fd, ""))

CALL(ssize_t, read, (int fd, void *to, size_t count), (fd, to, count), READS(fd))
CALL(ssize_t, pread, (int fd, void *to, size_t count, off_t at), (fd, to, count, at), READS(fd))
CALL(ssize_t, pread64, (int fd, void *to, size_t count, off64_t at), (fd, to, count, at), READS(fd))
CALL(ssize_t, preadv64v2, (int fd, const struct iovec *to, int count, off64_t at, int flags),
     (fd, to, count, at, flags), READS(fd))
CALL(ssize_t, write, (int fd, const void *from, size_t count), (fd, from, count), WRITES(fd))
CALL(ssize_t, writev, (int fd, const struct iovec *from, int count), (fd, from, count), WRITES(fd))
CALL(int, fsync, (int fd), (fd), fails_at("sync", fd, ""))
CALL(int, rename, (const char *from, const char *to), (from, to), fails_at("rename", AT_FDCWD, to))
CALL(int, renameat, (int from_in, const char *from, int to_in, const char *to), (from_in, from, to_in, to),
     fails_at("rename", to_in, to))
CALL(int, unlink, (const char *path), (path), fails_at("remove", AT_FDCWD, path))
CALL(int, unlinkat, (int in, const char *path, int flags), (in, path, flags), fails_at("remove", in, path))
CALL(int, rmdir, (const char *path), (path), fails_at("remove", AT_FDCWD, path))
