// Vendor state that exists once a process: the initialisation lock and the table of registered memory.
#ifndef KVLINK_ASCEND_REGISTRY_H
#define KVLINK_ASCEND_REGISTRY_H

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "ascend/library.h"
#include "host/socket.h"

namespace kvlink::ascend {

using host::Deadline;

// Communicator init, destroy and deregistration are not safe beside each other in one process. Taken with a deadline:
// a call that hangs inside the vendor's library keeps it for ever, and everyone else must still give up in time.
// Waits on `changed` until `ready`, the deadline, or its interrupt: OK, TIMEOUT or CANCELLED. The interrupt is a
// descriptor, which a condition variable cannot wait for: it is looked at every 20 ms.
template <typename Ready>
kvl_status wait_interruptibly(std::condition_variable &changed, std::unique_lock<std::mutex> &lock,
                              const Deadline &deadline, Ready ready);
bool is_interrupted(const Deadline &deadline);

class InitLock {
 public:
  // TIMEOUT names the call that holds it and for how long. `lock` holds nothing before.
  static Failure acquire(const char *call, const Deadline &deadline, InitLock *lock);
  InitLock() = default;
  InitLock(InitLock &&other) noexcept : held_(other.held_) { other.held_ = false; }
  InitLock &operator=(InitLock &&other) noexcept;
  ~InitLock() { release(); }
  void release();
  explicit operator bool() const { return held_; }

 private:
  bool held_ = false;
};

template <typename Ready>
kvl_status wait_interruptibly(std::condition_variable &changed, std::unique_lock<std::mutex> &lock,
                              const Deadline &deadline, Ready ready) {
  constexpr uint64_t look_ns = 20 * 1000000;
  for (;;) {
    const uint64_t now = host::now_ns();
    const auto until = std::chrono::steady_clock::time_point(
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::nanoseconds(
            deadline.interrupt_fd < 0 ? deadline.at_ns : std::min(deadline.at_ns, now + look_ns))));
    if (changed.wait_until(lock, until, ready)) return KVL_OK;
    if (is_interrupted(deadline)) return KVL_CANCELLED;
    if (host::now_ns() >= deadline.at_ns) return KVL_TIMEOUT;
  }
}

// Registered memory of this process, by device. The vendor answers an exact duplicate with the same handle and no
// count, so that the first deregistration kills it for all; here it is counted. Anything that overlaps is refused.
class Registry {
 public:
  struct Range {
    int32_t device = 0;
    uint64_t address = 0;
    uint64_t length = 0;
    bool on_device = false;
  };
  using Register = std::function<Failure(void **handle)>;
  using Deregister = std::function<Failure(void *handle)>;

  static Registry &process();

  // Registers `range` through `call`, or shares what is registered already. `owner` says whose it is ("kvlink channel
  // on npu:0"). INVALID on an overlap, naming the other range and its owner.
  Failure acquire(const Range &range, const std::string &owner, const Register &call, void **handle);
  // The last user's release deregisters through `call`; when that fails the entry stays.
  Failure release(const Range &range, const Deregister &call);
  size_t size() const;

 private:
  struct Entry {
    uint64_t length;
    bool on_device;
    uint32_t users;
    void *handle;
    std::string owner;
  };
  mutable std::mutex mutex_;
  std::map<std::pair<int32_t, uint64_t>, Entry> entries_;  // by device and address
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_REGISTRY_H
