#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>

namespace kvlink::host {
namespace {

// What the kernel thinks it can give without swapping; UINT64_MAX when it does not say.
uint64_t available_memory() {
  FILE *file = std::fopen("/proc/meminfo", "re");
  if (file == nullptr) return UINT64_MAX;
  char line[128];
  uint64_t kib = 0;
  bool found = false;
  while (!found && std::fgets(line, sizeof line, file) != nullptr) {
    found = std::sscanf(line, "MemAvailable: %" SCNu64 " kB", &kib) == 1;
  }
  std::fclose(file);
  return found ? kib * 1024 : UINT64_MAX;
}

}  // namespace

RegionTable::~RegionTable() {
  for (const auto &item : allocations_) munmap(reinterpret_cast<void *>(item.first), item.second.length);
}

const Region *RegionTable::lookup(uint32_t mem) const {
  const uint32_t index = mem & kIndexMask;
  if (index >= regions_.size()) return nullptr;
  const Region *region = regions_[index].get();
  return region != nullptr && region->mem == mem ? region : nullptr;
}

const Region *RegionTable::Reader::find(uint32_t mem) {
  if (last_ == nullptr || last_->mem != mem) last_ = table_.lookup(mem);
  return last_;
}

Failure RegionTable::open(uint32_t mem, const kvl_mem_desc &desc) {
  if (desc.kind != KVL_MEMORY_HOST) {
    return make_failure(KVL_UNSUPPORTED, "mem_open", "memory kind %u; the host provider registers host memory only",
                        desc.kind);
  }
  if (desc.address == 0 || desc.length == 0 || desc.address + desc.length < desc.address) {
    return make_failure(KVL_INVALID, "mem_open", "address %#" PRIx64 " with length %" PRIu64 " is no memory range",
                        desc.address, desc.length);
  }
  if ((desc.access & ~uint32_t{KVL_ACCESS_READ | KVL_ACCESS_WRITE}) != 0) {
    return make_failure(KVL_INVALID, "mem_open", "access %#x; expected READ (1) and WRITE (2), or-ed", desc.access);
  }
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const uint32_t index = mem & kIndexMask;
  if (index >= regions_.size()) regions_.resize(index + 1);
  if (regions_[index] != nullptr) {
    return make_failure(KVL_STATE, "mem_open", "handle %#x is open already", regions_[index]->mem);
  }
  auto region = std::make_unique<Region>();
  region->mem = mem;
  region->access = desc.access;
  region->base = reinterpret_cast<char *>(desc.address);
  region->length = desc.length;
  const auto allocation = allocations_.find(desc.address);
  // A part of an allocation is moved like any memory: sharing its descriptor would publish the rest as well.
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  region->shared = allocation != allocations_.end() && desc.length <= allocation->second.length &&
                   allocation->second.length - desc.length < page;
  regions_[index] = std::move(region);
  return {};
}

Failure RegionTable::close(uint32_t mem) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  if (lookup(mem) == nullptr) return make_failure(KVL_INVALID, "mem_close", "no region is open under handle %#x", mem);
  regions_[mem & kIndexMask].reset();
  return {};
}

Failure RegionTable::copy(uint32_t mem, Region *out) const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  const Region *region = lookup(mem);
  if (region == nullptr) return make_failure(KVL_INVALID, "mem_export", "no region is open under handle %#x", mem);
  *out = *region;
  return {};
}

Failure RegionTable::allocate(uint64_t length, uint64_t *address) {
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t rounded = (length + page - 1) / page * page;
  if (length == 0 || rounded < length || rounded > uint64_t{1} << 62) {
    return make_failure(KVL_INVALID, "mem_alloc", "length %" PRIu64 " bytes", length);
  }
  // Shared memory has no limit of its own: reserving more than there is would end in the kernel killing processes.
  const uint64_t available = available_memory();
  if (rounded > available) {
    return make_failure(KVL_NO_RESOURCE, "mem_alloc", "%" PRIu64 " bytes asked for, %" PRIu64 " available", rounded,
                        available);
  }
  UniqueFd fd(memfd_create("kvlink", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return errno_failure(KVL_NO_RESOURCE, errno, "memfd_create", "no shared memory");
  // Only its owner may reopen it through /proc, so that a read-only descriptor stays read-only for other users.
  if (fchmod(fd.get(), S_IRUSR | S_IWUSR) != 0) {
    return errno_failure(KVL_NO_RESOURCE, errno, "fchmod", "cannot restrict the shared memory");
  }
  // posix_fallocate reserves the pages now: a full machine is an error here and not a SIGBUS in a later copy.
  const int status = posix_fallocate(fd.get(), 0, static_cast<off_t>(rounded));
  if (status != 0) {
    return errno_failure(KVL_NO_RESOURCE, status, "posix_fallocate",
                         "cannot reserve %" PRIu64 " bytes of shared memory", rounded);
  }
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return errno_failure(KVL_NO_RESOURCE, errno, "fcntl", "cannot seal the shared memory");
  }
  void *base = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) {
    return errno_failure(KVL_NO_RESOURCE, errno, "mmap", "cannot map %" PRIu64 " bytes of shared memory", rounded);
  }
#ifdef MADV_POPULATE_WRITE
  static_cast<void>(madvise(base, rounded, MADV_POPULATE_WRITE));
#endif
  *address = reinterpret_cast<uint64_t>(base);
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  allocations_.emplace(*address, Allocation{rounded, std::move(fd)});
  return {};
}

void RegionTable::free(uint64_t address) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const auto found = allocations_.find(address);
  if (found == allocations_.end()) return;
  munmap(reinterpret_cast<void *>(address), found->second.length);
  allocations_.erase(found);
}

Failure RegionTable::share(uint32_t mem, UniqueFd *fd, Region *region) const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  const Region *found = lookup(mem);
  if (found == nullptr || found->access == 0) {
    return make_failure(KVL_DENIED, "share", "no region is published under handle %#x", mem);
  }
  const auto allocation = allocations_.find(reinterpret_cast<uint64_t>(found->base));
  if (!found->shared || allocation == allocations_.end()) {
    return make_failure(KVL_UNSUPPORTED, "share", "the region under handle %#x is not shared memory", mem);
  }
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", allocation->second.memfd.get());
  const bool writable = (found->access & KVL_ACCESS_WRITE) != 0;
  // Reopened, not duplicated: a duplicate would share the read-write mode of the original.
  *fd = UniqueFd(::open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC));
  if (!*fd) return errno_failure(KVL_NO_RESOURCE, errno, "open", "cannot reopen the shared memory through %s", path);
  *region = *found;
  return {};
}

}  // namespace kvlink::host
