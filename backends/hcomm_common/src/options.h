// The provider's options: what all Ascend providers take, and what is HCCL's own.
#ifndef KVLINK_HCOMM_OPTIONS_H
#define KVLINK_HCOMM_OPTIONS_H

#include <cstdint>

#include "ascend/options.h"

namespace kvlink::hcomm {

struct Options : ascend::CommonOptions {
  uint64_t device_port = 0;  // of the device's NIC in the rank table; 0 = the vendor's default, 16666
  uint64_t streams = 2;      // transfers of one link on the device at once
  // Of an A3 in a super-pod, where CANN does not tell them.
  uint64_t super_device_id = kNotSet;
  uint64_t super_pod_id = kNotSet;

  static constexpr uint64_t kNotSet = UINT64_MAX;
};

ascend::Failure parse_options(const kvl_engine_params &params, Options *options);

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_OPTIONS_H
