// Devices of this process and the context that is current in each thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "settings.h"

namespace cann_sim {

struct Context {
  void *handle = nullptr;  // what the client holds: unique for ever, points at nothing
  int device = 0;          // user id
  bool is_default = false;
  std::atomic<bool> alive{true};
};
using ContextPtr = std::shared_ptr<Context>;

// aclrtSetDevice / aclrtResetDevice: reference-counted; the first creates the device's default context.
SIM_API int set_device(int user_device);
SIM_API int reset_device(int user_device, bool force);
SIM_API int64_t device_references(int user_device);

// Null when this thread has none. A context whose device was reset in the meantime is a violation (rule 33).
SIM_API ContextPtr current_context();
SIM_API int current_device();  // user id, -1 when this thread has no context

SIM_API ContextPtr create_context(int user_device);  // does not make it current
SIM_API int destroy_context(void *handle);
SIM_API int find_context(void *handle, ContextPtr *found);
SIM_API ContextPtr default_context(int user_device);  // null before set_device

// Makes `context` current in this thread, returns the one before. For libraries that switch and switch back.
SIM_API ContextPtr exchange_context(ContextPtr context);

class ScopedContext {
 public:
  explicit ScopedContext(ContextPtr context) : before_(exchange_context(std::move(context))) {}
  ~ScopedContext() { exchange_context(before_); }
  ScopedContext(const ScopedContext &) = delete;
  ScopedContext &operator=(const ScopedContext &) = delete;

 private:
  ContextPtr before_;
};

// Handles given to clients: unique in the life of the process and never dereferenceable.
SIM_API void *new_handle();
// True when new_handle once returned it: an unknown one that was ours is a stale handle (violation, rule 33).
SIM_API bool was_handle(const void *handle);

}  // namespace cann_sim
