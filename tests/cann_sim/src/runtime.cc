// libruntime.so: the two fall-backs for toolkits whose ACL lacks the call.
#include "acl_abi.h"
#include "refused.h"
#include "sim.h"

ACL_EXPORT int rtPointerGetAttributes(cann_sim::rtPointerAttributes_t *attributes, const void *address) {
  SIM_CALL("rtPointerGetAttributes", kContext);
  if (attributes == nullptr || address == nullptr) {
    return call.done(cann_sim::fail(8, cann_sim::kRtParamInvalid, "rtPointerGetAttributes: null pointer"));
  }
  if (cann_sim::pointer_refused(address)) {
    return call.done(
        cann_sim::fail(8, cann_sim::kRtDriverError, "rtPointerGetAttributes(%p): the driver refuses", address));
  }
  const cann_sim::Located located = cann_sim::locate(address);
  *attributes = {};
  attributes->pageSize = located.huge ? 2U << 20 : 4096U;
  switch (located.place) {
    case cann_sim::Place::kDevice:
      attributes->memoryType = cann_sim::kRtDevice;
      attributes->locationType = static_cast<int32_t>(cann_sim::kLocationDevice);
      attributes->deviceID = static_cast<uint32_t>(located.device);
      break;
    case cann_sim::Place::kPinned:
    case cann_sim::Place::kRegistered:
      attributes->memoryType = cann_sim::kRtHost;
      break;
    case cann_sim::Place::kUnregistered:
      attributes->memoryType = cann_sim::kRtUser;
      attributes->locationType = static_cast<int32_t>(cann_sim::kLocationUnregistered);
      break;
    default:
      cann_sim::violation(8, "pointer probe of freed memory or of the device's address of host memory: %p", address);
      return call.done(cann_sim::kRtInvalidMemoryType);
  }
  return call.done(0);
}

ACL_EXPORT int rtGetDevicePhyIdByIndex(uint32_t device, uint32_t *id) {
  SIM_CALL("rtGetDevicePhyIdByIndex", kInit);
  const int physical = cann_sim::physical_id(static_cast<int>(device));
  if (id == nullptr || physical < 0) {
    return call.done(cann_sim::fail(4, cann_sim::kRtInvalidDevice, "rtGetDevicePhyIdByIndex(%u)", device));
  }
  *id = static_cast<uint32_t>(physical);
  return call.done(0);
}
