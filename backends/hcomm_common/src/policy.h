// What differs between the two distributions that are built from this source.
#ifndef KVLINK_HCOMM_POLICY_H
#define KVLINK_HCOMM_POLICY_H

#include "ascend/hccl.h"

namespace kvlink::hcomm {

// The value of transfer_channel and the libraries that may serve it: defined once in each distribution (policy.cc).
extern const ascend::HcclPolicy &kPolicy;

}  // namespace kvlink::hcomm

#endif  // KVLINK_HCOMM_POLICY_H
