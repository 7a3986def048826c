#include "hixl_status.h"

namespace cann_sim::hixl_sim {

hixl::Status from_hccl(int code) {
  switch (code) {
    case HCCL_SUCCESS:
      return hixl::kSuccess;
    case HCCL_E_PARA:
      return hixl::kParamInvalid;
    case HCCL_E_TIMEOUT:
      return hixl::kTimeout;
    case HCCL_E_NOT_SUPPORT:
      return hixl::kUnsupported;
    default:
      return hixl::kFailed;
  }
}

hixl::Status from_acl(int code) {
  return code == kRtStreamSyncTimeout ? hixl::kTimeout : static_cast<hixl::Status>(code);
}

}  // namespace cann_sim::hixl_sim
