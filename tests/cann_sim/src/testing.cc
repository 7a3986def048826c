// What tests call: faults at run time, counters, and a way to see device memory without any rule in the way.
#include <cstring>
#include <string>

#include "arena.h"
#include "call.h"
#include "faults.h"
#include "log.h"
#include "memory.h"
#include "refused.h"
#include "stream_state.h"

extern "C" {

SIM_API void cann_sim_set_faults(const char *spec) { cann_sim::set_faults(spec == nullptr ? "" : spec); }

SIM_API void cann_sim_release(void) { cann_sim::release_hangs(); }

SIM_API int64_t cann_sim_live(const char *name) { return cann_sim::live(name); }

// Valid until this thread's next call.
SIM_API const char *cann_sim_live_json(void) {
  thread_local std::string text;
  text = cann_sim::live_json();
  return text.c_str();
}

SIM_API int64_t cann_sim_violations(void) { return cann_sim::violations(); }

// Operations that streams have begun so far, finished or not.
SIM_API int64_t cann_sim_begun(void) { return cann_sim::operations_begun(); }

SIM_API int cann_sim_poke(void *device, const void *bytes, size_t length) {
  const uint64_t hidden = cann_sim::hidden_address(reinterpret_cast<uint64_t>(device), length);
  if (hidden == 0) return -1;
  std::memcpy(reinterpret_cast<void *>(hidden), bytes, length);
  return 0;
}

SIM_API int cann_sim_peek(void *bytes, const void *device, size_t length) {
  const uint64_t hidden = cann_sim::hidden_address(reinterpret_cast<uint64_t>(device), length);
  if (hidden == 0) return -1;
  std::memcpy(bytes, reinterpret_cast<void *>(hidden), length);
  return 0;
}

SIM_API void cann_sim_refuse_pointer(const void *start, size_t length) { cann_sim::refuse_pointer(start, length); }

}  // extern "C"
