// The peer's regions as one link sees them: how each is reached and where.
#ifndef KVLINK_HOST_REMOTE_H
#define KVLINK_HOST_REMOTE_H

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "blob.h"
#include "failure.h"
#include "options.h"
#include "socket.h"

namespace kvlink::host {

struct RemoteRegion {
  uint32_t rmem = 0;  // the core's handle
  Path path = Path::kTcp;
  uint32_t mem = 0;  // the exporter's handle
  uint32_t access = 0;
  uint64_t length = 0;
  char *base = nullptr;  // shm: our mapping; cma: the exporter's address

  RemoteRegion() = default;
  RemoteRegion(const RemoteRegion &) = delete;
  RemoteRegion &operator=(const RemoteRegion &) = delete;
  ~RemoteRegion();
};

// Maps the peer's shared memory after checking that it can neither shrink nor be smaller than `length`.
Failure map_shared(int fd, uint64_t length, bool writable, const Deadline &deadline, char **base);

class RemoteTable {
 public:
  class Reader {
   public:
    explicit Reader(const RemoteTable &table) : table_(table), lock_(table.mutex_) {}
    const RemoteRegion *find(uint32_t rmem);

   private:
    const RemoteTable &table_;
    std::shared_lock<std::shared_mutex> lock_;
    const RemoteRegion *last_ = nullptr;
  };

  Failure insert(std::unique_ptr<RemoteRegion> region);
  void erase(uint32_t rmem);

 private:
  mutable std::shared_mutex mutex_;
  std::vector<std::unique_ptr<RemoteRegion>> regions_;  // by handle index
};

}  // namespace kvlink::host

#endif  // KVLINK_HOST_REMOTE_H
