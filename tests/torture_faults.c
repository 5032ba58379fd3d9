/* Loaded before a process (LD_PRELOAD), counts every call that changes a file under one folder, SQLite's too, and makes
   one of them fail with an error, or kills the process there, before the call or with half of it written. Linux only. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long seen, at;
static int action; /* an errno, 0: kill before the call, -1: kill when half is written */

void faults_arm(const char *place, long call, int what) {
    strncpy(folder, place, sizeof folder - 1);
    seen = 0, at = call, action = what;
}

long faults_seen(void) { return seen; }

static int inside(const char *path) { return folder[0] && !strncmp(path, folder, strlen(folder)); }

static int open_inside(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static void die(void) { kill(getpid(), SIGKILL); }

/* 1 when the call must fail, 2 when it must be cut in half. */
static int struck(int ours) {
    if (!ours || ++seen != at) return 0;
    if (action == 0) die();
    if (action < 0) return 2;
    errno = action;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITES(name, parameters, all, half)                                                                            \
    ssize_t name parameters {                                                                                          \
        int what = struck(open_inside(file));                                                                          \
        if (what == 1) return -1;                                                                                      \
        if (what == 2) REAL(name) half, die();                                                                         \
        return REAL(name) all;                                                                                         \
    }

WRITES(write, (int file, const void *data, size_t size), (file, data, size), (file, data, size / 2))
WRITES(pwrite, (int file, const void *data, size_t size, off_t place), (file, data, size, place),
       (file, data, size / 2, place))
WRITES(pwrite64, (int file, const void *data, size_t size, off64_t place), (file, data, size, place),
       (file, data, size / 2, place))

#define CHANGES(name, parameters, arguments, ours)                                                                     \
    int name parameters {                                                                                              \
        int what = struck(ours);                                                                                       \
        if (what == 2) die();                                                                                          \
        return what ? -1 : REAL(name) arguments;                                                                       \
    }

CHANGES(fsync, (int file), (file), open_inside(file))
CHANGES(fdatasync, (int file), (file), open_inside(file))
CHANGES(ftruncate, (int file, off_t size), (file, size), open_inside(file))
CHANGES(ftruncate64, (int file, off64_t size), (file, size), open_inside(file))
CHANGES(rename, (const char *from, const char *to), (from, to), inside(to))
CHANGES(unlink, (const char *path), (path), inside(path))
