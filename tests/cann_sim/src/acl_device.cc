// libascendcl.so: devices and contexts.
#include <string>

#include "acl_abi.h"
#include "sim.h"

namespace {

using cann_sim::fail;

enum DeviceAttribute : int { kChip = 402, kSuperPodDevice = 403, kSuperPodServer = 404, kSuperPod = 405 };

int null_pointer(const char *what) { return fail(4, cann_sim::kRtParamInvalid, "%s is null", what); }

int physical(const char *function, int user_device, int32_t *id) {
  if (id == nullptr) return null_pointer(function);
  const int found = cann_sim::physical_id(user_device);
  if (found < 0) {
    return fail(4, cann_sim::kRtInvalidDevice, "%s(%d): there are %d visible devices", function, user_device,
                cann_sim::device_count());
  }
  *id = found;
  return 0;
}

}  // namespace

ACL_EXPORT int aclrtSetDevice(int32_t device) {
  SIM_CALL("aclrtSetDevice", kInit);
  call.note("device", device);
  return call.done(cann_sim::set_device(device));
}

ACL_EXPORT int aclrtGetDevice(int32_t *device) {
  SIM_CALL("aclrtGetDevice", kContext);
  if (device == nullptr) return call.done(null_pointer("deviceId"));
  *device = cann_sim::current_device();
  return call.done(0);
}

ACL_EXPORT int aclrtResetDevice(int32_t device) {
  SIM_CALL("aclrtResetDevice", kInit);
  call.note("device", device);
  return call.done(cann_sim::reset_device(device, false));
}

ACL_EXPORT int aclrtResetDeviceForce(int32_t device) {
  SIM_CALL("aclrtResetDeviceForce", kInit);
  call.note("device", device);
  return call.done(cann_sim::reset_device(device, true));
}

ACL_EXPORT int aclrtGetDeviceCount(uint32_t *count) {
  SIM_CALL("aclrtGetDeviceCount", kInit);
  if (count == nullptr) return call.done(null_pointer("count"));
  *count = static_cast<uint32_t>(cann_sim::device_count());
  return call.done(0);
}

ACL_EXPORT int aclrtCreateContext(void **context, int32_t device) {
  SIM_CALL("aclrtCreateContext", kInit);
  if (context == nullptr) return call.done(null_pointer("context"));
  if (cann_sim::physical_id(device) < 0) {
    return call.done(fail(4, cann_sim::kRtInvalidDevice, "aclrtCreateContext on device %d", device));
  }
  const cann_sim::ContextPtr created = cann_sim::create_context(device);
  cann_sim::exchange_context(created);
  *context = created->handle;
  return call.done(0);
}

ACL_EXPORT int aclrtDestroyContext(void *context) {
  SIM_CALL("aclrtDestroyContext", kInit);
  return call.done(cann_sim::destroy_context(context));
}

ACL_EXPORT int aclrtSetCurrentContext(void *context) {
  SIM_CALL("aclrtSetCurrentContext", kInit);
  cann_sim::ContextPtr found;
  const int code = cann_sim::find_context(context, &found);
  if (code == 0) cann_sim::exchange_context(found);
  return call.done(code);
}

ACL_EXPORT int aclrtGetCurrentContext(void **context) {
  SIM_CALL("aclrtGetCurrentContext", kContext);
  if (context == nullptr) return call.done(null_pointer("context"));
  *context = cann_sim::current_context()->handle;
  return call.done(0);
}

ACL_EXPORT const char *aclrtGetSocName() {
  static const std::string *const kName = new std::string(cann_sim::settings().soc_name);
  const bool absent = cann_sim::flavour().stub || cann_sim::device_count() == 0;
  cann_sim::Call call("aclrtGetSocName", cann_sim::Needs::kNothing);
  return absent || call.stop() ? nullptr : kName->c_str();
}

// The name says logic id; the vendor's documentation says the argument is the user id.
ACL_EXPORT int aclrtGetPhyDevIdByLogicDevId(const int32_t device, int32_t *const id) {
  SIM_CALL("aclrtGetPhyDevIdByLogicDevId", kInit);
  return call.done(physical("aclrtGetPhyDevIdByLogicDevId", device, id));
}

ACL_EXPORT int aclrtGetPhyDevIdByUserDevId(const int32_t device, int32_t *const id) {
  SIM_CALL("aclrtGetPhyDevIdByUserDevId", kInit);
  return call.done(physical("aclrtGetPhyDevIdByUserDevId", device, id));
}

ACL_EXPORT int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
  SIM_CALL("aclrtGetDeviceInfo", kInit);
  if (value == nullptr) return call.done(null_pointer("value"));
  const int user = static_cast<int>(device);
  if (cann_sim::physical_id(user) < 0) {
    return call.done(fail(4, cann_sim::kRtInvalidDevice, "aclrtGetDeviceInfo(%u)", device));
  }
  const bool pod = cann_sim::settings().soc != cann_sim::Soc::kA2;
  if (attribute == kChip) {
    *value = cann_sim::physical_id(user) / 2;
  } else if (attribute == kSuperPodDevice && pod) {
    *value = cann_sim::super_device_id(user);
  } else if (attribute == kSuperPodServer && pod) {
    *value = cann_sim::settings().host;
  } else if (attribute == kSuperPod && pod) {
    *value = cann_sim::settings().super_pod;
  } else {
    return call.done(fail(4, cann_sim::kRtNotSupported, "aclrtGetDeviceInfo: no attribute %d here", attribute));
  }
  return call.done(0);
}
