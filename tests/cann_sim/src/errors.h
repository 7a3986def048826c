// State of a thread and of the process that only libascendcl asks for.
#pragma once

#include "settings.h"

namespace cann_sim {

SIM_API int last_code(bool clear);  // of this thread, for aclrtGetLastError and aclrtPeekAtLastError
SIM_API bool process_exiting();     // exit() was called: libraries are unloaded rightly

}  // namespace cann_sim
