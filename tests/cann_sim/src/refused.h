// Ranges at which the pointer probe fails, as it does on some mapped host memory (rule 8).
#pragma once

#include <cstddef>

#include "settings.h"

namespace cann_sim {

void refuse_pointer(const void *start, size_t bytes);
SIM_API bool pointer_refused(const void *address);

}  // namespace cann_sim
