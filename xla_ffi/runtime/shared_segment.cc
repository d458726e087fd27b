#include "runtime/shared_segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "runtime/memory.h"
#include "runtime/scratch.h"

namespace jaxmoe {
namespace {

// Two seconds: attaching maps the segment and compares a header, even on a busy machine.
constexpr int kLockAttempts = 200;
constexpr useconds_t kLockPauseMicros = 10'000;

Status failed(const std::string& name, const std::string& what) {
  return Status::error("shared memory /dev/shm" + name + ": " + what);
}

Status failed_errno(const std::string& name, const std::string& what) {
  return failed(name, what + ": " + std::strerror(errno));
}

// F_OFD_SETLK of the whole file; type F_WRLCK or F_UNLCK.
int record_lock(int fd, short type) {
  struct flock lock = {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return fcntl(fd, F_OFD_SETLK, &lock);
}

}  // namespace

Status SharedSegment::open(const std::string& name, size_t bytes,
                           std::unique_ptr<SharedSegment>* segment) {
  if (name.size() < 2 || name.size() > 200 || name[0] != '/' ||
      name.find('/', 1) != std::string::npos) {
    return Status::error("shared memory name \"" + name +
                         "\": wanted a slash and 1 to 199 characters without one");
  }
  std::unique_ptr<SharedSegment> result(new SharedSegment());
  result->name_ = name;
  // Whoever removes a stale segment holds it exclusively: what was opened meanwhile has no name any
  // more, and a new one is made.
  struct stat info;
  for (int attempt = 0;; ++attempt) {
    int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return failed_errno(name, "cannot be opened");
    result->fd_ = fd;
    if (flock(fd, LOCK_SH) != 0) return failed_errno(name, "cannot be locked");
    if (fstat(fd, &info) != 0) return failed_errno(name, "cannot be examined");
    if (info.st_nlink > 0) break;
    close(fd);
    result->fd_ = -1;
    if (attempt == 10) return failed(name, "is removed as often as it is made");
  }
  if (info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
    return failed(name, "belongs to another user or is open to others; remove it");
  }
  // Whoever attaches to a full segment holds the lock for a moment, too; filling takes longer.
  for (int attempt = 0; record_lock(result->fd_, F_WRLCK) != 0; ++attempt) {
    if ((errno != EAGAIN && errno != EACCES) || attempt == kLockAttempts) {
      return failed_errno(name, "another process is filling it");
    }
    usleep(kLockPauseMicros);
  }
  // Looked at again under the lock: its size may just have been set.
  if (fstat(result->fd_, &info) != 0) return failed_errno(name, "cannot be examined");
  if (info.st_size == 0 && ftruncate(result->fd_, static_cast<off_t>(bytes)) != 0) {
    return failed_errno(name, "cannot be made " + std::to_string(bytes) + " bytes long");
  }
  if (info.st_size != 0 && static_cast<size_t>(info.st_size) != bytes) {
    return failed(name, "has " + std::to_string(info.st_size) + " bytes, wanted " +
                            std::to_string(bytes) + ": it holds other weights; remove it");
  }
  result->bytes_ = bytes;
  result->mapping_bytes_ = align_up(bytes, kHugePageBytes) + kHugePageBytes;
  void* space = mmap(nullptr, result->mapping_bytes_, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return failed_errno(name, "no address space for it");
  result->mapping_ = space;
  uintptr_t start = align_up(reinterpret_cast<uintptr_t>(space), kHugePageBytes);
  void* data = mmap(reinterpret_cast<void*>(start), bytes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, result->fd_, 0);
  if (data == MAP_FAILED) return failed_errno(name, "cannot be mapped");
  result->data_ = static_cast<uint8_t*>(data);
  // Granted where the system allows huge pages for shared memory (shmem_enabled: advise).
  (void)madvise(data, bytes, MADV_HUGEPAGE);
  *segment = std::move(result);
  return {};
}

Status SharedSegment::remove(const std::string& name) {
  if (shm_unlink(name.c_str()) != 0 && errno != ENOENT) {
    return failed_errno(name, "cannot be removed");
  }
  return {};
}

SharedSegment::~SharedSegment() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
  if (fd_ >= 0) close(fd_);
}

Status SharedSegment::reserve(size_t offset, size_t bytes) const {
  if (bytes == 0) return {};
  int error;
  do {
    error = posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == 0) return {};
  return failed(name_, "no room for " + std::to_string(bytes) + " bytes at " +
                           std::to_string(offset) + ": " + std::strerror(error) +
                           "; enlarge /dev/shm or keep the weights private");
}

Status SharedSegment::bind(size_t offset, size_t bytes, int node) const {
  return bind_to_node(data_ + offset, bytes, node);
}

Status SharedSegment::seal() {
  if (mprotect(data_, bytes_, PROT_READ) != 0) return failed_errno(name_, "cannot be sealed");
  if (record_lock(fd_, F_UNLCK) != 0) return failed_errno(name_, "cannot be unlocked");
  return {};
}

}  // namespace jaxmoe
