// libascendcl.so: streams.
#include "acl_abi.h"
#include "sim.h"

namespace {

using cann_sim::fail;
using cann_sim::StreamPtr;

int create(void **stream, uint32_t flags) {
  if (stream == nullptr) return fail(5, cann_sim::kRtParamInvalid, "stream is null");
  StreamPtr created;
  const int code = cann_sim::create_stream(flags, &created);
  if (code == 0) *stream = cann_sim::stream_handle(created);
  return code;
}

int destroy(void *stream, bool force) {
  StreamPtr found;
  const int code = cann_sim::find_stream(stream, false, true, &found);
  return code != 0 ? code : cann_sim::destroy_stream(found, force);
}

}  // namespace

ACL_EXPORT int aclrtCreateStream(void **stream) {
  SIM_CALL("aclrtCreateStream", kContext);
  return call.done(create(stream, 0));
}

ACL_EXPORT int aclrtCreateStreamWithConfig(void **stream, uint32_t, uint32_t flag) {
  SIM_CALL("aclrtCreateStreamWithConfig", kContext);
  if ((flag & ~0x3fU) != 0) {
    return call.done(fail(5, cann_sim::kRtParamInvalid, "aclrtCreateStreamWithConfig: flag 0x%x", flag));
  }
  return call.done(create(stream, flag));
}

ACL_EXPORT int aclrtDestroyStream(void *stream) {
  SIM_CALL("aclrtDestroyStream", kContext);
  return call.done(destroy(stream, false));
}

ACL_EXPORT int aclrtDestroyStreamForce(void *stream) {
  SIM_CALL("aclrtDestroyStreamForce", kContext);
  return call.done(destroy(stream, true));
}

ACL_EXPORT int aclrtSynchronizeStream(void *stream) {
  SIM_CALL("aclrtSynchronizeStream", kContext);
  StreamPtr found;
  const int code = cann_sim::find_stream(stream, true, false, &found);
  return call.done(code != 0 ? code : cann_sim::synchronize(found, -1));
}

ACL_EXPORT int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout) {
  SIM_CALL("aclrtSynchronizeStreamWithTimeout", kContext);
  if (timeout == 0 || timeout < -1) {
    return call.done(
        fail(23, cann_sim::kRtParamInvalid, "aclrtSynchronizeStreamWithTimeout: timeout %d; -1 or above 0", timeout));
  }
  StreamPtr found;
  const int code = cann_sim::find_stream(stream, true, false, &found);
  return call.done(code != 0 ? code : cann_sim::synchronize(found, timeout));
}

ACL_EXPORT int aclrtStreamQuery(void *stream, int *status) {
  SIM_CALL("aclrtStreamQuery", kContext);
  if (status == nullptr) return call.done(fail(5, cann_sim::kRtParamInvalid, "status is null"));
  StreamPtr found;
  bool complete = false;
  int code = cann_sim::find_stream(stream, true, false, &found);
  if (code == 0) code = cann_sim::query(found, &complete);
  if (code == 0) *status = complete ? 0 : 1;
  return call.done(code);
}

ACL_EXPORT int aclrtStreamAbort(void *stream) {
  SIM_CALL("aclrtStreamAbort", kContext);
  StreamPtr found;
  const int code = cann_sim::find_stream(stream, false, true, &found);
  return call.done(code != 0 ? code : cann_sim::abort_stream(found));
}

ACL_EXPORT int aclrtSetStreamFailureMode(void *stream, uint64_t mode) {
  SIM_CALL("aclrtSetStreamFailureMode", kContext);
  if (mode > 1) return call.done(fail(5, cann_sim::kRtParamInvalid, "aclrtSetStreamFailureMode: mode above 1"));
  StreamPtr found;
  const int code = cann_sim::find_stream(stream, false, true, &found);
  if (code == 0) cann_sim::set_failure_mode(found, mode == 1);
  return call.done(code);
}
