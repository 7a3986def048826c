// Events: recorded on a stream, complete when the stream reaches that place.
#include <algorithm>
#include <chrono>

#include "call.h"
#include "stream.h"
#include "stream_state.h"

namespace cann_sim {
namespace {

using Lock = std::unique_lock<std::mutex>;

// Recording and querying one event at the same time is racy by contract: flagged, whoever comes second.
class Use {
 public:
  Use(Event &event, const char *what) : event_(event), mine_(!event.busy.exchange(true)) {
    if (!mine_) violation(33, "%s of an event while another thread records or queries it", what);
  }
  ~Use() {
    if (mine_) event_.busy = false;
  }
  Use(const Use &) = delete;
  Use &operator=(const Use &) = delete;

 private:
  Event &event_;
  const bool mine_;
};

}  // namespace

int create_event(bool reusable, uint32_t flags, EventPtr *created) {
  (void)flags;
  const ContextPtr context = current_context();
  if (context == nullptr) return fail(4, kRtContextNull, "create event: this thread has no current context");
  auto event = std::make_shared<Event>();
  event->handle = new_handle();
  event->reusable = reusable;
  event->context = context;
  Streams &all = all_streams();
  Lock lock(all.mutex);
  all.events[event->handle] = event;
  count_live("event", 1);
  *created = event;
  return kAclOk;
}

int find_event(void *handle, EventPtr *found) {
  if (handle == nullptr) return fail(5, kRtParamInvalid, "event is null");
  Streams &all = all_streams();
  {
    Lock lock(all.mutex);
    const auto at = all.events.find(handle);
    if (at != all.events.end()) {
      *found = at->second;
      return kAclOk;
    }
  }
  if (was_handle(handle)) violation(5, "event %p was destroyed, or is no event", handle);
  return fail(5, kRtInvalidHandle, "event %p is none of ours", handle);
}

void *event_handle(const EventPtr &event) { return event->handle; }

int destroy_event(const EventPtr &event) {
  Streams &all = all_streams();
  Lock lock(all.mutex);
  if (all.events.erase(event->handle) != 0) count_live("event", -1);
  return kAclOk;
}

int record_event(const EventPtr &event, const StreamPtr &stream) {
  const Use use(*event, "record");
  Lock lock(all_streams().mutex);
  if (!event->reusable && event->recorded != 0) {
    lock.unlock();
    violation(33, "record of an event that was recorded before and is not of aclrtCreateEventExWithFlag");
    lock.lock();
  }
  if (event->context->device != stream->context->device) {
    return fail(5, kRtStreamContext, "event of device %d recorded on a stream of device %d", event->context->device,
                stream->context->device);
  }
  Item item;
  item.kind = Item::kRecord;
  item.event = event;
  item.generation = event->recorded + 1;
  const int code = push(stream, std::move(item));
  if (code == kAclOk) ++event->recorded;
  return code;
}

int wait_event(const StreamPtr &stream, const EventPtr &event) {
  Lock lock(all_streams().mutex);
  Item item;
  item.kind = Item::kWait;
  item.event = event;
  item.generation = event->recorded;
  return push(stream, std::move(item));
}

void complete_record(const Item &item, int error) {
  Event &event = *item.event;
  event.completed = std::max(event.completed, item.generation);
  event.error = error;
  event.done.notify_all();
}

int query_event(const EventPtr &event, bool *complete) {
  const Use use(*event, "query");
  Lock lock(all_streams().mutex);
  *complete = event->recorded == 0 ? event->reusable : event->completed >= event->recorded;
  if (*complete && event->error != 0) return fail(23, event->error, "the event's stream failed");
  return kAclOk;
}

int synchronize_event(const EventPtr &event, int64_t timeout_ms) {
  Lock lock(all_streams().mutex);
  const uint64_t target = event->recorded;
  const auto over = [&] { return event->completed >= target; };
  if (timeout_ms < 0) {
    event->done.wait(lock, over);
  } else if (!event->done.wait_for(lock, std::chrono::milliseconds(timeout_ms), over)) {
    return fail(23, kRtEventSyncTimeout, "event not complete after %lld ms", static_cast<long long>(timeout_ms));
  }
  if (event->error != 0) return fail(23, event->error, "the event's stream failed");
  return kAclOk;
}

}  // namespace cann_sim
