// libascendcl.so: memory, copies and the pointer probe.
#include "acl_abi.h"
#include "refused.h"
#include "sim.h"

namespace {

using cann_sim::CopyKind;
using cann_sim::fail;
using cann_sim::Place;

bool on_device(const void *address) {
  const Place place = cann_sim::locate(address).place;
  return place == Place::kDevice || place == Place::kFreed || place == Place::kMapped;
}

// The direction a client names must be the real one.
int check_copy(const void *to, uint64_t room, const void *from, uint64_t bytes, int kind) {
  if (to == nullptr || from == nullptr) return fail(7, cann_sim::kRtParamInvalid, "memcpy: null pointer");
  if (bytes == 0 || bytes > room) {
    return fail(7, cann_sim::kRtParamInvalid, "memcpy of %llu bytes into room for %llu",
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(room));
  }
  if (kind < 0 || kind > cann_sim::kInterDevice || (kind >= cann_sim::kDefault && cann_sim::flavour().number < 850)) {
    return fail(7, cann_sim::kRtParamInvalid, "memcpy kind %d", kind);
  }
  if (kind == cann_sim::kDefault) return 0;
  const bool to_device = on_device(to);
  const bool from_device = on_device(from);
  const bool wants_to = kind != cann_sim::kHostToHost && kind != cann_sim::kDeviceToHost;
  const bool wants_from =
      kind != cann_sim::kHostToHost && kind != cann_sim::kHostToDevice && kind != cann_sim::kHostToBufferToDevice;
  if (to_device != wants_to || from_device != wants_from) {
    return fail(7, cann_sim::kRtParamInvalid, "memcpy kind %d, but the target is %s memory and the source %s memory",
                kind, to_device ? "device" : "host", from_device ? "device" : "host");
  }
  return 0;
}

bool pageable(const void *address) { return cann_sim::locate(address).place == Place::kUnregistered; }

}  // namespace

ACL_EXPORT int aclrtMalloc(void **address, size_t bytes, int policy) {
  SIM_CALL("aclrtMalloc", kContext);
  call.note("bytes", static_cast<int64_t>(bytes)).note("policy", policy);
  return call.done(cann_sim::device_malloc(cann_sim::current_device(), bytes, static_cast<uint32_t>(policy), address));
}

ACL_EXPORT int aclrtFree(void *address) {
  SIM_CALL("aclrtFree", kContext);
  return call.done(cann_sim::device_free(address));
}

ACL_EXPORT int aclrtMallocHost(void **address, size_t bytes) {
  SIM_CALL("aclrtMallocHost", kContext);
  call.note("bytes", static_cast<int64_t>(bytes));
  return call.done(cann_sim::host_malloc(bytes, address));
}

ACL_EXPORT int aclrtFreeHost(void *address) {
  SIM_CALL("aclrtFreeHost", kContext);
  return call.done(cann_sim::host_free(address));
}

ACL_EXPORT int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  SIM_CALL("aclrtMemcpy", kContext);
  const int code = check_copy(to, room, from, bytes, kind);
  return call.done(code != 0 ? code : cann_sim::copy_local(to, from, bytes));
}

ACL_EXPORT int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  SIM_CALL("aclrtMemcpyAsync", kContext);
  int code = check_copy(to, room, from, bytes, kind);
  if (code != 0) return call.done(code);
  if (!on_device(to) && !on_device(from)) {
    return call.done(fail(7, cann_sim::kRtNotSupported, "asynchronous host to host copy"));
  }
  cann_sim::StreamPtr found;
  code = cann_sim::find_stream(stream, true, true, &found);
  if (code != 0) return call.done(code);
  const bool synchronous = pageable(to) || pageable(from);
  code =
      cann_sim::enqueue(found, {"memcpy", [=](cann_sim::Running &) { return cann_sim::copy_local(to, from, bytes); }});
  if (code == 0 && synchronous) code = cann_sim::synchronize(found, -1);
  return call.done(code);
}

ACL_EXPORT int aclrtMemset(void *address, size_t room, int32_t value, size_t bytes) {
  SIM_CALL("aclrtMemset", kContext);
  if (address == nullptr || bytes == 0 || bytes > room) {
    return call.done(fail(7, cann_sim::kRtParamInvalid, "aclrtMemset: null pointer, 0 bytes or too many"));
  }
  return call.done(cann_sim::fill_local(address, value, bytes));
}

ACL_EXPORT int aclrtPointerGetAttributes(const void *address, cann_sim::aclrtPtrAttributes *attributes) {
  SIM_CALL("aclrtPointerGetAttributes", kContext);
  if (address == nullptr || attributes == nullptr) {
    return call.done(fail(8, cann_sim::kRtParamInvalid, "aclrtPointerGetAttributes: null pointer"));
  }
  if (cann_sim::pointer_refused(address)) {
    return call.done(fail(8, cann_sim::kRtDriverError, "aclrtPointerGetAttributes(%p): the driver refuses", address));
  }
  const cann_sim::Located located = cann_sim::locate(address);
  *attributes = {};
  attributes->pageSize = 4096;
  switch (located.place) {
    case Place::kDevice:
      attributes->location = {static_cast<uint32_t>(located.device), cann_sim::kLocationDevice};
      if (located.huge) attributes->pageSize = 2U << 20;
      break;
    case Place::kPinned:
    case Place::kRegistered:
      attributes->location = {0, cann_sim::kLocationHost};
      break;
    case Place::kUnregistered:
      attributes->location = {0, cann_sim::kLocationUnregistered};
      break;
    case Place::kMapped:
      cann_sim::violation(8, "pointer probe of %p, the device's address of registered host memory", address);
      return call.done(cann_sim::kRtInvalidMemoryType);
    case Place::kFreed:
      cann_sim::violation(8, "pointer probe of freed device memory %p", address);
      return call.done(cann_sim::kRtInvalidMemoryType);
  }
  return call.done(0);
}

ACL_EXPORT int aclrtHostRegister(void *address, uint64_t bytes, int type, void **device_address) {
  SIM_CALL("aclrtHostRegister", kContext);
  const bool known = type == 0 || (cann_sim::flavour().number >= 900 && (type == 4 || type == 8));
  if (!known) return call.done(fail(9, cann_sim::kRtParamInvalid, "aclrtHostRegister: type %d", type));
  return call.done(cann_sim::host_register(address, bytes, cann_sim::current_device(), device_address, true));
}

ACL_EXPORT int aclrtHostUnregister(void *address) {
  SIM_CALL("aclrtHostUnregister", kContext);
  return call.done(cann_sim::host_unregister(address));
}

ACL_EXPORT int aclrtHostRegisterV2(void *address, uint64_t bytes, uint32_t flag) {
  constexpr uint32_t kMapped = 0x2;
  constexpr uint32_t kPinned = 0x10000000;
  SIM_CALL("aclrtHostRegisterV2", kContext);
  if ((flag & ~(kMapped | kPinned)) != 0 || flag == 0) {
    return call.done(fail(9, cann_sim::kRtParamInvalid, "aclrtHostRegisterV2: flag 0x%x", flag));
  }
  void *device_address = nullptr;
  return call.done(
      cann_sim::host_register(address, bytes, cann_sim::current_device(), &device_address, (flag & kPinned) == 0));
}

ACL_EXPORT int aclrtHostGetDevicePointer(void *address, void **device_address, uint32_t) {
  SIM_CALL("aclrtHostGetDevicePointer", kContext);
  return call.done(cann_sim::host_device_address(address, device_address));
}

ACL_EXPORT int aclrtGetMemInfo(int attribute, size_t *free_bytes, size_t *total) {
  SIM_CALL("aclrtGetMemInfo", kContext);
  if (free_bytes == nullptr || total == nullptr || attribute < 0 || attribute > 17) {
    return call.done(fail(6, cann_sim::kRtParamInvalid, "aclrtGetMemInfo: null pointer or attribute %d", attribute));
  }
  *free_bytes = cann_sim::hbm_free(cann_sim::current_device());
  *total = cann_sim::settings().hbm_bytes;
  return call.done(0);
}
