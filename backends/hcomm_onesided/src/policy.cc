#include "policy.h"

namespace kvlink::hcomm {

const ascend::HcclPolicy &kPolicy = ascend::kHcommOnesidedPolicy;

}  // namespace kvlink::hcomm
