// Faults changed while the process runs (testing.cc); looking them up is in call.h.
#pragma once

#include <string>

namespace cann_sim {

void set_faults(const std::string &spec);
void release_hangs();

}  // namespace cann_sim
