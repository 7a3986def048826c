#include "ascend/event_loop.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

namespace kvlink::ascend {
namespace {

constexpr int kEventsPerPoll = 16;

}  // namespace

Failure EventLoop::open() {
  epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_) return errno_failure(KVL_NO_RESOURCE, errno, "epoll_create1", "no descriptors left");
  return {};
}

Failure EventLoop::watch(Watch *item, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = item;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, item->fd.get(), &event) == 0) return {};
  return errno_failure(KVL_NO_RESOURCE, errno, "epoll_ctl", "cannot watch a connection");
}

void EventLoop::rewatch(Watch *item, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = item;
  static_cast<void>(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, item->fd.get(), &event));
}

void EventLoop::unwatch(Watch *item) {
  static_cast<void>(epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, item->fd.get(), nullptr));
}

void EventLoop::bury(std::unique_ptr<Watch> item) {
  if (item->fd) unwatch(item.get());
  item->fd.reset();
  item->dead = true;
  graveyard_.push_back(std::move(item));
}

void EventLoop::dispatch(uint64_t until_ns) {
  epoll_event events[kEventsPerPoll];
  const int ready = epoll_wait(epoll_.get(), events, kEventsPerPoll, 0);
  for (int i = 0; i < ready; ++i) {
    auto *item = static_cast<Watch *>(events[i].data.ptr);
    if (item->dead) continue;
    item->on_events(events[i].events);
    if (now_ns() >= until_ns) break;  // level-triggered: the others are reported again
  }
  graveyard_.clear();
}

void EventLoop::wake() {
  const uint64_t one = 1;
  static_cast<void>(write(wake_.get(), &one, sizeof one) < 0);  // full means that it is awake already
}

void EventLoop::wait(uint32_t timeout_ms, bool in_flight) {
  uint64_t sleep_ns = uint64_t{timeout_ms} * 1000000;
  if (retry_.exchange(false, std::memory_order_relaxed) || in_flight) {
    const uint64_t pace = pace_ns_.load(std::memory_order_relaxed);
    sleep_ns = std::min(sleep_ns, pace);
    pace_ns_.store(std::min(pace * 2, kLastLookNs), std::memory_order_relaxed);
  }
  timespec timeout{};
  timeout.tv_sec = static_cast<time_t>(sleep_ns / 1000000000u);
  timeout.tv_nsec = static_cast<long>(sleep_ns % 1000000000u);
  // An epoll descriptor is readable when it has events; ppoll takes nanoseconds where epoll_wait takes milliseconds.
  pollfd fds[2] = {{epoll_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  if (ppoll(fds, 2, &timeout, nullptr) <= 0) return;
  if (fds[1].revents != 0) {
    uint64_t value;
    static_cast<void>(read(wake_.get(), &value, sizeof value) < 0);
    note_progress();
  }
}

}  // namespace kvlink::ascend
