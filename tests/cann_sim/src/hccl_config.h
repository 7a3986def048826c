// HcclCommConfig as the library reads it: any older prefix, by its own size and version fields (rule 12).
#pragma once

#include <string>

#include "hccl_abi.h"

namespace cann_sim::hccl {

// Throws Refused(1). Returns the communicator's name.
std::string read_config(const HcclCommConfig *config);

}  // namespace cann_sim::hccl
