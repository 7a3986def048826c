#include "policy.h"

namespace kvlink::hcomm {

const ascend::HcclPolicy &kPolicy = ascend::kHcclPolicy;

}  // namespace kvlink::hcomm
