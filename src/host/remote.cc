#include "remote.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <mutex>

namespace kvlink::host {
namespace {

constexpr uint32_t kIndexMask = (1u << KVL_HANDLE_INDEX_BITS) - 1;
constexpr uint64_t kPopulateStep = uint64_t{64} << 20;

// Page tables are filled now, while the caller waits anyway, and not fault by fault inside the first transfer.
// Half the time left is enough for that; the rest comes by faults.
void populate(char *base, uint64_t length, bool writable, Deadline deadline) {
#if defined(MADV_POPULATE_WRITE) && defined(MADV_POPULATE_READ)
  const uint64_t now = now_ns();
  if (deadline.at_ns > now) deadline.at_ns = now + (deadline.at_ns - now) / 2;
  for (uint64_t at = 0; at < length && deadline.remaining_ms() > 0; at += kPopulateStep) {
    const uint64_t step = std::min(kPopulateStep, length - at);
    if (madvise(base + at, step, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) != 0) return;
  }
#else
  static_cast<void>(base), static_cast<void>(length), static_cast<void>(writable), static_cast<void>(deadline);
#endif
}

}  // namespace

RemoteRegion::~RemoteRegion() {
  if (path == Path::kShm && base != nullptr) munmap(base, length);
}

Failure map_shared(int fd, uint64_t length, bool writable, const Deadline &deadline, char **base) {
  struct stat status {};
  if (fstat(fd, &status) != 0) return errno_failure(KVL_REMOTE, errno, "fstat", "the peer sent a bad descriptor");
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW)) {
    return make_failure(KVL_DENIED, "fcntl", "the peer's shared memory is not sealed (seals %#x)", seals);
  }
  if (status.st_size < 0 || static_cast<uint64_t>(status.st_size) < length) {
    return make_failure(KVL_DENIED, "fstat", "the peer's shared memory has %lld bytes; its region %" PRIu64,
                        static_cast<long long>(status.st_size), length);
  }
  void *mapped = mmap(nullptr, length, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    return errno_failure(KVL_NO_RESOURCE, errno, "mmap", "cannot map %" PRIu64 " bytes of the peer's memory", length);
  }
  *base = static_cast<char *>(mapped);
  populate(*base, length, writable, deadline);
  return {};
}

const RemoteRegion *RemoteTable::Reader::find(uint32_t rmem) {
  if (last_ != nullptr && last_->rmem == rmem) return last_;
  const uint32_t index = rmem & kIndexMask;
  if (index >= table_.regions_.size()) return nullptr;
  const RemoteRegion *region = table_.regions_[index].get();
  if (region == nullptr || region->rmem != rmem) return nullptr;
  return last_ = region;
}

Failure RemoteTable::insert(std::unique_ptr<RemoteRegion> region) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const uint32_t index = region->rmem & kIndexMask;
  if (index >= regions_.size()) regions_.resize(index + 1);
  if (regions_[index] != nullptr) {
    return make_failure(KVL_STATE, "rmem_open", "handle %#x is open already", regions_[index]->rmem);
  }
  regions_[index] = std::move(region);
  return {};
}

void RemoteTable::erase(uint32_t rmem) {
  std::unique_ptr<RemoteRegion> gone;  // unmapped after the lock is free
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const uint32_t index = rmem & kIndexMask;
  if (index < regions_.size() && regions_[index] != nullptr && regions_[index]->rmem == rmem) {
    gone = std::move(regions_[index]);
  }
}

}  // namespace kvlink::host
