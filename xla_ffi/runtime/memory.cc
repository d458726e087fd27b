#include "runtime/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace jaxmoe {
namespace {

constexpr size_t kHugePage = kHugePageBytes;

// mbind(MPOL_BIND) by raw system call: libnuma is not needed for one call.
int bind_memory(void* address, size_t bytes, int node) {
  constexpr int kMpolBind = 2;
  unsigned long mask[16] = {};
  constexpr unsigned long kBits = 8 * sizeof(mask[0]);
  if (node < 0 || node >= static_cast<int>(16 * kBits)) return EINVAL;
  mask[node / kBits] |= 1ul << (node % kBits);
  return syscall(SYS_mbind, address, bytes, kMpolBind, mask, 16 * kBits + 1, 0) == 0 ? 0 : errno;
}

}  // namespace

Status bind_to_node(void* address, size_t bytes, int node) {
  if (int error = bind_memory(address, bytes, node)) {
    return Status::error(
        "cannot bind weight memory to NUMA node " + std::to_string(node) + ": " +
        std::strerror(error) +
        "; allow mbind (containers: CAP_SYS_NICE or a seccomp profile that has it), "
        "or run on the CPUs of one node");
  }
  return {};
}

Status Arena::create(size_t bytes, int bind_node, std::unique_ptr<Arena>* arena) {
  std::unique_ptr<Arena> result(new Arena());
  // One huge page more, so that the usable part can start at a huge-page boundary.
  result->mapping_bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  void* mapping = mmap(nullptr, result->mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return Status::error("cannot map " + std::to_string(result->mapping_bytes_) +
                         " bytes of memory for weights: " + std::strerror(errno));
  }
  result->mapping_ = mapping;
  uintptr_t start = (reinterpret_cast<uintptr_t>(mapping) + kHugePage - 1) / kHugePage * kHugePage;
  result->data_ = reinterpret_cast<uint8_t*>(start);
  result->bytes_ = bytes;
  // Without huge pages everything still works, with more TLB misses; kernels may lack the feature.
  (void)madvise(mapping, result->mapping_bytes_, MADV_HUGEPAGE);
  if (bind_node >= 0) {
    Status status = bind_to_node(mapping, result->mapping_bytes_, bind_node);
    if (!status.ok()) return status;
  }
  *arena = std::move(result);
  return {};
}

Arena::~Arena() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

Status MappedFile::open(const std::string& path, std::unique_ptr<MappedFile>* file) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return Status::error("cannot open " + path + ": " + std::strerror(errno));
  struct stat info;
  if (fstat(fd, &info) != 0 || info.st_size <= 0) {
    std::string reason = info.st_size <= 0 ? "it is empty" : std::strerror(errno);
    close(fd);
    return Status::error("cannot map " + path + ": " + reason);
  }
  size_t bytes = static_cast<size_t>(info.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  int error = errno;
  close(fd);
  if (data == MAP_FAILED) return Status::error("cannot map " + path + ": " + std::strerror(error));
  std::unique_ptr<MappedFile> result(new MappedFile());
  result->path_ = path;
  result->data_ = static_cast<const uint8_t*>(data);
  result->bytes_ = bytes;
  *file = std::move(result);
  return {};
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), bytes_);
}

void MappedFile::will_need(size_t offset, size_t bytes) const {
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  size_t begin = offset / page * page;
  (void)madvise(const_cast<uint8_t*>(data_) + begin, offset + bytes - begin, MADV_WILLNEED);
}

}  // namespace jaxmoe
