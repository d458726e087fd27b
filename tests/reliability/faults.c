// A library to preload: makes the n-th read of a file fail, end early or find it cut in half.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static _Atomic int left = -1;  // reads until the fault; negative: none is planned
static int kind;               // 1: EIO, 2: a short read, 3: the file is cut

__attribute__((visibility("default"))) void fault_plan(int how, int after) {
  kind = how;
  left = after;
}

static int is_due(int fd) {
  struct stat info;
  if (left < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) return 0;
  if (left-- != 0) return 0;
  if (kind == 3) {
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (truncate(path, info.st_size / 2) != 0) return 0;
  }
  return kind;
}

#define READ(name, arguments, call, shorter)                      \
  __attribute__((visibility("default"))) ssize_t name arguments { \
    static ssize_t(*next) arguments;                              \
    if (!next) next = (ssize_t(*) arguments)dlsym(RTLD_NEXT, #name); \
    switch (is_due(fd)) {                                         \
      case 1:                                                     \
        errno = EIO;                                              \
        return -1;                                                \
      case 2:                                                     \
        shorter;                                                  \
    }                                                             \
    return next call;                                             \
  }

READ(pread, (int fd, void* data, size_t size, off_t at), (fd, data, size, at), size = size / 2)
READ(pread64, (int fd, void* data, size_t size, off64_t at), (fd, data, size, at), size = size / 2)
READ(preadv, (int fd, const struct iovec* to, int count, off_t at), (fd, to, count, at), return 0)
READ(preadv64, (int fd, const struct iovec* to, int count, off64_t at), (fd, to, count, at), return 0)
