// This side's registered regions, and the shared memory that it allocates for users.
#ifndef KVLINK_HOST_MEMORY_H
#define KVLINK_HOST_MEMORY_H

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "failure.h"
#include "socket.h"

namespace kvlink::host {

struct Region {
  uint32_t mem = 0;     // the core's handle, generation included
  uint32_t access = 0;  // what peers may do
  char *base = nullptr;
  uint64_t length = 0;
  bool shared = false;  // spans one allocation of ours, so that peers may map it
};

// Readers (transfers, checks of incoming frames) share the lock; opening and closing regions takes it alone.
class RegionTable {
 public:
  // Holds the table still and answers lookups; keep it for no longer than one batch.
  class Reader {
   public:
    explicit Reader(const RegionTable &table) : table_(table), lock_(table.mutex_) {}
    // Null when no region is open under exactly this handle. Valid while the reader lives.
    const Region *find(uint32_t mem);

   private:
    const RegionTable &table_;
    std::shared_lock<std::shared_mutex> lock_;
    const Region *last_ = nullptr;
  };

  RegionTable() = default;
  RegionTable(const RegionTable &) = delete;
  RegionTable &operator=(const RegionTable &) = delete;
  ~RegionTable();

  Failure open(uint32_t mem, const kvl_mem_desc &desc);
  Failure close(uint32_t mem);
  Failure copy(uint32_t mem, Region *out) const;

  Failure allocate(uint64_t length, uint64_t *address);
  void free(uint64_t address);
  // A new descriptor of the allocation behind `mem`, read-only unless peers may write.
  Failure share(uint32_t mem, UniqueFd *fd, Region *region) const;

 private:
  static constexpr uint32_t kIndexMask = (1u << KVL_HANDLE_INDEX_BITS) - 1;

  struct Allocation {
    uint64_t length;
    UniqueFd memfd;
  };

  const Region *lookup(uint32_t mem) const;

  mutable std::shared_mutex mutex_;
  std::vector<std::unique_ptr<Region>> regions_;  // by handle index
  std::map<uint64_t, Allocation> allocations_;    // by address
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_MEMORY_H
