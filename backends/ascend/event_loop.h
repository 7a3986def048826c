// What the engine's thread sleeps in: descriptors, wake-ups, and short looks at the device while transfers are out.
//
// ACL events have no descriptor, so a thread with transfers in flight looks again after 20 us, then 40, ... up to 500;
// without any it sleeps until a descriptor or a wake-up. No CPU is used when idle.
#ifndef KVLINK_ASCEND_EVENT_LOOP_H
#define KVLINK_ASCEND_EVENT_LOOP_H

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ascend/library.h"
#include "host/socket.h"

namespace kvlink::ascend {

using host::Deadline;
using host::now_ns;
using host::UniqueFd;

// A descriptor in the loop and who handles its events.
class Watch {
 public:
  virtual ~Watch() = default;
  virtual void on_events(uint32_t events) = 0;

  UniqueFd fd;
  bool dead = false;
};

class EventLoop {
 public:
  Failure open();

  // The engine's I/O lock: poll holds it while it works; connecting and closing take it for what poll also touches.
  std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(mutex_); }

  // With the I/O lock held:
  Failure watch(Watch *item, uint32_t events);
  void rewatch(Watch *item, uint32_t events);
  void unwatch(Watch *item);
  void bury(std::unique_ptr<Watch> item);  // out of the loop; destroyed when no event can name it any more
  void dispatch(uint64_t until_ns);        // handles what is ready

  // From any thread:
  void wake();
  // The engine's thread. `in_flight`: look at the device again soon.
  void wait(uint32_t timeout_ms, bool in_flight);
  // The next wait looks again soon: for a resource whose return no event announces.
  void retry_soon() { retry_.store(true, std::memory_order_relaxed); }
  void note_progress() { pace_ns_.store(kFirstLookNs, std::memory_order_relaxed); }

 private:
  static constexpr uint64_t kFirstLookNs = 20 * 1000;
  static constexpr uint64_t kLastLookNs = 500 * 1000;

  UniqueFd epoll_, wake_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Watch>> graveyard_;
  std::atomic<uint64_t> pace_ns_{kFirstLookNs};
  std::atomic<bool> retry_{false};
};

}  // namespace kvlink::ascend

#endif  // KVLINK_ASCEND_EVENT_LOOP_H
