// The device and the vendor's functions as one engine uses them, shared with calls that outlive the engine.
#ifndef KVLINK_HCOMM_VENDOR_H
#define KVLINK_HCOMM_VENDOR_H

#include <memory>

#include "ascend/device.h"
#include "ascend/errors.h"
#include "ascend/hccl.h"

namespace kvlink::hcomm {

using ascend::Failure;
using ascend::make_failure;

struct Vendor {
  std::shared_ptr<const ascend::Device> device;
  ascend::HcclApi hccl;

  const ascend::AclApi &acl() const { return device->acl(); }
  bool global() const { return hccl.flavour == ascend::HcclFlavour::kGlobal; }
};

// OK for HCCL_SUCCESS, else the catalogue's words for `code`. Call it in the thread that made the vendor call, at once.
inline Failure hccl_result(const Vendor &vendor, const char *call, int code, const char *what) {
  if (code == ascend::HCCL_SUCCESS) return {};
  return ascend::vendor_failure(&vendor.acl(), ascend::Vendor::kHccl, call, code, "%s", what);
}

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_VENDOR_H
