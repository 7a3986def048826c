// libascendcl.so: events.
#include "acl_abi.h"
#include "sim.h"

namespace {

using cann_sim::EventPtr;
using cann_sim::fail;
using cann_sim::StreamPtr;

int create(void **event, bool reusable, uint32_t flags) {
  constexpr uint32_t kKnown = 0x1U | 0x2U | 0x8U | 0x10U | 0x20U | 0x40U;
  if (event == nullptr || (flags & ~kKnown) != 0) {
    return fail(5, cann_sim::kRtParamInvalid, "create event: null pointer or flag 0x%x", flags);
  }
  EventPtr created;
  const int code = cann_sim::create_event(reusable, flags, &created);
  if (code == 0) *event = cann_sim::event_handle(created);
  return code;
}

}  // namespace

ACL_EXPORT int aclrtCreateEvent(void **event) {
  SIM_CALL("aclrtCreateEvent", kContext);
  return call.done(create(event, false, 0x1));
}

ACL_EXPORT int aclrtCreateEventWithFlag(void **event, uint32_t flag) {
  SIM_CALL("aclrtCreateEventWithFlag", kContext);
  return call.done(create(event, false, flag));
}

ACL_EXPORT int aclrtCreateEventExWithFlag(void **event, uint32_t flag) {
  SIM_CALL("aclrtCreateEventExWithFlag", kContext);
  return call.done(create(event, true, flag));
}

ACL_EXPORT int aclrtDestroyEvent(void *event) {
  SIM_CALL("aclrtDestroyEvent", kContext);
  EventPtr found;
  const int code = cann_sim::find_event(event, &found);
  return call.done(code != 0 ? code : cann_sim::destroy_event(found));
}

ACL_EXPORT int aclrtRecordEvent(void *event, void *stream) {
  SIM_CALL("aclrtRecordEvent", kContext);
  EventPtr found;
  StreamPtr on;
  int code = cann_sim::find_event(event, &found);
  if (code == 0) code = cann_sim::find_stream(stream, true, true, &on);
  return call.done(code != 0 ? code : cann_sim::record_event(found, on));
}

ACL_EXPORT int aclrtStreamWaitEvent(void *stream, void *event) {
  SIM_CALL("aclrtStreamWaitEvent", kContext);
  EventPtr found;
  StreamPtr on;
  int code = cann_sim::find_event(event, &found);
  if (code == 0) code = cann_sim::find_stream(stream, true, true, &on);
  return call.done(code != 0 ? code : cann_sim::wait_event(on, found));
}

ACL_EXPORT int aclrtSynchronizeEvent(void *event) {
  SIM_CALL("aclrtSynchronizeEvent", kContext);
  EventPtr found;
  const int code = cann_sim::find_event(event, &found);
  return call.done(code != 0 ? code : cann_sim::synchronize_event(found, -1));
}

// 0 = not ready, 1 = complete.
ACL_EXPORT int aclrtQueryEventStatus(void *event, int *status) {
  SIM_CALL("aclrtQueryEventStatus", kContext);
  if (status == nullptr) return call.done(fail(5, cann_sim::kRtParamInvalid, "status is null"));
  EventPtr found;
  bool complete = false;
  int code = cann_sim::find_event(event, &found);
  if (code == 0) code = cann_sim::query_event(found, &complete);
  if (code == 0) *status = complete ? 1 : 0;
  return call.done(code);
}

// The deprecated twin, its values the other way round.
ACL_EXPORT int aclrtQueryEvent(void *event, int *status) {
  SIM_CALL("aclrtQueryEvent", kContext);
  if (status == nullptr) return call.done(fail(5, cann_sim::kRtParamInvalid, "status is null"));
  EventPtr found;
  bool complete = false;
  int code = cann_sim::find_event(event, &found);
  if (code == 0) code = cann_sim::query_event(found, &complete);
  if (code == 0) *status = complete ? 0 : 1;
  return call.done(code);
}
