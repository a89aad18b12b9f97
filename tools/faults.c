/* Loaded before the C library (LD_PRELOAD), it has calls of the system fail, or do half of what they were asked.
 *
 * Only calls that concern files below the folders that were named by faults_below() count. Armed by faults_arm(), one call of a kind,
 * or each so-manieth, fails with an error number, or is SHORT.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT (-1)

enum { OPEN, READ, PREAD, PREADV, WRITE, PWRITE, PWRITEV, STAT, FSTAT, TRUNCATE, FALLOCATE, FSYNC, RENAME, UNLINK, RMDIR, LINK, MKDIR,
       CLOSE, MMAP, COPY, SEEK, LOCK, OPENDIR, ACCESS, STATVFS, KINDS };

static char below[8][4096];
static int folders;
static long counts[KINDS];
static int armed_kind = -1, armed_error;
static long armed_number, armed_every;

void faults_below(const char *path) {
    if (folders < 8)
        strncpy(below[folders++], path, sizeof below[0] - 1);
}

void faults_arm(int kind, long number, long every, int error) {
    memset(counts, 0, sizeof counts);
    armed_number = number, armed_every = every, armed_error = error, armed_kind = kind;
}

long faults_count(int kind) { return counts[kind]; }

static int is_below(const char *path) {
    for (int k = 0; path && k < folders; k++)
        if (!strncmp(path, below[k], strlen(below[k])))
            return 1;
    return 0;
}

static int is_below_fd(int fd) {
    char link[64], path[4096];
    if (!folders || fd < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return is_below(path);
}

static int is_below_at(int dir, const char *path) {
    return path && path[0] != '/' && dir != AT_FDCWD ? is_below_fd(dir) : is_below(path);
}

/* Whether this call, of those that count, is one that fails. */
static int is_due(int kind) {
    long number = __atomic_add_fetch(&counts[kind], 1, __ATOMIC_SEQ_CST);
    return kind == armed_kind && (armed_every ? number % armed_every == 0 : number == armed_number);
}

static int fails(int kind, int counts_here) {
    if (!counts_here || !is_due(kind) || armed_error == SHORT)
        return 0;
    errno = armed_error;
    return 1;
}

/* How many bytes a call is let take: half of them where it is one that falls short. */
static size_t least(int kind, size_t size) { return armed_error == SHORT && armed_kind == kind && size > 1 ? size / 2 : size; }

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = dlsym(RTLD_NEXT, #name)

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        int mode = va_arg(more, int); \
        va_end(more); \
        REAL(name); \
        return fails(OPEN, is_below(path)) ? -1 : real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        int mode = va_arg(more, int); \
        va_end(more); \
        REAL(name); \
        return fails(OPEN, is_below_at(dir, path)) ? -1 : real(dir, path, flags, mode); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

/* A call that moves bytes by one buffer: fails, or is shortened. */
#define MOVES(kind, name, result, parameters, size, given) \
    result name parameters { \
        REAL(name); \
        if (is_below_fd(fd) && is_due(kind)) { \
            if (armed_error != SHORT) { \
                errno = armed_error; \
                return -1; \
            } \
            size = least(kind, size); \
        } \
        return real given; \
    }
MOVES(READ, read, ssize_t, (int fd, void *to, size_t size), size, (fd, to, size))
MOVES(PREAD, pread, ssize_t, (int fd, void *to, size_t size, off_t at), size, (fd, to, size, at))
MOVES(PREAD, pread64, ssize_t, (int fd, void *to, size_t size, off64_t at), size, (fd, to, size, at))
MOVES(WRITE, write, ssize_t, (int fd, const void *of, size_t size), size, (fd, of, size))
MOVES(PWRITE, pwrite, ssize_t, (int fd, const void *of, size_t size, off_t at), size, (fd, of, size, at))
MOVES(PWRITE, pwrite64, ssize_t, (int fd, const void *of, size_t size, off64_t at), size, (fd, of, size, at))
MOVES(COPY, copy_file_range, ssize_t, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags), size,
      (from, at, fd, to, size, flags))

#define MOVES_PIECES(kind, name, parameters, last) \
    ssize_t name parameters { \
        REAL(name); \
        if (is_below_fd(fd) && is_due(kind)) { \
            if (armed_error != SHORT) { \
                errno = armed_error; \
                return -1; \
            } \
            struct iovec first = {pieces[0].iov_base, least(kind, pieces[0].iov_len)}; \
            return real(fd, &first, 1, at last); \
        } \
        return real(fd, pieces, count, at last); \
    }
#define PIECES int fd, const struct iovec *pieces, int count, off64_t at
#define NOTHING
#define FLAGS , flags
MOVES_PIECES(PREADV, preadv, (PIECES), NOTHING)
MOVES_PIECES(PREADV, preadv64, (PIECES), NOTHING)
MOVES_PIECES(PREADV, preadv2, (PIECES, int flags), FLAGS)
MOVES_PIECES(PREADV, preadv64v2, (PIECES, int flags), FLAGS)
MOVES_PIECES(PWRITEV, pwritev, (PIECES), NOTHING)
MOVES_PIECES(PWRITEV, pwritev64, (PIECES), NOTHING)
MOVES_PIECES(PWRITEV, pwritev2, (PIECES, int flags), FLAGS)
MOVES_PIECES(PWRITEV, pwritev64v2, (PIECES, int flags), FLAGS)

/* Calls that name a file by its path, by a path in a folder, and by a descriptor. */
#define BY_PATH(kind, name, result, parameters, failed, given) \
    result name parameters { \
        REAL(name); \
        return fails(kind, is_below(path)) ? failed : real given; \
    }
#define BY_PLACE(kind, name, parameters, given) \
    int name parameters { \
        REAL(name); \
        return fails(kind, is_below_at(dir, path)) ? -1 : real given; \
    }
#define BY_FD(kind, name, result, parameters, failed, given) \
    result name parameters { \
        REAL(name); \
        return fails(kind, is_below_fd(fd)) ? failed : real given; \
    }
BY_PATH(STAT, stat, int, (const char *path, struct stat *to), -1, (path, to))
BY_PATH(STAT, stat64, int, (const char *path, struct stat64 *to), -1, (path, to))
BY_PATH(STAT, lstat, int, (const char *path, struct stat *to), -1, (path, to))
BY_PATH(STAT, lstat64, int, (const char *path, struct stat64 *to), -1, (path, to))
BY_PLACE(STAT, fstatat, (int dir, const char *path, struct stat *to, int flags), (dir, path, to, flags))
BY_PLACE(STAT, fstatat64, (int dir, const char *path, struct stat64 *to, int flags), (dir, path, to, flags))
BY_FD(FSTAT, fstat, int, (int fd, struct stat *to), -1, (fd, to))
BY_FD(FSTAT, fstat64, int, (int fd, struct stat64 *to), -1, (fd, to))
BY_PATH(TRUNCATE, truncate, int, (const char *path, off_t size), -1, (path, size))
BY_PATH(TRUNCATE, truncate64, int, (const char *path, off64_t size), -1, (path, size))
BY_FD(TRUNCATE, ftruncate, int, (int fd, off_t size), -1, (fd, size))
BY_FD(TRUNCATE, ftruncate64, int, (int fd, off64_t size), -1, (fd, size))
BY_FD(FALLOCATE, fallocate, int, (int fd, int mode, off_t at, off_t size), -1, (fd, mode, at, size))
BY_FD(FALLOCATE, fallocate64, int, (int fd, int mode, off64_t at, off64_t size), -1, (fd, mode, at, size))
BY_FD(FSYNC, fsync, int, (int fd), -1, (fd))
BY_FD(FSYNC, fdatasync, int, (int fd), -1, (fd))
BY_PATH(RENAME, rename, int, (const char *path, const char *to), -1, (path, to))
BY_PLACE(RENAME, renameat, (int dir, const char *path, int into, const char *to), (dir, path, into, to))
BY_PATH(UNLINK, unlink, int, (const char *path), -1, (path))
BY_PLACE(UNLINK, unlinkat, (int dir, const char *path, int flags), (dir, path, flags))
BY_PATH(RMDIR, rmdir, int, (const char *path), -1, (path))
BY_PATH(LINK, link, int, (const char *path, const char *to), -1, (path, to))
BY_PLACE(LINK, linkat, (int dir, const char *path, int into, const char *to, int flags), (dir, path, into, to, flags))
BY_PATH(MKDIR, mkdir, int, (const char *path, mode_t mode), -1, (path, mode))
BY_PLACE(MKDIR, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode))
BY_FD(MMAP, mmap, void *, (void *at, size_t size, int prot, int flags, int fd, off_t offset), MAP_FAILED,
      (at, size, prot, flags, fd, offset))
BY_FD(MMAP, mmap64, void *, (void *at, size_t size, int prot, int flags, int fd, off64_t offset), MAP_FAILED,
      (at, size, prot, flags, fd, offset))
BY_FD(SEEK, lseek, off_t, (int fd, off_t at, int whence), -1, (fd, at, whence))
BY_FD(SEEK, lseek64, off64_t, (int fd, off64_t at, int whence), -1, (fd, at, whence))
BY_FD(LOCK, flock, int, (int fd, int how), -1, (fd, how))
BY_PATH(OPENDIR, opendir, DIR *, (const char *path), NULL, (path))
BY_FD(OPENDIR, fdopendir, DIR *, (int fd), NULL, (fd))
BY_PATH(ACCESS, access, int, (const char *path, int mode), -1, (path, mode))
BY_PLACE(ACCESS, faccessat, (int dir, const char *path, int mode, int flags), (dir, path, mode, flags))

struct statvfs;
extern int statvfs64(const char *, struct statvfs *);
extern int statvfs(const char *, struct statvfs *);
BY_PATH(STATVFS, statvfs, int, (const char *path, struct statvfs *to), -1, (path, to))
BY_PATH(STATVFS, statvfs64, int, (const char *path, struct statvfs *to), -1, (path, to))

/* The system closes the descriptor whatever it says. */
int close(int fd) {
    REAL(close);
    int failed = fails(CLOSE, is_below_fd(fd)), error = errno, done = real(fd);
    if (!failed)
        return done;
    errno = error;
    return -1;
}
