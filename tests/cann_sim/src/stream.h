// Streams and events. Each stream runs its operations in order on a thread of its own, each after a random time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "context.h"

namespace cann_sim {

class Stream;  // opaque
class Event;   // opaque
using StreamPtr = std::shared_ptr<Stream>;
using EventPtr = std::shared_ptr<Event>;

// What an operation may use while it runs on its stream's thread.
class SIM_API Running {
 public:
  virtual ~Running() = default;
  // Waits as hardware would. False when the stream was aborted or destroyed by force meanwhile.
  virtual bool wait_ms(int64_t milliseconds) = 0;
  // The peer does not answer: waits settings().retry_window_ms, then returns 507056 (or 107023 when aborted).
  int retry_window();
};

struct Operation {
  std::string name;                   // "put", "get", "memcpy": fault points "op" and "op.<name>"
  std::function<int(Running &)> run;  // copies NOW (completion time); returns an ACL code, not 0 = the stream failed
};

// Looks a client's handle up. Null is the default stream of the current context when allow_null, else 107000. Unknown
// is 107017, destroyed is a violation (rule 5), and another context than the current one is 107003 when check_context.
SIM_API int find_stream(void *handle, bool allow_null, bool check_context, StreamPtr *found);
SIM_API void *stream_handle(const StreamPtr &stream);
SIM_API ContextPtr stream_context(const StreamPtr &stream);

// In the current context; 207008 when the device has settings().max_streams already.
SIM_API int create_stream(uint32_t flags, StreamPtr *created);
// Waits for pending work unless by force. By force, or aborted: queued operations are dropped, while the one that was
// already begun still copies at its end, as a DMA would: only the library that began it can fence it.
SIM_API int destroy_stream(const StreamPtr &stream, bool force);
SIM_API int abort_stream(const StreamPtr &stream);
SIM_API void set_failure_mode(const StreamPtr &stream, bool stop);

// Never blocks. The operation's result shows at sync, query and events only.
SIM_API int enqueue(const StreamPtr &stream, Operation operation);
// -1 = for ever, else milliseconds; 507046 when they pass (work goes on); the stream's error when an operation failed.
SIM_API int synchronize(const StreamPtr &stream, int64_t timeout_ms);
SIM_API int query(const StreamPtr &stream, bool *complete);

SIM_API int create_event(bool reusable, uint32_t flags, EventPtr *created);
SIM_API int find_event(void *handle, EventPtr *found);
SIM_API void *event_handle(const EventPtr &event);
SIM_API int destroy_event(const EventPtr &event);
SIM_API int record_event(const EventPtr &event, const StreamPtr &stream);
SIM_API int wait_event(const StreamPtr &stream, const EventPtr &event);
SIM_API int query_event(const EventPtr &event, bool *complete);
SIM_API int synchronize_event(const EventPtr &event, int64_t timeout_ms);

// Streams and events of a context end with it.
SIM_API void drop_context_objects(const ContextPtr &context);

}  // namespace cann_sim
