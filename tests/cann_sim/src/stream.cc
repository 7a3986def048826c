// Streams: a queue and a worker thread each.
#include "stream.h"

#include <chrono>
#include <utility>
#include <vector>

#include "call.h"
#include "faults.h"
#include "stream_state.h"

namespace cann_sim {
namespace {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

// Random microseconds of the next operation (splitmix64: the same seed gives the same times).
int64_t next_delay(Stream &stream) {
  const Settings &s = settings();
  uint64_t z = (stream.random += 0x9e3779b97f4a7c15U);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  z ^= z >> 31;
  const uint64_t span = static_cast<uint64_t>(s.delay_max_us - s.delay_min_us) + 1;
  return s.delay_min_us + static_cast<int64_t>(z % span);
}

class Worker : public Running {
 public:
  Worker(Stream &stream, uint64_t aborts) : stream_(stream), aborts_(aborts) {}

  bool wait_ms(int64_t milliseconds) override {
    Lock lock(all_streams().mutex);
    const auto gone = [&] { return stream_.closing || stream_.aborts != aborts_; };
    if (milliseconds < 0) {
      stream_.wake.wait(lock, gone);
      return false;
    }
    return !stream_.wake.wait_for(lock, std::chrono::milliseconds(milliseconds), gone);
  }

 private:
  Stream &stream_;
  const uint64_t aborts_;
};

// The fault kHang: until its time passed or somebody releases it; false when the stream was aborted.
bool hang_operation(Worker &worker, const Fault &fault) {
  constexpr int64_t kStep = 2;
  for (int64_t waited = 0; waited < fault.value && hang_releases() == fault.epoch; waited += kStep) {
    if (!worker.wait_ms(kStep)) return false;
  }
  return true;
}

// Runs one operation without the lock. The random time passes even when the stream is aborted: what a NIC has begun, it
// ends.
int run_operation(Stream &stream, Operation &operation, uint64_t aborts, int64_t delay_us) {
  Worker worker(stream, aborts);
  std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
  const Fault faults[] = {fault_at("op." + operation.name), fault_at("op")};
  {
    Lock lock(all_streams().mutex);
    ++all_streams().begun;  // its faults are counted: the next operation gets the next number
  }
  for (const Fault &fault : faults) {
    if (fault.kind == Fault::kFail) return static_cast<int>(fault.value);
    if (fault.kind == Fault::kDelay) std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
    if (fault.kind == Fault::kHang && !hang_operation(worker, fault)) return kRtStreamAbort;
  }
  return operation.run(worker);
}

void run_item(Lock &lock, Stream &stream, Item &item) {
  const uint64_t aborts = stream.aborts;
  const bool stopped = stream.stop_on_failure && stream.error != 0;
  switch (item.kind) {
    case Item::kOperation: {
      if (stopped) break;
      const int64_t delay = next_delay(stream);
      lock.unlock();
      const int code = run_operation(stream, item.operation, aborts, delay);
      log_event("ran", "\"op\":" + json_quote(item.operation.name) + ",\"code\":" + std::to_string(code));
      item.operation = Operation();  // what it holds is let go before anyone sees the stream idle
      lock.lock();
      if (code != 0 && stream.error == 0) stream.error = code;
      break;
    }
    case Item::kRecord:
      if (stopped && settings().stopped_events == "hang") break;
      complete_record(item, stopped && settings().stopped_events == "error" ? stream.error : 0);
      break;
    case Item::kWait: {
      Event &event = *item.event;
      stream.waits_on = &event.done;
      event.done.wait(lock,
                      [&] { return event.completed >= item.generation || stream.closing || stream.aborts != aborts; });
      stream.waits_on = nullptr;
      break;
    }
  }
}

void work(const StreamPtr &stream) {
  Lock lock(all_streams().mutex);
  for (;;) {
    stream->wake.wait(lock, [&] { return stream->closing || !stream->queue.empty(); });
    if (stream->queue.empty()) return;
    Item item = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->running = true;
    run_item(lock, *stream, item);
    stream->running = false;
    ++stream->finished;
    stream->idle.notify_all();
  }
}

// Drops what has not begun; events recorded there complete, as nobody could wait for them else.
void drop_queue(Stream &stream) {
  for (const Item &item : stream.queue) {
    if (item.kind == Item::kRecord) complete_record(item, 0);
  }
  stream.finished += stream.queue.size();
  stream.queue.clear();
}

void interrupt(Stream &stream) {
  stream.wake.notify_all();
  stream.idle.notify_all();
  if (stream.waits_on != nullptr) stream.waits_on->notify_all();
}

void forget(Streams &all, const StreamPtr &stream) {
  if (all.streams.erase(stream->handle) != 0) {
    --all.per_device[stream->context->device];
    count_live("stream", -1);
  }
}

StreamPtr make_stream(Streams &all, const ContextPtr &context) {
  auto stream = std::make_shared<Stream>();
  stream->handle = new_handle();
  stream->context = context;
  stream->random = settings().seed * 0x2545f4914f6cdd1dU + ++all.created;
  return stream;
}

// Ends the worker. A begun operation of a stream destroyed by force goes on by itself.
void end_worker(Lock &lock, const StreamPtr &stream) {
  stream->closing = true;
  interrupt(*stream);
  std::thread worker = std::move(stream->worker);
  const bool running = stream->running;
  lock.unlock();
  if (!worker.joinable()) return;
  if (running) {
    worker.detach();
  } else {
    worker.join();
  }
}

// Counts the threads inside synchronize, so that a test can tell when one has got there.
struct Waiting {
  Waiting() { count_live("synchronizing", 1); }
  ~Waiting() { count_live("synchronizing", -1); }
  Waiting(const Waiting &) = delete;
  Waiting &operator=(const Waiting &) = delete;
};

}  // namespace

Streams &all_streams() {
  static Streams *const kStreams = new Streams;
  return *kStreams;
}

int64_t operations_begun() {
  Lock lock(all_streams().mutex);
  return all_streams().begun;
}

int Running::retry_window() { return wait_ms(settings().retry_window_ms) ? kRtLinkError : kRtStreamAbort; }

int push(const StreamPtr &stream, Item item) {
  if (stream->closing) return fail(5, kRtInvalidHandle, "the stream is being destroyed");
  stream->queue.push_back(std::move(item));
  ++stream->enqueued;
  if (!stream->worker.joinable()) {
    stream->worker = std::thread(work, stream);
  } else {
    stream->wake.notify_all();
  }
  return kAclOk;
}

int find_stream(void *handle, bool allow_null, bool check_context, StreamPtr *found) {
  const ContextPtr current = current_context();
  Streams &all = all_streams();
  {
    Lock lock(all.mutex);
    if (handle == nullptr) {
      if (!allow_null) return fail(5, kRtParamInvalid, "stream is null");
      if (current == nullptr) return fail(4, kRtContextNull, "default stream: this thread has no current context");
      StreamPtr &stream = all.defaults[current.get()];
      if (stream == nullptr) stream = make_stream(all, current);
      *found = stream;
      return kAclOk;
    }
    const auto at = all.streams.find(handle);
    if (at != all.streams.end()) *found = at->second;
  }
  if (*found == nullptr) {
    if (was_handle(handle)) violation(5, "stream %p was destroyed, or is no stream", handle);
    return fail(5, kRtInvalidHandle, "stream %p is none of ours", handle);
  }
  if (check_context && (*found)->context != current) {
    return fail(5, kRtStreamContext, "stream of device %d used from another context (device %d)",
                (*found)->context->device, current == nullptr ? -1 : current->device);
  }
  return kAclOk;
}

void *stream_handle(const StreamPtr &stream) { return stream->handle; }

ContextPtr stream_context(const StreamPtr &stream) { return stream->context; }

int create_stream(uint32_t flags, StreamPtr *created) {
  (void)flags;
  const ContextPtr context = current_context();
  if (context == nullptr) return fail(4, kRtContextNull, "create stream: this thread has no current context");
  Streams &all = all_streams();
  Lock lock(all.mutex);
  int &count = all.per_device[context->device];
  if (count >= settings().max_streams) {
    return fail(5, kRtNoStreamResource, "device %d has its %d streams", context->device, settings().max_streams);
  }
  ++count;
  *created = make_stream(all, context);
  all.streams[(*created)->handle] = *created;
  count_live("stream", 1);
  return kAclOk;
}

int destroy_stream(const StreamPtr &stream, bool force) {
  Streams &all = all_streams();
  Lock lock(all.mutex);
  if (stream->closing) return fail(5, kRtInvalidHandle, "the stream is being destroyed");
  if (force) {
    ++stream->aborts;  // whoever synchronises it learns that its work was dropped
    drop_queue(*stream);
  } else {
    stream->idle.wait(lock, [&] { return stream->closing || stream->finished == stream->enqueued; });
  }
  forget(all, stream);
  end_worker(lock, stream);
  return kAclOk;
}

int abort_stream(const StreamPtr &stream) {
  Lock lock(all_streams().mutex);
  ++stream->aborts;
  drop_queue(*stream);
  interrupt(*stream);
  return kAclOk;
}

void set_failure_mode(const StreamPtr &stream, bool stop) {
  Lock lock(all_streams().mutex);
  stream->stop_on_failure = stop;
}

int enqueue(const StreamPtr &stream, Operation operation) {
  Item item;
  item.operation = std::move(operation);
  Lock lock(all_streams().mutex);
  return push(stream, std::move(item));
}

int synchronize(const StreamPtr &stream, int64_t timeout_ms) {
  const Waiting waiting;
  Lock lock(all_streams().mutex);
  const uint64_t target = stream->enqueued;
  const uint64_t aborts = stream->aborts;
  const auto over = [&] { return stream->finished >= target || stream->aborts != aborts || stream->closing; };
  if (timeout_ms < 0) {
    stream->idle.wait(lock, over);
  } else if (!stream->idle.wait_until(lock, Clock::now() + std::chrono::milliseconds(timeout_ms), over)) {
    return fail(23, kRtStreamSyncTimeout, "stream not idle after %lld ms; its work goes on",
                static_cast<long long>(timeout_ms));
  }
  if (stream->aborts != aborts) return fail(23, kRtStreamAbort, "the stream was aborted meanwhile");
  if (stream->error != 0) return fail(23, stream->error, "an operation of this stream failed: %d", stream->error);
  return kAclOk;
}

int query(const StreamPtr &stream, bool *complete) {
  Lock lock(all_streams().mutex);
  *complete = stream->finished == stream->enqueued;
  if (*complete && stream->error != 0) return fail(23, stream->error, "an operation of this stream failed");
  return kAclOk;
}

void drop_context_objects(const ContextPtr &context) {
  Streams &all = all_streams();
  std::vector<StreamPtr> ended;
  {
    Lock lock(all.mutex);
    for (const auto &[handle, stream] : all.streams) {
      if (stream->context == context) ended.push_back(stream);
    }
    const auto found = all.defaults.find(context.get());
    if (found != all.defaults.end()) {
      ended.push_back(found->second);
      all.defaults.erase(found);
    }
    for (auto at = all.events.begin(); at != all.events.end();) {
      if (at->second->context == context) {
        at = all.events.erase(at);
        count_live("event", -1);
      } else {
        ++at;
      }
    }
  }
  for (const StreamPtr &stream : ended) destroy_stream(stream, true);
}

}  // namespace cann_sim
