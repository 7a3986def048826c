#include "ascend/registry.h"

#include <poll.h>

#include <cinttypes>
#include <condition_variable>

namespace kvlink::ascend {
namespace {

struct InitState {
  std::mutex mutex;
  std::condition_variable freed;
  bool held = false;
  const char *call = "";
  uint64_t since_ns = 0;
};

// Never destroyed: a thread that hangs in a vendor call may come back while the process ends.
InitState &init_state() {
  static auto *state = new InitState;
  return *state;
}

}  // namespace

bool is_interrupted(const Deadline &deadline) {
  pollfd item{deadline.interrupt_fd, POLLIN, 0};
  return deadline.interrupt_fd >= 0 && poll(&item, 1, 0) > 0;
}

Failure InitLock::acquire(const char *call, const Deadline &deadline, InitLock *lock) {
  InitState &state = init_state();
  std::unique_lock<std::mutex> guard(state.mutex);
  const kvl_status waited = wait_interruptibly(state.freed, guard, deadline, [&state] { return !state.held; });
  if (waited != KVL_OK) {
    return make_failure(waited, call,
                        "the vendor's library is still in %s, since %.1f s, and takes one such call at a time; if it "
                        "never returns, restart this process",
                        state.call, static_cast<double>(host::now_ns() - state.since_ns) / 1e9);
  }
  state.held = true;
  state.call = call;
  state.since_ns = host::now_ns();
  lock->held_ = true;
  return {};
}

InitLock &InitLock::operator=(InitLock &&other) noexcept {
  if (this != &other) {
    release();
    held_ = other.held_;
    other.held_ = false;
  }
  return *this;
}

void InitLock::release() {
  if (!held_) return;
  held_ = false;
  InitState &state = init_state();
  {
    const std::lock_guard<std::mutex> guard(state.mutex);
    state.held = false;
  }
  state.freed.notify_one();
}

Registry &Registry::process() {
  static auto *registry = new Registry;
  return *registry;
}

Failure Registry::acquire(const Range &range, const std::string &owner, const Register &call, void **handle) {
  const uint64_t end = range.address + range.length;
  if (range.length == 0 || end < range.address) {
    return make_failure(KVL_INVALID, "mem_open", "address %#" PRIx64 " with length %" PRIu64 " is no memory range",
                        range.address, range.length);
  }
  // Held across the vendor's call, which is bookkeeping only: two users of one range must not both register it.
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::pair<int32_t, uint64_t> key{range.device, range.address};
  const auto exact = entries_.find(key);
  if (exact != entries_.end() && exact->second.length == range.length && exact->second.on_device == range.on_device) {
    ++exact->second.users;
    *handle = exact->second.handle;
    return {};
  }
  auto next = entries_.lower_bound(key);
  auto other = entries_.end();
  if (next != entries_.end() && next->first.first == range.device && next->first.second < end) other = next;
  if (next != entries_.begin()) {
    const auto before = std::prev(next);
    if (before->first.first == range.device && before->first.second + before->second.length > range.address) {
      other = before;
    }
  }
  if (other != entries_.end()) {
    return make_failure(KVL_INVALID, "mem_open",
                        "%" PRIu64 " bytes at %#" PRIx64 " overlap %" PRIu64 " bytes at %#" PRIx64
                        " (%s memory) that %s registered: register the whole buffer once",
                        range.length, range.address, other->second.length, other->first.second,
                        other->second.on_device ? "device" : "host", other->second.owner.c_str());
  }
  Entry entry{range.length, range.on_device, 1, nullptr, owner};
  const Failure failure = call(&entry.handle);
  if (!failure.ok()) return failure;
  *handle = entry.handle;
  entries_.emplace(key, std::move(entry));
  return {};
}

Failure Registry::release(const Range &range, const Deregister &call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find({range.device, range.address});
  if (found == entries_.end() || found->second.length != range.length) {
    return make_failure(KVL_INVALID, "mem_close", "%" PRIu64 " bytes at %#" PRIx64 " are not registered", range.length,
                        range.address);
  }
  if (found->second.users > 1) {
    --found->second.users;
    return {};
  }
  const Failure failure = call(found->second.handle);
  if (failure.ok()) entries_.erase(found);
  return failure;
}

size_t Registry::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return entries_.size();
}

}  // namespace kvlink::ascend
